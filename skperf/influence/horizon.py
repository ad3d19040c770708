"""How long an influence estimate stays true while training goes on.

Parameters drift apart along the two runs that an influence compares, so an estimate at the
current weights holds for a limited number of further steps (Schioppa, Filippova, Titov,
Zablotskaia, "Theoretical and Practical Perspectives on what Influence Functions Do", 2023).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters
from skperf.backbone.progress import track
from skperf.backbone.rows import Rows
from skperf.influence.retraining import stacked_outputs, stacked_outputs_of, stacked_values


@dataclass(frozen=True)
class FurtherTraining:
    """Plain gradient steps from the fitted weights on."""

    learning_rate: float
    batch_size: int
    weight_decay: float = 0.0
    seed: int = 0


def actual_effects(
    network: Network,
    parameters: Parameters,
    inputs: Rows,
    targets: Tensor,
    left_out: Tensor,
    queries: tuple[Rows, Tensor],
    output: Callable[[Tensor, Tensor], Tensor],
    training: FurtherTraining,
    steps: Sequence[int],
    *,
    weights: Tensor | None = None,
    kept: Tensor | None = None,
    verbose: int = 0,
) -> Tensor:
    """Train on with and without single rows, and compare.

    Shapes: inputs (n, ...), targets (n, ...), weights (n,), kept (m,) -> (n_steps, n_queries, m).
    """
    # All runs see the same batches in the same order. A row that is left out has weight zero (or
    # `kept` of its own) where it would be used, in an unchanged batch with an unchanged
    # denominator: sum_b w_i l_i / |b|.
    n, runs = len(inputs), len(left_out) + 1
    stacked = {
        name: p.detach().expand(runs, *p.shape).clone().requires_grad_()
        for name, p in parameters.items()
    }
    own = torch.ones(runs, n) if weights is None else weights.float().cpu().expand(runs, n).clone()
    own[torch.arange(1, runs), left_out] *= 0.0 if kept is None else kept.float()
    own = own.to(network.device, network.dtype)
    order = _batches(n, training)
    effects = []
    with torch.enable_grad():
        for step in track(
            range(1, max(steps) + 1), description="further training", verbose=verbose
        ):
            rows = next(order).to(network.device)
            outputs = stacked_outputs_of(network, stacked, inputs[rows])
            losses = stacked_values(
                network.loss.value, outputs, targets[rows].expand(runs, *targets[rows].shape)
            )
            total = (losses * own[:, rows]).mean(1).sum()
            gradients = torch.autograd.grad(total, list(stacked.values()), materialize_grads=True)
            _step(stacked, gradients, training)
            if step in steps:
                values = stacked_outputs(network, stacked, *queries, output)
                effects.append((values[1:] - values[:1]).T)
    return torch.stack(effects)


def further_trained(
    network: Network,
    parameters: Parameters,
    inputs: Rows,
    targets: Tensor,
    weights: Tensor | None,
    training: FurtherTraining,
    steps: int,
) -> Parameters:
    """Train on: inputs (n, ...), targets (n, ...), weights (n,)."""
    current = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    order = _batches(len(inputs), training)
    with torch.enable_grad():
        for _ in range(steps):
            rows = next(order).to(network.device)
            losses = network.loss.value(network(inputs[rows], current), targets[rows])
            if weights is not None:
                losses = losses * weights.to(losses)[rows]
            gradients = torch.autograd.grad(
                losses.mean(), list(current.values()), materialize_grads=True
            )
            _step(current, gradients, training)
    return {name: p.detach() for name, p in current.items()}


def _batches(n: int, training: FurtherTraining) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(training.seed)
    while True:
        yield from torch.split(torch.randperm(n, generator=generator), training.batch_size)


def _step(stacked: Parameters, gradients: tuple[Tensor, ...], training: FurtherTraining) -> None:
    with torch.no_grad():
        for tensor, gradient in zip(stacked.values(), gradients, strict=True):
            tensor -= training.learning_rate * (gradient + training.weight_decay * tensor)


def agreement(predicted: Tensor, actual: Tensor) -> tuple[float, float, float]:
    """Compare predicted with actual effects: predicted, actual (n_queries, m)."""
    predicted, actual = predicted.double(), actual.double()
    slope = float((predicted * actual).sum() / predicted.square().sum().clamp_min(1e-300))
    pearson = _correlation(predicted, actual)
    ranks = [_ranks(effects) for effects in (predicted, actual)]
    return pearson, _correlation(*ranks), slope


def _correlation(left: Tensor, right: Tensor) -> float:
    left = left - left.mean(1, keepdim=True)
    right = right - right.mean(1, keepdim=True)
    sizes = left.norm(dim=1) * right.norm(dim=1)
    varies = sizes > 0
    if not bool(varies.any()):
        return float("nan")
    return float(((left * right).sum(1)[varies] / sizes[varies]).mean())


def _ranks(values: Tensor) -> Tensor:
    """Rank within each row, ties sharing their mean."""
    ordered, order = values.sort(1)
    ordered = ordered.contiguous()
    first = torch.searchsorted(ordered, ordered, right=False)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    shared = (first + last).double() / 2
    return torch.empty_like(shared).scatter_(1, order, shared)


def usable_horizon(steps: Sequence[int], pearson: Sequence[float], *, least: float = 0.8) -> int:
    """Last step up to which the correlation never falls short."""
    reached = 0
    for step, value in zip(steps, pearson, strict=True):
        if not value >= least:
            break
        reached = step
    return reached
