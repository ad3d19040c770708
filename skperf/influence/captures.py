"""Watch a network's layers at work: what goes in, and the gradient that comes back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional

from skperf.backbone.modes import differentiating, forward_hooks
from skperf.backbone.network import Network
from skperf.backbone.parameters import substituted
from skperf.backbone.rows import Rows
from skperf.influence.gradients import Dense, Factor, Gradients, Outer, Tokens, folded, merged
from skperf.influence.layers import CONVOLUTIONS, TABLES, Layer, Place
from skperf.influence.mapping import mapped, plain

_BATCH_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_FIRST = Place(0)
HINT = (
    "gradients='reference' takes any network into account (row by row, slower), "
    "parameters=... leaves it out."
)


class Unusual(ValueError):
    """A layer whose gradients do not factorise over the rows."""

    def __init__(self, layer: Layer, reason: str) -> None:
        super().__init__(f"layer {layer.name!r} {reason}; {HINT}")
        self.layer = layer
        self.reason = reason


@dataclass
class Tape:
    """One forward pass, ready to pull gradients back through."""

    outputs: Tensor  # (n, ...)
    pull: Callable[[Tensor], Gradients]


Recorder = Callable[[Network, Rows], Tape]


@contextmanager
def recording(module: nn.Module) -> Iterator[None]:
    """Check that rows have gradients of their own, and compute them."""
    for name, part in module.named_modules():
        unfrozen = getattr(part, "track_running_stats", True) is False
        batch_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        depends = isinstance(part, _BATCH_DEPENDENT) and (
            part.training or (batch_norm and unfrozen)
        )
        if depends or getattr(part, "scale_grad_by_freq", False):
            raise ValueError(
                f"layer {name!r} ({type(part).__name__}) is in training mode, or normalises by "
                "the batch (or scales): a row's gradient would depend on other rows or on chance."
            )
    with differentiating():
        yield


@dataclass
class Call:
    """What a hook saw when a layer ran."""

    site: nn.Module
    inputs: Tensor
    extra: tuple[Any, ...]
    outputs: Tensor
    edge: GradientEdge
    place: Place


@dataclass
class Watch:
    """What hooks saw during one forward pass."""

    n: int
    calls: dict[str, list[Call]] = field(default_factory=dict)

    def hook(self, layer: Layer) -> Callable[..., Any]:
        """Make the hook of a layer."""
        calls = self.calls.setdefault(layer.name, [])

        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
            simple = args and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            if not simple or (not layer.known and len(args) != 1):
                raise Unusual(layer, "does not turn one tensor into another")
            if output.is_inference():
                raise Unusual(layer, "runs in torch.inference_mode()")
            place = layer.places[len(calls)] if len(calls) < len(layer.places) else _FIRST
            inputs, plain = args[0].detach(), output.detach()
            if place.axis is None:
                # every row gets a copy of what all of them share, and so a gradient of its own
                inputs, output = (_for_each(tensor, self.n) for tensor in (inputs, output))
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            edge = get_gradient_edge(output)
            calls.append(Call(module, inputs, args[1:], plain, edge, place))
            # in-place activations may not overwrite a leaf
            return output.clone() if output.is_leaf else output

        return seen


def _for_each(tensor: Tensor, n: int) -> Tensor:
    single = tensor if tensor.ndim and len(tensor) == 1 else tensor[None]
    return single.expand(n, *single.shape[1:])


def record(network: Network, inputs: Rows, layers: Sequence[Layer]) -> Tape:
    """Run a network and keep what gradients of rows need: inputs (n, ...)."""
    watch = Watch(len(inputs))
    hooked = [layer for layer in layers if layer.sites]
    # with a gradient asked for at the inputs no layer's output is a leaf, but a backbone below
    # the first of the layers would remember its activations for nothing
    below = next(network.module.parameters(), None)
    from_start = any(below is own for layer in hooked for own in layer.module.parameters())

    with forward_hooks({site: watch.hook(layer) for layer in hooked for site in layer.sites}):
        outputs = network(
            inputs.map(lambda x: x.detach().requires_grad_(from_start and x.is_floating_point()))
        )
    for layer in hooked:
        n_calls = len(watch.calls[layer.name])
        if n_calls != (len(layer.places) or 1):
            raise Unusual(layer, f"ran {n_calls} times, not {len(layer.places) or 1} as before")

    _check_folds(network, inputs, watch, hooked)
    calls = [(layer, call) for layer in hooked for call in watch.calls[layer.name]]

    def pull(cotangent: Tensor) -> Gradients:
        edges = [call.edge for _, call in calls]
        returned: tuple[Tensor, ...] = ()
        if edges:
            returned = torch.autograd.grad(
                outputs, edges, cotangent, retain_graph=True, materialize_grads=True
            )
        _check_finite([layer.name for layer, _ in calls], returned)
        parts: dict[str, list[Factor]] = {}
        for (layer, call), gradient in zip(calls, returned, strict=True):
            parts.setdefault(layer.name, []).append(_of_call(layer, call, gradient, watch.n))
        factors = [
            merged(parts[layer.name])
            if layer.sites
            else Dense(alone(network, inputs, layer, cotangent))
            for layer in layers
        ]
        # parts may compute in types of their own
        return [
            factor.with_tensors(
                *(t.to(outputs.dtype) if t.is_floating_point() else t for t in factor.tensors)
            )
            for factor in factors
        ]

    return Tape(outputs, pull)


def watched(network: Network, rows: Rows, layers: Sequence[Layer]) -> dict[Any, list[Any]]:
    """Say what goes into each call of each layer, and the shape of what comes out."""
    seen: dict[Any, list[Any]] = {layer.names: [] for layer in layers}

    def look(names: tuple[str, ...]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            simple = args and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            seen[names].append((args[0].clone(), output.shape) if simple else None)

        return hook

    with (
        torch.no_grad(),
        forward_hooks({site: look(layer.names) for layer in layers for site in layer.sites}),
    ):
        network(rows)
    return seen


def same_rows(one: Tensor, two: Tensor, place: Place, order: Tensor) -> bool:
    """Compare what went into a call with that of its rows in another order."""
    first, second = (_by_row(inputs, place) for inputs in (one, two))
    away = (first[order] - second).abs().max()
    return bool(away <= 1e-3 * first.abs().max().clamp_min(1e-30))


def _by_row(inputs: Tensor, place: Place) -> Tensor:
    """Lay a call's inputs out row by row: -> (n, fold, ...)."""
    assert place.axis is not None
    inputs = inputs.movedim(place.axis, 0).double()
    if place.rows_last:
        return inputs.unflatten(0, (place.fold, -1)).transpose(0, 1)
    return inputs.unflatten(0, (-1, place.fold))


def _check_folds(network: Network, inputs: Rows, watch: Watch, layers: Sequence[Layer]) -> None:
    """Run a batch in another order: entries of one row that are those of others show."""
    # rows of unequal lengths without padding come to as many entries as rows of equal ones
    folded = [layer for layer in layers if any(place.fold > 1 for place in layer.places)]
    if not folded or len(inputs) == 1:
        return
    order = torch.arange(len(inputs)).flip(0)
    again = watched(network, inputs[order], folded)
    for layer in folded:
        for call, other in zip(watch.calls[layer.name], again[layer.names], strict=True):
            place, shape = call.place, call.inputs.shape
            if place.fold == 1 or shape[place.axis or 0] != len(inputs) * place.fold:
                continue
            if other[0].shape != shape or not same_rows(call.inputs, other[0], place, order):
                raise Unusual(layer, "has entries of a row elsewhere than where some were tried")


def alone(network: Network, inputs: Rows, layer: Layer, cotangent: Tensor) -> Tensor:
    """Differentiate row by row, whatever the layers: cotangent (n, ...) -> (n, n_weights)."""
    own = {name: network.module.get_parameter(name).detach() for name in layer.names}

    def gradient(row: Rows, slope: Tensor) -> Tensor:
        single = row.map(lambda leaf: leaf[None])
        if layer.looped:
            # some kernels, such as those of packed sequences, take no tensors of torch.func
            leaves = {name: value.detach().requires_grad_() for name, value in own.items()}
            # what is checkpointed runs again in the backward pass, and wants the same leaves
            with torch.enable_grad(), substituted(network.module, leaves):
                output = network(single)[0]
                if not output.requires_grad:  # of the layer, as inside torch.inference_mode()
                    return torch.cat([torch.zeros_like(v).reshape(-1) for v in own.values()])
                found = torch.autograd.grad(
                    output, list(leaves.values()), slope, materialize_grads=True, allow_unused=True
                )
            return torch.cat([part.reshape(-1) for part in found])
        _, pull_back, *_ = vjp(lambda values: network(single, values)[0], own)
        (gradients,) = pull_back(slope)
        return torch.cat([part.reshape(-1) for part in gradients.values()])

    values: Tensor = mapped(gradient, inputs, cotangent, chunk_size=64, looped=layer.looped)
    _check_finite([layer.name], [values])
    return values.detach()


def _check_finite(names: Sequence[str], gradients: Sequence[Tensor]) -> None:
    if not gradients:
        return
    if torch.isfinite(torch.stack([gradient.sum() for gradient in gradients]).sum()):
        return
    for name, gradient in zip(names, gradients, strict=True):
        finite = torch.isfinite(gradient).flatten(1).all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"the gradient at layer {name!r} is not finite, first at row {row} of the batch."
            )


def _of_call(layer: Layer, call: Call, gradient: Tensor, n: int) -> Factor:
    place, inputs = call.place, call.inputs
    axis = place.axis or 0
    if inputs.shape[axis] != n * place.fold or gradient.shape[axis] != n * place.fold:
        raise Unusual(layer, "has its rows elsewhere than in the batches before")
    if axis:
        inputs, gradient = inputs.movedim(axis, 0), gradient.movedim(axis, 0)
    if not layer.known:
        return _whole(layer, inputs, call.outputs, gradient)
    factor = _factor(layer, call.site, inputs, gradient, call.extra)
    return folded(factor, n, rows_last=place.rows_last)


def _whole(layer: Layer, inputs: Tensor, outputs: Tensor, gradient: Tensor) -> Dense:
    """Differentiate a part of an unknown kind once more, row by row."""
    module = layer.module
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}

    def pull(row: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        output, back, *_ = vjp(lambda values: functional_call(module, values, (row[None],)), own)
        (gradients,) = back(slope[None])
        return output[0], torch.cat([part.reshape(-1) for part in gradients.values()])

    try:
        with plain():
            again, values = vmap(pull, chunk_size=64)(inputs, gradient)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:  # or what is called with more than its input
        message = str(error).splitlines()[0]
        raise Unusual(layer, f"cannot be differentiated row by row: {message}") from error
    if not torch.allclose(again, outputs, rtol=1e-3, atol=1e-3 * float(outputs.abs().max())):
        raise Unusual(layer, "gives a row another output alone than in its batch")
    return Dense(values.detach())


def _factor(
    layer: Layer, module: nn.Module, inputs: Tensor, gradient: Tensor, extra: tuple[Any, ...]
) -> Factor:
    if isinstance(module, nn.Linear):
        return _linear(layer, inputs, gradient)
    if isinstance(module, CONVOLUTIONS):
        return _convolution(layer, module, inputs, gradient)
    if isinstance(module, TABLES):
        return _tokens(layer, module, inputs, gradient, extra)
    return _norm(layer, module, inputs, gradient)


def _linear(layer: Layer, inputs: Tensor, gradient: Tensor) -> Factor:
    if inputs.ndim > 2:
        inputs, gradient = (t.reshape(len(t), -1, t.shape[-1]) for t in (inputs, gradient))
    if not layer.weight:
        return Dense(gradient.reshape(len(gradient), -1, gradient.shape[-1]).sum(1))
    if layer.bias:
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
    if inputs.ndim == 3 and not _is_short(inputs.shape[1], inputs.shape[2], gradient.shape[2]):
        return Dense((gradient.mT @ inputs).flatten(1))
    return Outer(inputs, gradient)


def _is_short(n_positions: int, n_inputs: int, n_outputs: int) -> bool:
    return n_positions**2 * (n_inputs + n_outputs) < n_inputs * n_outputs


def _convolution(
    layer: Layer, conv: nn.Conv1d | nn.Conv2d, inputs: Tensor, gradient: Tensor
) -> Factor:
    n, n_outputs = len(gradient), gradient.shape[1]
    gradient = gradient.reshape(n, n_outputs, -1)  # (n, outputs, positions)
    if not layer.weight:
        return Dense(gradient.sum(-1))
    patches = _patches(conv, inputs)  # (n, groups * inputs, positions)
    n_inputs = conv.weight[0].numel()
    if conv.groups == 1 and _is_short(gradient.shape[2], n_inputs + layer.bias, n_outputs):
        if layer.bias:
            patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
        return Outer(patches.mT.contiguous(), gradient.mT.contiguous())
    values = gradient.new_empty(n, n_outputs, n_inputs + layer.bias)
    grouped = gradient.reshape(n * conv.groups, n_outputs // conv.groups, -1)
    products = torch.bmm(grouped, patches.reshape(n * conv.groups, n_inputs, -1).mT)
    values[:, :, :n_inputs] = products.view(n, n_outputs, n_inputs)
    if layer.bias:
        values[:, :, -1] = gradient.sum(-1)
    return Dense(values.flatten(1))


def _patches(conv: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    around = list(conv._reversed_padding_repeated_twice)
    if any(around):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        inputs = functional.pad(inputs, around, mode=mode)
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if isinstance(conv, nn.Conv1d):
        inputs = inputs.unsqueeze(2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    return functional.unfold(inputs, kernel, dilation=dilation, stride=stride)


def _tokens(
    layer: Layer, module: Any, indices: Tensor, gradient: Tensor, extra: tuple[Any, ...]
) -> Factor:
    """Read the gradient of a table, summed or averaged over the tokens of a row for a bag."""
    bag = isinstance(module, nn.EmbeddingBag)
    plain = not any(given is not None for given in extra)
    if bag and (indices.ndim != 2 or module.mode == "max" or not plain):
        raise Unusual(layer, "is not called with tokens (n, length), a mean or sum, and no more")
    indices = indices.reshape(len(indices), -1)
    if module.padding_idx is not None:
        indices = indices.masked_fill(indices == module.padding_idx, -1)
    if not bag:
        return Tokens(indices, gradient.reshape(*indices.shape, -1), module.num_embeddings)
    share = (indices >= 0).to(gradient.dtype)
    if module.mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp_min(1)
    return Tokens(indices, share[:, :, None] * gradient[:, None, :], module.num_embeddings)


def _norm(layer: Layer, module: Any, inputs: Tensor, gradient: Tensor) -> Factor:
    n, own = len(inputs), module.weight if module.weight is not None else module.bias
    last = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape, axis = ((n, -1, own.numel()), 1) if last else ((n, own.numel(), -1), 2)
    parts = []
    if layer.weight:
        parts.append((gradient * _normalised(module, inputs)).reshape(shape).sum(axis))
    if layer.bias:
        parts.append(gradient.reshape(shape).sum(axis))
    return Dense(torch.cat(parts, 1))


def _normalised(module: Any, inputs: Tensor) -> Tensor:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return functional.batch_norm(
            inputs, module.running_mean, module.running_var, training=False, eps=module.eps
        )
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)
    uses_batch = not module.track_running_stats
    return functional.instance_norm(
        inputs, module.running_mean, module.running_var, use_input_stats=uses_batch, eps=module.eps
    )
