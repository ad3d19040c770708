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
    """Embeddings of some images and of the classes, with and without the programs.

    Parameters
    ----------
    images, images_zero : Tensor of shape (n, d)
        Unit embeddings of the reprogrammed and of the plain images.
    classes, classes_zero : Tensor of shape (n_classes, d)
        The same of the classes.
    """

    images: Tensor
    images_zero: Tensor
    classes: Tensor
    classes_zero: Tensor

    def similarities(self, alpha: float, *, renormalize: bool = False) -> Tensor:
        """Similarities of the mixed images and classes.

        Parameters
        ----------
        alpha : float
            0 = reprogrammed, 1 = zero-shot.
        renormalize : bool, default=False
            Whether mixes are scaled back to unit length.

        Returns
        -------
        Tensor of shape (n, n_classes)
            Cosines, up to the lengths of the mixes.
        """
        images = mixed(self.images, self.images_zero, alpha, renormalize=renormalize)
        classes = mixed(self.classes, self.classes_zero, alpha, renormalize=renormalize)
        return images @ classes.T


def mixed(
    reprogrammed: Tensor, zero_shot: Tensor, alpha: float, *, renormalize: bool = False
) -> Tensor:
    """Mix unit embeddings, ``(1 - alpha) u + alpha u0``.

    Where the two disagree the mix is shorter, ``|mix|^2 = 1 - 2 alpha (1 - alpha)
    (1 - cos(u, u0))``, which lowers the confidence.

    Parameters
    ----------
    reprogrammed, zero_shot : Tensor of shape (n, d)
        Of unit length.
    alpha : float
        Share of the second.
    renormalize : bool, default=False
        Whether to scale the mix back to unit length.

    Returns
    -------
    Tensor of shape (n, d)
        At alpha 0 and 1 the embeddings themselves.
    """
    if alpha in (0, 1):
        return zero_shot if alpha else reprogrammed
    mix = (1 - alpha) * reprogrammed + alpha * zero_shot
    return functional.normalize(mix, dim=-1) if renormalize else mix


@dataclass(frozen=True)
class AlphaCurve:
    """What each alpha reaches on some labelled images.

    Parameters
    ----------
    alphas : tuple of float
        The mixes.
    accuracy, loss : tuple of float
        Weighted share of right answers and mean cross-entropy at each.
    """

    alphas: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    def best(self) -> float:
        """Choose the alpha with the highest accuracy; of equals that with the smallest loss.

        Returns
        -------
        float
            A few rows give many alphas the same accuracy; the loss tells these apart.
        """
        ranked = zip(self.accuracy, self.loss, self.alphas, strict=True)
        return min((-round(right, 6), loss, alpha) for right, loss, alpha in ranked)[2]


def alpha_curve(
    representations: Representations,
    codes: Tensor,
    alphas: Sequence[float],
    *,
    scale: float,
    renormalize: bool = False,
    weight: Tensor | None = None,
) -> AlphaCurve:
    """Try mixes on cached embeddings; no encoder runs.

    Parameters
    ----------
    representations : Representations
        Of the labelled images.
    codes : LongTensor of shape (n,)
        Their classes.
    alphas : sequence of float
        Mixes to try.
    scale : float
        From similarities to logits.
    renormalize : bool, default=False
        As in :func:`mixed`.
    weight : Tensor of shape (n,), optional
        Weights of the images.

    Returns
    -------
    AlphaCurve
        Accuracy and cross-entropy at each alpha.
    """
    weight = torch.ones(len(codes)) if weight is None else weight
    weight = weight / weight.sum()
    accuracy, loss = [], []
    for alpha in alphas:
        logits = scale * representations.similarities(alpha, renormalize=renormalize)
        losses = functional.cross_entropy(logits, codes, reduction="none")
        accuracy.append(float((logits.argmax(1) == codes).to(weight) @ weight))
        loss.append(float(losses @ weight.to(losses)))
    return AlphaCurve(tuple(alphas), tuple(accuracy), tuple(loss))
