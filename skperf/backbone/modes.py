"""Hooks on a network of ours, and normalisation by the batch at hand."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_LOCK = threading.RLock()
_HOOK_ATTRIBUTES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


class _Visit:
    """What a module looked like when the first of its visitors came in."""

    def __init__(self, module: nn.Module) -> None:
        self.visitors = 0
        self.training = [(part, part.training) for part in module.modules()]
        self.hooks = [
            (part, name, dict(getattr(part, name)))
            for part in module.modules()
            for name in _HOOK_ATTRIBUTES
        ]
        self.gradients = [(p, p.requires_grad, p.grad) for p in module.parameters()]
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]

    def restore(self) -> None:
        for part, training in self.training:
            part.training = training
        for part, name, hooks in self.hooks:
            current = getattr(part, name)
            if dict(current) != hooks:
                current.clear()
                current.update(hooks)
        for parameter, requires_grad, gradient in self.gradients:
            if parameter.is_leaf:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)


_VISITS: "WeakKeyDictionary[nn.Module, _Visit]" = WeakKeyDictionary()


@contextmanager
def untouched(module: nn.Module) -> Iterator[nn.Module]:
    """Open a network for use and give it back as it was found."""
    # Inside, every part is in evaluation mode and no parameter requires a gradient. On exit,
    # also by an exception or a keyboard interrupt, the mode of every part, `requires_grad`,
    # `.grad`, buffers, hooks and torch's global random streams are as before. Parameter values
    # are not copied: whoever changes them in place also enters
    # :func:`~skperf.backbone.parameters.restored`.
    # The context may be nested, and threads may share a module: the first one in records its
    # state and the last one out restores it.
    with preserved_rng(_device_of(module)):
        with _LOCK:
            visit = _VISITS.get(module)
            if visit is None:
                visit = _VISITS[module] = _Visit(module)
                module.eval()
                for parameter in module.parameters():
                    if parameter.is_leaf:
                        parameter.requires_grad_(False)
                    # backward passes would accumulate into the user's own tensor
                    parameter.grad = None
            visit.visitors += 1
        try:
            yield module
        finally:
            with _LOCK:
                visit.visitors -= 1
                if visit.visitors == 0:
                    del _VISITS[module]
                    visit.restore()


class _Streams:
    """Torch's global random streams, recorded by the first that asks for them."""

    visitors = 0
    cpu: Tensor | None = None
    cuda: dict[torch.device, Tensor]


_STREAMS = _Streams()
_STREAMS.cuda = {}


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Keep torch's global random streams as they are."""
    # Unlike `torch.random.fork_rng` it may be entered by several threads at once: the last one
    # out restores what the first one in has found.
    with _LOCK:
        if _STREAMS.visitors == 0:
            _STREAMS.cpu = torch.get_rng_state()
        if device is not None and device.type == "cuda" and device not in _STREAMS.cuda:
            _STREAMS.cuda[device] = torch.cuda.get_rng_state(device)
        _STREAMS.visitors += 1
    try:
        yield
    finally:
        with _LOCK:
            _STREAMS.visitors -= 1
            if _STREAMS.visitors == 0:
                assert _STREAMS.cpu is not None
                torch.set_rng_state(_STREAMS.cpu)
                for cuda_device, state in _STREAMS.cuda.items():
                    torch.cuda.set_rng_state(state, cuda_device)
                _STREAMS.cuda = {}


@contextmanager
def forward_hooks(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Change or watch the outputs of parts of a network."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def forward_pre_hooks(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Change or watch the inputs of parts of a network."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _device_of(module: nn.Module) -> torch.device:
    tensor: Tensor | None = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
