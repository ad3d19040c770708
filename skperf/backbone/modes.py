"""Hooks on a network of ours, and its gradients, for as long as a block runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def forward_hooks(
    hooks: Mapping[nn.Module, Callable[..., Any]], *, before: bool = False
) -> Iterator[None]:
    """Change or watch the outputs of parts of a network, or its inputs, before they are used."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook).remove)
        yield


@contextmanager
def differentiating() -> Iterator[None]:
    """Compute gradients, and say of which networks torch can't."""
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        if "an inplace operation" not in str(error) and "checkpoint" not in str(error):
            raise
        raise ValueError(
            "the network can't be differentiated: an operation of it overwrites what its gradient "
            f"needs, or is computed again in another way. torch says: {str(error)[:200]}"
        ) from error
