"""Get at the outputs of components: watch them, replace them, scale the weights behind them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from skperf.backbone.modes import forward_hooks
from skperf.components.units import Component, Place, find_places, place_of

Tapping = Callable[[Tensor], Tensor | None]


@dataclass(eq=False)
class Tap:
    """A module whose output carries components."""

    part: nn.Module
    place: Place
    channels: Tensor  # (n_channels,)
    scaled: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    bias: Tensor | None = None  # (n_channels,)
    replacement: Tensor | None = None

    @property
    def dim(self) -> int:
        """Dimension of the channels in the output."""
        return self.place.dim


def make_taps(
    module: nn.Module, components: Sequence[Component], *, with_bias: bool = False
) -> list[Tap]:
    """Find the modules that carry components."""
    places = find_places(module)
    groups: dict[tuple[Place, bool], list[int]] = {}
    for position, component in enumerate(components):
        whole = component.kind == "layer"
        groups.setdefault((place_of(places, component), whole), []).append(position)
    taps = []
    for (place, whole), positions in groups.items():
        units = [-1 if whole else components[position].unit for position in positions]
        channels = _channels(place, units, positions, len(components)).to(_device(module))
        for name in place.acts_on:
            part = module.get_submodule(name)
            taps.append(
                Tap(part, place, channels, _scaled(part, place, with_bias), _bias(part, place))
            )
    return taps


def scale_weights(taps: Sequence[Tap], values: Tensor) -> None:
    """Set the weights behind taps to their original values times the gates, in place.

    Shapes: values (n_components + 1,).
    """
    done: set[int] = set()
    applied: set[tuple[int, int]] = set()
    for tap in taps:
        factors = values.index_select(0, tap.channels)
        for tensor, original, dim in tap.scaled:
            key = (id(tensor), id(tap.channels))
            if key in applied:
                continue
            shape = [1] * tensor.ndim
            shape[dim] = len(factors)
            start = original if id(tensor) not in done else tensor
            torch.mul(start, factors.view(shape), out=tensor.data)
            done.add(id(tensor))
            applied.add(key)


@contextmanager
def tapped(functions: Mapping[Tap, Tapping]) -> Iterator[None]:
    """Pass the outputs of taps through functions for a while."""
    heads: dict[int, Tapping] = {}
    with ExitStack() as stack:
        for tap, function in functions.items():
            if isinstance(tap.part, nn.MultiheadAttention):
                heads[id(tap.part.out_proj.weight)] = _both(
                    heads.get(id(tap.part.out_proj.weight)), function
                )
            else:
                stack.enter_context(forward_hooks({tap.part: _hook(function)}))
        if heads:
            stack.enter_context(_TappedHeads(heads))
        yield


class _TappedHeads(TorchFunctionMode):
    """Reach the heads of ``nn.MultiheadAttention`` before its output projection."""

    # Its `out_proj` is never called as a module, so no hook fires. Here the attention function
    # runs with the identity in place of that projection, which gives the heads side by side, and
    # the projection follows.

    def __init__(self, functions: Mapping[int, Tapping]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        attention: Any = functional.multi_head_attention_forward
        if func is not attention or id(args[11]) not in self.functions:
            return func(*args, **kwargs)
        weight, bias = args[11], args[12]
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        heads, attention_weights = func(*args[:11], identity, None, *args[13:], **kwargs)
        examples_first = heads.transpose(0, 1) if heads.ndim == 3 else heads[None]
        changed = self.functions[id(weight)](examples_first)
        if changed is not None:
            heads = changed.transpose(0, 1) if heads.ndim == 3 else changed[0]
        return functional.linear(heads, weight, bias), attention_weights


def _both(first: Tapping | None, second: Tapping) -> Tapping:
    if first is None:
        return second

    def one_after_the_other(output: Tensor) -> Tensor | None:
        between = first(output)
        return second(output if between is None else between)

    return one_after_the_other


def _hook(function: Tapping) -> Callable[..., Any]:
    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return function(output)

    return hook


def _channels(place: Place, units: list[int], positions: list[int], n_components: int) -> Tensor:
    n_channels = place.offset + place.n_units * place.width
    channels = torch.full((n_channels,), n_components)
    for unit, position in zip(units, positions, strict=True):
        start = place.offset + max(unit, 0) * place.width
        stop = n_channels if unit < 0 else start + place.width
        channels[start:stop] = position
    return channels


def _scaled(part: nn.Module, place: Place, with_bias: bool) -> list[tuple[Tensor, Tensor, int]]:
    if isinstance(part, nn.MultiheadAttention):
        weight = part.out_proj._parameters.get("weight")
        return [] if weight is None else [(weight, weight.detach().clone(), 1)]
    weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
    if weight is None:
        return []
    transposed = type(part).__name__ == "Conv1D" or type(part).__name__.startswith("ConvTranspose")
    if transposed and getattr(part, "groups", 1) > 1:
        return []
    found: list[tuple[Tensor, Tensor, int]] = [
        (weight, weight.detach().clone(), 1 if transposed else 0)
    ]
    if bias is not None and (with_bias or place.kind == "attention_head"):
        found.append((bias, bias.detach().clone(), 0))
    return found


def _bias(part: nn.Module, place: Place) -> Tensor | None:
    bias = part._parameters.get("bias")
    return None if bias is None or place.kind == "attention_head" else bias.detach()


def _device(module: nn.Module) -> torch.device:
    return next(iter(module.parameters())).device
