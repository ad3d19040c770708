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

#: Scores of similarities (n, n_classes), or of logits, at a temperature: -> (n,).
SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mcm": lambda s, temperature: (s / temperature).softmax(1).amax(1),
    "max_logit": lambda s, temperature: s.amax(1),
    "energy": lambda s, temperature: temperature * (s / temperature).logsumexp(1),
    "entropy": lambda s, temperature: -torch.special.entr((s / temperature).softmax(1)).sum(1),
}


def agreement(reprogrammed: Tensor, zero_shot: Tensor) -> Tensor:
    """Cosine between embeddings with and without the program: (n, d) each -> (n,)."""
    return functional.cosine_similarity(reprogrammed, zero_shot, dim=1)


#: Directions that the common covariance of the classes keeps apart; the others share one variance.
KEPT_DIRECTIONS = 32


@dataclass(frozen=True)
class Gaussians:
    """Classes as normal distributions with one covariance, of a small file."""

    means: Tensor  # (n_classes, d)
    directions: Tensor  # (d, kept)
    shares: Tensor  # (kept,), by which whitening changes them more than the others
    deviation: float  # of the others

    @classmethod
    def fit(cls, outputs: Tensor, codes: Tensor) -> "Gaussians":
        """Estimate them: outputs (n, d), codes (n,)."""
        means, residuals = _centred(outputs, codes)
        n, width = residuals.shape
        values, vectors = _principal(residuals)
        values = values / max(1, n - len(means))
        # shrinkage, since rows are often fewer than dimensions
        share = min(0.9, max(0.05, width / (n + width)))
        level = share * (values.sum() / width).clamp_min(1e-12)
        kept = min(KEPT_DIRECTIONS, width - 1)
        deviation = ((1 - share) * values[kept:].sum() / (width - kept) + level).sqrt()
        shares = deviation / ((1 - share) * values[:kept] + level).sqrt() - 1
        return cls(means, vectors[:, :kept], shares, float(deviation))

    def score(self, outputs: Tensor) -> Tensor:
        """Minus the squared distance to the nearest class: outputs (n, d) -> (n,)."""
        distances = torch.cdist(self._white(outputs), self._white(self.means))
        return -distances.square().amin(1)

    def _white(self, outputs: Tensor) -> Tensor:
        projected = outputs @ self.directions * self.shares
        white: Tensor = (outputs + projected @ self.directions.T) / self.deviation
        return white


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
        pieces = unit(outputs).split(512)  # n x 5,000 numbers would not fit
        return torch.cat([(p @ self.rows.T).topk(self.k, 1).values[:, -1] for p in pieces])


@dataclass(frozen=True)
class VirtualLogit:
    """Directions in which the training rows do not vary."""

    centre: Tensor  # (d,)
    directions: Tensor  # (d, kept), in which they do

    @classmethod
    def fit(cls, outputs: Tensor, codes: Tensor) -> "VirtualLogit":
        """Find them: outputs (n, d), codes (n,)."""
        centre = outputs.mean(0)
        values, vectors = _principal(outputs - centre)
        # all but 5 % of the variance, and never all directions
        kept = int((values.cumsum(0) < 0.95 * values.sum()).sum()) + 1
        return cls(centre, vectors[:, : min(kept, outputs.shape[1] - 1)])

    def score(self, outputs: Tensor) -> Tensor:
        """Minus the share of a row outside the kept directions: outputs (n, d) -> (n,)."""
        centred = outputs - self.centre
        outside = (centred - centred @ self.directions @ self.directions.T).norm(dim=1)
        shares: Tensor = outside / centred.norm(dim=1).clamp_min(1e-12)
        return -shares


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find the directions of most, and sums of squares along them: (n, d) -> (k,), (d, k)."""
    few = len(rows) < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if few:  # no matrix of all pairs of entries is made
        vectors = rows.T @ vectors * values.clamp_min(1e-30).rsqrt()
    return values, vectors * (values > 1e-6 * values[0])


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


def left_out_aurocs(
    score: Callable[[NDArray[np.intp], NDArray[np.intp]], Tensor], codes: Tensor, n_tried: int
) -> NDArray[np.floating]:
    """AUROC of telling each class apart by a ``score(known, asked)`` that lacks it: (k,)."""
    values, generator = [], np.random.RandomState(0)
    classes = codes.unique()
    for code in classes[:: -(-len(classes) // n_tried)]:
        others = generator.permutation((codes != code).nonzero()[:, 0].numpy())
        outside = (codes == code).nonzero()[:, 0].numpy()
        fresh, known = np.split(others, [max(1, len(others) // 5)])
        if len(known):
            inside, left_out = score(known, np.r_[fresh, outside]).split([len(fresh), len(outside)])
            wins = (inside[:, None] - left_out[None]).sign()
            values.append(float(0.5 + wins.mean() / 2))
    return np.array(values)
