"""Choose parameters by name, lay them out as one vector, put them back."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]


def select_parameters(
    module: nn.Module,
    patterns: str | Sequence[str] = "all",
    *,
    trainable: Sequence[str] | None = None,
    last: str | None = None,
) -> Parameters:
    """Parameters that train, or those of globs, in order; tied ones once, by their first name."""
    refuse_scripted(module)
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if not named:
        raise ValueError(f"{type(module).__name__} has no parameters.")
    trained = named if trainable is None else {n: p for n, p in named.items() if n in trainable}
    if isinstance(patterns, str):
        if patterns == "all":
            return trained
        if patterns == "last":
            layer = list(trained)[-1].rpartition(".")[0] if last is None else last
            return {n: p for n, p in trained.items() if n.rpartition(".")[0] == layer}
        patterns = [patterns]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"parameters={pattern!r} matches no parameter of {type(module).__name__}; "
                f"it has {list(named)[:12]}{' and more' if len(named) > 12 else ''}."
            )
    return {n: p for n, p in named.items() if any(fnmatchcase(n, glob) for glob in patterns)}


def flatten(parameters: Parameters) -> Tensor:
    """Lay parameters out as one vector: -> (n_parameters,)."""
    return torch.cat([parameter.reshape(-1) for parameter in parameters.values()])


def unflatten(vector: Tensor, like: Parameters) -> Parameters:
    """Cut a vector into parameters: vector (n_parameters,)."""
    sizes = [parameter.numel() for parameter in like.values()]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"vector has shape {tuple(vector.shape)}, expected ({sum(sizes)},).")
    pieces = torch.split(vector, sizes)
    return {
        name: piece.view(parameter.shape)
        for (name, parameter), piece in zip(like.items(), pieces, strict=True)
    }


@contextmanager
def substituted(module: nn.Module, parameters: Parameters) -> Iterator[None]:
    """Put tensors in the place of parameters of a module of ours, tied ones together."""
    # torch.func.functional_call would leave them in a layer that is registered twice
    slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
    refuse_scripted(module)
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                slots.setdefault(id(tensor), []).append((part._parameters, name))
    changed = []
    try:
        for name, value in parameters.items():
            own = module.get_parameter(name)
            for place, key in slots[id(own)]:
                changed.append((place, key, own))
                place[key] = value
        yield
    finally:
        for place, key, own in changed:
            place[key] = own


def refuse_scripted(module: nn.Module) -> None:
    """Refuse what hides its parts."""
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"{type(part).__name__} is a scripted module, whose parameters can't be varied: "
                "give the module that it was made from."
            )


def checksum(module: nn.Module) -> str:
    """Digest of all weights and buffers that is cheap enough for every call."""
    # Sums of bit patterns: exact, in any order, and they notice what bumps no version counter.
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            continue  # a count that no answer depends on
        bits = _bits(tensor.detach())
        # in pieces: a sum makes wider numbers of all it is given
        each = () if bits is None else (bits, bits[::7])
        sums = tuple(sum(int(piece.sum()) for piece in part.split(2**20)) for part in each)
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{sums}".encode())
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Tensor | None:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds.get(tensor.element_size())
    if kind is None or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    return flat.reshape(-1).view(kind)


def fingerprint(module: nn.Module) -> str:
    """Digest of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
