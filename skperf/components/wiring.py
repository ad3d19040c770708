"""How gates are laid into a network: where rows are in a tensor, what need not run again."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.components.folding import folds_exactly, followers_of
from skperf.components.taps import captured, vmapped
from skperf.components.units import Component, Site, Spot

_PROBED = 3


@dataclass(frozen=True)
class Layout:
    """Where the rows of a pass are in a tensor: along an axis, next to each other or in turn."""

    axis: int
    in_turn: bool = False

    def split(self, tensor: Tensor, n_rows: int) -> Tensor:
        """Bring rows to the front: (.., n_rows * inner, ..) -> (n_rows, inner, ..)."""
        front = tensor.movedim(self.axis, 0)
        rest = front.shape[1:]
        if self.in_turn:
            return front.reshape(-1, n_rows, *rest).transpose(0, 1)
        return front.reshape(n_rows, -1, *rest)

    def join(self, split: Tensor) -> Tensor:
        """Undo `split`."""
        front = split.transpose(0, 1) if self.in_turn else split
        return front.flatten(0, 1).movedim(0, self.axis)


@dataclass(frozen=True)
class Wiring:
    """All that is known about gating some components of a network, by name."""

    components: tuple[Component, ...]
    sites: tuple[Site, ...]
    layouts: Mapping[tuple[Spot, int], Layout] = field(default_factory=dict)
    n_calls: Mapping[Spot, int] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()  # modules whose outputs no gate changes
    followers: Mapping[str, str] = field(default_factory=dict)  # layer -> its batch norm
    floats_per_row: int = 0
    sizes: Mapping[Spot, int] = field(default_factory=dict)  # numbers a row, of gated activations
    plain: bool = False

    @property
    def knows_rows(self) -> bool:
        """Whether every gated tensor says which of its entries belong to which row."""
        return not self.plain and all(
            spot.is_activation
            and self.n_calls.get(spot, 0)
            and all((spot, call) in self.layouts for call in range(self.n_calls[spot]))
            for site in self.sites
            for spot in site.spots
        )

    def plainly(self) -> "Wiring":
        """Gate the same, one mask a pass, by zeroed weights wherever there are weights."""
        return replace(self, plain=True, prefix=(), followers={})


def wire(
    network: Network,
    components: Sequence[Component],
    sites: Sequence[Site],
    examples: Rows,
    *,
    outputs_themselves: bool,
) -> Wiring:
    """Run a few rows through a view of ours and look: examples (n, ...)."""
    few = examples[:_PROBED] if len(examples) > 1 else Rows.cat([examples, examples])
    seen = _follow(network, few)
    followers = followers_of(network.module, seen.pairs, seen.n_calls)
    if outputs_themselves:  # what stands in comes out of the batch normalisation
        sites = [_behind(site, followers) for site in sites]
        followers = {}
    elif followers and not folds_exactly(network, followers, few):
        followers = {}
    spots = {spot for site in sites for spot in site.spots}
    together = captured(network, few, spots)
    alone = [captured(network, few[i : i + 1], spots) for i in range(len(few))]
    layouts, n_calls = {}, {}
    for spot in spots:
        n_calls[spot] = len(together[spot])
        for call, tensor in enumerate(together[spot]):
            parts = [tensors[spot][call] for tensors in alone if len(tensors[spot]) > call]
            layout = _layout(tensor, parts) if len(parts) == len(few) else None
            if layout is not None and spot.dim % tensor.ndim == layout.axis:
                raise ValueError(
                    f"dim={spot.dim} of the {spot.side} of {spot.module!r} runs over rows: they "
                    "are no components, name another dimension."
                )
            if layout is not None:
                layouts[spot, call] = layout
    prefix, floats = seen.before(spots, network.module), seen.floats // len(few)
    sizes = {spot: sum(t.numel() for t in seen) // len(few) for spot, seen in together.items()}
    return Wiring(
        tuple(components), tuple(sites), layouts, n_calls, prefix, followers, floats, sizes
    )


@dataclass
class _Seen:
    """One pass: when which module began and ended."""

    began: dict[str, int] = field(default_factory=dict)  # the first call
    ended: dict[str, int] = field(default_factory=dict)
    n_calls: dict[str, int] = field(default_factory=dict)
    returns_tensor: set[str] = field(default_factory=set)
    hooked: set[str] = field(default_factory=set)
    pairs: dict[str, str] = field(default_factory=dict)  # layer -> module that takes its output
    floats: int = 0

    def before(self, spots: set[Spot], module: nn.Module) -> tuple[str, ...]:
        """Largest modules that are called once and done before any gate has acted."""
        first = self._first_gate(spots, module)
        done = [
            name
            for name, end in self.ended.items()
            if end <= first
            and self.n_calls[name] == 1
            and name in self.returns_tensor - self.hooked
        ]
        return tuple(
            name
            for name in done
            if not any(
                self.began[other] < self.began[name] and self.ended[name] < self.ended[other]
                for other in done
            )
        )

    def _first_gate(self, spots: set[Spot], module: nn.Module) -> int:
        starts = []
        for spot in spots:
            names = [spot.module]
            if not spot.is_activation:  # whoever holds the parameter too may use it
                shared = module.get_submodule(spot.module)._parameters[spot.side]
                names = [
                    name
                    for name, part in module.named_modules(remove_duplicate=False)
                    if any(own is shared for own in part._parameters.values())
                ]
            # a parameter may be used by the parent of the module that holds it
            whole = [n for name in names for n in (name, name.rpartition(".")[0])]
            # a gate behind a module acts on what it has returned, and that may be remembered
            once = self.n_calls.get(spot.module) == 1 and spot.module not in self.hooked
            kept = once and spot.module in self.returns_tensor and spot.side == "output"
            acts = self.ended if kept else self.began
            starts += [acts.get(n, 0) for n in (names if spot.is_activation else whole)]
        return min(starts, default=0)


def _follow(network: Network, rows: Rows) -> _Seen:
    seen = _Seen()
    made: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
    clock = iter(range(10**9))
    handles = []

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            seen.began.setdefault(name, next(clock))

        return hook

    def leave(name: str, is_leaf: bool) -> Any:
        def hook(part: nn.Module, args: Any, output: Any) -> None:
            seen.ended[name] = next(clock)
            seen.n_calls[name] = seen.n_calls.get(name, 0) + 1
            if args and isinstance(args[0], Tensor) and args[0] in made:
                seen.pairs[made[args[0]]] = name
            if isinstance(output, Tensor) and not vmapped(output):
                seen.returns_tensor.add(name)
                if is_leaf:
                    made[output] = name
                    seen.floats += output.numel()

        return hook

    for name, part in network.module.named_modules():
        is_leaf = not list(part.children())
        if part._forward_hooks or part._forward_pre_hooks:  # would act twice on what is recalled
            seen.hooked.add(name)
        handles.append(part.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(part.register_forward_hook(leave(name, is_leaf)))
    try:
        with torch.no_grad():
            network(rows)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _behind(site: Site, followers: Mapping[str, str]) -> Site:
    if not site.keeps_bias or not any(spot.module in followers for spot in site.spots):
        return site
    moved = [replace(s, module=followers.get(s.module, s.module)) for s in site.spots]
    return replace(site, spots=tuple(moved), weights=())


def _layout(together: Tensor, alone: list[Tensor]) -> Layout | None:
    """Find how the rows lie in a tensor, from what each of them gives alone."""
    n_rows, one = len(alone), alone[0].shape
    if any(tensor.shape != one for tensor in alone) or together.ndim != len(one):
        return None
    for axis in range(together.ndim):
        expected = [size * n_rows if i == axis else size for i, size in enumerate(one)]
        if list(together.shape) != expected:
            continue
        for layout in (Layout(axis), Layout(axis, in_turn=True)):
            split = layout.split(together, n_rows)
            rows = torch.stack([tensor.movedim(axis, 0) for tensor in alone])
            if not rows.numel():  # rows that are routed elsewhere
                return None
            scale = float(rows.abs().max()) + 1e-30
            if bool(((split - rows).abs() <= 1e-4 * scale).all()):
                return layout
    return None
