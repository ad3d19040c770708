"""The adapter of the released Performativity-aware Predictor (arXiv:2410.04499), for comparison.

A plain multi-layer perceptron takes recalls to the logits of a label mix and gets one pass of Adam
over all rounds after each round, on a divergence averaged over classes and faded by coefficients
that belong to positions in the batch and persist. As released, the mix is used from the second
round on, also before the first pass, in full.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from skperf.backbone.architectures import MLP
from skperf.backbone.randomness import drawing_from
from skperf.performative.label_shift import Array
from skperf.performative.response import Inputs

WIDTH = 256
LEARNING_RATE = 1e-4
FADE = 0.995
BASE_PSEUDO_SHARE = 1e-4  # added to the base mix


@dataclass(frozen=True, eq=False)
class PaperMap:
    """The perceptron, its optimiser and its fading coefficients, kept from round to round."""

    module: nn.Module
    optimizer: torch.optim.Adam
    coefficients: Tensor  # (n_positions,)
    n_updates: int = 0

    def log_prior(self, inputs: Inputs) -> Array:
        """Log label mix (n, n_classes) answering the statistics in force."""
        statistics = torch.as_tensor(inputs.statistics[:, 0], dtype=torch.float32)
        with torch.no_grad():
            return np.asarray(self.module(statistics).double().log_softmax(1).numpy())


def fit_paper(
    inputs: Inputs,
    counts: Array,
    *,
    log_base: Array,
    l2: float = 1.0,
    start: PaperMap | None = None,
    seed: int = 0,
) -> PaperMap:
    """Make one pass over the rounds, in shuffled batches of half of them: counts (R, K)."""
    known = np.isfinite(inputs.statistics[:, 0]).all(axis=1) & (counts.sum(axis=1) > 0)
    inputs, counts = inputs[known], counts[known]
    previous = start or new_map(inputs.statistics.shape[2], counts.shape[1], seed)
    module, optimizer = deepcopy((previous.module, previous.optimizer))
    coefficients = previous.coefficients.clone()
    if len(coefficients) < len(counts):
        fresh = torch.ones(len(counts) - len(coefficients))
        coefficients = torch.cat([coefficients, fresh])
    statistics = torch.as_tensor(inputs.statistics[:, 0], dtype=torch.float32)
    targets = torch.as_tensor(counts / counts.sum(axis=1, keepdims=True), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + previous.n_updates)
    order = torch.randperm(len(statistics), generator=generator)
    for rows in order.split(max(1, len(statistics) // 2)):
        divergence = nn.functional.kl_div(
            module(statistics[rows]).log_softmax(1), targets[rows], reduction="none"
        )
        optimizer.zero_grad()
        (divergence.mean(dim=1) * coefficients[: len(rows)]).mean().backward()
        optimizer.step()
        coefficients[: len(rows)] *= FADE
    return PaperMap(module, optimizer, coefficients, previous.n_updates + 1)


def new_map(n_statistics: int, n_classes: int, seed: int) -> PaperMap:
    """Start with torch's own initial weights, drawn from a generator of our own."""
    with drawing_from(torch.Generator().manual_seed(seed)):
        module = MLP(n_statistics, n_classes, (WIDTH, WIDTH))
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)
    return PaperMap(module, optimizer, torch.ones(0))
