"""Watch a network's layers at work: what goes in, and the gradient that comes back."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn import functional

from skperf.backbone.modes import forward_hooks, untouched
from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters
from skperf.influence.gradients import Dense, Factor, Gradients, Outer, Tokens
from skperf.influence.layers import CONVOLUTIONS, REFERENCE_HINT, Layer

_BATCH_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


@dataclass
class Tape:
    """One forward pass, ready to pull gradients back through."""

    logits: Tensor  # (n, n_classes)
    pull: Callable[[Tensor], Gradients]


Recorder = Callable[[Network, Tensor], Tape]


@contextmanager
def recording(module: nn.Module) -> Iterator[None]:
    """Open a network for per-row gradients."""
    with untouched(module), torch.enable_grad():
        for name, part in module.named_modules():
            unfrozen = getattr(part, "track_running_stats", True) is False
            batch_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
            if isinstance(part, _BATCH_DEPENDENT) and (part.training or (batch_norm and unfrozen)):
                raise ValueError(
                    f"layer {name!r} ({type(part).__name__}) is in training mode or normalises by "
                    "the batch: a row's gradient would depend on the other rows or on chance."
                )
        yield


@dataclass
class _Watch:
    """What hooks saw during one forward pass."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    edges: dict[str, GradientEdge] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def hook(self, layer: Layer) -> Callable[..., Any]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            self.calls[layer.name] += 1
            if layer.whole:
                _check_simple(layer, args, output)
                self.outputs[layer.name] = output.detach()
            self.inputs[layer.name] = args[0].detach()
            self.arguments[layer.name] = args[1:]
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            self.edges[layer.name] = get_gradient_edge(output)
            # in-place activations may not overwrite a leaf
            return output.clone() if output.is_leaf else output

        return seen


def record(network: Network, inputs: Tensor, layers: Sequence[Layer]) -> Tape:
    """Run a network and keep what factorised gradients need: inputs (n, ...)."""
    watch = _Watch()
    # with a gradient asked for at the inputs no layer's output is a leaf, but a backbone below
    # the first of the layers would remember its activations for nothing
    below = next(network.module.parameters(), None)
    from_start = any(below is own for layer in layers for own in layer.module.parameters())
    with forward_hooks({layer.module: watch.hook(layer) for layer in layers}):
        logits = network(inputs.detach().requires_grad_(from_start and inputs.is_floating_point()))
    for layer in layers:
        if watch.calls[layer.name] != 1:
            raise ValueError(
                f"layer {layer.name!r} ran {watch.calls[layer.name]} times in one forward pass, "
                f"expected once: its weights are used twice, or outside the layer; {REFERENCE_HINT}"
            )

    def pull(cotangent: Tensor) -> Gradients:
        edges = [watch.edges[layer.name] for layer in layers]
        returned = torch.autograd.grad(
            logits, edges, cotangent, retain_graph=True, materialize_grads=True
        )
        _check_finite([layer.name for layer in layers], returned)
        gradients = []
        for layer, gradient in zip(layers, returned, strict=True):
            seen = watch.inputs[layer.name]
            if layer.whole:
                factor: Factor = _whole(layer, seen, watch.outputs[layer.name], gradient)
            else:
                factor = _factor(layer, seen, gradient, watch.arguments[layer.name])
            gradients.append(factor)
        return gradients

    return Tape(logits, pull)


def record_reference(network: Network, inputs: Tensor, parameters: Parameters) -> Tape:
    """Run a network and pull back with ``torch.func``, whatever its layers: inputs (n, ...)."""

    def logits_of(values: Parameters, row: Tensor) -> Tensor:
        outputs = functional_call(network.module, values, (row[None],))
        return (outputs if network.readout is None else network.readout(outputs))[0]

    def gradient(row: Tensor, cotangent: Tensor) -> Tensor:
        _, pull_back, *_ = vjp(lambda values: logits_of(values, row), parameters)
        (gradients,) = pull_back(cotangent)
        return torch.cat([part.reshape(-1) for part in gradients.values()])

    def pull(cotangent: Tensor) -> Gradients:
        values = vmap(gradient, chunk_size=64)(inputs, cotangent)
        _check_finite(["the network"], [values])
        return [Dense(values.detach())]

    return Tape(network(inputs), pull)


def _check_finite(names: Sequence[str], gradients: Sequence[Tensor]) -> None:
    if torch.isfinite(torch.stack([gradient.sum() for gradient in gradients]).sum()):
        return
    for name, gradient in zip(names, gradients, strict=True):
        finite = torch.isfinite(gradient).flatten(1).all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"the gradient at layer {name!r} is not finite, first at row {row} of the batch."
            )


def _check_simple(layer: Layer, args: tuple[Any, ...], output: Any) -> None:
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        raise ValueError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) has no factorised gradients: it "
            f"does not turn one tensor into another; {REFERENCE_HINT}"
        )


def _whole(layer: Layer, inputs: Tensor, outputs: Tensor, gradient: Tensor) -> Dense:
    """Differentiate a part of an unknown kind once more, row by row."""
    module = layer.module
    own = {name: module.get_parameter(name).detach() for name in layer.whole}

    def pull(row: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        output, back, *_ = vjp(lambda values: functional_call(module, values, (row[None],)), own)
        (gradients,) = back(slope[None])
        return output[0], torch.cat([part.reshape(-1) for part in gradients.values()])

    try:
        again, values = vmap(pull, chunk_size=64)(inputs, gradient)
        same = torch.allclose(again, outputs, rtol=1e-3, atol=1e-3 * float(outputs.abs().max()))
    except RuntimeError as error:
        raise ValueError(
            f"layer {layer.name!r} ({type(module).__name__}) cannot be differentiated row by row: "
            f"{str(error).splitlines()[0]} {REFERENCE_HINT}"
        ) from error
    if not same:
        raise ValueError(
            f"layer {layer.name!r} ({type(module).__name__}) gives a row another output alone than "
            f"in its batch: a row's gradient would depend on the other rows; {REFERENCE_HINT}"
        )
    return Dense(values.detach())


def _factor(layer: Layer, inputs: Tensor, gradient: Tensor, arguments: tuple[Any, ...]) -> Factor:
    module = layer.module
    if isinstance(module, nn.Linear):
        return _linear(layer, inputs, gradient)
    if isinstance(module, CONVOLUTIONS):
        return _convolution(layer, inputs, gradient)
    if isinstance(module, nn.Embedding):
        return _embedding(module, inputs, gradient)
    if isinstance(module, nn.EmbeddingBag):
        return _embedding_bag(layer, inputs, gradient, arguments)
    return _norm(layer, inputs, gradient)


def _linear(layer: Layer, inputs: Tensor, gradient: Tensor) -> Factor:
    n = len(inputs)
    if inputs.ndim > 2:
        inputs, gradient = (
            inputs.reshape(n, -1, inputs.shape[-1]),
            gradient.reshape(n, -1, gradient.shape[-1]),
        )
    if not layer.weight:
        return Dense(gradient.reshape(n, -1, gradient.shape[-1]).sum(1))
    parts = [inputs]
    if layer.bias:
        parts.append(inputs.new_ones(*inputs.shape[:-1], 1))
    inputs = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    if inputs.ndim == 3 and not _is_short(inputs.shape[1], inputs.shape[2], gradient.shape[2]):
        return Dense((gradient.mT @ inputs).flatten(1))
    return Outer(inputs, gradient)


def _is_short(n_positions: int, n_inputs: int, n_outputs: int) -> bool:
    return n_positions**2 * (n_inputs + n_outputs) < n_inputs * n_outputs


def _convolution(layer: Layer, inputs: Tensor, gradient: Tensor) -> Factor:
    conv = layer.module
    assert isinstance(conv, CONVOLUTIONS)
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


def _embedding(module: nn.Embedding, indices: Tensor, gradient: Tensor) -> Factor:
    indices = indices.reshape(len(indices), -1)
    if module.padding_idx is not None:
        indices = indices.masked_fill(indices == module.padding_idx, -1)
    return Tokens(indices, gradient.reshape(*indices.shape, -1), module.num_embeddings)


def _embedding_bag(
    layer: Layer, indices: Tensor, gradient: Tensor, arguments: tuple[Any, ...]
) -> Factor:
    bag = layer.module
    assert isinstance(bag, nn.EmbeddingBag)
    if indices.ndim != 2 or bag.mode == "max" or any(extra is not None for extra in arguments):
        raise ValueError(
            f"layer {layer.name!r} (EmbeddingBag) is understood with mode 'mean' or 'sum', "
            f"tokens of shape (n, length) and neither offsets nor weights; {REFERENCE_HINT}"
        )
    if bag.padding_idx is not None:
        indices = indices.masked_fill(indices == bag.padding_idx, -1)
    share = (indices >= 0).to(gradient.dtype)
    if bag.mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp_min(1)
    return Tokens(indices, share[:, :, None] * gradient[:, None, :], bag.num_embeddings)


def _norm(layer: Layer, inputs: Tensor, gradient: Tensor) -> Factor:
    module: Any = layer.module
    shape = _own_shape(module)
    parts = []
    if layer.weight:
        parts.append(_sum_to(gradient * _normalised(module, inputs), shape, module))
    if layer.bias:
        parts.append(_sum_to(gradient, shape, module))
    return Dense(torch.cat(parts, 1))


def _own_shape(module: Any) -> torch.Size:
    weight = module.weight if module.weight is not None else module.bias
    return torch.Size(weight.shape)


def _sum_to(values: Tensor, shape: torch.Size, module: nn.Module) -> Tensor:
    n = len(values)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return values.reshape(n, -1, shape.numel()).sum(1)
    return values.reshape(n, shape.numel(), -1).sum(2)


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
