"""The adapter of the released Performativity-aware Predictor, for comparison.

A plain multi-layer perceptron takes the statistic to the logits of a label mix and gets one
pass of Adam over all rounds after each round, on a divergence averaged over classes.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from skperf.backbone.modes import preserved_rng

Array = NDArray[np.float64]

WIDTH = 256
LEARNING_RATE = 1e-4
FADE = 0.995


@dataclass(frozen=True, eq=False)
class PaperMap:
    """The perceptron and its optimiser, both kept from round to round."""

    module: nn.Module
    optimizer: torch.optim.Adam
    n_updates: int = 0

    def log_prior(self, statistics: Array) -> Array:
        """Log label mix answering each statistic, of shape (n, n_classes)."""
        with torch.inference_mode():
            logits = self.module(torch.as_tensor(statistics, dtype=torch.float32))
            return np.asarray(logits.double().log_softmax(1).numpy())


def fit_paper(
    statistics: Array,
    counts: Array,
    *,
    log_base: Array,
    l2: float = 1.0,
    start: Any = None,
    seed: int = 0,
) -> PaperMap:
    """Make one pass over the rounds, in shuffled batches of half of them.

    Shapes: statistics (n_rounds, n_statistics), counts (n_rounds, n_classes).
    """
    previous = start or _new(statistics.shape[1], counts.shape[1], seed)
    module, optimizer = deepcopy((previous.module, previous.optimizer))
    inputs = torch.as_tensor(statistics, dtype=torch.float32)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    targets = torch.as_tensor(counts / totals, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + previous.n_updates)
    order = torch.randperm(len(inputs), generator=generator)
    for rows in order.split(max(1, len(inputs) // 2)):
        divergence = nn.functional.kl_div(
            module(inputs[rows]).log_softmax(1), targets[rows], reduction="none"
        )
        fading = FADE ** torch.arange(len(rows))
        optimizer.zero_grad()
        (divergence.mean(dim=1) * fading).mean().backward()
        optimizer.step()
    return PaperMap(module, optimizer, previous.n_updates + 1)


def _new(n_statistics: int, n_classes: int, seed: int) -> PaperMap:
    with preserved_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Linear(n_statistics, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, n_classes),
        )
    return PaperMap(module, torch.optim.Adam(module.parameters(), lr=LEARNING_RATE))
