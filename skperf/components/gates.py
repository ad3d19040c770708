"""Gates on the components of a network: ablate, and differentiate.

A gate of 1 keeps a component and a gate of 0 ablates it; in between, what comes out is
``instead + gate * (output - instead)``. What stands in for an ablated component is the
layer's bias (weight rows zeroed, as released), zero, a mean, the value on another row, or
whatever a function makes of the output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters, substituted
from skperf.backbone.rows import Rows
from skperf.backbone.views import view
from skperf.components.folding import fold, is_small
from skperf.components.measures import Measure
from skperf.components.taps import captured, opened_attention, tapped
from skperf.components.units import Site, Spot
from skperf.components.wiring import Layout, Wiring

Ablation = str | float | Callable[[Tensor], Tensor]
ABLATIONS = ("zero", "zero_output", "mean", "resample")
_ROWS_PER_PASS = 64
STACKED = 32
_PASS_FLOATS = 128_000_000  # most are forgotten at once
_GRADIENT_FLOATS = 16_000_000


@dataclass(frozen=True)
class Rule:
    """What stands in for what is ablated, and where."""

    kind: Ablation = "zero"
    per: str = "all"  # what a mean is over: "all", "position", "class"; "row": each its own donor
    positions: tuple[int, ...] | None = None
    donors: Rows | None = None  # (n_donors, ...), on the network's device
    labels: Tensor | None = None  # (n_donors,), for means of classes

    @property
    def replaces(self) -> bool:
        """Whether outputs themselves are replaced, not the weights behind them zeroed."""
        return not (self.kind == "zero" or isinstance(self.kind, float | int))

    @property
    def scales(self) -> bool:
        """Whether it can be had by scaling weights."""
        return not self.replaces and self.positions is None


@dataclass(frozen=True)
class Asked:
    """Rows, their targets, and the donors that belong to them, of one pass."""

    rows: Rows  # (n, ...)
    targets: Tensor | None  # (n, ...)
    donors: Rows | None = None  # (n, ...)
    raw: bool = False  # rows as the user gave them, not yet on the network's device
    single: bool = False  # given as one array, whatever the network takes beside

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: Any) -> "Asked":
        targets = None if self.targets is None else self.targets[where]
        donors = None if self.donors is None else self.donors[where]
        return replace(self, rows=self.rows[where], targets=targets, donors=donors)

    def ready(self, network: Network) -> "Asked":
        """Bring what is still as the user gave it to the network's device."""
        return replace(self, rows=network.inputs(self.rows), raw=False) if self.raw else self

    def repeat(self, times: int) -> "Asked":
        """Stack the whole batch so many times."""
        if times == 1:
            return self
        targets = self.targets
        if targets is not None:
            targets = targets.repeat(times, *[1] * (targets.ndim - 1))
        donors = None if self.donors is None else self.donors.repeat(times)
        return replace(self, rows=self.rows.repeat(times), targets=targets, donors=donors)


@dataclass(eq=False)
class Tap:
    """A tensor with gates on it."""

    spot: Spot
    channels: Tensor  # (n_channels,): which gate
    bias: Tensor | None = None  # (n_channels,)
    n_floats: int = 0  # of a parameter


class Circuit:
    """A network, a view of ours, with a gate on every chosen component."""

    def __init__(
        self, network: Network, wiring: Wiring, rule: Rule | None = None, base: Tensor | None = None
    ) -> None:
        rule = Rule() if rule is None else rule
        self.base = base  # (n_components,): gates that are closed already
        self.stacked = STACKED  # most rows of a pass of several masks
        self.network, self.wiring, self.rule = network, wiring, rule
        self.by_weights = wiring.plain and rule.scales
        if not (self.by_weights and all(site.weights for site in wiring.sites)):
            opened_attention(network.module)
        for part in network.module.modules():
            if getattr(part, "inplace", False) is True:
                part.inplace = False  # type: ignore[assignment]
        if not wiring.plain and not rule.replaces and is_small(network.module):
            fold(network.module, wiring.followers)
        self.sites = self._laid()
        self.taps = [tap for taps, _ in self.sites for tap in taps]
        # (r, inner, ...) with rows first, or (n_channels,), for each tensor
        self.instead: dict[tuple[Spot, int], Tensor] = {}
        self._means: dict[tuple[Spot, int], Tensor] = {}
        if rule.kind == "mean":
            self.instead = self._means = self._averages()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Circuit":
        """Give another thread hooks of its own around the same weights."""
        other = copy(self)
        other.network = replace(self.network, module=view(self.network.module))
        return other

    @property
    def n_components(self) -> int:
        """Number of gates."""
        return len(self.wiring.components)

    def outputs(self, asked: Asked, measure: Measure, masks: Tensor, *, first: int = 0) -> Tensor:
        """Compute true outputs under ablation: n rows, masks (m, n_components) -> (n, ..., m)."""
        values = self.values(masks)
        size = self.network.batch_size  # rows that look at one another are cut as in prediction
        size = size if self.wiring.plain else min(size, self._most(_PASS_FLOATS))
        starts = range(0, len(asked), size)
        return torch.cat(
            [self._batch(asked[start : start + size], measure, values, first) for start in starts]
        )

    def together(self, n_rows: int) -> int:
        """Masks that are run in one pass."""
        most = min(self.stacked, self._most(_PASS_FLOATS))
        return max(1, most // n_rows) if self.wiring.knows_rows else 1

    @property
    def light(self) -> int:
        """Rows of a pass that takes no more memory than gradients may."""
        return self._most(_GRADIENT_FLOATS)

    def _most(self, n_floats: int) -> int:
        """Rows of a pass whose layers make at most so many numbers."""
        return max(1, min(_ROWS_PER_PASS, n_floats // max(self.wiring.floats_per_row, 1)))

    def gradients(
        self, asked: Asked, measure: Measure, gates: Tensor, *, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Compute outputs (n,) and slopes (n, N) of every gate: gates (N,) or (n, N)."""
        size = self.light if self.wiring.knows_rows else 1
        values, gradients = [], []
        for start in range(0, len(asked), size):
            part = asked[start : start + size].ready(self.network)
            here = gates if gates.ndim == 1 else gates[start : start + size]
            leaf = here.to(self.network.device, self.network.dtype).expand(len(part), -1).clone()
            leaf.requires_grad_(True)
            self.replace_by(part, range(first, first + 1))
            with torch.enable_grad(), self.gated(self.values(leaf), part):
                result = measure(self.network(part.rows), part)
                gradient = torch.zeros_like(leaf)
                if result.requires_grad:  # rows may be routed past all gates
                    (gradient,) = torch.autograd.grad(result.sum(), leaf)
            values.append(result.detach().cpu())
            gradients.append(gradient.cpu())
        return torch.cat(values), torch.cat(gradients)

    def values(self, masks: Tensor) -> Tensor:
        """Gate values and one more that is always open, (m, n_components + 1)."""
        values = masks.to(self.network.device, self.network.dtype)
        if self.base is not None:
            values = values * self.base.to(values)
        if isinstance(self.rule.kind, float | int):
            values = self.rule.kind + (1 - self.rule.kind) * values
        return functional.pad(values, (0, 1), value=1.0)

    @contextmanager
    def gated(self, values: Tensor, asked: Asked) -> Iterator[None]:
        """Close gates for a while: values (1, n_gates), one for each mask or one for each row."""
        functions: dict[Spot, list[Callable[[Tensor, int], Tensor]]] = {}
        weights: Parameters = {}
        for tap in self._acting(values, asked):
            if tap.spot.is_activation:
                functions.setdefault(tap.spot, []).append(self._gate(tap, values, asked))
            else:
                assert len(values) == 1
                name = f"{tap.spot.module}.{tap.spot.side}".lstrip(".")
                own = weights.get(name, self.network.module.get_parameter(name))
                factors = padded(values[0].index_select(0, tap.channels), own.shape[tap.spot.dim])
                weights[name] = own * along(factors, tap.spot.dim, own.ndim)
        with substituted(self.network.module, weights), tapped(self.network.module, functions):
            yield

    def replace_by(self, asked: Asked, numbers: range) -> None:
        """Capture what stands in: with "resample" one donor for each mask or for each row."""
        rule = self.rule
        if rule.kind == "resample":
            if asked.donors is not None:
                donors = asked.donors
            else:
                assert rule.donors is not None
                donors = rule.donors[[number % len(rule.donors) for number in numbers]]
            captured = self.captured(donors)
            self.instead = {key: self._split(key, t, len(donors)) for key, t in captured.items()}
        elif rule.per == "class":
            assert asked.targets is not None
            codes = asked.targets
            self.instead = {key: mean[codes] for key, mean in self._means.items()}

    def captured(self, inputs: Rows) -> dict[tuple[Spot, int], Tensor]:
        """Activations at all taps, by the number of the call."""
        made = captured(self.network, inputs, [tap.spot for tap in self.taps])
        if within := [spot.module for spot, calls in made.items() for t in calls if not t.ndim]:
            raise ValueError(
                f"ablation={self.rule.kind!r} needs what {within[0]!r} makes, which lives within "
                "torch.vmap alone; use 'zero'."
            )
        return {(spot, n): tensor for spot, calls in made.items() for n, tensor in enumerate(calls)}

    def _acting(self, values: Tensor, asked: Asked) -> Iterator[Tap]:
        """Gates of a pass: where all its rows share a mask, on whatever has fewer numbers."""
        for taps, scaled in self.sites:
            floats = sum(self.wiring.sizes.get(tap.spot, 0) for tap in taps) * len(asked)
            shared = len(values) == 1 and scaled
            yield from scaled if shared and sum(tap.n_floats for tap in scaled) < floats else taps

    def _laid(self) -> list[tuple[list[Tap], list[Tap]]]:
        """Gates of every site, and those on weights that would do the same."""
        groups: dict[tuple[Site, bool], list[int]] = {}
        for position, component in enumerate(self.wiring.components):
            site = next(site for site in self.wiring.sites if site.holds(component))
            groups.setdefault((site, component.kind == "layer"), []).append(position)
        # scaled weights would be a second copy of a large network's
        quick = self.rule.scales and is_small(self.network.module)
        laid = []
        for (site, whole), positions in groups.items():
            units = [-1 if whole else self.wiring.components[p].unit for p in positions]
            channels = _channels(site, units, positions, self.n_components)
            channels = channels.to(self.network.device)
            recalled = any(spot.module in self.wiring.prefix for spot in site.spots)
            spots = site.weights if self.by_weights and site.weights else site.spots
            weights = site.weights if quick and not recalled else ()
            taps = [self._tap(site, spot, channels) for spot in spots]
            laid.append((taps, [self._tap(site, spot, channels) for spot in weights]))
        return laid

    def _tap(self, site: Site, spot: Spot, channels: Tensor) -> Tap:
        part = self.network.module.get_submodule(spot.module)
        if not spot.is_activation:
            if self.rule.replaces:
                raise ValueError(
                    f"ablation={self.rule.kind!r} replaces activations, but {site.module!r} is "
                    f"reached by its parameter {spot.side!r} alone; use 'zero'."
                )
            return Tap(spot, channels, None, part.get_parameter(spot.side).numel())
        kept = site.keeps_bias and not self.rule.replaces
        bias = part._parameters.get("bias") if kept else None
        return Tap(spot, channels, None if bias is None else bias.detach())

    def _batch(self, asked: Asked, measure: Measure, values: Tensor, first: int) -> Tensor:
        asked = asked.ready(self.network)
        together = min(len(values), self.together(len(asked)))
        columns = []
        remembers = self.wiring.prefix and len(values) > 2 * together
        with ExitStack() as stack:
            recall = self._remember(stack) if remembers and self.rule.kind != "resample" else None
            stacked = asked.repeat(together)
            for start in range(0, len(values), together):
                part = values[start : start + together]
                # A last group that is too small is filled up: what is remembered has its size.
                filled = torch.cat([part, part[:1].expand(together - len(part), -1)])
                numbers = range(first + start, first + start + together)
                self.replace_by(stacked, numbers)
                with torch.no_grad(), self.gated(filled, stacked):
                    result = measure(self.network(stacked.rows), stacked)
                if recall is not None and not start:
                    recall()
                result = result.unflatten(0, (together, len(asked))).movedim(0, -1)
                columns.append(result[..., : len(part)].cpu())
        return torch.cat(columns, -1)

    def _remember(self, stack: ExitStack) -> Callable[[], None]:
        """Note what comes before the first gate in one pass; give what recalls it from then on."""
        made: dict[nn.Module, Any] = {}
        hooks = stack.enter_context(ExitStack())
        for name in self.wiring.prefix:
            part = self.network.module.get_submodule(name)
            handle = part.register_forward_hook(lambda part, _, out: made.__setitem__(part, out))
            hooks.callback(handle.remove)

        def recall() -> None:
            hooks.close()
            for part, output in made.items():
                # What was changed in place afterwards must be computed anew.
                if isinstance(output, Tensor) and output._version == 0:
                    own = {k: v for k, v in part.__dict__.items() if k == "forward"}
                    part.__dict__["forward"] = lambda *args, _kept=output, **kwargs: _kept
                    stack.callback(part.__dict__.update, own)
                    stack.callback(part.__dict__.pop, "forward")

        return recall

    def _gate(self, tap: Tap, values: Tensor, asked: Asked) -> Callable[[Tensor, int], Tensor]:
        gates = values.index_select(1, tap.channels)

        def mix(output: Tensor, call: int) -> Tensor:
            if torch.is_grad_enabled() and self.wiring.n_calls[tap.spot] == 1:
                call = 0  # a checkpoint runs it again
            key, size = (tap.spot, call), len(asked)
            layout = self.wiring.layouts.get(key)
            instead = self.instead.get(key, tap.bias)
            if instead is None and self.rule.kind in ("mean", "resample"):
                raise ValueError(
                    f"ablation={self.rule.kind!r}: {tap.spot.module!r} runs more often for some "
                    "rows than for the donors, and nothing can stand in for it there; use 'zero'."
                )
            return blend(output, gates, instead, layout, tap.spot.dim, self.rule, size)

        return mix

    def _averages(self) -> dict[tuple[Spot, int], Tensor]:
        """Means of the donors' activations, one for each channel, position or class."""
        donors, labels = self.rule.donors, self.rule.labels
        assert donors is not None
        sums: dict[tuple[Spot, int], Any] = {}
        sizes: dict[tuple[Spot, int], int] = {}
        codes = torch.zeros(len(donors), dtype=torch.long, device=self.network.device)
        if self.rule.per == "class":
            assert labels is not None
            codes = labels
        n_groups = int(codes.max()) + 1
        counts = torch.bincount(codes, minlength=n_groups)
        for start in range(0, len(donors), _ROWS_PER_PASS):
            where = slice(start, start + _ROWS_PER_PASS)
            part, here = donors[where], codes[where]
            for key, tensor in self.captured(part).items():
                if self.rule.per == "all":  # rows may be routed elsewhere
                    flat = tensor.movedim(key[0].dim, -1).flatten(0, -2)
                    sums[key] = sums.get(key, 0) + flat.sum(0)
                    sizes[key] = sizes.get(key, 0) + len(flat)
                    continue
                rows = self._split(key, tensor, len(part))
                total = sums.setdefault(key, rows.new_zeros(n_groups, *rows.shape[1:]))
                total.index_add_(0, here, rows)
        if self.rule.per == "all":
            return {key: total / max(sizes[key], 1) for key, total in sums.items()}
        shape = (-1, *[1] * 9)
        present = counts.clamp_min(1).to(self.network.dtype)
        return {key: total / present.view(shape[: total.ndim]) for key, total in sums.items()}

    def _split(self, key: tuple[Spot, int], tensor: Tensor, n_rows: int) -> Tensor:
        layout = self.wiring.layouts.get(key)
        if layout is None:
            if n_rows == 1:
                return tensor[None]
            raise ValueError(
                f"ablation={self.rule.kind!r} needs to know which part of the tensor at "
                f"{key[0].module!r} belongs to which row, and cannot: use 'zero' or 'mean'."
            )
        return layout.split(tensor, n_rows)


def _channels(
    site: Site, units: Sequence[int], positions: Sequence[int], n_components: int
) -> Tensor:
    n_channels = site.start + site.n_units * site.width
    channels = torch.full((n_channels,), n_components)
    for unit, position in zip(units, positions, strict=True):
        start = site.start + max(unit, 0) * site.width
        stop = n_channels if unit < 0 else start + site.width
        channels[start:stop] = position
    return channels


def blend(
    output: Tensor,
    gates: Tensor,
    instead: Tensor | None,
    layout: Layout | None,
    dim: int,
    rule: Rule,
    n_rows: int,
) -> Tensor:
    """Put what stands in where gates are closed.

    Shapes: output (.., n_channels, ..), gates (r, n_channels) with r 1, or a divisor of n_rows;
    instead (n_channels,) or rows in front, (r, inner, ...).
    """
    dim = dim % output.ndim
    weights = _spread(gates, layout, dim, output, n_rows)
    if rule.positions is not None:
        weights = _at_positions(weights, layout, dim, output, rule.positions)
    if callable(rule.kind):
        return torch.lerp(rule.kind(output), output, weights)
    if instead is None:
        return output * weights
    if instead.ndim == 1:
        instead = along(padded(instead, output.shape[dim], 0), dim, output.ndim)
    elif layout is None:  # one donor, and one row of its shape
        instead = instead[0]
    else:
        whole = layout.split(output, n_rows).shape
        instead = layout.join(_for_each(instead, n_rows).expand(whole))
    return torch.lerp(instead.to(output).expand_as(output), output, weights)


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Lay values along one of so many dimensions: (size,) -> (1, .., size, .., 1)."""
    shape = [1] * ndim
    shape[dim] = len(values)
    return values.reshape(shape)


def padded(values: Tensor, size: int, beyond: float = 1.0) -> Tensor:
    """Fill up with what leaves a channel as it is: (..., n) -> (..., size)."""
    missing = size - values.shape[-1]
    return functional.pad(values, (0, missing), value=beyond) if missing else values


def _for_each(table: Tensor, n_rows: int) -> Tensor:
    """One entry for each row of a stacked batch, given one for all, each mask or each row."""
    if len(table) in (1, n_rows):
        return table
    return table.repeat_interleave(n_rows // len(table), 0)


def _spread(gates: Tensor, layout: Layout | None, dim: int, output: Tensor, n_rows: int) -> Tensor:
    """Lay gates over an output: gates (r, n_channels) -> something that broadcasts with it."""
    gates = padded(gates, output.shape[dim]).to(output)
    if len(gates) == 1:
        return along(gates[0], dim, output.ndim)
    if layout is None:
        raise RuntimeError("a layer ran more often than at first, as if for gradients")
    rows = _for_each(gates, n_rows)
    inner = output.shape[layout.axis] // n_rows
    rows = rows.repeat(inner, 1) if layout.in_turn else rows.repeat_interleave(inner, 0)
    shape = [1] * output.ndim
    shape[layout.axis], shape[dim] = rows.shape
    return (rows if layout.axis < dim else rows.T).reshape(shape)


def _at_positions(
    weights: Tensor, layout: Layout | None, dim: int, output: Tensor, positions: tuple[int, ...]
) -> Tensor:
    others = [a for a in range(output.ndim) if a != dim and (layout is None or a != layout.axis)]
    if layout is None or len(others) != 1:
        raise ValueError(
            f"positions={positions} need tensors of rows, positions and channels; here is one of "
            f"shape {tuple(output.shape)}."
        )
    chosen = torch.zeros(output.shape[others[0]], dtype=output.dtype, device=output.device)
    chosen[list(positions)] = 1
    return 1 - along(chosen, others[0], output.ndim) * (1 - weights)
