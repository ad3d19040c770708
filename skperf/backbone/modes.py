"""Hooks on a network of ours, for as long as a block runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

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
