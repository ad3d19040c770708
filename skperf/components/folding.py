"""A private copy of a network that runs faster and computes the same."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from skperf.backbone.modes import forward_hooks, untouched
from skperf.backbone.network import Network

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMALISERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Trace:
    """What happened during one forward pass."""

    order: list[nn.Module]
    followers: dict[nn.Module, nn.Module]
    floats: int


def trace(network: Network, inputs: Tensor) -> Trace:
    """Watch one forward pass: inputs (n, ...)."""
    order: list[nn.Module] = []
    made: dict[int, nn.Module] = {}
    kept: list[Tensor] = []
    pairs: dict[nn.Module, nn.Module] = {}

    def record(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(part, _NORMALISERS) and id(args[0]) in made:
            pairs[made[id(args[0])]] = part
        order.append(part)
        if isinstance(output, Tensor):
            made[id(output)] = part
            kept.append(output)

    leaves = [part for part in network.module.modules() if not list(part.children())]
    with untouched(network.module), torch.no_grad(), forward_hooks(dict.fromkeys(leaves, record)):
        network(inputs)
    followers = {
        layer: norm
        for layer, norm in pairs.items()
        if order.count(layer) == 1 and order.count(norm) == 1
    }
    return Trace(order, followers, sum(output.numel() for output in kept) // max(len(inputs), 1))


def private_copy(network: Network, inputs: Tensor) -> tuple[Network, bool]:
    """Copy a network for work on its weights: inputs (n, ...)."""
    try:
        module = deepcopy(network.module)
    except (RuntimeError, TypeError):
        return network, False
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for part in module.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    if any(isinstance(part, nn.Conv2d) for part in module.modules()):
        _reorder(module, torch.channels_last)
        try:
            with untouched(module), torch.no_grad():
                replace(network, module=module)(inputs)
        except RuntimeError:  # its own Tensor.view insists on the usual order
            _reorder(module, torch.contiguous_format)
    return replace(network, module=module), True


def _reorder(module: nn.Module, order: torch.memory_format) -> None:
    module.to(memory_format=order)  # type: ignore[call-overload]


def fold(network: Network, followers: dict[nn.Module, nn.Module]) -> None:
    """Merge batch normalisations into the layers before them, in place."""
    # With `y = gamma (w x + b - mean) / sd + beta` the rows of `w` are scaled by `gamma / sd`,
    # so zeroing a row before or after folding leaves the same constant.
    parents = {
        child: (parent, name)
        for parent in network.module.modules()
        for name, child in parent.named_children()
    }
    for layer, norm in followers.items():
        if not isinstance(layer, _FOLDABLE) or not isinstance(norm, _NORMALISERS):
            continue
        if (
            norm.running_mean is None
            or norm.running_var is None
            or "weight" not in layer._parameters
        ):
            continue
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        shift = 0 if norm.bias is None else norm.bias
        weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        layer.bias = nn.Parameter((bias * scale + shift).detach(), requires_grad=False)
        parent, name = parents[norm]
        setattr(parent, name, nn.Identity())
