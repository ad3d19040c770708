"""Where a model and the label mix that answers it come to rest."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from skperf.performative.diagnostics import total_variation
from skperf.performative.label_shift import Array, Codes
from skperf.performative.ranking import score_under
from skperf.performative.record import Record, worst_share

FLIP = 0.1  # total variation between rounds above which a steady alternation is a cycle
MEMORY = 0.1  # of the running mean of answers: about ten steps


def stable_prior(
    answer: Callable[[Array], Array],
    start: Array,
    *,
    damping: float = 0.1,
    tol: float = 1e-3,
    max_iter: int = 500,
) -> dict[str, Any]:
    """Find a mix (n_classes,) that answers itself: ``q = M(S(model corrected for q))``."""
    prior, mean, residual, step = start, start, np.inf, 0
    for step in range(1, max_iter + 1):
        following = answer(prior)
        mean = mean + max(MEMORY, 1.0 / step) * (following - mean)
        residual = float(total_variation(mean, prior))
        if residual <= tol:
            break
        prior = prior + damping * min(1.0, 50.0 / step) * (following - prior)
    converged = residual <= tol
    return {"prior": prior, "residual": residual, "converged": converged, "n_iter": step}


def plain_gaps(answer: Callable[[Array], Array], start: Array) -> tuple[float, float]:
    """Total variation of mixes one and two steps apart under full correction, from (n_classes,)."""
    path = [start]
    for _ in range(40):
        path.append(answer(path[-1]))
    late = np.array(path[-10:])
    one = total_variation(late[1:], late[:-1]).mean()
    two = total_variation(late[2:], late[:-2]).mean()
    return float(one), float(two)


def rest_point(
    record: Record,
    logits: Array,
    codes: Codes,
    strata: Codes | None,
    damping: float,
    tol: float,
    max_iter: int,
) -> dict[str, Any]:
    """Rest of the corrected model on rows: logits (n, n_classes), codes, strata (n,)."""
    start, coming = np.exp(record.log_base), record.anticipation.trajectory.coming()

    def corrected(prior: Array, full: bool = False) -> Array:
        log_prior = np.log(np.maximum(prior, 1e-12))
        return record.corrected(logits, log_prior if full else record.applied(log_prior)[0])

    def statistic(scores: Array) -> Array:
        return record.measured(codes, scores.argmax(axis=1), scores, strata=strata)

    def answer(prior: Array, full: bool = False) -> Array:
        seen = statistic(corrected(prior, full))
        found: Array = np.exp(record.anticipation.log_answer(coming.at(seen[None]))[0])
        return found

    rest = stable_prior(answer, start, damping=damping, tol=tol, max_iter=max_iter)
    one, two = plain_gaps(partial(answer, full=True), start)
    scores = corrected(rest["prior"])
    right = scores.argmax(axis=1) == codes
    return rest | {
        "statistic": statistic(scores),
        "cycle": bool(one > FLIP and two < 0.5 * one),
        "cycle_gap": one,
        "worst_recall": worst_share(codes, right),
        "accuracy": score_under(rest["prior"], right.astype(np.float64), codes),
    }
