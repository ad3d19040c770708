"""What is added to the curvature's eigenvalues."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from skperf.influence.curvature import RowSpace
from skperf.influence.gradients import Dense, Factor, Gradients, Outer, squared_norms
from skperf.influence.layers import from_vectors
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
    if settings.ridge:
        return settings.weight_decay
    trace = curvature_trace(problem) if curvature is None else curvature.trace
    if settings.ridge == 0:
        return _OF_NOTHING * trace / sum(p.numel() for p in problem.parameters.values())
    return _PULL * noise_damping(trace, problem.shares, problem.parameters.values())


def damping_of_each(problem: Problem, damping: float) -> Tensor:
    """Damping of every weight: a known penalty may spare the biases: -> (n_parameters,)."""
    # directions that leave every output as it is have no curvature, so that there is some
    return of_each(problem, damping, damping * 1e-6 if _biases_are_spared(problem) else damping)


def _biases_are_spared(problem: Problem) -> bool:
    settings = problem.settings
    return settings.damping == "auto" and bool(settings.ridge) and not settings.ridge_on_biases


def of_each(problem: Problem, weights: float, biases: float) -> Tensor:
    """Give one number to weights and one to biases: -> (n_parameters,)."""
    values = [(p, biases if p.ndim < 2 else weights) for p in problem.parameters.values()]
    return torch.cat([torch.full((p.numel(),), v, dtype=torch.float64) for p, v in values])


def stretch_of_biases(problem: Problem, share: float = 1e-3) -> float:
    """Find how much longer biases must be for one number to damp the weights and hardly them."""
    if not _biases_are_spared(problem):
        return 1.0
    rows = curvature_rows(problem)
    curvature = problem.gather(problem.X, rows.cotangents, rows.examples)
    weights = stretched(problem, curvature, 0.0)
    n_biases = sum(p.numel() for p in problem.parameters.values() if p.ndim < 2)
    of_biases = float((squared_norms(curvature) - squared_norms(weights)).sum()) / max(n_biases, 1)
    # by a share of their curvature: less than a thousandth would cost float32 its digits
    ridge = resolve_damping(problem)
    return math.sqrt(ridge / min(ridge, share * of_biases)) if of_biases > 0 else 1.0


def stretched(problem: Problem, gradients: Sequence[Factor], by: float) -> Gradients:
    """Multiply the part that belongs to biases: (n, ...) each."""
    if by == 1:
        return [*gradients]
    each = of_each(problem, 1.0, by)[None]
    scales = from_vectors(problem.layers, each, problem.parameters)
    parts: Gradients = []
    for factor, scale in zip(gradients, scales, strict=True):
        assert not isinstance(scale, Outer)
        if isinstance(factor, Outer):
            one = scale.values[0, : factor.inputs.shape[-1]].to(factor.inputs)
            parts.append(Outer(factor.inputs * one, factor.outputs))
        else:
            assert isinstance(factor, Dense)
            parts.append(Dense(factor.values * scale.values.to(factor.values)))
    return parts


def curvature_trace(problem: Problem) -> float:
    """Sum of the curvature's eigenvalues."""
    rows = curvature_rows(problem)
    if not len(rows.examples):  # of a network that is sure of everything
        return 0.0
    return float(squared_norms(problem.gather(problem.X, rows.cotangents, rows.examples)).sum())


def layer_damping(problem: Problem, which: int, trace: float) -> float:
    """Find what is added to the eigenvalues of one layer's own curvature."""
    settings = problem.settings
    if not isinstance(settings.damping, str):
        return float(settings.damping)
    if settings.damping != "auto" or settings.horizon is not None:
        return 1 / horizon_time(settings)
    if settings.ridge:
        return settings.weight_decay
    weights = [problem.parameters[name] for name in problem.layers[which].names]
    return _PULL_OF_LAYER * noise_damping(trace, problem.shares, weights)


# benchmarks.influence_damping chose them
_PULL = 1.5
_PULL_OF_LAYER = 0.2
_LEAST_DAMPING = 1e-8
_OF_NOTHING = 1e-6  # of the mean eigenvalue: a model that was trained without a penalty


def noise_damping(trace: float, shares: Tensor, weights: Iterable[Tensor]) -> float:
    """Find the weight decay that pulls as hard as chance does: shares (n,)."""
    # The mean gradient of a sample has the standard error `sqrt(trace(C) sum_i w_i^2)`, which is
    # `sqrt(trace(C) / n)` for equal shares. A weight decay x holds the weights against a mean
    # gradient of length `x ||weights||`. Scaling the weights leaves what results unchanged.
    length = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))
    error = math.sqrt(trace * float(shares.square().sum()))
    return max(error / (length or 1.0), _LEAST_DAMPING)
