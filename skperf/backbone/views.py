"""Open a module as a private view: its structure copied, its weights shared."""

import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# values that a copy may share with the original: nothing can change them
_IMMUTABLE: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, range, type)
_IMMUTABLE += (types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size)
_HALVES = (torch.float16, torch.bfloat16)


def view(module: nn.Module) -> nn.Module:
    """Copy a module in evaluation mode around aliases of its weights; halves become float32."""

    # Restoring a borrowed module can't be made safe against threads and Ctrl-C; a view need not.
    def parameter(own: Tensor) -> Tensor:
        # `data` has a version counter of its own: an optimizer that steps beside us makes no
        # error of our backward passes
        return nn.Parameter(_single_precision(own.data), requires_grad=False)

    def buffer(own: Tensor) -> Tensor:
        # a forward may write to its buffers, also in evaluation mode
        return _single_precision(own.detach()).clone()

    copied = _copied(module, parameter, buffer)
    for part in copied.modules():
        part.training = False
        if isinstance(part, nn.RNNBase) and next(part.parameters()).is_cuda:
            part.training, part.dropout = True, 0.0  # cuDNN goes back in training mode only
        _switch_off_fast_paths(part)
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            part.sparse = False  # sums and reshapes of gradients want them dense
        if bounds_its_norms(part):
            part.weight.data = part.weight.data.clone()
    return copied


def bounds_its_norms(part: nn.Module) -> TypeGuard[nn.Embedding | nn.EmbeddingBag]:
    """Whether a forward writes to a table, whose rows it shortens."""
    return isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None


def own_copy(module: nn.Module) -> nn.Module:
    """Copy a module, its weights included, in the modes and types it has."""

    def parameter(own: Tensor) -> Tensor:
        return nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)

    return _copied(module, parameter, lambda own: own.detach().clone())


def original(module: nn.Module) -> nn.Module:
    """Find the module that `torch.compile` has wrapped."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def _copied(
    module: nn.Module, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]
) -> nn.Module:
    module = original(module)
    memo: dict[int, Any] = {}
    parts = list(module.modules())
    shells: dict[int, nn.Module] = {}
    for part in parts:
        if original(part) is not part:
            continue
        if isinstance(part, torch.jit.ScriptModule):
            warnings.warn(
                f"{type(part).__name__} is a scripted module, which shares no weights: it is "
                "copied whole for every call. Give the module it was made from to save memory.",
                UserWarning,
                stacklevel=2,
            )
            memo[id(part)] = _whole(part)
            continue
        for name, weight in part._parameters.items():
            tensor: Any = weight
            if tensor is None or id(tensor) in memo:
                continue
            if is_lazy(tensor) or tensor.is_meta:
                raise ValueError(
                    f"parameter {name!r} of a {type(part).__name__} has no shape or no numbers yet "
                    "(a lazy layer, a 'meta' device): run one batch through it, or load weights."
                )
            memo[id(tensor)] = parameter(tensor)
        for own in part._buffers.values():
            if own is not None and id(own) not in memo:
                memo[id(own)] = buffer(own)
        # all empty copies first, so that references between parts end inside the copy
        # (the __deepcopy__ of what is parametrized does that too, with no way past what refuses)
        if not hasattr(type(part), "__deepcopy__") or "parametrizations" in part._modules:
            memo[id(part)] = shells[id(part)] = type(part).__new__(type(part))
    for part in parts:  # what is compiled runs the user's own module: the copy is not compiled
        if id(original(part)) in shells:
            memo[id(part)] = shells[id(original(part))]
    # inner parts first: those that copy themselves want them whole
    for part in reversed(parts):
        if id(part) in shells:
            shells[id(part)].__dict__.update(_attributes(part, memo))
        elif id(part) not in memo:
            inner = original(part)
            memo[id(part)] = _by_itself(part, memo) if inner is part else memo[id(inner)]
    copied: nn.Module = memo[id(module)]
    return copied


def _by_itself(part: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return deepcopy(part, memo)
    except Exception as error:  # of any class
        raise ValueError(
            f"{type(part).__name__} can't be copied, and is never run itself: "
            f"{type(error).__name__}: {error}"
        ) from error


def _whole(part: torch.jit.ScriptModule) -> nn.Module:
    with torch.no_grad():
        copied: nn.Module = deepcopy(part)
    for tensor in copied.parameters():
        tensor.requires_grad_(False)
    return copied


def _attributes(part: nn.Module, memo: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in list(part.__dict__.items()):
        if name == "_compiled_call_impl":
            continue  # runs the original
        if isinstance(value, _IMMUTABLE):
            yield name, value
        elif isinstance(value, dict) and not value:
            yield name, type(value)() if type(value) in (dict, OrderedDict) else deepcopy(value)
        elif name in ("_parameters", "_buffers", "_modules"):
            # None copies as None
            yield (
                name,
                type(value)(
                    (key, memo[id(entry)] if id(entry) in memo else deepcopy(entry, memo))
                    for key, entry in value.items()
                ),
            )
        else:
            yield name, _own(value, memo)


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an attribute; what refuses copying, such as a lock, is shared."""
    if isinstance(value, types.FunctionType | types.MethodType | partial):
        return _pointed(value, memo)
    if isinstance(value, weakref.ref):
        inside = memo.get(id(value()))
        return value if inside is None else weakref.ref(inside)
    if type(value) in (dict, OrderedDict):
        # hooks stand in such dictionaries, under numbers
        return type(value)((key, _own(entry, memo)) for key, entry in list(value.items()))
    if type(value) in (list, tuple, set):
        return type(value)(_own(entry, memo) for entry in value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if id(value) not in memo:
            # a tensor cached by an earlier forward; it may hang on a graph, which has no copy
            memo[id(value)] = _single_precision(value.detach()).clone()
        return memo[id(value)]
    try:
        return deepcopy(value, memo)
    except Exception:  # any class may refuse in its own way
        return value


def _pointed(value: Any, memo: dict[int, Any]) -> Any:
    """Point what holds parts of the original to those of the copy, all else as it is."""
    if id(value) in memo:
        return memo[id(value)]
    inner = getattr(value, "_torchdynamo_orig_callable", None)
    if inner is not None:
        return _pointed(inner, memo)
    if isinstance(value, types.FunctionType):
        return _function(value, memo)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _own(value.__self__, memo))
    if isinstance(value, partial):
        arguments = _pointed(value.args, memo)
        return partial(_pointed(value.func, memo), *arguments, **_pointed(value.keywords, memo))
    if type(value) in (list, tuple):
        return type(value)(_pointed(entry, memo) for entry in value)
    if type(value) is dict:
        return {key: _pointed(entry, memo) for key, entry in value.items()}
    return value


def _function(function: types.FunctionType, memo: dict[int, Any]) -> Any:
    """Copy a function that holds parts of the original, in its closure or as defaults."""
    closure = tuple(types.CellType() for _ in function.__closure__ or ())
    defaults = _pointed(function.__defaults__, memo)
    code, name = function.__code__, function.__name__
    copied = types.FunctionType(code, function.__globals__, name, defaults, closure or None)
    copied.__dict__.update(function.__dict__)
    copied.__kwdefaults__ = _pointed(function.__kwdefaults__, memo)
    memo[id(function)] = copied  # which may hold itself
    for cell, own in zip(function.__closure__ or (), closure, strict=True):
        with suppress(ValueError):  # a cell that is still empty
            own.cell_contents = _pointed(cell.cell_contents, memo)
    return copied


def _single_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALVES else tensor


def _switch_off_fast_paths(part: nn.Module) -> None:
    # Hooks inside are not called on them, and whether they are taken depends on the batch.
    if isinstance(part, nn.TransformerEncoder) and part.use_nested_tensor:
        part.use_nested_tensor = False
        part.layers[-1].register_forward_hook(_zero_where_padded, with_kwargs=True)
    elif isinstance(part, nn.TransformerEncoderLayer):
        part.activation_relu_or_gelu = 0
    elif isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
        part.register_forward_pre_hook(_refuse_one_row)


def _refuse_one_row(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if args[0].numel() == args[0].shape[1]:
        raise ValueError(
            f"{type(layer).__name__} has no running statistics (track_running_stats=False) and "
            "normalises by the batch: a row alone has no outputs. Predict several rows at once, or "
            "train the network with running statistics."
        )


def _zero_where_padded(
    layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor
) -> Tensor:
    """Give padded positions zeros, as torch's nested tensors do: output (n, L, d) -> (n, L, d)."""
    padding = named.get("src_key_padding_mask")
    if layer.training or padding is None or named.get("src_mask") is not None:
        return output
    padded = padding if padding.dtype == torch.bool else padding == -torch.inf
    # nested tensors are made of rows whose padding stands behind all else, or not at all
    if bool((padded[:, :-1] & ~padded[:, 1:]).any()):
        return output
    return output.masked_fill(padded[:, :, None], 0.0)
