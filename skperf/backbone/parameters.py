"""Choose parameters by name, lay them out as one vector, put them back."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]


def select_parameters(module: nn.Module, patterns: str | Sequence[str] = "all") -> Parameters:
    """Parameters of a network by name.

    Parameters
    ----------
    module : nn.Module
        The network.
    patterns : str or sequence of str, default="all"
        ``"all"``, ``"last"`` (the parameters of the last layer that has any), or one or
        more globs of parameter names, such as ``"layer4.*"``.

    Returns
    -------
    dict of str to Tensor
        In the network's own order, detached but sharing memory with the network. A tensor
        that goes by several names appears once, under the first of them.

    Raises
    ------
    ValueError
        If the network has no parameters or a pattern matches none of them.
    """
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
    """Lay parameters out as one vector.

    Parameters
    ----------
    parameters : dict of str to Tensor
        Tensors of any shapes.

    Returns
    -------
    Tensor of shape (n_parameters,)
        A copy, in the order of the dictionary.
    """
    return torch.cat([parameter.reshape(-1) for parameter in parameters.values()])


def unflatten(vector: Tensor, like: Parameters) -> Parameters:
    """Cut a vector into parameters.

    Parameters
    ----------
    vector : Tensor of shape (n_parameters,)
        What :func:`flatten` made, or any vector of that length.
    like : dict of str to Tensor
        Names, order and shapes of the result.

    Returns
    -------
    dict of str to Tensor
        Views of `vector`.

    Raises
    ------
    ValueError
        If the lengths differ.
    """
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
    """Allow in-place changes of parameters and buffers, and undo them on exit.

    Parameters
    ----------
    module : nn.Module
        The network whose tensors may be changed inside.

    Yields
    ------
    nn.Module
        The same module.
    """
    tensors = [*module.parameters(), *module.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield module
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)


def fingerprint(module: nn.Module) -> str:
    """Digest of a network's parameters and buffers.

    Parameters
    ----------
    module : nn.Module
        The network.

    Returns
    -------
    str
        SHA-256, hexadecimal; equal for networks with equal names, shapes, types and values.
    """
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
