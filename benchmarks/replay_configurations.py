"""Trainings that influence through the run is judged on.

Fixed, and committed, before the first datamodeling score of any of them was computed: none was
left out, added or changed after a look at its scores. `THRESHOLD_DATA` are other rows, on which
the threshold of `smoothness` was chosen.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

from benchmarks.data import fetch_spam_assassin
from skperf.datasets import load_fashion_mnist

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # X, y, X_query, y_query
N_QUERIES = 60
SUBSETS = 40
SHARES = (0.01, 0.1, 0.5)  # of the rows that are dropped
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Configuration:
    """A network, and how it is trained."""

    name: str
    rows: Callable[[int], Split]
    widths: tuple[int, ...] = ()  # of an MLP; none for the small CNN
    activation: type[nn.Module] = nn.GELU
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    lr: float = 0.1
    batch_size: int = 64
    max_epochs: int = 10
    settings: dict[str, Any] = field(default_factory=dict)

    def module(self, n_features: int, n_classes: int) -> nn.Module:
        """Build the network, its weights drawn from the global stream."""
        if not self.widths:
            return nn.Sequential(
                nn.Conv2d(1, 8, 3, stride=2, padding=1),
                self.activation(),
                nn.Conv2d(8, 16, 3, stride=2, padding=1),
                self.activation(),
                nn.Flatten(),
                nn.Linear(16 * 7 * 7, n_classes),
            )
        sizes = [n_features, *self.widths]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), self.activation()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))


def _split(X: np.ndarray, y: np.ndarray, seed: int, n_train: int) -> Split:
    X_train, X_query, y_train, y_query = train_test_split(
        X.astype(np.float32),
        y,
        train_size=n_train,
        test_size=N_QUERIES,
        random_state=seed,
        stratify=y,
    )
    return X_train, y_train, X_query, y_query


def digits(seed: int) -> Split:
    """1,437 of scikit-learn's digits."""
    X, y = load_digits(return_X_y=True)
    return _split(X / 16, y, seed, 1437)


def breast_cancer(seed: int) -> Split:
    """455 rows of 30 measurements, standardised."""
    X, y = load_breast_cancer(return_X_y=True)
    X_train, y_train, X_query, y_query = _split(X, y, seed, 455)
    scaler = StandardScaler().fit(X_train)
    return scaler.transform(X_train), y_train, scaler.transform(X_query), y_query


def fashion(seed: int) -> Split:
    """1,000 images of Fashion-MNIST."""
    X, y = load_fashion_mnist(return_X_y=True)
    return _split(X.reshape(-1, 1, 28, 28), y, seed, 1000)


def mails(seed: int) -> Split:
    """1,000 e-mails as bags of their 300 most frequent words."""
    found = fetch_spam_assassin()
    order = np.random.default_rng(seed).permutation(len(found.data))[:1200]
    texts, y = [found.data[i] for i in order], np.asarray(found.target)[order]
    counts = CountVectorizer(max_features=300, stop_words="english").fit_transform(texts)
    return _split(np.log1p(counts.toarray()), y, seed, 1000)


def wine(seed: int) -> Split:
    """118 rows of 13 measurements, standardised."""
    X, y = load_wine(return_X_y=True)
    return _split(StandardScaler().fit_transform(X), y, seed, 118)


CONFIGURATIONS = (
    Configuration("digits, SGD", digits, (32,), nn.Tanh, lr=0.1),
    Configuration("digits, SGD, high rate", digits, (32,), nn.Tanh, lr=0.5, max_epochs=40),
    Configuration("digits, SGD, ReLU", digits, (32,), nn.ReLU, lr=0.1),
    Configuration("digits, Adam", digits, (32,), nn.GELU, torch.optim.Adam, 0.002),
    Configuration("breast_cancer, SGD", breast_cancer, (16,), nn.Tanh, lr=0.05, batch_size=32),
    Configuration(
        "breast_cancer, momentum",
        breast_cancer,
        (32,),
        nn.GELU,
        lr=0.01,
        batch_size=64,
        max_epochs=20,
        settings={"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    ),
    Configuration("Fashion-MNIST, CNN, SGD", fashion, lr=0.1, batch_size=100, max_epochs=8),
    Configuration(
        "Fashion-MNIST, CNN, Adam", fashion, (), nn.GELU, torch.optim.Adam, 0.001, 100, 8
    ),
    Configuration("SpamAssassin, SGD", mails, (16,), nn.Tanh, lr=0.05, max_epochs=8),
    Configuration(
        "SpamAssassin, AdamW",
        mails,
        (32,),
        nn.GELU,
        torch.optim.AdamW,
        0.001,
        settings={"weight_decay": 0.01},
        max_epochs=8,
    ),
)

# a threshold of smoothness is chosen on these only
THRESHOLD_DATA = tuple(
    Configuration(
        f"wine, {kind.__name__}, {activation.__name__}, {lr}",
        wine,
        (16,),
        activation,
        kind,
        lr,
        batch_size=16,
        max_epochs=15,
    )
    for kind, rates in ((torch.optim.SGD, (0.05, 0.5, 2.0)), (torch.optim.Adam, (0.001, 0.01, 0.1)))
    for lr in rates
    for activation in (nn.Tanh, nn.ReLU)
)
