"""Random operators of torch, drawing from a generator of ours and never from the global stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Drawing(TorchDispatchMode):
    """A mode of one thread: every random operator draws from one generator."""

    # Operators that take no generator on some devices, such as fused attention with dropout on
    # CUDA, are left to the global stream: there is no other way to run them.
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generators = {generator.device: generator}
        self.first = generator
        self.drawn = False
        self.read_only: set[int] = set()  # storages

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # else the first operator imports the compiler, which takes a second and more; views are
        # never compiled
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.read_only:
            self._refuse_writes(func._schema.arguments, args, kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.drawn = True
        if func is torch.ops.aten.native_dropout.default:
            return self._dropout(*args)
        taking = _taking_a_generator(func)
        if taking is None and func._can_decompose():  # as dropout in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        if taking is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        return taking(*args, **kwargs | {"generator": self._on(_device(args, kwargs))})

    def _refuse_writes(self, arguments: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
        written = [given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self.read_only:
                raise ValueError("it writes to its own parameters; write to a copy in its forward")

    def _dropout(self, inputs: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        if not train or p == 0:
            return inputs.clone(), torch.ones_like(inputs, dtype=torch.bool)
        kept = torch.empty_like(inputs).bernoulli_(1 - p, generator=self._on(inputs.device))
        return inputs * kept / (1 - p) if p < 1 else inputs * 0, kept.bool()

    def _on(self, device: torch.device) -> torch.Generator:
        for known, generator in self.generators.items():
            if known.type == device.type and device.index in (None, known.index):
                return generator
        seed = int(torch.randint(2**62, (), generator=self.first, device=self.first.device))
        self.generators[device] = torch.Generator(device).manual_seed(seed)
        return self.generators[device]


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[Drawing]:
    """Let every random operator of this thread draw from a generator."""
    with Drawing(generator) as mode:
        yield mode


def _taking_a_generator(func: Any) -> Any:
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    packet = func.overloadpacket
    own = func._overloadname
    for name in (f"{own}_generator", "generator"):
        if name in packet.overloads():
            return getattr(packet, name)
    return None


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in args:
        if isinstance(value, Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")
