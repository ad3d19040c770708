"""Training objectives: cross-entropy over class prompts, in-batch contrast, focal forms."""

from functools import partial

import torch
from torch import Tensor, nn


def focal_cross_entropy(
    logits: Tensor, targets: Tensor, *, gamma: float = 0.0, scale: float = 1.0
) -> Tensor:
    """Loss ``-scale (1 - p)^gamma log p`` of targets (n,): logits (n, m) -> (n,)."""
    logarithms = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    if gamma == 0:
        return -scale * logarithms
    return -scale * (1 - logarithms.exp()).clamp_min(0) ** gamma * logarithms


class ClassObjective(nn.Module):
    """Loss of class logits."""

    def __init__(self, contrastive: bool = False, gamma: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.contrastive = contrastive
        self.gamma = gamma
        self.scale = scale

    def forward(self, logits: Tensor, codes: Tensor) -> Tensor:
        """Compute the losses: logits (n, n_classes), codes (n,) -> (n,)."""
        focal = partial(focal_cross_entropy, gamma=self.gamma, scale=self.scale)
        if not self.contrastive:
            return focal(logits, codes)
        pairs = logits[:, codes]  # (n, n): image i against the class of image j
        own = torch.arange(len(codes), device=logits.device)
        return (focal(pairs, own) + focal(pairs.T, own)) / 2
