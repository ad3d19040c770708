"""Batch normalisation with fixed statistics as the affine map that it is."""

import torch
from torch import Tensor
from torch.nn import functional

from skperf.backbone.batch_norm import batch_statistics_wanted


# Torch's own backward pass also sums the gradients of scale and shift, which a frozen network has
# no use for.
def affine_batch_norm(
    values: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do ``functional.batch_norm``, in evaluation mode by one multiplication and addition."""
    if training or mean is None or variance is None or batch_statistics_wanted():
        return functional.batch_norm(values, mean, variance, weight, bias, training, momentum, eps)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1) + (1,) * (values.ndim - 2)
    return torch.addcmul(shift.view(shape), values, scale.view(shape))
