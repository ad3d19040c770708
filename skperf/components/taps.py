"""Get at activations and parameters of a network of ours: watch them, put others in their place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.components.units import Spot

Tapping = Callable[[Tensor, int], Tensor | None]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
vmapped = torch._C._functorch.is_functorch_wrapped_tensor
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@contextmanager
def tapped(module: nn.Module, functions: Mapping[Spot, Sequence[Tapping]]) -> Iterator[None]:
    """Pass activations through functions of the tensor and the number of the call in this pass."""
    handles = []
    calls: dict[Spot, int] = {}

    def apply(spot: Spot, tensor: Tensor) -> Tensor:
        number = calls.get(spot, 0)
        calls[spot] = number + 1
        for function in functions[spot]:
            changed = function(tensor, number)
            tensor = tensor if changed is None else changed
        return tensor

    def after(spot: Spot) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            return with_first(output, lambda tensor: apply(spot, tensor))

        return hook

    def before(spot: Spot) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            args, kwargs = with_first((args, kwargs), lambda tensor: apply(spot, tensor))
            return args, kwargs

        return hook

    def anew(_: nn.Module, args: Any) -> None:
        calls.clear()

    try:
        handles.append(module.register_forward_pre_hook(anew, prepend=True))
        for spot in functions:
            part = module.get_submodule(spot.module)
            if spot.side == "input":
                handles.append(part.register_forward_pre_hook(before(spot), with_kwargs=True))
            else:
                handles.append(part.register_forward_hook(after(spot)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def captured(network: Network, rows: Rows, spots: Iterable[Spot]) -> dict[Spot, list[Tensor]]:
    """Activations of a pass, one for each call, as they were before anybody wrote to them."""
    # of what lives within torch.vmap alone, that there is one: a tensor without axes
    made: dict[Spot, list[Tensor]] = {spot: [] for spot in spots}

    def keep(spot: Spot) -> Tapping:
        return lambda tensor, call: made[spot].append(
            torch.empty(()) if vmapped(tensor) else tensor.detach().clone()
        )

    with torch.no_grad(), tapped(network.module, {s: [keep(s)] for s in made if s.is_activation}):
        network(rows)
    return made


def with_first(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Change the first floating tensor in what a module takes or returns."""
    done = False

    def walk(item: Any) -> Any:
        nonlocal done
        if done:
            return item
        if isinstance(item, Tensor):
            if not item.is_floating_point():
                return item
            done = True
            return function(item)
        if isinstance(item, dict):
            changed = {name: walk(entry) for name, entry in item.items()}
            if type(item) is dict or not done:
                return changed if type(item) is dict else item
            for name, entry in changed.items():
                item[name] = entry
            return item
        if isinstance(item, tuple | list):
            entries = [walk(entry) for entry in item]
            named = hasattr(item, "_fields")
            return type(item)(*entries) if named else type(item)(entries)
        return item

    return walk(value)


def first_tensor(value: Any) -> Tensor | None:
    """Find the first floating tensor in what a module takes or returns."""
    found: list[Tensor] = []
    with_first(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found[0] if found else None


class OpenAttention(nn.MultiheadAttention):
    """Torch's attention that calls its output projection as a module, so that hooks fire."""

    # What is projected are the heads side by side: torch's own code runs with the identity in
    # place of the projection, which then follows.
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend as the parent does."""
        projection = self._modules["out_proj"]
        assert projection is not None
        identity, weight = self.__dict__["_identity"], projection._parameters["weight"]
        assert weight is not None
        if identity.weight.dtype != weight.dtype or identity.weight.device != weight.device:
            identity = self.__dict__["_identity"] = identity.to(weight)  # cast or moved since
        self._modules["out_proj"] = identity
        try:
            heads, weights = super().forward(*args, **kwargs)
        finally:
            self._modules["out_proj"] = projection
        return projection(heads), weights


def opened_attention(module: nn.Module) -> nn.Module:
    """Let the torch attention in a view of ours call its projections."""
    for part in module.modules():
        if type(part) is nn.MultiheadAttention:
            like = part.out_proj.weight
            identity = nn.Linear(len(like), len(like), dtype=like.dtype, device="meta")
            identity.weight = nn.Parameter(
                torch.eye(len(like), dtype=like.dtype, device=like.device), requires_grad=False
            )
            identity.bias = nn.Parameter(torch.zeros_like(like[0]), requires_grad=False)
            part.__dict__["_identity"] = identity
            part.__class__ = OpenAttention
    return module


def row_layer(part: nn.Module) -> tuple[str, int, int, int] | None:
    """Kind, number of outputs, number of inputs and channel dimension of a layer with rows."""
    if isinstance(part, CONVOLUTIONS + TRANSPOSED):
        return "conv_filter", part.out_channels, part.in_channels, -1 - len(part.kernel_size)
    if isinstance(part, nn.Linear) or _is_linear(part):
        return "neuron", int(part.out_features), int(part.in_features), -1  # type: ignore[arg-type]
    if is_transposed_linear(part):
        weight = part._parameters["weight"]
        assert weight is not None
        return "neuron", int(weight.shape[1]), int(weight.shape[0]), -1
    return None


def _is_linear(part: nn.Module) -> bool:
    """Whether a layer of another class holds the weight of a linear map and calls it that."""
    weight = part._parameters.get("weight")
    shape = (getattr(part, "out_features", None), getattr(part, "in_features", None))
    return weight is not None and tuple(weight.shape) == shape


def is_transposed_linear(part: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight has a column for each output."""
    return type(part).__name__ == "Conv1D" and hasattr(part, "nf")


def weight_rows(part: nn.Module, name: str) -> Spot | None:
    """Slices of a layer's weight that make its outputs, if it has such."""
    if part._parameters.get("weight") is None:
        return None
    if isinstance(part, TRANSPOSED):
        return Spot(name, "weight", 1) if part.groups == 1 else None
    return Spot(name, "weight", 1 if is_transposed_linear(part) else 0)


def weight_columns(part: nn.Module, name: str) -> Spot | None:
    """Slices of a layer's weight that read its inputs, if it has such."""
    if part._parameters.get("weight") is None or getattr(part, "groups", 1) > 1:
        return None
    transposed = is_transposed_linear(part) or isinstance(part, TRANSPOSED)
    return Spot(name, "weight", 0 if transposed else 1)
