"""Response maps that are torch modules, trained by skorch."""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from torch import nn

from skperf.backbone._batches import TensorBatches
from skperf.backbone.architectures import MLP
from skperf.backbone.randomness import drawing_from

BATCH_SIZE = 32
AGAIN = 8  # share of the epochs when rounds were added


class MixLoss(nn.Module):
    """Count-weighted cross-entropy of predicted label mixes, by label."""

    def forward(self, logits: Any, counts: Any) -> Any:
        """Return the mean negative log likelihood of the counts, a scalar."""
        return -(counts * logits.log_softmax(1)).sum() / counts.sum()


@dataclass(frozen=True)
class NeuralMap:
    """Response map ``log pi(S) = log pi_0 + module((S - centre) / scale)`` up to a constant."""

    module: nn.Module
    log_base: np.ndarray  # (n_classes,)
    centre: np.ndarray  # (n_statistics,)
    scale: np.ndarray  # (n_statistics,)

    def log_prior(self, inputs: Any) -> Any:
        """Log label mix (n, n_classes) answering the statistics in force."""
        statistics = (inputs.statistics[:, 0] - self.centre) / self.scale
        self.module.eval()
        with torch.no_grad():
            change = self.module(torch.as_tensor(statistics, dtype=torch.float32))
        change = change.double().cpu().numpy()
        logits = torch.as_tensor(self.log_base + change)
        return logits.log_softmax(1).numpy()


def fit_neural(
    inputs: Any,
    counts: Any,
    *,
    log_base: Any,
    l2: Any = 1.0,
    start: Any = None,
    module: Any = MLP,
    seed: Any = 0,
    hidden: Any = (256, 256),
    lr: Any = 1e-3,
    max_epochs: Any = 200,
    weight_decay: Any = 1e-3,
) -> Any:
    """Train a module on the rounds so far: counts (n_rounds, n_classes), log_base (n_classes,)."""
    known = np.isfinite(inputs.statistics[:, 0]).all(axis=1) & (np.abs(counts).sum(axis=1) > 0)
    statistics, counts = inputs.statistics[known, 0], counts[known]
    scale = np.maximum(statistics.std(axis=0), 0.02)
    if start is not None:
        centre, scale, max_epochs = start.centre, start.scale, max(1, max_epochs // AGAIN)
    else:
        centre = statistics.mean(axis=0)
    features = torch.as_tensor((statistics - centre) / scale, dtype=torch.float32)
    # counts far below zero can only come from pseudo-counts of classes that never occur
    targets = torch.as_tensor(np.asarray(counts), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with drawing_from(generator):
        net = NeuralNet(
            _build(module, statistics.shape[1], counts.shape[1], hidden),
            MixLoss,
            optimizer=torch.optim.Adam,
            optimizer__weight_decay=weight_decay * l2,
            optimizer__fused=True,
            lr=lr,
            max_epochs=max_epochs,
            batch_size=BATCH_SIZE,
            train_split=None,
            iterator_train=TensorBatches,
            iterator_train__shuffle=True,
            iterator_train__generator=generator,
            callbacks="disable",
            verbose=0,
        ).initialize()
    if start is not None:
        net.module_.load_state_dict(start.module.state_dict())
    # a module of the user's own may draw while it trains; looking at every operator costs a third
    with nullcontext() if module is MLP else drawing_from(generator):
        net.partial_fit(features, targets)
    return NeuralMap(net.module_, log_base, centre, scale)


def _build(module: Any, n_statistics: Any, n_classes: Any, hidden: Any) -> Any:
    accepted = inspect.signature(module).parameters
    widths = {"n_features": n_statistics, "n_classes": n_classes, "hidden": tuple(hidden)}
    known = {name: value for name, value in widths.items() if name in accepted}
    if {"n_features", "n_classes"} <= set(known):
        return module(**known)
    return module(n_statistics, n_classes)
