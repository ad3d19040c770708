"""Scores and thresholds for saying "none of these".

All scores are higher for rows that look like the training data.

References
----------
Hendrycks and Gimpel (arXiv 1610.02136, maximal softmax); Liu et al. (arXiv 2010.03759,
energy); Ming et al. (arXiv 2211.13445, maximal concept matching).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


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


def retention_threshold(scores: NDArray[np.floating], retention: float) -> float:
    """Highest threshold that keeps at least a given share of the scores: scores (n,)."""
    return float(np.quantile(scores, 1 - retention, method="lower"))
