"""The layers that own a network's parameters, and the layout of their gradients."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skperf.backbone.parameters import Parameters
from skperf.influence.gradients import Dense, Factor, written_out

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.RMSNorm,
)
_SUPPORTED = (nn.Linear, *CONVOLUTIONS, nn.Embedding, nn.EmbeddingBag, *_NORMS)


@dataclass(frozen=True)
class Layer:
    """A part of a network that owns parameters taken into account."""

    name: str
    module: nn.Module
    weight: bool
    bias: bool
    whole: tuple[str, ...] = ()

    @property
    def own_names(self) -> list[str]:
        """Names in the part of the parameters taken into account."""
        taken = ("weight", self.weight), ("bias", self.bias)
        return [*self.whole, *(name for name, used in taken if used)]

    @property
    def n_weights(self) -> int:
        """Parameters taken into account."""
        return sum(self.module.get_parameter(name).numel() for name in self.own_names)

    @property
    def matrix_shape(self) -> tuple[int, int] | None:
        """(n_outputs, n_inputs) where the weights are a matrix, a bias one more input."""
        if not isinstance(self.module, (nn.Linear, *CONVOLUTIONS)) or not self.weight:
            return None
        weight = self.module.weight
        return len(weight), weight[0].numel() + self.bias

    @property
    def parameter_names(self) -> list[str]:
        """Names in the network of the parameters taken into account."""
        return [_joined(self.name, name) for name in self.own_names]


def find_layers(module: nn.Module, parameters: Parameters) -> list[Layer]:
    """Find the layers that own parameters."""
    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    layers = []
    for name, part in module.named_modules():
        own = {
            n: p for n, p in part.named_parameters(recurse=False) if _joined(name, n) in parameters
        }
        if not own:
            continue
        shared = [_joined(name, n) for n, p in own.items() if owners[id(p)] > 1]
        if shared:
            raise ValueError(f"{shared[0]!r} is shared by several layers; {REFERENCE_HINT}")
        _check_supported(name, part, own)
        if _is_known(part, own):
            layers.append(Layer(name, part, "weight" in own, "bias" in own))
        else:
            layers.append(Layer(name, part, weight=False, bias=False, whole=tuple(own)))
    return layers


REFERENCE_HINT = (
    "gradients='reference' takes any network into account (row by row, slower), "
    "parameters=... leaves it out."
)


def _check_supported(name: str, part: nn.Module, own: dict[str, Any]) -> None:
    kind = type(part).__name__
    embeds = isinstance(part, nn.Embedding | nn.EmbeddingBag)
    holds_others = any(list(child.parameters()) for child in part.children())
    if isinstance(part, nn.RNNBase) or (holds_others and not _is_known(part, own)):
        raise ValueError(
            f"layer {name!r} ({kind}) has no factorised gradients: {sorted(own)} would be left "
            f"out; {REFERENCE_HINT}"
        )
    if embeds and (getattr(part, "max_norm", None) is not None or part.scale_grad_by_freq):
        raise ValueError(
            f"layer {name!r} ({kind}) renormalises its table or rescales its gradients while "
            f"it runs; {REFERENCE_HINT}"
        )


def _is_known(part: nn.Module, own: dict[str, Any]) -> bool:
    known = isinstance(part, _SUPPORTED) and type(part).forward in _FORWARDS
    return known and set(own) <= {"weight", "bias"}


_FORWARDS = {kind.forward for kind in _SUPPORTED}


def to_vectors(layers: Sequence[Layer], gradients: Sequence[Factor], like: Parameters) -> Tensor:
    """Lay gradients out in the order of the network's parameters: -> (n, n_parameters)."""
    if not layers:
        return written_out(gradients[0])
    named: dict[str, Tensor] = {}
    for layer, factor in zip(layers, gradients, strict=True):
        matrix = written_out(factor)
        named.update(_split(layer, matrix))
    return torch.cat([named[name].flatten(1) for name in like], 1)


def from_vectors(layers: Sequence[Layer], vectors: Tensor, like: Parameters) -> list[Dense]:
    """Cut vectors into the factors' layout, the inverse of :func:`to_vectors`.

    Shapes: vectors (n, n_parameters).
    """
    if not layers:
        return [Dense(vectors)]
    pieces = torch.split(vectors, [p.numel() for p in like.values()], 1)
    named = dict(zip(like, pieces, strict=True))
    return [Dense(_joined_weights(layer, named)) for layer in layers]


def _as_matrix(layer: Layer) -> bool:
    return layer.matrix_shape is not None and layer.bias


def _split(layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
    names = layer.parameter_names
    if layer.whole or len(names) == 1:
        sizes = [layer.module.get_parameter(name).numel() for name in layer.own_names]
        return dict(zip(names, matrix.split(sizes, 1), strict=True))
    n_outputs = layer.module.get_parameter("bias").numel()
    if _as_matrix(layer):
        matrix = matrix.view(len(matrix), n_outputs, -1)
        return {names[0]: matrix[:, :, :-1], names[1]: matrix[:, :, -1]}
    return {names[0]: matrix[:, :-n_outputs], names[1]: matrix[:, -n_outputs:]}


def _joined_weights(layer: Layer, named: dict[str, Tensor]) -> Tensor:
    parts = [named[name] for name in layer.parameter_names]
    if _as_matrix(layer):
        bias = parts[1][:, :, None]
        return torch.cat([parts[0].view(*bias.shape[:2], -1), bias], 2).flatten(1)
    return torch.cat(parts, 1)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
