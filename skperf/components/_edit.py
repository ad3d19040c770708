"""Carry an edit out: who is to change, who is to be spared, how many components."""

import warnings

import numpy as np
import torch

from skperf.components.editing import ORDERS, choose_k, grid_of_k


def rows_of(selection, n_rows, name):
    """Resolve a selection of rows."""
    if selection is None:
        return np.arange(n_rows)
    rows = np.atleast_1d(np.asarray(selection))
    if rows.dtype == bool:
        if rows.shape != (n_rows,):
            raise ValueError(
                f"{name} is a boolean mask of shape {rows.shape}; the rows of fit are {n_rows}."
            )
        rows = np.flatnonzero(rows)
    elif rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise ValueError(f"{name} must be row indices or a boolean mask over the rows of fit.")
    if not len(rows):
        raise ValueError(f"{name} selects no row.")
    if rows.min() < -n_rows or rows.max() >= n_rows:
        raise ValueError(f"{name} names row {rows.max()}; fit was given {n_rows} rows.")
    return rows % n_rows


def edit_network(
    question,
    attributions,
    stderr,
    target,
    reference,
    *,
    k,
    direction,
    criterion,
    guard,
    max_drop,
):
    """Choose what to ablate.

    Shapes: attributions, stderr (n_examples, n_components) -> mask (n_components,).
    """
    if direction not in ("increase", "decrease"):
        raise ValueError(f"direction={direction!r} must be 'increase' or 'decrease'.")
    if criterion not in ORDERS:
        raise ValueError(f"criterion={criterion!r} must be one of {sorted(ORDERS)}.")
    if isinstance(k, str) and k != "auto":
        raise ValueError(f"k={k!r} must be a number or 'auto'.")
    n_rows = len(attributions)
    targets = rows_of(target, n_rows, "target")
    if reference is None:
        references = np.setdiff1d(np.arange(n_rows), targets)
    else:
        references = rows_of(reference, n_rows, "reference")
    if len(targets) < 2 and criterion == "welch":
        warnings.warn(
            "target has a single row: Welch's statistic has no variance for it.",
            UserWarning,
            stacklevel=3,
        )
    increase = direction == "increase"
    spared = attributions[references] if len(references) else None
    options = {"target_error": stderr[targets]} if criterion == "budgeted" else {}
    if options and not np.isfinite(stderr[targets]).all():
        options = {}
    order = ORDERS[criterion](attributions[targets], spared, increase=increase, **options)
    measure = _measure(question, targets, references, guard)
    n_components = attributions.shape[1]
    candidates = grid_of_k(n_components) if k == "auto" else sorted({0, *_steps(k), int(k)})
    drop = max_drop if k == "auto" else np.inf
    best, path = choose_k(order, candidates, measure, increase=increase, max_drop=drop)
    chosen = best if k == "auto" else int(k)
    mask = np.ones(n_components, bool)
    mask[order[:chosen]] = False
    report = {
        "k": chosen,
        "path": path,
        "order": order,
        "direction": direction,
        "criterion": criterion,
        "predicted_change": float(-attributions[targets][:, ~mask].sum(1).mean()),
        "realised_change": float(
            next(s for s in path if s["k"] == chosen)["target_output"] - path[0]["target_output"]
        ),
    }
    return mask, report


def _steps(k):
    return [step for step in grid_of_k(max(int(k), 1), int(k)) if step < k] if k else []


def _measure(question, targets, references, guard):
    """Outcomes of one mask on targets, references and guarded rows, by true passes."""

    def measure(mask):
        gates = torch.as_tensor(mask[None], dtype=torch.float32)

        def of(asked, rows):
            logits_output = _Both(asked.output)
            index = torch.as_tensor(rows, device=asked.inputs.device)
            both = asked.circuit.outputs(
                asked.inputs[index], asked.codes[index], logits_output, gates
            )
            return float(both.mean()), float(np.mean(logits_output.correct))

        output, accuracy = of(question, targets)
        step = {"target_output": output, "target_accuracy": accuracy}
        if len(references):
            output, accuracy = of(question, references)
            step |= {"reference_output": output, "reference_accuracy": accuracy}
        if guard is not None:
            _, accuracy = of(guard, np.arange(guard.n_examples))
            step["validation_accuracy"] = accuracy
        step["reference_score"] = accuracy if len(references) or guard is not None else 1.0
        return step

    return measure


class _Both:
    """An output that also notes which rows are right."""

    def __init__(self, output):
        self.output = output
        self.correct = []

    def __call__(self, logits, codes):
        self.correct.extend((logits.argmax(1) == codes).tolist())
        return self.output(logits, codes)
