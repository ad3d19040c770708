"""Scores and thresholds for saying "none of these".

All scores are higher for rows that look like the training data.

References
----------
Hendrycks and Gimpel (arXiv 1610.02136, maximal softmax); Liu et al. (arXiv 2010.03759,
energy); Ming et al. (arXiv 2211.13445, maximal concept matching); Lee et al. (arXiv
1807.03888, Mahalanobis); Sun et al. (arXiv 2204.06507, nearest neighbours); Wang et al. (arXiv
2203.10807, ViM).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from skperf.reprogramming.residual import unit


def concept_matching(similarities: Tensor, temperature: float = 1.0) -> Tensor:
    """Largest softmax probability (MCM on cosines, maximal softmax on logits).

    Shapes: similarities (n, n_classes) -> (n,).
    """
    return (similarities / temperature).softmax(1).amax(1)


def max_logit(similarities: Tensor, temperature: float = 1.0) -> Tensor:
    """Largest similarity: similarities (n, n_classes) -> (n,)."""
    return similarities.amax(1)


def energy(similarities: Tensor, temperature: float = 1.0) -> Tensor:
    """Free energy with its sign turned, ``T logsumexp(s / T)``.

    Shapes: similarities (n, n_classes) -> (n,).
    """
    return temperature * (similarities / temperature).logsumexp(1)


def negative_entropy(similarities: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the softmax with its sign turned: similarities (n, n_classes) -> (n,)."""
    logarithms = (similarities / temperature).log_softmax(1)
    return (logarithms.exp() * logarithms).sum(1)


def agreement(reprogrammed: Tensor, zero_shot: Tensor) -> Tensor:
    """Cosine between a row's embedding with and without the program.

    Shapes: reprogrammed (n, d), zero_shot (n, d) -> (n,).
    """
    return functional.cosine_similarity(reprogrammed, zero_shot, dim=1)


SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mcm": concept_matching,
    "max_logit": max_logit,
    "energy": energy,
    "entropy": negative_entropy,
}


@dataclass(frozen=True)
class Gaussians:
    """Classes as normal distributions with one covariance."""

    means: Tensor  # (n_classes, d)
    whitening: Tensor  # (d, d)

    @classmethod
    def fit(cls, outputs: Tensor, codes: Tensor) -> "Gaussians":
        """Estimate them: outputs (n, d), codes (n,)."""
        means, residuals = _centred(outputs, codes)
        n, width = residuals.shape
        covariance = residuals.T @ residuals / max(1, n - len(means))
        # shrinkage, since rows are often fewer than dimensions
        share = min(0.9, max(0.05, width / (n + width)))
        isotropic = covariance.diagonal().mean().clamp_min(1e-12)
        eye = torch.eye(width, dtype=outputs.dtype)
        covariance = (1 - share) * covariance + share * isotropic * eye
        return cls(means, torch.linalg.cholesky(torch.linalg.inv(covariance)))

    def score(self, outputs: Tensor) -> Tensor:
        """Minus the squared distance to the nearest class: outputs (n, d) -> (n,)."""
        distances = torch.cdist(outputs @ self.whitening, self.means @ self.whitening)
        return -distances.square().amin(1)


@dataclass(frozen=True)
class Neighbours:
    """Training rows, for the distance to the k-th nearest."""

    rows: Tensor  # (n, d)
    k: int

    @classmethod
    def fit(cls, outputs: Tensor, codes: Tensor) -> "Neighbours":
        """Keep them, some thousands at most: outputs (n, d), codes (n,)."""
        step = -(-len(outputs) // 5000)
        kept = unit(outputs[::step])
        return cls(kept, max(1, min(10, round(0.02 * len(kept)))))

    def score(self, outputs: Tensor) -> Tensor:
        """Cosine with the k-th nearest training row: outputs (n, d) -> (n,)."""
        near = unit(outputs) @ self.rows.T
        return near.topk(self.k, 1).values[:, -1]


@dataclass(frozen=True)
class VirtualLogit:
    """Directions in which the training rows do not vary."""

    centre: Tensor  # (d,)
    residual: Tensor  # (d, d - kept)

    @classmethod
    def fit(cls, outputs: Tensor, codes: Tensor) -> "VirtualLogit":
        """Find them: outputs (n, d), codes (n,)."""
        centre = outputs.mean(0)
        covariance = (outputs - centre).T @ (outputs - centre) / len(outputs)
        values, vectors = torch.linalg.eigh(covariance)
        # all but 5 % of the variance, and never all directions
        kept = int((values.flip(0).cumsum(0) < 0.95 * values.sum()).sum()) + 1
        kept = min(kept, outputs.shape[1] - 1)
        return cls(centre, vectors[:, : outputs.shape[1] - kept])

    def score(self, outputs: Tensor) -> Tensor:
        """Minus the share of a row outside the kept directions: outputs (n, d) -> (n,)."""
        centred = outputs - self.centre
        outside = (centred @ self.residual).norm(dim=1)
        shares: Tensor = outside / centred.norm(dim=1).clamp_min(1e-12)
        return -shares


def _centred(outputs: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    present, codes = codes.unique(return_inverse=True)
    sums = outputs.new_zeros(len(present), outputs.shape[1]).index_add(0, codes, outputs)
    means = sums / torch.bincount(codes)[:, None]
    return means, outputs - means[codes]


#: Scores on outputs of the plain encoder, fitted to those of the training rows.
FEATURE_SCORES: dict[str, Any] = {"mahalanobis": Gaussians, "knn": Neighbours, "vim": VirtualLogit}


def retention_threshold(scores: NDArray[np.floating], retention: float) -> float:
    """Threshold that keeps a share of fresh rows like the scored ones, on average: scores (n,)."""
    # of n rows and a fresh one, each is the lowest with the same probability
    return float(np.quantile(scores, 1 - retention, method="weibull"))


def left_out_auroc(scores: Callable[[int], tuple[Tensor, Tensor]], n_classes: int) -> float:
    """Mean AUROC over classes of telling a class apart that the score does not know of.

    ``scores(code)`` gives the scores of the other classes' rows and of the class's own.
    """
    values = []
    for code in range(n_classes):
        inside, outside = scores(code)
        if len(inside) and len(outside):
            above = (inside[:, None] > outside[None]).float().mean()
            values.append(float(above + 0.5 * (inside[:, None] == outside[None]).float().mean()))
    return float(np.mean(values)) if values else 0.5
