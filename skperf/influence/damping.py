"""What is added to the curvature's eigenvalues."""

import math
from collections.abc import Iterable

from torch import Tensor

from skperf.influence.curvature import RowSpace
from skperf.influence.gradients import squared_norms
from skperf.influence.problem import Problem, Settings, curvature_rows


def horizon_time(settings: Settings) -> float:
    """Learning rate times number of further steps."""
    if settings.horizon is None or settings.learning_rate is None:
        missing = "horizon" if settings.horizon is None else "learning_rate"
        raise ValueError(
            f"damping tied to a horizon needs {missing}: horizon is the number of further training "
            "steps, learning_rate their step size."
        )
    return settings.horizon * settings.learning_rate


def resolve_damping(problem: Problem, curvature: RowSpace | None = None) -> float:
    """Find the number that is added to the curvature's eigenvalues."""
    settings = problem.settings
    if not isinstance(settings.damping, str):
        return float(settings.damping)
    if settings.damping == "horizon" or settings.horizon is not None:
        return 1 / horizon_time(settings)
    if settings.ridge is not None:
        return settings.ridge
    trace = curvature_trace(problem) if curvature is None else curvature.trace
    return _PULL * noise_damping(trace, problem.shares, problem.parameters.values())


def curvature_trace(problem: Problem) -> float:
    """Sum of the curvature's eigenvalues."""
    rows = curvature_rows(problem)
    return float(squared_norms(problem.gather(problem.X, rows.cotangents, rows.examples)).sum())


def layer_damping(problem: Problem, which: int, trace: float) -> float:
    """Find what is added to the eigenvalues of one layer's own curvature."""
    settings = problem.settings
    if not isinstance(settings.damping, str):
        return float(settings.damping)
    if settings.damping != "auto" or settings.horizon is not None:
        return 1 / horizon_time(settings)
    if settings.ridge is not None:
        return settings.ridge
    weights = [problem.parameters[name] for name in problem.layers[which].names]
    return _PULL_OF_LAYER * noise_damping(trace, problem.shares, weights)


# benchmarks.influence_damping chose them
_PULL = 1.5
_PULL_OF_LAYER = 0.2
_LEAST_DAMPING = 1e-8


def noise_damping(trace: float, shares: Tensor, weights: Iterable[Tensor]) -> float:
    """Find the weight decay that pulls as hard as chance does: shares (n,)."""
    # The mean gradient of a sample has the standard error `sqrt(trace(C) sum_i w_i^2)`, which is
    # `sqrt(trace(C) / n)` for equal shares. A weight decay x holds the weights against a mean
    # gradient of length `x ||weights||`. Scaling the weights leaves what results unchanged.
    length = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))
    error = math.sqrt(trace * float(shares.square().sum()))
    return max(error / (length or 1.0), _LEAST_DAMPING)
