"""Response maps that are torch modules, trained by skorch."""

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from skorch import NeuralNet
from torch import nn

from skperf.backbone._batches import TensorBatches
from skperf.backbone.architectures import MLP
from skperf.backbone.modes import preserved_rng


class MixLoss(nn.Module):
    """Count-weighted cross-entropy of predicted label mixes, by label."""

    def forward(self, logits, counts):
        """Return the mean negative log likelihood of the counts, a scalar."""
        return -(counts * logits.log_softmax(1)).sum() / counts.sum()


@dataclass(frozen=True)
class NeuralMap:
    """Response map ``log pi(S) = log pi_0 + module((S - centre) / scale)`` up to a constant."""

    module: nn.Module
    log_base: np.ndarray  # (n_classes,)
    centre: np.ndarray  # (n_statistics,)
    scale: np.ndarray  # (n_statistics,)

    def log_prior(self, statistics):
        """Log label mix answering each statistic, of shape (n, n_classes)."""
        inputs = torch.as_tensor((statistics - self.centre) / self.scale, dtype=torch.float32)
        self.module.eval()
        with torch.inference_mode():
            change = self.module(inputs).double().cpu().numpy()
        logits = torch.as_tensor(self.log_base + change)
        return logits.log_softmax(1).numpy()


def fit_neural(
    statistics,
    counts,
    *,
    log_base,
    l2=1.0,
    start=None,
    module=MLP,
    seed=0,
    hidden=(256, 256),
    lr=1e-3,
    max_epochs=200,
    batch_size=32,
    weight_decay=1e-3,
):
    """Train a module on the rounds so far.

    Shapes: statistics (n_rounds, n_statistics), counts (n_rounds, n_classes), log_base
    (n_classes,).
    """
    scale = np.maximum(statistics.std(axis=0), 0.02)
    if start is not None:
        centre, scale, max_epochs = start.centre, start.scale, max(1, max_epochs // 4)
    else:
        centre = statistics.mean(axis=0)
    inputs = torch.as_tensor((statistics - centre) / scale, dtype=torch.float32)
    # counts far below zero can only come from pseudo-counts of classes that never occur
    targets = torch.as_tensor(np.asarray(counts), dtype=torch.float32)
    with preserved_rng():
        torch.manual_seed(seed)
        net = NeuralNet(
            _build(module, statistics.shape[1], counts.shape[1], hidden),
            MixLoss,
            optimizer=torch.optim.Adam,
            optimizer__weight_decay=weight_decay * l2,
            lr=lr,
            max_epochs=max_epochs,
            batch_size=batch_size,
            train_split=None,
            iterator_train=TensorBatches,
            iterator_train__shuffle=True,
            callbacks="disable",
            verbose=0,
        ).initialize()
        if start is not None:
            net.module_.load_state_dict(start.module.state_dict())
        net.partial_fit(inputs, targets)
    return NeuralMap(net.module_, log_base, centre, scale)


def _build(module, n_statistics, n_classes, hidden):
    accepted = inspect.signature(module).parameters
    widths = {"n_features": n_statistics, "n_classes": n_classes, "hidden": tuple(hidden)}
    known = {name: value for name, value in widths.items() if name in accepted}
    if {"n_features", "n_classes"} <= set(known):
        return module(**known)
    return module(n_statistics, n_classes)
