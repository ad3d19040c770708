"""The residual: a mix of the reprogrammed and the zero-shot representation.

References
----------
Geng and Chen, "Model Reprogramming Outperforms Fine-tuning on Out-of-distribution Data in
Text-Image Encoders" (SaTML 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Representations:
    """Embeddings of some images and of the classes, with and without the programs."""

    images: Tensor  # (n, d)
    images_zero: Tensor  # (n, d)
    classes: Tensor  # (n_classes, d)
    classes_zero: Tensor  # (n_classes, d)

    def similarities(self, alpha: float, *, renormalize: bool = False) -> Tensor:
        """Similarities of the mixed images and classes: -> (n, n_classes)."""
        images = mixed(self.images, self.images_zero, alpha, renormalize=renormalize)
        classes = mixed(self.classes, self.classes_zero, alpha, renormalize=renormalize)
        return images @ classes.T


def unit(embeddings: Tensor) -> Tensor:
    """Scale rows to unit length: embeddings (n, d) -> (n, d)."""
    # not functional.normalize, which leaves the very short rows of small networks short
    length = embeddings.norm(dim=-1, keepdim=True)
    return embeddings / length.clamp_min(torch.finfo(embeddings.dtype).tiny)


def mixed(
    reprogrammed: Tensor, zero_shot: Tensor, alpha: float, *, renormalize: bool = False
) -> Tensor:
    """Mix unit embeddings, ``(1 - alpha) u + alpha u0``: (n, d) each -> (n, d)."""
    # Where the two disagree the mix is shorter, `|mix|^2 = 1 - 2 alpha (1 - alpha) (1 - cos(u,
    # u0))`, which lowers the confidence.
    if alpha in (0, 1):
        return zero_shot if alpha else reprogrammed
    mix = (1 - alpha) * reprogrammed + alpha * zero_shot
    return unit(mix) if renormalize else mix


@dataclass(frozen=True)
class AlphaCurve:
    """What each alpha reaches on some labelled images."""

    alphas: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    def best(self) -> float:
        """Choose the alpha with the highest accuracy; of equals that with the smallest loss."""
        ranked = zip(self.accuracy, self.loss, self.alphas, strict=True)
        return min((-round(right, 6), loss, alpha) for right, loss, alpha in ranked)[2]


def alpha_curve(
    parts: Sequence[Representations],
    codes: Tensor,
    alphas: Sequence[float],
    *,
    scale: float,
    renormalize: bool = False,
    weight: Tensor | None = None,
) -> AlphaCurve:
    """Try mixes on cached embeddings; no encoder runs: codes (n,), weight (n,) of all parts."""
    weight = torch.ones(len(codes)) if weight is None else weight
    weight = weight / weight.sum()
    accuracy, loss = [], []
    for alpha in alphas:
        similarities = [part.similarities(alpha, renormalize=renormalize) for part in parts]
        logits = scale * torch.cat(similarities)
        losses = functional.cross_entropy(logits, codes, reduction="none")
        accuracy.append(float((logits.argmax(1) == codes).to(weight) @ weight))
        loss.append(float(losses @ weight.to(losses)))
    return AlphaCurve(tuple(alphas), tuple(accuracy), tuple(loss))
