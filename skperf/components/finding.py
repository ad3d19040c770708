"""Find what a network can be cut into, by running one row and looking."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.parameters import refuse_scripted
from skperf.components.taps import captured, row_layer, weight_rows
from skperf.components.units import Found, Place, Site, Spot
from skperf.components.watching import Watcher


def find(network: Network, row: Any, others: Any = None) -> Found:
    """Run one row through a view of ours and say what it is made of: row (1, ...)."""
    refuse_scripted(network.module)
    watcher = Watcher(network.module)
    try:
        with torch.enable_grad(), watcher.hooks(), watcher:
            outputs = network(row)
    except RuntimeError as error:  # runs as it is, or it would have been refused before
        raise ValueError(
            f"components can't be found in {type(network.module).__name__}, whose forward does not "
            f"bear to be watched ({error}). Does it take gradients itself?"
        ) from error
    readout = watcher.readout(outputs)
    parts = dict(network.module.named_modules())
    fans_in = {name: shape[2] for name, part in parts.items() if (shape := row_layer(part))}
    if (
        others is not None and not fans_in.keys() <= watcher.called
    ):  # other rows may be routed there
        with torch.no_grad(), watcher.hooks(whole=False):
            network(others)
    names: dict[nn.Module, list[str]] = {}
    for name, part in network.module.named_modules(remove_duplicate=False):
        names.setdefault(part, []).append(name)
    rows = list(_rows_of_layers(network.module, names, watcher, readout))
    heads = [replace(s, aliases=_other_names(names, network.module, s)) for s in watcher.heads]
    order = list(parts).index
    sites = sorted([*rows, *heads, *watcher.experts()], key=lambda site: order(site.module))
    kernels = {name: np.prod(getattr(part, "kernel_size", 1)) for name, part in parts.items()}
    found = Found(
        tuple(sites),
        frozenset(watcher.attention_layers),
        fans_in,
        frozenset(name for name, size in kernels.items() if size > 1),
        frozenset(watcher.inside),
        frozenset(watcher.leading_back),
        tuple(watcher.unrecognised()),
        tuple(watcher.fused()),
    )
    for seen in (watcher.made, watcher.mixings, watcher.kept):
        seen.clear()  # a cycle would hold the whole graph until it is collected
    return found


def size_at(network: Network, row: Any, place: Place) -> int:
    """Entries along the dimension that a place cuts, found by running a row: row (1, ...)."""
    spot = Spot(place.module, place.side, place.dim)
    if spot.is_activation:
        seen = captured(network, row, [spot])[spot]
    else:
        seen = [network.module.get_submodule(place.module).get_parameter(place.side)]
    if not seen:
        raise ValueError(f"{place!r}: {place.module!r} is never called, or has no such tensor.")
    shape = tuple(seen[0].shape)
    if not -len(shape) <= place.dim < len(shape):
        raise ValueError(
            f"{place!r}: the tensor there has shape {shape}, no dimension {place.dim}."
        )
    return int(shape[place.dim])


def _other_names(names: dict[nn.Module, list[str]], module: nn.Module, site: Site) -> Any:
    held = dict.fromkeys([site.module, *(spot.module for spot in site.spots)])
    others = [other for name in held for other in names[module.get_submodule(name)]]
    return tuple(other for other in others if other != site.module)


def _rows_of_layers(
    module: nn.Module, names: dict[nn.Module, list[str]], watcher: Watcher, readout: str | None
) -> Iterator[Site]:
    # A weight shared by several layers gives one site that acts on all of them. A layer whose
    # weight is shared with something of another kind (an embedding, say) gives none, because
    # zeroing rows would change that too.
    owners: dict[int, list[nn.Module]] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and part not in owners.setdefault(id(parameter), []):
                owners[id(parameter)].append(part)
    seen: set[int] = set()
    for part, part_names in names.items():
        described = row_layer(part)
        if described is None:
            continue
        kind, n_units, _, dim = described
        weight = part._parameters.get("weight")
        sharing = owners.get(id(weight), [part]) if weight is not None else [part]
        if id(weight) in seen or any(row_layer(other) is None for other in sharing):
            continue
        if weight is not None:
            seen.add(id(weight))
        rows = weight_rows(part, part_names[0])
        known = [names[other][0] for other in sharing]
        hooks = tuple(Spot(name, "output", dim) for name in known if name in watcher.called)
        # a weight that is used without its module being called is reached as a parameter
        spots = hooks if len(hooks) == len(known) else (() if rows is None else (rows,))
        if not spots or (not hooks and id(weight) not in watcher.used):
            continue
        aliases = tuple(n for other in sharing for n in names[other] if n != part_names[0])
        yield Site(
            part_names[0],
            kind,
            n_units,
            spots,
            aliases=aliases,
            weights=() if rows is None else (rows,),
            keeps_bias=True,
            hidden=readout not in (part_names[0], *aliases),
        )
