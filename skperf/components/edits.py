"""Carry an edit out: who is to change, who is to be spared, how many components."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skperf.components.editing import ORDERS, choose_k, grid_of_k
from skperf.components.gates import Asked, Circuit
from skperf.components.measures import Measure

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Wish:
    """Whose outputs are to change, and how."""

    targets: NDArray[np.intp]  # (n_targets,)
    references: NDArray[np.intp]  # (n_references,)
    direction: str = "increase"
    criterion: str = "budgeted"
    k: int | str = "auto"
    max_drop: float = 0.01

    def __post_init__(self) -> None:
        if self.direction not in ("increase", "decrease"):
            raise ValueError(f"direction={self.direction!r} must be 'increase' or 'decrease'.")
        if self.criterion not in ORDERS:
            raise ValueError(f"criterion={self.criterion!r} must be one of {sorted(ORDERS)}.")
        if isinstance(self.k, str) and self.k != "auto":
            raise ValueError(f"k={self.k!r} must be a number or 'auto'.")

    @property
    def increases(self) -> bool:
        """Whether outputs are to be raised."""
        return self.direction == "increase"

    def order(self, attributions: Array, stderr: Array) -> NDArray[np.intp]:
        """Rank components, first those to ablate: (n_examples, n_components) -> (n_components,)."""
        if len(self.targets) < 2 and self.criterion == "welch":
            warnings.warn(
                "target has a single row: Welch's statistic has no variance for it.",
                UserWarning,
                stacklevel=4,
            )
        spared = attributions[self.references] if len(self.references) else None
        known = np.isfinite(stderr[self.targets]).all()
        options: dict[str, Any] = {}
        if self.criterion == "budgeted" and known:
            options = {"target_error": stderr[self.targets]}
        return ORDERS[self.criterion](
            attributions[self.targets], spared, increase=self.increases, **options
        )


@dataclass(frozen=True)
class Guarded:
    """Rows on which an edit must do no harm, and their groups."""

    asked: Asked  # (n, ...)
    groups: NDArray[Any] | None = None  # (n,)


@dataclass(frozen=True)
class Outcomes:
    """What true passes show of a mask: on the targets, on the references, on guarded rows."""

    circuit: Circuit
    measure: Measure
    asked: Asked
    wish: Wish
    guard: Guarded | None = None

    def __call__(self, mask: Mask) -> dict[str, Any]:
        """Run: mask (n_components,)."""
        output, right = self._of(self.asked[self.wish.targets], mask)
        step: dict[str, Any] = {"target_output": float(output.mean())}
        step |= _accuracy("target_accuracy", right)
        score = 1.0
        if len(self.wish.references):
            output, right = self._of(self.asked[self.wish.references], mask)
            step |= {"reference_output": float(output.mean())}
            step |= _accuracy("reference_accuracy", right)
            score = float(output.mean() if right is None else right.mean())
        if self.guard is not None:
            output, right = self._of(self.guard.asked, mask)
            kept = output if right is None else right
            score = float(kept.mean())
            step["guard_mean"] = score
            if self.guard.groups is not None:
                groups = self.guard.groups
                lines = {g: float(kept[groups == g].mean()) for g in np.unique(groups).tolist()}
                step["groups"], score = lines, min(lines.values())
        step["guard_score"] = score
        return step

    def _of(self, asked: Asked, mask: Mask) -> tuple[Array, Array | None]:
        both = _Noting(self.measure)
        gates = torch.as_tensor(mask[None], dtype=torch.float32)
        values = self.circuit.outputs(asked, both, gates)  # type: ignore[arg-type]
        right = np.concatenate(both.right) if both.right else None
        return values.flatten(1).double().mean(1).numpy(), right


def edit(outcomes: Outcomes, attributions: Array, stderr: Array) -> tuple[Mask, dict[str, Any]]:
    """Choose what to ablate: -> mask (n_components,)."""
    wish = outcomes.wish
    order = wish.order(attributions, stderr)
    n_components = attributions.shape[1]
    if wish.k == "auto":
        candidates, drop = grid_of_k(n_components), wish.max_drop
    else:
        k = int(wish.k)
        steps = [step for step in grid_of_k(max(k, 1), k) if step < k] if k else []
        candidates, drop = sorted({0, *steps, k}), np.inf
    sign = 1 if wish.increases else -1
    best, path = choose_k(
        order, candidates, outcomes, aim=lambda step: sign * step["target_output"], max_drop=drop
    )
    chosen = best if wish.k == "auto" else int(wish.k)
    mask = np.ones(n_components, bool)
    mask[order[:chosen]] = False
    here = next(step for step in path if step["k"] == chosen)
    report = {
        "k": chosen,
        "path": path,
        "order": order,
        "direction": wish.direction,
        "criterion": wish.criterion,
        "predicted_change": float(-attributions[wish.targets][:, ~mask].sum(1).mean()),
        "realised_change": float(here["target_output"] - path[0]["target_output"]),
    }
    if "groups" in here:
        report["groups"] = {
            name: {"before": path[0]["groups"][name], "after": here["groups"][name]}
            for name in here["groups"]
        }
    return mask, report


def rows_of(selection: Any, n_rows: int, name: str) -> NDArray[np.intp]:
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
    resolved: NDArray[np.intp] = rows % n_rows
    return resolved


def wish_of(target: Any, reference: Any, n_rows: int, **options: Any) -> Wish:
    """Read whose outputs are to change: the others are spared unless some are named."""
    wish = Wish(np.arange(0), np.arange(0), **options)
    targets = rows_of(target, n_rows, "target")
    others = np.setdiff1d(np.arange(n_rows), targets)
    spared = others if reference is None else rows_of(reference, n_rows, "reference")
    return replace(wish, targets=targets, references=spared)


def _accuracy(name: str, right: Array | None) -> dict[str, float]:
    return {} if right is None else {name: float(right.mean())}


@dataclass
class _Noting:
    """An output that also notes which rows are right, where rows have a label each."""

    measure: Measure
    right: list[Array] = field(default_factory=list)

    def __call__(self, outputs: Tensor, asked: Asked) -> Tensor:
        targets = asked.targets
        labelled = targets is not None and not targets.is_floating_point() and targets.ndim == 1
        if labelled and targets is not None and outputs.ndim == 2 and outputs.shape[1] > 1:
            hits = outputs.argmax(1).eq(targets)
            self.right.append(hits.double().cpu().numpy())
        return self.measure(outputs, asked)
