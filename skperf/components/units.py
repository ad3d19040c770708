"""Find the parts of a network that can be ablated, and name them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_VALUE_NAMES = ("value", "v_proj", "v_lin", "to_v", "v")
_QUERY_NAMES = ("query", "q_proj", "q_lin", "to_q", "q")
_FUSED_NAMES = ("qkv", "c_attn", "query_key_value", "in_proj", "Wqkv")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_HEAD_SIZES = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class Component:
    """One part of a network.

    Parameters
    ----------
    module : str
        Dotted name of the module in the network.
    kind : {"conv_filter", "neuron", "mlp_neuron", "attention_head", "layer"}
        What the part is.
    unit : int
        The filter, row or head in it; 0 for a whole layer.
    """

    module: str
    kind: str
    unit: int

    @property
    def name(self) -> str:
        """A readable name such as ``layer1.0.conv2[7]``."""
        return self.module if self.kind == "layer" else f"{self.module}[{self.unit}]"


Selection = str | Sequence["str | Component"] | Callable[[nn.Module], Sequence[Component]]


@dataclass(frozen=True)
class Place:
    """A module whose output, cut along one dimension, is a row of components."""

    module: str
    kind: str
    n_units: int
    acts_on: tuple[str, ...]
    width: int = 1
    offset: int = 0
    dim: int = -1
    aliases: tuple[str, ...] = ()

    def components(self) -> list[Component]:
        """All components of this place."""
        return [Component(self.module, self.kind, unit) for unit in range(self.n_units)]

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches one of the module's names."""
        return any(fnmatchcase(name, pattern) for name in (self.module, *self.aliases))


def find_places(module: nn.Module) -> list[Place]:
    """Everything in a network that can be gated."""
    # A module, or a weight shared by several modules, gives one place however many names it has.
    # Layers whose weight is shared with something that is no layer of its own kind (an
    # embedding, say) give none, because zeroing rows would change that too.
    names = _names_of_modules(module)
    places = list(_rows_of_layers(module, names)) + list(_heads(module, names))
    order = {name: position for position, name in enumerate(n for n, _ in module.named_modules())}
    places.sort(key=lambda place: order[place.module])
    return places


def find_components(module: nn.Module, selection: Selection = "auto") -> list[Component]:
    """Name the components that a selection means."""
    places = find_places(module)
    if callable(selection):
        chosen = list(selection(module))
    elif isinstance(selection, str):
        chosen = _by_word(places, selection, module)
    elif isinstance(selection, Sequence):
        chosen = [c for item in selection for c in _one_item(places, item, module)]
    else:
        raise TypeError(
            "components must be a word, a glob, a list of these or of Component, or a function "
            f"of the module; it is {type(selection).__name__}."
        )
    _check_exist(places, chosen)
    if not chosen:
        raise ValueError("components selects nothing: " + _listing(places))
    return list(dict.fromkeys(chosen))


def place_of(places: Sequence[Place], component: Component) -> Place:
    """Where a component lives."""
    for place in places:
        named = component.module == place.module or component.module in place.aliases
        if named and component.kind == "layer" and component.unit == 0:
            return place
        alike = component.kind == place.kind or {component.kind, place.kind} <= {
            "neuron",
            "mlp_neuron",
        }
        if named and alike and 0 <= component.unit < place.n_units:
            return place
    raise ValueError(f"the network has no component {component}: " + _listing(places))


def _check_exist(places: Sequence[Place], chosen: Sequence[Any]) -> None:
    for component in chosen:
        if not isinstance(component, Component):
            raise TypeError(
                f"components must be Component records, got {type(component).__name__}."
            )
        place_of(places, component)


def _one_item(places: list[Place], item: str | Component, module: nn.Module) -> list[Component]:
    return [item] if isinstance(item, Component) else _by_word(places, item, module)


def _by_word(places: list[Place], word: str, module: nn.Module) -> list[Component]:
    if word == "auto":
        word = _automatic(places)
    if word == "layers":
        kept = [place for place in places if not _is_readout(place, places)]
        chosen = [Component(place.module, "layer", 0) for place in kept]
    elif word == "mlp_neurons":
        chosen = [
            Component(place.module, "mlp_neuron", unit)
            for place in _feed_forward(places, module)
            for unit in range(place.n_units)
        ]
    elif word in _WORDS:
        kept = [place for place in places if place.kind == _WORDS[word]]
        hidden = [place for place in kept if not _is_readout(place, places)]
        chosen = [component for place in hidden or kept for component in place.components()]
    else:
        chosen = [c for place in places if place.matches(word) for c in place.components()]
    if not chosen:
        raise ValueError(f"components={word!r} matches nothing: " + _listing(places))
    return chosen


_WORDS = {
    "conv_filters": "conv_filter",
    "neurons": "neuron",
    "attention_heads": "attention_head",
}


def _automatic(places: list[Place]) -> str:
    kinds = {place.kind for place in places}
    for word, kind in (("attention_heads", "attention_head"), ("conv_filters", "conv_filter")):
        if kind in kinds:
            return word
    return "neurons"


def _is_readout(place: Place, places: list[Place]) -> bool:
    linear = [other for other in places if other.kind == "neuron"]
    return bool(linear) and place == linear[-1]


def _feed_forward(places: list[Place], module: nn.Module) -> list[Place]:
    """Hidden linear layers; in a transformer only those that widen, outside attention."""
    linear = [p for p in places if p.kind == "neuron" and not _is_readout(p, places)]
    if not any(place.kind == "attention_head" for place in places):
        return linear
    parts = dict(module.named_modules())
    blocks = {place.module for place in places if place.kind == "attention_head"}
    return [
        place
        for place in linear
        if not any(place.module.startswith(block + ".") for block in blocks)
        and place.n_units > _fan_in(parts[place.module])
    ]


def _fan_in(layer: Any) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    weight = layer._parameters["weight"]
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])


def _names_of_modules(module: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        names.setdefault(part, []).append(name)
    return names


def _rows_of_layers(module: nn.Module, names: dict[nn.Module, list[str]]) -> Iterator[Place]:
    owners = _owners_of_weights(module)
    seen: set[int] = set()
    for part, part_names in names.items():
        described = _rows(part)
        if described is None or _inside_attention(part_names[0], module):
            continue
        kind, n_units, dim = described
        weight = part._parameters.get("weight")
        sharing = owners.get(id(weight), [part]) if weight is not None else [part]
        if id(weight) in seen or any(_rows(other) is None for other in sharing):
            continue
        if weight is not None:
            seen.add(id(weight))
        acts_on = tuple(names[other][0] for other in sharing)
        aliases = tuple(n for other in sharing for n in names[other] if n != part_names[0])
        yield Place(part_names[0], kind, n_units, acts_on, dim=dim, aliases=aliases)


def _inside_attention(name: str, module: nn.Module) -> bool:
    """``out_proj`` of torch's attention is never called: its rows cannot be gated."""
    parent = module.get_submodule(name.rpartition(".")[0])
    return name != "" and isinstance(parent, nn.MultiheadAttention)


def _owners_of_weights(module: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if isinstance(parameter, Tensor) and part not in owners.get(id(parameter), []):
                owners.setdefault(id(parameter), []).append(part)
    return owners


def _rows(part: nn.Module) -> tuple[str, int, int] | None:
    if isinstance(part, _CONVOLUTIONS):
        return "conv_filter", part.out_channels, 1
    if isinstance(part, nn.Linear):
        return "neuron", part.out_features, -1
    if type(part).__name__ == "Conv1D" and hasattr(part, "nf"):  # the transposed linear of GPT-2
        n_units: Any = part.nf
        return "neuron", int(n_units), -1
    return None


def _heads(module: nn.Module, names: dict[nn.Module, list[str]]) -> Iterator[Place]:
    for part, (name, *aliases) in names.items():
        if isinstance(part, nn.MultiheadAttention):
            place = Place(name, "attention_head", part.num_heads, (name,), part.head_dim)
        else:
            found = _separate_heads(part, name) or _fused_heads(part, name)
            if found is None:
                continue
            place = found
        yield Place(**{**vars(place), "aliases": tuple(aliases)})


def _separate_heads(part: nn.Module, name: str) -> Place | None:
    """Query, key and value projections of their own, as in Hugging Face encoders."""
    children = dict(part.named_children())
    value = next((n for n in _VALUE_NAMES if isinstance(children.get(n), nn.Linear)), None)
    if value is None or not any(query in children for query in _QUERY_NAMES):
        return None
    layer = children[value]
    assert isinstance(layer, nn.Linear)
    size = _attribute(part, _HEAD_SIZES)
    count = _attribute(part, _HEAD_COUNTS)
    if size is None and count is not None:
        size = layer.out_features // count
    if size is None or layer.out_features % size:
        return None
    return Place(
        name, "attention_head", layer.out_features // size, (_join(name, value),), width=size
    )


def _fused_heads(part: nn.Module, name: str) -> Place | None:
    """One projection for query, key and value, the value last, as in timm and GPT-2."""
    children = dict(part.named_children())
    fused = next((n for n in _FUSED_NAMES if _rows(children.get(n, part)) is not None), None)
    count = _attribute(part, _HEAD_COUNTS)
    if fused is None or count is None:
        return None
    described = _rows(children[fused])
    if described is None or described[1] % (3 * count):
        return None
    third = described[1] // 3
    acts_on = (_join(name, fused),)
    return Place(name, "attention_head", count, acts_on, third // count, offset=2 * third)


def _attribute(part: nn.Module, candidates: Sequence[str]) -> int | None:
    owners = (part, getattr(part, "config", None))
    values = (getattr(owner, name, None) for owner in owners for name in candidates)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _listing(places: Sequence[Place], most: int = 12) -> str:
    if not places:
        return "the network has no convolution, linear layer or attention block."
    shown = [f"{place.module!r} ({place.n_units} x {place.kind})" for place in places[:most]]
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return "it can be ablated in " + ", ".join(shown) + more + "."
