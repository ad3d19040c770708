"""Choose parameters by name, lay them out as one vector, put them back."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]


def select_parameters(module: nn.Module, patterns: str | Sequence[str] = "all") -> Parameters:
    """Parameters of a network by name."""
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if not named:
        raise ValueError(f"{type(module).__name__} has no parameters.")
    if isinstance(patterns, str):
        if patterns == "all":
            return named
        if patterns == "last":
            layer = list(named)[-1].rpartition(".")[0]
            return {n: p for n, p in named.items() if n.rpartition(".")[0] == layer}
        patterns = [patterns]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"parameters={pattern!r} matches no parameter of {type(module).__name__}; "
                f"it has {_shortened(list(named))}."
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
def restored(module: nn.Module) -> Iterator[nn.Module]:
    """Allow in-place changes of parameters and buffers, and undo them on exit."""
    tensors = [*module.parameters(), *module.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield module
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)


def fingerprint(module: nn.Module) -> str:
    """Digest of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shortened(names: list[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
