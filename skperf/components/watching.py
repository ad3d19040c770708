"""Look on while a row goes through a network: who attends, who takes heads, who has experts.

Heads are found by what depends on what, never by names: the weights of every softmax and the
results of every product of many axes are made leaves, and a layer takes heads where the blocks
of its input each depend on one entry of such a leaf alone.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from skperf.components.taps import (
    OpenAttention,
    first_tensor,
    row_layer,
    vmapped,
    weight_columns,
    with_first,
)
from skperf.components.units import Site, Spot

_SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax, torch.special.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum)
_FUSED: Any = functional.scaled_dot_product_attention
_TORCHS_OWN: Any = functional.multi_head_attention_forward
_READS_EXPERTS = ("bmm", "baddbmm", "_grouped_mm", "grouped_mm")
_REMEMBERED = 24
"""Layers back at which the values of an attention may have been made."""


@dataclass(eq=False)
class _Mixing:
    """What a softmax or a fused attention returned, as a leaf of its own."""

    leaf: Tensor
    module: str
    axes: range
    attends: bool = False
    blind: bool = False
    open: bool = True
    used: bool = False


@dataclass(eq=False)
class _Made:
    """What a layer returned, cut off from what it was made of; kept by what is made of it alone."""

    edge: GradientEdge
    module: str
    dim: int
    value: Callable[[], Tensor | None]


class Watcher(TorchFunctionMode):
    """Looks on while a row goes through a network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names = {part: name for name, part in module.named_modules()}
        self.running: list[str] = [""]
        self.called: set[str] = set()
        self.mixings: list[_Mixing] = []
        self.made: list[_Made] = []
        self.heads: list[Site] = []
        self.taken: dict[nn.Module, int] = {}  # where in memory what a module takes lies
        self.kept: deque[Tensor] = deque(maxlen=_REMEMBERED)
        self.attention_layers: set[str] = set()
        self.inside: set[str] = set()
        self.leading_back: set[str] = set()
        self.expert_slices: dict[str, dict[str, Tensor]] = {}
        self.used: set[int] = set()
        self.buffers = {id(buffer) for buffer in module.buffers()}
        self.holders = {
            id(parameter): (name, own)
            for name, part in module.named_modules()
            for own, parameter in part._parameters.items()
            if parameter is not None
        }
        self.owners = {
            key: (name, own)
            for key, (name, own) in self.holders.items()
            if (part := module.get_submodule(name)).get_parameter(own).ndim >= 3
            and row_layer(part) is None
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, Tensor) and vmapped(value) for value in args):
            return func(*args, **kwargs)
        if func is _FUSED:
            for tensor in (*args[:2], kwargs.get("query"), kwargs.get("key")):
                self._feeds_attention(tensor)
            # only the values keep their past: who makes them decides which heads share them
            args = tuple(_cut(a) if i < 2 else a for i, a in enumerate(args))
            kwargs = {
                name: _cut(a) if name in ("query", "key") else a for name, a in kwargs.items()
            }
            result = func(*args, **kwargs)
            self._feeds_attention(kwargs.get("value", args[2] if len(args) > 2 else None))
            leaf = self._mixing(result, range(result.ndim - 2), attends=True)
            return leaf.clone() + (result - result.detach())
        if func in _SOFTMAX:
            result = func(*args, **kwargs)
            if result.ndim >= 3 and result.is_floating_point():
                return self._mixing(result, range(result.ndim - 1), args[0]).clone()
            return result
        self._reads_parameters(func, args, kwargs)
        if func is _TORCHS_OWN:
            self._projects(args)
        if func is torch.einsum:
            self._takes_by_parameter(args)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        fixed = [self._is_fixed(value) for value in given]
        result = func(*args, **kwargs)
        least_axes = 3 if "bmm" in func.__name__ or not torch.is_grad_enabled() else 4
        # a product with what no row has a part in turns entries, and mixes none
        if func in _PRODUCTS and result.ndim >= least_axes and not any(fixed):
            leaf = self._mixing(result, range(result.ndim - 1))
            return leaf.clone() + (result - result.detach())
        if all(fixed):
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    value._of_no_row = True  # type: ignore[attr-defined]
        elif func.__name__ == "__setitem__" or func.__name__.endswith("_"):
            given[0]._of_no_row = False  # type: ignore[attr-defined]
        return result

    def _is_fixed(self, value: Tensor) -> bool:
        """Whether a tensor was made of parameters, buffers and constants alone."""
        known = isinstance(value, nn.Parameter) or id(value) in self.buffers
        return known or getattr(value, "_of_no_row", False)

    @contextmanager
    def hooks(self, *, whole: bool = True) -> Iterator[None]:
        """Follow the modules of the network, or note only which are called."""
        handles = []
        for part, name in self.names.items():
            enter = self._enter(name) if whole else self._called(name)
            # before a lasting gate, behind which the heads it has closed could not be seen
            handles.append(part.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            if whole:
                handles.append(part.register_forward_hook(self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, name: str) -> Any:
        return lambda part, args, kwargs: self.called.add(name)

    def readout(self, outputs: Tensor) -> str | None:
        """Name of the layer that alone makes the outputs."""
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            return None
        grads = torch.autograd.grad(
            outputs.sum(), [made.edge for made in self.made], allow_unused=True
        )
        last = {
            made.module for made, grad in zip(self.made, grads, strict=True) if grad is not None
        }
        name = last.pop() if len(last) == 1 else None
        described = None if name is None else row_layer(self.module.get_submodule(name))
        width = outputs.shape[1] if outputs.ndim > 1 else 1
        # two classes may be read off a single logit
        return name if described is not None and described[1] in (width, 1) else None

    def experts(self) -> list[Site]:
        """Parameters that hold a slice for each expert."""
        sites = []
        for name, slices in self.expert_slices.items():
            n_units = min(len(tensor) for tensor in slices.values())
            spots = tuple(Spot(name, own, 0) for own in slices)
            sites.append(Site(name, "expert", n_units, spots, weights=spots))
        return sites

    def unrecognised(self) -> list[str]:
        """Modules that attend, but in which no heads were found."""
        found = {site.module for site in self.heads}
        many = [
            m.module
            for m in self.mixings
            if m.attends and not m.used and (m.leaf.ndim >= 4 or m.blind)
        ]
        return list(dict.fromkeys(name for name in many if name not in found))

    def fused(self) -> list[str]:
        """Parameters of three dimensions that neither layers nor experts hold."""
        return [
            f"{name}.{own}" if name else own
            for name, own in self.owners.values()
            if own not in self.expert_slices.get(name, {})
            and self.module.get_submodule(name)._parameters[own].numel() > 10_000  # type: ignore[union-attr]
        ]

    def _mixing(
        self, result: Tensor, axes: range, scores: Tensor | None = None, *, attends: bool = False
    ) -> Tensor:
        leaf = result.detach().clone().requires_grad_(True)
        # what runs without gradients, in an autograd function of its own, can't be seen through
        blind = not torch.is_grad_enabled()
        attends = attends or scores is not None or blind
        self.mixings.append(_Mixing(leaf, self.running[-1], axes, attends, blind))
        if scores is not None and leaf.ndim >= 4:
            self._feeds_attention(scores)
        return leaf

    def _feeds_attention(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            self.attention_layers |= {made.module for made in self._behind(tensor)}

    def _behind(self, tensor: Tensor) -> list[_Made]:
        """Layers whose outputs a tensor depends on, with no other layer between."""
        recent = self.made[-_REMEMBERED:]
        if not recent:
            return []
        edges = [made.edge for made in recent]
        with torch.enable_grad():
            grads = torch.autograd.grad(tensor.sum(), edges, retain_graph=True, allow_unused=True)
        return [made for made, grad in zip(recent, grads, strict=True) if grad is not None]

    def _reads_parameters(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Note which parameters are used, and which are cut into slices for experts."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.used |= {id(tensor) for tensor in given if isinstance(tensor, nn.Parameter)}
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            index = args[1]
            whole = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim <= 1)
            given = given[:1] if whole else []
        elif name not in _READS_EXPERTS:
            return
        for tensor in given:
            # a transposed or cast copy still says whose it is
            base = tensor._base if tensor._is_view() else tensor
            owner = self.owners.get(id(base))
            if owner is not None and base is not None:
                self.expert_slices.setdefault(owner[0], {})[owner[1]] = base

    def _projects(self, args: tuple[Any, ...]) -> None:
        """Torch's attention as a function: its heads are reached by the weight behind them."""
        n_heads, weight = args[4], args[11]
        owner = self.holders.get(id(weight))
        if owner is None or isinstance(self.module.get_submodule(self.running[-1]), OpenAttention):
            return
        spot = Spot(*owner, 1)
        site = Site(
            self.running[-1], "attention_head", n_heads, (spot,), weight.shape[1] // n_heads
        )
        self.heads.append(replace(site, weights=(spot,)))

    def _takes_by_parameter(self, args: tuple[Any, ...]) -> None:
        """Look whether a product with a parameter takes heads along an axis of its own."""
        equation = args[0] if isinstance(args[0], str) else ""
        terms = equation.replace(" ", "").partition("->")[0].split(",")
        if len(args) != 3 or len(terms) != 2:
            return
        for term, other, tensor, parameter in (
            (terms[0], terms[1], args[1], args[2]),
            (terms[1], terms[0], args[2], args[1]),
        ):
            owner = self.holders.get(id(parameter))
            # one axis in common mixes heads, more than one projects them
            if owner is None or not tensor.requires_grad or len({*term} & {*other}) < 2:
                continue
            for mixing in [m for m in self.mixings if m.open]:
                for axis, letter in enumerate(term):
                    blocks = _blocks(tensor, axis, mixing) if letter in other else None
                    if blocks is not None and blocks[2] == 1 and blocks[0] > 1:
                        spot = Spot(*owner, other.index(letter))
                        site = Site(mixing.module, "attention_head", blocks[0], (spot,))
                        mixing.used = True
                        if not any(spot in known.spots for known in self.heads):
                            self.heads.append(replace(site, weights=(spot,)))

    def _enter(self, name: str) -> Any:
        def hook(part: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(name)
            self.called.add(name)
            described = row_layer(part)
            tensor = first_tensor((args, kwargs))
            if tensor is None or vmapped(tensor):
                return
            self.taken[part] = tensor.data_ptr()
            if described is not None:
                self.kept.append(tensor)  # so that no other tensor gets its address
                with torch.enable_grad():  # a model may run parts of itself without
                    self._takes(name, part, tensor, described[3])
                    if described[3] == -1 and tensor.requires_grad:
                        self._leads_back(name, described[2], described[1], tensor)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(part: nn.Module, args: Any, output: Any) -> Any:
            self.running.pop()
            described = row_layer(part)
            if described is None:
                return None

            def cut(tensor: Tensor) -> Tensor:
                if vmapped(tensor) or not torch.is_grad_enabled():
                    return tensor
                value = tensor.detach() + tensor.new_zeros(()).requires_grad_()
                edge = get_gradient_edge(value)
                self.made.append(_Made(edge, name, described[3], ref(value)))
                return value

            return with_first(output, cut)

        return hook

    def _takes(self, name: str, part: nn.Module, tensor: Tensor, dim: int) -> None:
        """Look whether a layer takes heads side by side."""
        parent = name.rpartition(".")[0]
        attention = self.module.get_submodule(parent)
        if isinstance(attention, OpenAttention):
            self._found(parent, name, part, (attention.num_heads, 0, attention.head_dim))
            return
        waiting = [mixing for mixing in self.mixings if mixing.open]
        if not waiting or not tensor.requires_grad:
            return
        weighted = tensor * torch.rand_like(tensor)
        grads = torch.autograd.grad(
            weighted.sum(), [m.leaf for m in waiting], retain_graph=True, allow_unused=True
        )
        reached = [m for m, grad in zip(waiting, grads, strict=True) if grad is not None]
        for mixing in reached:
            blocks = _blocks(tensor, dim, mixing)
            if blocks is not None and blocks[2] == 1 and blocks[0] > 1:
                blocks = None  # the heads themselves are mixed before they are taken
            mixing.open = blocks is not None
            if blocks is not None:
                mixing.used = True
                self._found(mixing.module, name, part, blocks)
                self._groups(mixing.module, name, part, weighted, dim, blocks)
        if len(reached) > 1 and not any(mixing.used for mixing in reached):
            # a module for each head
            pushed = [_pushed(tensor, dim, mixing.leaf) for mixing in reached]
            sets = [push(torch.rand_like(m.leaf)) for push, m in zip(pushed, reached, strict=True)]
            blocks = _as_blocks(sets, shared=False)
            if blocks is not None and blocks[2] > 1:
                for mixing in reached:
                    mixing.used = True
                self._found(parent, name, part, blocks)
        if any(mixing.used for mixing in reached):
            self.attention_layers |= {made.module for made in self._behind(tensor)}

    def _leads_back(self, name: str, fan_in: int, n_units: int, tensor: Tensor) -> None:
        """Note layers that are read entry by entry and led back to the width that they had."""
        recent = self.made[-_REMEMBERED:]
        if not tensor._version and any(made.value() is tensor for made in recent):
            self.leading_back.add(name)  # one map in two layers
            return
        parts = {made.module: self.module.get_submodule(made.module) for made in recent}
        shapes = {other: row_layer(part) for other, part in parts.items()}
        wanted = {n for n, s in shapes.items() if s and (s[1], s[2], s[3]) == (fan_in, n_units, -1)}
        behind = self._behind(tensor) if wanted else []
        alike = {self.taken.get(parts[made.module]) for made in behind}
        if len(alike) != 1 or not {made.module for made in behind} <= wanted:
            return
        first = tensor[..., 0].sum()
        slopes = torch.autograd.grad(first, [made.edge for made in behind], retain_graph=True)
        if not any(bool(slope[..., 1:].any()) for slope in slopes):
            self.inside |= {made.module for made in behind}
            self.leading_back.add(name)

    def _found(self, module: str, name: str, part: nn.Module, blocks: tuple[int, int, int]) -> None:
        self.attention_layers.add(name)
        n_heads, start, width = blocks
        self._add(Site(module, "attention_head", n_heads, (), width, start), name, part)

    def _add(self, site: Site, name: str, part: nn.Module) -> None:
        outer = self._adapted(site.module, name, part)
        spot = Spot(outer, "input", row_layer(part)[3])  # type: ignore[index]
        columns = weight_columns(part, name) if outer == name else None
        for position, other in enumerate(self.heads):
            if (other.kind, other.n_units, other.width, other.start) != (
                site.kind,
                site.n_units,
                site.width,
                site.start,
            ):
                continue
            if spot in other.spots:  # the inner of two modules may have seen the same heads
                names = {known.module for known in self.heads if known.kind == site.kind}
                if len(site.module) < len(other.module) and site.module not in names:
                    self.heads[position] = replace(other, module=site.module)
                return
            known = self.module.get_submodule(other.spots[0].module)
            if other.module == site.module and self.taken.get(known) == self.taken.get(part):
                # a second layer that reads the same heads, such as a low-rank adapter
                both = other.weights and columns is not None
                weights = (*other.weights, columns) if both and columns is not None else ()
                self.heads[position] = replace(other, spots=(*other.spots, spot), weights=weights)
                return
        taken = {(other.module, other.kind) for other in self.heads}
        if (site.module, site.kind) in taken:
            site = replace(site, module=name)
        self.heads.append(
            replace(site, spots=(spot,), weights=() if columns is None else (columns,))
        )

    def _adapted(self, attention: str, name: str, part: nn.Module) -> str:
        """Name the module around a layer that takes the same and does more with it (an adapter)."""
        around = name
        inside = f"{attention}." if attention else ""
        while (around := around.rpartition(".")[0]) and around.startswith(inside):
            outer = self.module.get_submodule(around)
            if around not in self.running or self.taken.get(outer) != self.taken[part]:
                continue
            if any(p._parameters and row_layer(p) is None for p in outer.modules()):
                return around
        return name

    def _groups(
        self,
        module: str,
        name: str,
        part: nn.Module,
        tensor: Tensor,
        dim: int,
        blocks: tuple[int, int, int],
    ) -> None:
        """Heads that read the same values form a group."""
        n_heads, start, width = blocks
        for made in self._behind(tensor):
            sets = []
            for head in range(n_heads):
                block = tensor.narrow(dim, start + head * width, width).sum()
                (grad,) = torch.autograd.grad(
                    block, [made.edge], retain_graph=True, allow_unused=True
                )
                if grad is None:
                    return
                sets.append(grad.movedim(made.dim, -1).flatten(0, -2).abs().sum(0) > 0)
            together = torch.stack(sets).float()
            shared = together @ together.T > 0
            n_groups = len(torch.unique(shared, dim=0))
            size = n_heads // n_groups
            labels = torch.arange(n_heads) // size
            contiguous = n_groups * size == n_heads and bool(
                (shared.cpu() == (labels[:, None] == labels[None])).all()
            )
            if 1 <= n_groups < n_heads and contiguous:
                site = Site(module, "key_value_group", n_groups, (), width * size, start)
                self._add(site, name, part)
                return


def _blocks(tensor: Tensor, dim: int, mixing: _Mixing) -> tuple[int, int, int] | None:
    """Find blocks that one entry of a mixing makes each: their number, start and width."""
    leaf = mixing.leaf
    push = _pushed(tensor, dim, leaf)
    for axis in mixing.axes:
        sets: list[Tensor] = []
        for head in range(leaf.shape[axis]):
            v = torch.zeros_like(leaf)
            v.select(axis, head).uniform_(0.5, 1)
            moved = push(v)
            if not moved.any() or (bool(moved.all()) and leaf.shape[axis] > 1):
                break
            sets.append(moved)
        # positions and heads along one axis, as in a convolution made anew for every row, are none
        shared = leaf.ndim > 3
        found = _as_blocks(sets, shared) if len(sets) == leaf.shape[axis] else None
        if found is not None:
            return found
    alone = sum(leaf.shape[axis] == 1 for axis in mixing.axes) > 1  # of rows, and of heads
    alone = alone and leaf.ndim >= 4 and bool(push(torch.ones_like(leaf)).any())
    return (1, 0, tensor.shape[dim]) if alone else None


def _pushed(tensor: Tensor, dim: int, leaf: Tensor) -> Callable[[Tensor], Tensor]:
    """Give which channels of a tensor move when a leaf does: the leaf's shape -> (n_channels,)."""
    # J v by two backward passes: J' u is linear in u, and its derivative along v is J v
    u = torch.rand_like(tensor).add_(0.5).requires_grad_(True)
    (back,) = torch.autograd.grad(
        tensor, leaf, u, retain_graph=True, create_graph=True, allow_unused=True
    )

    def push(v: Tensor) -> Tensor:
        jv = torch.zeros_like(tensor)
        if back is not None and back.requires_grad:
            (jv,) = torch.autograd.grad(
                (back * v).sum(), u, retain_graph=True, materialize_grads=True
            )
        return jv.movedim(dim, -1).flatten(0, -2).abs().sum(0) > 0

    return push


def _as_blocks(sets: list[Tensor], shared: bool) -> tuple[int, int, int] | None:
    """Read sets of channels as blocks side by side; several entries may have one in common."""
    spans = {tuple(moved.nonzero()[:, 0].tolist()) for moved in sets}
    if len(spans) < 2 or () in spans or (len(spans) < len(sets) and not shared):
        return None
    ordered = sorted(spans)
    start, width = ordered[0][0], len(ordered[0])
    for i, span in enumerate(ordered):
        if span != tuple(range(start + i * width, start + (i + 1) * width)):
            return None
    return len(ordered), start, width


def _cut(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
