"""How long an influence estimate stays true while training goes on.

Parameters drift apart along the two runs that an influence compares, so an estimate at the
current weights holds for a limited number of further steps (Schioppa, Filippova, Titov,
Zablotskaia, "Theoretical and Practical Perspectives on what Influence Functions Do", 2023).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
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
    """Train on with and without rows, compare: inputs (n, ...) -> (n_steps, n_queries, m)."""
    # A row that is left out has weight zero (or `kept` of its own) where it would be used, in an
    # unchanged batch with an unchanged denominator: sum_b w_i l_i / |b|.
    n, runs = len(inputs), len(left_out) + 1
    own = torch.ones(runs, n) if weights is None else weights.float().cpu().expand(runs, n).clone()
    own[torch.arange(1, runs), left_out] *= 0.0 if kept is None else kept.float()
    stages = further_trained(network, parameters, inputs, targets, own, training)
    stages, effects = islice(stages, max(steps) + 1), []
    for step, stacked in enumerate(
        track(stages, description="further training", total=max(steps) + 1, verbose=verbose)
    ):
        if step in steps:
            values = stacked_outputs(network, stacked, *queries, output)
            effects.append((values[1:] - values[:1]).T)
    return torch.stack(effects)


def further_trained(
    network: Network,
    parameters: Parameters,
    inputs: Rows,
    targets: Tensor,
    weights: Tensor,
    training: FurtherTraining,
) -> Iterator[Parameters]:
    """Train on with weightings (m, n): the start, what each step leads to, (m, ...)."""
    # all runs see the same batches in the same order
    runs, own = len(weights), weights.to(network.device, network.dtype)
    stacked = {
        name: p.detach().expand(runs, *p.shape).clone().requires_grad_()
        for name, p in parameters.items()
    }
    yield stacked
    for batch in _batches(len(inputs), training):
        rows = batch.to(network.device)
        with torch.enable_grad():
            outputs = stacked_outputs_of(network, stacked, inputs[rows])
            losses = stacked_values(
                network.loss.value, outputs, targets[rows].expand(runs, *targets[rows].shape)
            )
            total = (losses * own[:, rows]).mean(1).sum()
            gradients = torch.autograd.grad(total, list(stacked.values()), materialize_grads=True)
        with torch.no_grad():
            for tensor, gradient in zip(stacked.values(), gradients, strict=True):
                tensor -= training.learning_rate * (gradient + training.weight_decay * tensor)
        yield stacked


def _batches(n: int, training: FurtherTraining) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(training.seed)
    while True:
        yield from torch.split(torch.randperm(n, generator=generator), training.batch_size)


def curve(steps: Sequence[int], predicted: Tensor, actual: Tensor, least: float) -> dict[str, Any]:
    """Compare step by step: predicted, actual (n_steps, n_queries, m)."""
    figures = [agreement(p, a) for p, a in zip(predicted, actual, strict=True)]
    pearson, spearman, slope = map(np.array, zip(*figures, strict=True))
    found = {"steps": np.array(steps), "pearson": pearson, "spearman": spearman, "slope": slope}
    return {**found, "usable_horizon": usable_horizon(steps, pearson.tolist(), least=least)}


def agreement(predicted: Tensor, actual: Tensor) -> tuple[float, float, float]:
    """Compare predicted with actual effects: predicted, actual (n_queries, m)."""
    predicted, actual = predicted.double(), actual.double()
    slope = float((predicted * actual).sum() / predicted.square().sum().clamp_min(1e-300))
    ranks = [torch.from_numpy(rankdata(both.cpu().numpy(), axis=1)) for both in (predicted, actual)]
    return correlation(predicted, actual), correlation(*ranks), slope


def correlation(left: Any, right: Any) -> float:
    """Mean over queries of the correlation across rows: left, right (n_queries, m)."""
    left, right = (torch.as_tensor(both).double() for both in (left, right))
    left = left - left.mean(1, keepdim=True)
    right = right - right.mean(1, keepdim=True)
    sizes = left.norm(dim=1) * right.norm(dim=1)
    varies = sizes > 0
    if not bool(varies.any()):
        return float("nan")
    return float(((left * right).sum(1)[varies] / sizes[varies]).mean())


def usable_horizon(steps: Sequence[int], pearson: Sequence[float], *, least: float = 0.8) -> int:
    """Last step up to which the correlation never falls short."""
    reached = 0
    for step, value in zip(steps, pearson, strict=True):
        if not value >= least:
            break
        reached = step
    return reached
