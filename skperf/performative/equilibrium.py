"""Where a model and the label mix that answers it come to rest, and what a candidate would meet."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skperf.performative.diagnostics import total_variation

Array = NDArray[np.float64]

MEMORY = 0.1  # of the running mean of answers: about ten steps


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """Outcome of an iteration towards a stable label mix."""

    prior: Array  # (n_classes,)
    residual: float
    converged: bool
    n_iter: int


def stable_prior(
    answer: Callable[[Array], Array],
    start: Array,
    *,
    damping: float = 0.1,
    tol: float = 1e-3,
    max_iter: int = 500,
) -> Equilibrium:
    """Find a label mix that answers itself: ``q = M(S(model corrected for q))``.

    Shapes: start (n_classes,).
    """
    prior, mean, residual, step = start, start, np.inf, 0
    for step in range(1, max_iter + 1):
        following = answer(prior)
        mean = mean + max(MEMORY, 1.0 / step) * (following - mean)
        residual = float(total_variation(mean, prior))
        if residual <= tol:
            break
        prior = prior + damping * min(1.0, 50.0 / step) * (following - prior)
    return Equilibrium(prior, residual, residual <= tol, step)


def plain_gaps(
    answer: Callable[[Array], Array], start: Array, *, n_steps: int = 40
) -> tuple[float, float]:
    """Total variation between mixes one and two steps apart under full, undamped correction.

    Shapes: start (n_classes,).
    """
    path = [start]
    for _ in range(n_steps):
        path.append(answer(path[-1]))
    late = np.array(path[-max(4, n_steps // 4) :])
    one = total_variation(late[1:], late[:-1]).mean()
    two = total_variation(late[2:], late[:-2]).mean()
    return float(one), float(two)
