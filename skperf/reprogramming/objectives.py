"""Training objectives: cross-entropy over class prompts, in-batch contrast, focal forms."""

import torch
from torch import Tensor, nn


def focal_cross_entropy(
    logits: Tensor, targets: Tensor, *, gamma: float = 0.0, scale: float = 1.0
) -> Tensor:
    """Focal loss ``-scale (1 - p)^gamma log p`` of the targets, row by row.

    Parameters
    ----------
    logits : Tensor of shape (n, m)
        Scores.
    targets : LongTensor of shape (n,)
        Columns that are right.
    gamma : float, default=0.0
        Above 0, rows that are right already count less.
    scale : float, default=1.0
        Constant factor.

    Returns
    -------
    Tensor of shape (n,)
        Cross-entropy where gamma is 0 and scale 1.

    Notes
    -----
    Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017).
    """
    logarithms = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    if gamma == 0:
        return -scale * logarithms
    return -scale * (1 - logarithms.exp()).clamp_min(0) ** gamma * logarithms


class ClassObjective(nn.Module):
    """Loss of class logits.

    Parameters
    ----------
    contrastive : bool, default=False
        In place of all classes, hold each image against the classes of the images in its
        batch, and each of those against the images. Images of one class then count as
        each other's negatives, as in the released code.
    gamma, scale : float, default=0.0, 1.0
        As in :func:`focal_cross_entropy`.
    reduction : {"mean", "none"}, default="mean"
        Whether to average over the rows.
    """

    def __init__(
        self,
        contrastive: bool = False,
        gamma: float = 0.0,
        scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.contrastive = contrastive
        self.gamma = gamma
        self.scale = scale
        self.reduction = reduction

    def forward(self, logits: Tensor, codes: Tensor) -> Tensor:
        """Compute the loss.

        Parameters
        ----------
        logits : Tensor of shape (n, n_classes)
            Class logits.
        codes : LongTensor of shape (n,)
            Classes.

        Returns
        -------
        Tensor of shape () or (n,)
            The mean, or one value a row.
        """
        if self.contrastive:
            pairs = logits[:, codes]  # (n, n): image i against the class of image j
            own = torch.arange(len(codes), device=logits.device)
            losses = (self._focal(pairs, own) + self._focal(pairs.T, own)) / 2
        else:
            losses = self._focal(logits, codes)
        return losses.mean() if self.reduction == "mean" else losses

    def _focal(self, logits: Tensor, targets: Tensor) -> Tensor:
        return focal_cross_entropy(logits, targets, gamma=self.gamma, scale=self.scale)
