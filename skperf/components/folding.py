"""Merge batch normalisations into the layers before them, in a view of ours."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.backbone.views import view

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMALISERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MOST_BYTES = 64 * 2**20
"""Larger networks keep the weights that they share with the user's own."""


def followers_of(
    module: nn.Module, pairs: Mapping[str, str], n_calls: Mapping[str, int]
) -> dict[str, str]:
    """Layers and the batch normalisations that take their outputs, where nobody shares either."""
    parts = dict(module.named_modules(remove_duplicate=False))
    holders: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    followers = {}
    for layer, norm in pairs.items():
        one, other = parts[layer], parts[norm]
        if not isinstance(one, _FOLDABLE) or not isinstance(other, _NORMALISERS):
            continue
        tensors = [one._parameters.get("weight"), one._parameters.get("bias")]
        tensors += list(other._parameters.values())
        shared = any(tensor is not None and holders[id(tensor)] > 1 for tensor in tensors)
        # hooks are part of the network, and would go with the normalisation
        shared |= any(part._forward_hooks or part._forward_pre_hooks for part in (one, other))
        known = tensors[0] is not None and other.running_mean is not None
        if known and not shared and n_calls[layer] == 1 and n_calls[norm] == 1:
            followers[layer] = norm
    return followers


def folds_exactly(network: Network, followers: Mapping[str, str], few: Rows) -> bool:
    """Whether folding changes nothing: a layer's output may be used beside its normalisation."""
    folded = view(network.module)
    fold(folded, followers)
    with torch.no_grad():
        before, after = network(few), replace(network, module=folded)(few)
    return bool(((before - after).abs() <= 1e-4 * before.abs().max()).all())


def is_small(module: nn.Module) -> bool:
    """Whether faster copies of the weights may be held beside the shared ones."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) <= _MOST_BYTES


def in_image_order(network: Network, few: Rows) -> None:
    """Keep the weights of convolutions in the order that is fastest on a CPU: few (n, ...)."""
    module = network.module
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return
    _reorder(module, torch.channels_last)
    try:
        with torch.no_grad():
            network(few)
    except RuntimeError:  # its own Tensor.view insists on the usual order
        _reorder(module, torch.contiguous_format)


def _reorder(module: nn.Module, order: torch.memory_format) -> None:
    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None and own.ndim == 4:
                # contiguous() would leave as they are the strides of a single input channel
                copy = own.detach().to(memory_format=order, copy=True)
                part._parameters[name] = done.setdefault(
                    id(own), nn.Parameter(copy, requires_grad=False)
                )


def fold(module: nn.Module, followers: Mapping[str, str]) -> None:
    """Merge batch normalisations into the layers before them; no weight is written to."""
    # With `y = gamma (w x + b - mean) / sd + beta` the rows of `w` are scaled by `gamma / sd`,
    # so zeroing a row before or after folding leaves the same constant.
    for layer_name, norm_name in followers.items():
        layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
        assert isinstance(norm, _NORMALISERS)
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        weight, own = layer._parameters["weight"], layer._parameters.get("bias")
        assert isinstance(weight, Tensor)
        bias = -norm.running_mean if own is None else own - norm.running_mean
        shift = 0 if norm.bias is None else norm.bias
        scaled = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        layer._parameters["weight"] = nn.Parameter(scaled.detach(), requires_grad=False)
        folded = (bias * scale + shift).detach()
        layer._parameters["bias"] = nn.Parameter(folded, requires_grad=False)
        norm.__dict__["forward"] = nn.Identity().forward  # others may read its tensors
