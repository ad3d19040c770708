"""Name the parts of a network that can be ablated, and pick them."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Component:
    """One part of a network.

    Parameters
    ----------
    module : str
        Dotted name of the module in the network.
    kind : str
        What the part is: ``"conv_filter"``, ``"neuron"``, ``"mlp_neuron"``,
        ``"attention_head"``, ``"key_value_group"``, ``"expert"``, ``"layer"``, or the name of
        a `Place`.
    unit : int
        The filter, row or head in it; 0 for a whole layer.
    """

    module: str
    kind: str
    unit: int

    @property
    def name(self) -> str:
        """A readable name such as ``layer1.0.conv2[7]``."""
        if self.kind == "layer":
            return self.module
        if self.kind in _SHOWN_BY_MODULE:
            return f"{self.module}[{self.unit}]"
        named = self.kind.startswith(f"{self.module}:")
        return f"{self.kind if named else f'{self.module}:{self.kind}'}[{self.unit}]"


_SHOWN_BY_MODULE = ("conv_filter", "neuron", "mlp_neuron", "attention_head", "expert")


@dataclass(frozen=True)
class Place:
    """A slice of an activation or of a weight, cut into units, each a component.

    Ablating a unit sets its slice to zero, or to what `ablation` says.

    Parameters
    ----------
    module : str
        Dotted name of the module in the network.
    side : str, default="output"
        ``"output"`` or ``"input"`` of the module (of several tensors the first), or the name
        of one of its parameters, such as ``"weight"``.
    dim : int, default=1
        Dimension that is cut into units.
    start : int, default=0
        Where the first unit begins.
    width : int or None, default=1
        Entries of a unit; None means all that there are.
    n_units : int or None, default=None
        How many units; None means as many as fit.
    name : str or None, default=None
        What its components are called, also their `kind`; by default module and side.

    Examples
    --------
    >>> from skperf.components import Place
    >>> Place("lstm", dim=2, name="lstm unit").side
    'output'
    """

    module: str
    side: str = "output"
    dim: int = 1
    start: int = 0
    width: int | None = 1
    n_units: int | None = None
    name: str | None = None


Selection = str | Sequence["str | Component | Place"] | Callable[[nn.Module], Sequence[Any]]


@dataclass(frozen=True)
class Spot:
    """A tensor that a pass makes or uses: an activation of a module, or a parameter."""

    module: str
    side: str  # "output", "input" or the name of a parameter
    dim: int

    @property
    def is_activation(self) -> bool:
        """Whether every pass makes it anew."""
        return self.side in ("output", "input")


@dataclass(frozen=True)
class Site:
    """A row of components: one slice of some tensors each."""

    module: str
    kind: str
    n_units: int
    spots: tuple[Spot, ...]
    width: int = 1
    start: int = 0
    aliases: tuple[str, ...] = ()
    weights: tuple[Spot, ...] = ()  # zeroing these slices is the same as ablating
    keeps_bias: bool = False
    hidden: bool = True  # whether more of the network comes behind

    def components(self) -> list[Component]:
        """All components of this site."""
        return [Component(self.module, self.kind, unit) for unit in range(self.n_units)]

    def holds(self, component: Component) -> bool:
        """Whether a component is one of this site's."""
        if component.module != self.module and component.module not in self.aliases:
            return False
        if component.kind == "layer":
            return self.keeps_bias and component.unit == 0
        alike = component.kind == self.kind or {component.kind, self.kind} == {
            "neuron",
            "mlp_neuron",
        }
        return alike and 0 <= component.unit < self.n_units


@dataclass(frozen=True)
class Found:
    """What one pass has shown of a network."""

    sites: tuple[Site, ...]
    attention_layers: frozenset[str] = frozenset()  # make queries, keys, values or take heads
    fans_in: dict[str, int] = field(default_factory=dict)  # of the row layers
    looks_around: frozenset[str] = frozenset()  # convolutions of more than one position
    inner: frozenset[str] = frozenset()  # read entry by entry, and led back to their width
    leading_back: frozenset[str] = frozenset()
    unrecognised: tuple[str, ...] = ()  # attend, but no heads were found
    fused: tuple[str, ...] = ()  # parameters that no layer of a known kind holds

    def of_kind(self, *kinds: str) -> list[Site]:
        """Sites of some kinds."""
        return [site for site in self.sites if site.kind in kinds]

    def feed_forward(self) -> list[Site]:
        """Hidden linear layers; in a transformer those that widen or are inner."""
        linear = [site for site in self.of_kind("neuron") if site.hidden]
        if not self.of_kind("attention_head"):
            return linear
        outside = [
            site
            for site in [*linear, *(s for s in self.of_kind("conv_filter") if s.hidden)]
            if site.module not in self.looks_around
            and not {site.module, *(spot.module for spot in site.spots)} & self.attention_layers
        ]
        wide = [site for site in outside if site.n_units > self.fans_in[site.module]]
        inner = [site for site in outside if site.module in self.inner or site in wide]
        return [site for site in inner if site.module not in self.leading_back]


def select(
    found: Found, selection: Selection, module: nn.Module, sizes: Callable[[Place], int]
) -> tuple[list[Component], list[Site]]:
    """Name the components that a selection means, and the sites they live in."""
    sites = list(found.sites)
    given: Any = selection(module) if callable(selection) else selection
    items = [given] if isinstance(given, str | Component | Place) else given
    if not isinstance(items, Sequence):
        raise TypeError(
            "components must be a word, a glob, a list of these, of Component or of Place, or a "
            f"function of the module; it is {type(items).__name__}."
        )
    chosen: list[Component] = []
    for item in items:
        if isinstance(item, Place):
            site = site_of_place(item, module, sizes)
            if site not in sites:
                site = _told_apart(site, item, sites)
                sites.append(site)
            chosen += site.components()
        elif isinstance(item, str):
            chosen += _by_word(found, item)
        elif isinstance(item, Component):
            site_of(sites, item)
            chosen.append(item)
        else:
            raise TypeError(
                f"components must hold words, globs, Component or Place, got {type(item).__name__}."
            )
    if not chosen:
        raise ValueError("components selects nothing: " + _listing(found.sites))
    # one unit may go by several names, and two gates on it would be one
    used: dict[tuple[int, bool, int], tuple[Component, Site]] = {}
    for component in chosen:
        site = site_of(sites, component)
        used.setdefault((id(site), component.kind == "layer", component.unit), (component, site))
    return [c for c, _ in used.values()], list(dict.fromkeys(site for _, site in used.values()))


def site_of(sites: Sequence[Site], component: Component) -> Site:
    """Where a component lives."""
    for site in sites:
        if site.holds(component):
            return site
    raise ValueError(f"the network has no component {component}: " + _listing(sites))


def site_of_place(place: Place, module: nn.Module, sizes: Callable[[Place], int]) -> Site:
    """Lay a declared place over the network."""
    parts = dict(module.named_modules())
    if place.module not in parts:
        raise ValueError(
            f"Place names the module {place.module!r}; the network has {list(parts)[:20]}."
        )
    spot = Spot(place.module, place.side, place.dim)
    if not spot.is_activation and parts[place.module]._parameters.get(place.side) is None:
        raise ValueError(
            f"side={place.side!r} of {place!r} must be 'output', 'input' or a parameter of "
            f"{place.module!r}: {[name for name, _ in parts[place.module].named_parameters()]}."
        )
    size = sizes(place)
    width = size - place.start if place.width is None else place.width
    n_units = (size - place.start) // max(width, 1) if place.n_units is None else place.n_units
    if width < 1 or n_units < 1 or place.start < 0 or place.start + n_units * width > size:
        raise ValueError(
            f"{place!r} needs {place.start} + {n_units} x {width} entries of dimension "
            f"{place.dim}, which has {size}."
        )
    kind = place.name or f"{place.module}:{place.side}"
    return Site(place.module, kind, n_units, (spot,), width, place.start)


def _told_apart(site: Site, place: Place, sites: Sequence[Site]) -> Site:
    if place.name is None and any(other.holds(site.components()[0]) for other in sites):
        site = replace(site, kind=f"{site.kind}({place.dim}, {place.start})")
    if any(other.holds(site.components()[0]) for other in sites):
        raise ValueError(
            f"{place!r}: {place.module!r} has other components called {site.kind!r}; tell them "
            "apart by name=."
        )
    return site


WORDS = {
    "conv_filters": "conv_filter",
    "neurons": "neuron",
    "attention_heads": "attention_head",
    "key_value_groups": "key_value_group",
    "experts": "expert",
}


def _by_word(found: Found, word: str) -> list[Component]:
    if word == "auto":
        chosen = _automatic(found)
    elif word == "layers":
        kept = [site for site in found.sites if site.keeps_bias]
        hidden = [site for site in kept if site.hidden]
        chosen = [Component(site.module, "layer", 0) for site in hidden or kept]
    elif word == "mlp_neurons":
        chosen = _mlp_neurons(found)
    elif word in WORDS:
        kept = found.of_kind(WORDS[word])
        hidden = [site for site in kept if site.hidden]
        chosen = [component for site in hidden or kept for component in site.components()]
    else:
        matching = [s for s in found.sites if fnmatch.filter((s.module, *s.aliases), word)]
        # a group is the sum of its heads, which stand beside it under the same name
        if any(site.kind != "key_value_group" for site in matching):
            matching = [site for site in matching if site.kind != "key_value_group"]
        chosen = [c for site in matching for c in site.components()]
    if not chosen:
        raise ValueError(f"components={word!r} matches nothing: " + _listing(found.sites))
    return chosen


def _automatic(found: Found) -> list[Component]:
    if found.of_kind("attention_head"):
        heads = found.of_kind("attention_head") + found.of_kind("expert")
        return [c for site in heads for c in site.components()] + _mlp_neurons(found)
    return _by_word(found, "conv_filters" if found.of_kind("conv_filter") else "neurons")


def _mlp_neurons(found: Found) -> list[Component]:
    named = {"neuron": "mlp_neuron"}
    sites = [replace(s, kind=named.get(s.kind, s.kind)) for s in found.feed_forward()]
    return [component for site in sites for component in site.components()]


def _listing(sites: Sequence[Site], most: int = 12) -> str:
    if not sites:
        return "the network has no convolution, linear layer or attention block."
    shown = [f"{site.module!r} ({site.n_units} x {site.kind})" for site in sites[:most]]
    more = f" and {len(sites) - most} more" if len(sites) > most else ""
    return "it can be ablated in " + ", ".join(shown) + more + "."
