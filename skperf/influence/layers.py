"""The layers that own a network's parameters, and the layout of their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skperf.backbone.parameters import Parameters
from skperf.influence.gradients import Dense, Factor, written_out

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.RMSNorm,
)
SUPPORTED = (nn.Linear, *CONVOLUTIONS, *TABLES, *_NORMS)
_FORWARDS = {kind.forward for kind in SUPPORTED}
_HELD_BY_OTHERS = (nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Place:
    """Where the rows of a batch lie in what a call of a layer takes and gives."""

    axis: int | None  # None where all rows share one input
    fold: int = 1  # entries of the axis that belong to one row
    rows_last: bool = False  # whether the entries of one row lie n apart


@dataclass(frozen=True)
class Layer:
    """Parameters that are differentiated together, and the modules that use them."""

    name: str
    sites: tuple[nn.Module, ...]  # none where they are differentiated row by row
    names: tuple[str, ...]  # of the parameters, in the network
    n_weights: int
    weight: bool = False
    bias: bool = False
    known: bool = True
    places: tuple[Place, ...] = ()  # of every call in a forward pass
    looped: bool = False  # whether rows are differentiated one after the other

    @property
    def module(self) -> nn.Module:
        """The first of the modules."""
        return self.sites[0]

    @property
    def matrix_shape(self) -> tuple[int, int] | None:
        """(n_outputs, n_inputs) where the weights are a matrix, a bias one more input."""
        if not self.sites or not self.known or not self.weight:
            return None
        if not isinstance(self.module, (nn.Linear, *CONVOLUTIONS)):
            return None
        weight = self.module.weight
        return len(weight), weight[0].numel() + self.bias


def find_layers(module: nn.Module, parameters: Parameters) -> list[Layer]:
    """Group parameters by the layers that use them."""
    # A parameter that several layers hold has one name, that of the first of them.
    named = {id(p): name for name, p in module.named_parameters() if name in parameters}
    groups: dict[tuple[str, ...], list[tuple[str, nn.Module]]] = {}
    for name, part in module.named_modules():
        own = [named[id(p)] for p in part.parameters(recurse=False) if id(p) in named]
        if own:
            groups.setdefault(tuple(own), []).append((name, part))
    seen = [name for names in groups for name in names]
    layers, alone = [], []
    for names, members in groups.items():
        if all(seen.count(name) == 1 for name in names) and _fit_together(names, members):
            name, part = members[0]
            size = sum(parameters[name].numel() for name in names)
            known = _is_known(part)
            short = {n.rpartition(".")[2] for n in names} if known else set()
            sites = tuple(site for _, site in members)
            layers.append(
                Layer(name, sites, names, size, "weight" in short, "bias" in short, known)
            )
        else:
            alone += [name for name in names if name not in alone]
    return [*layers, one_by_one(alone, parameters)] if alone else layers


def one_by_one(names: Sequence[str], parameters: Parameters, *, looped: bool = False) -> Layer:
    """Stand for parameters that are differentiated row by row."""
    size = sum(parameters[name].numel() for name in names)
    return Layer("(row by row)", (), tuple(names), size, known=False, looped=looped)


def _fit_together(names: tuple[str, ...], members: list[tuple[str, nn.Module]]) -> bool:
    parts = [part for _, part in members]
    first = parts[0]
    if not _is_known(first):
        # a part of unknown kind is differentiated by itself where it is whole and alone
        own = list(first.parameters(recurse=False))
        held = any(list(child.parameters()) for child in first.children())
        whole = len(own) == len(names) and not isinstance(first, _HELD_BY_OTHERS)
        return len(parts) == 1 and whole and not held
    tables = [part for part in parts if isinstance(part, TABLES)]
    if any(part.max_norm is not None or part.scale_grad_by_freq for part in tables):
        return False
    return len(parts) == 1 or (
        all(_is_known(part) for part in parts) and (not tables or len(names) == 1)
    )


def _is_known(part: nn.Module) -> bool:
    known = isinstance(part, SUPPORTED) and type(part).forward in _FORWARDS
    own = {name for name, _ in part.named_parameters(recurse=False)}
    return known and own <= {"weight", "bias"}


def to_vectors(layers: Sequence[Layer], gradients: Sequence[Factor], like: Parameters) -> Tensor:
    """Lay gradients out in the order of the network's parameters: -> (n, n_parameters)."""
    if not layers:
        return written_out(gradients[0])
    named: dict[str, Tensor] = {}
    for layer, factor in zip(layers, gradients, strict=True):
        named.update(_split(layer, written_out(factor), like))
    return torch.cat([named[name].flatten(1) for name in like], 1)


def from_vectors(layers: Sequence[Layer], vectors: Tensor, like: Parameters) -> list[Dense]:
    """Cut vectors (n, n_parameters) into the factors' layout, as :func:`to_vectors` joins them."""
    if not layers:
        return [Dense(vectors)]
    pieces = torch.split(vectors, [p.numel() for p in like.values()], 1)
    named = dict(zip(like, pieces, strict=True))
    return [Dense(_joined_weights(layer, named)) for layer in layers]


def _as_matrix(layer: Layer) -> bool:
    return layer.matrix_shape is not None and layer.bias


def _split(layer: Layer, matrix: Tensor, like: Parameters) -> Parameters:
    names = layer.names
    if _as_matrix(layer):
        matrix = matrix.view(len(matrix), len(like[names[1]]), -1)
        return {names[0]: matrix[:, :, :-1], names[1]: matrix[:, :, -1]}
    sizes = [like[name].numel() for name in names]
    return dict(zip(names, matrix.split(sizes, 1), strict=True))


def _joined_weights(layer: Layer, named: Parameters) -> Tensor:
    parts = [named[name] for name in layer.names]
    if _as_matrix(layer):
        bias = parts[1][:, :, None]
        return torch.cat([parts[0].view(*bias.shape[:2], -1), bias], 2).flatten(1)
    return torch.cat(parts, 1)
