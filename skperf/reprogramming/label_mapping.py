"""From the labels that a classifier knows to the labels of the task at hand.

All mappings are matrices of shape (n_source, n_classes); target logits are source logits
times the matrix.

References
----------
Chen et al., "Understanding and Improving Visual Prompting: A Label-Mapping Perspective"
(CVPR 2023); Cai et al., "Bayesian-guided Label Mapping for Visual Reprogramming" (NeurIPS
2024).
"""

import torch
from torch import Tensor


def cooccurrence(
    source_logits: Tensor,
    codes: Tensor,
    n_classes: int,
    *,
    weight: Tensor | None = None,
    top: int | None = None,
) -> Tensor:
    """Count the source labels that rows get: logits (n, n_source) -> (n_source, n_classes)."""
    if top is None:
        labels = source_logits.argmax(1, keepdim=True)
        values = torch.ones_like(labels, dtype=source_logits.dtype)
    else:
        values, labels = source_logits.softmax(1).topk(min(top, source_logits.shape[1]), 1)
    if weight is not None:
        values = values * weight[:, None].to(values)
    counts = source_logits.new_zeros(source_logits.shape[1], n_classes)
    flat = labels * n_classes + codes[:, None]
    counts.view(-1).index_add_(0, flat.reshape(-1), values.reshape(-1))
    return counts


def one_to_one(counts: Tensor, per_class: int = 1) -> Tensor:
    """Give each class its most frequent source labels, none twice: (n_source, n_classes)."""
    n_source, n_classes = counts.shape
    _check_enough(n_source, n_classes, per_class)
    mapping = torch.zeros_like(counts)
    for _ in range(per_class):
        left = counts.masked_fill(mapping.sum(1, keepdim=True) > 0, -1)
        for _ in range(n_classes):
            source, target = divmod(int(left.argmax()), n_classes)
            mapping[source, target] = 1 / per_class
            left[source] = -2
            left[:, target] = -2
    return mapping


def random_mapping(
    n_source: int, n_classes: int, per_class: int, generator: torch.Generator
) -> Tensor:
    """Give each class source labels drawn at random, none twice: -> (n_source, n_classes)."""
    _check_enough(n_source, n_classes, per_class)
    drawn = torch.randperm(n_source, generator=generator)[: n_classes * per_class]
    mapping = torch.zeros(n_source, n_classes)
    mapping[drawn, torch.arange(n_classes).repeat(per_class)] = 1 / per_class
    return mapping


def bayesian(counts: Tensor, smoothing: float = 1.0) -> Tensor:
    """Estimate classes given source labels, columns scaled to sum 1: (n_source, n_classes)."""
    given_source = counts / (counts.sum(1, keepdim=True) + smoothing).clamp_min(1e-12)
    totals = given_source.sum(0)
    mapping = given_source / totals.clamp_min(torch.finfo(totals.dtype).tiny)
    return torch.where(totals > 0, mapping, 1 / len(counts))


def estimated(name: str, counts: Tensor, per_class: int, smoothing: float) -> Tensor:
    """Estimate a mapping that follows from counts: (n_source, n_classes) -> the same shape."""
    greedy = name in ("flm", "ilm")
    return one_to_one(counts, per_class) if greedy else bayesian(counts, smoothing)


#: Mappings that are estimated anew while the program is trained.
REFRESHED = frozenset({"ilm", "blm", "blm+"})

#: Share of the classes that the soft form of the Bayesian mapping looks at.
SOFT_TOP_SHARE = 0.15


def labels_of_interest(name: str, n_classes: int) -> int | None:
    """Tell how many source labels a mapping looks at in one row."""
    return max(1, int(SOFT_TOP_SHARE * n_classes)) if name == "blm+" else None


def _check_enough(n_source: int, n_classes: int, per_class: int) -> None:
    if per_class * n_classes > n_source:
        raise ValueError(
            f"a one-to-one mapping of {per_class} source labels for each of {n_classes} classes "
            f"needs {per_class * n_classes}; the encoder has {n_source}. Use mapping='blm' or "
            "head='linear'."
        )
