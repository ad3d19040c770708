"""Batch normalisation with fixed statistics as the affine map that it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from skperf.backbone.batch_norm import batch_statistics_wanted


class AffineBatchNorm(TorchFunctionMode):
    """Inside, batch normalisation in evaluation mode is one multiplication and addition."""

    # The values are the same up to rounding. Torch's own backward pass also sums the gradients
    # of scale and shift, which a frozen network has no use for. Holds for the current thread
    # only and changes no module.

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace ``functional.batch_norm``, and nothing else."""
        kwargs = kwargs or {}
        if func is functional.batch_norm and not batch_statistics_wanted():
            return _affine(*args, **kwargs)
        return func(*args, **kwargs)


def _affine(
    values: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or mean is None or variance is None:
        return functional.batch_norm(values, mean, variance, weight, bias, training, momentum, eps)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1) + (1,) * (values.ndim - 2)
    return torch.addcmul(shift.view(shape), values, scale.view(shape))
