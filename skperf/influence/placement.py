"""Find where a network keeps its rows, layer by layer, by running a few of them.

Nothing is taken from names or from the kind of a layer: what differs between a batch of two and
one of three is where the rows are, and what a row's gradient comes out as alone is what it must
be in a batch. Layers that fail the comparison are differentiated row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skperf.backbone.modes import forward_hooks
from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters
from skperf.backbone.rows import Rows
from skperf.influence.captures import HINT, Call, Unusual, Watch, alone, record, recording
from skperf.influence.gradients import written_out
from skperf.influence.layers import CONVOLUTIONS, Layer, Place, find_layers, one_by_one

_LOOKED_AT, _SPREAD = 512, 6
_RTOL = {torch.float64: 1e-8}


@dataclass(frozen=True)
class Plan:
    """How each parameter of a network is differentiated."""

    places: dict[tuple[str, ...], tuple[Place, ...]]  # of the layers that factorise
    looped: bool = False  # whether the rest takes one row after another

    def layers(self, module: nn.Module, parameters: Parameters) -> list[Layer]:
        """Find the layers again in another view of the network."""
        found = [
            replace(layer, places=self.places[layer.names])
            for layer in find_layers(module, parameters)
            if layer.names in self.places
        ]
        taken = {name for layer in found for name in layer.names}
        rest = [name for name in parameters if name not in taken]
        return [*found, one_by_one(rest, parameters, looped=self.looped)] if rest else found


def plan(network: Network, X: Rows, parameters: Parameters, how: str) -> Plan:
    """Choose how to differentiate: X (n, ...), how "auto", "factorised" or "reference"."""
    with recording(network.module):
        rows = network.inputs(X[telling_rows(X)])
        if how == "reference":
            return Plan({}, _must_loop(network, rows, parameters, parameters))
        layers = [layer for layer in find_layers(network.module, parameters) if layer.sites]
        places = _places(network, rows, layers)
        truth, cotangent = _truth(network, rows, parameters)
        kept = _verified(network, rows, parameters, places, truth, cotangent)
        kept = _equivariant(network, network.inputs(X[spread_rows(X)]), parameters, kept)
        rest = [name for name in parameters if not any(name in names for names in kept)]
        if rest and how == "factorised":
            raise ValueError(
                f"gradients='factorised': no factorised gradients of {rest[:12]}, whose layers "
                "keep rows elsewhere than in the first dimension, hold other layers, or are "
                f"recurrent; gradients='auto' takes these row by row, {HINT}"
            )
        looped = bool(rest) and _must_loop(network, rows, parameters, rest, truth, cotangent)
        return Plan(kept, looped)


def telling_rows(X: Rows) -> Any:
    """Choose three rows that differ, in an order that is not theirs: X (n, ...) -> (3,)."""
    # a network that sorts its rows, by length for example, gives itself away
    seen = X[: min(len(X), _LOOKED_AT)].load().leaves[0]
    values = seen.detach().cpu().double().numpy() if isinstance(seen, Tensor) else np.asarray(seen)
    sums = np.nan_to_num(values.reshape(len(values), -1).astype(float)).sum(1)
    order = np.argsort(-sums, kind="stable")
    where = [0, len(order) // 2, len(order) - 1] if len(order) > 2 else [0, len(order) - 1, 0]
    return order[where]


def spread_rows(X: Rows) -> Any:
    """Choose rows over the whole length: X (n, ...) -> (m,)."""
    return np.unique(np.linspace(0, len(X) - 1, _SPREAD).astype(int))


def _equivariant(
    network: Network,
    rows: Rows,
    parameters: Parameters,
    places: dict[tuple[str, ...], tuple[Place, ...]],
) -> dict[tuple[str, ...], tuple[Place, ...]]:
    """Keep the layers whose inputs follow the rows wherever these stand in a batch."""
    # a network that sorts its rows gives itself away in one of two orders, one that sends rows to
    # different layers by the sizes of what they get
    n = len(rows)
    order = torch.arange(n).flip(0)
    layers = [layer for layer in Plan(places).layers(network.module, parameters) if layer.sites]
    seen = []
    for batch in (rows, rows[order]):
        watch = Watch(n)
        with forward_hooks(watch.hooks(layers)):
            network(batch)
        seen.append(watch.calls)
    kept = {}
    for layer in layers:
        pairs = zip(seen[0][layer.name], seen[1][layer.name], strict=False)
        same = len(seen[0][layer.name]) == len(seen[1][layer.name]) == len(layer.places)
        if same and all(_follows(one, two, order) for one, two in pairs):
            kept[layer.names] = layer.places
    return kept


def _follows(one: Call, two: Call, order: Tensor) -> bool:
    place, n = one.place, len(order)
    if place.axis is None:
        return True
    parts = []
    for call in (one, two):
        inputs = call.inputs.movedim(place.axis, 0)
        if len(inputs) != n * place.fold:
            return False
        shape = (place.fold, n) if place.rows_last else (n, place.fold)
        apart = inputs.unflatten(0, shape)
        parts.append(apart.transpose(0, 1) if place.rows_last else apart)
    first, second = parts[0][order].double(), parts[1].double()
    return bool((first - second).abs().max() <= 1e-3 * first.abs().max().clamp_min(1e-30))


def _places(
    network: Network, rows: Rows, layers: Sequence[Layer]
) -> dict[tuple[str, ...], tuple[Place, ...]]:
    """Compare the shapes in batches of two and of three."""
    shapes = []
    for n in (2, 3):
        seen: dict[tuple[str, ...], list[Any]] = {layer.names: [] for layer in layers}

        def look(layer: Layer, seen: dict[tuple[str, ...], list[Any]] = seen) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                simple = args and isinstance(args[0], Tensor) and isinstance(output, Tensor)
                seen[layer.names].append((args[0].shape, output.shape) if simple else None)

            return hook

        hooks = {site: look(layer) for layer in layers for site in layer.sites}
        with torch.no_grad(), forward_hooks(hooks):
            network(rows[:n])
        shapes.append(seen)
    found = {
        layer.names: _of_shapes(layer, *(seen[layer.names] for seen in shapes)) for layer in layers
    }
    return {names: where for names, where in found.items() if where is not None}


def _of_shapes(layer: Layer, two: list[Any], three: list[Any]) -> tuple[Place, ...] | None:
    if len(two) != len(three) or not two or None in two or None in three:
        return None
    places = []
    for (input_2, output_2), (input_3, output_3) in zip(two, three, strict=True):
        where = _place(input_2, input_3)
        if where is None or (where.axis is not None and where != _place(output_2, output_3)):
            return None
        simple = where.axis == 0 and where.fold == 1
        if where.axis and isinstance(layer.module, (*CONVOLUTIONS, nn.modules.batchnorm._NormBase)):
            return None
        if not layer.known and not (simple and len(two) == 1):
            return None
        places.append(where)
    return tuple(places)


def _place(two: torch.Size, three: torch.Size) -> Place | None:
    if len(two) != len(three):
        return None
    changed = [axis for axis, pair in enumerate(zip(two, three, strict=True)) if pair[0] != pair[1]]
    if not changed:
        return Place(None)
    axis = changed[0]
    fold, rest = divmod(two[axis], 2)
    if len(changed) > 1 or rest or fold == 0 or three[axis] != 3 * fold:
        return None
    return Place(axis, fold)


def _truth(network: Network, rows: Rows, parameters: Parameters) -> tuple[Parameters, Tensor]:
    """Gradients of each row run alone, by plain autograd: -> (3, ...) each, cotangent (3, ...)."""
    outputs = network(rows).detach()
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError("the network's outputs are not finite: its weights hold NaN, or X does.")
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    gradients = []
    for i in range(len(rows)):
        leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        own = network(rows[i : i + 1], leaves)
        if not torch.allclose(
            own.detach(), outputs[i : i + 1], rtol=1e-3, atol=1e-3 * float(outputs.abs().max())
        ):
            raise ValueError(
                "the network gives a row another output alone than in its batch: a row's gradient "
                "would depend on the other rows. Does it normalise, sort or pool over the batch?"
            )
        total = (own * cotangent[i : i + 1]).sum()
        found = (
            torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            if total.requires_grad
            else [torch.zeros_like(p) for p in leaves.values()]
        )
        gradients.append(dict(zip(leaves, found, strict=True)))
    return {n: torch.stack([g[n].flatten() for g in gradients]) for n in parameters}, cotangent


def _verified(
    network: Network,
    rows: Rows,
    parameters: Parameters,
    places: dict[tuple[str, ...], tuple[Place, ...]],
    truth: Parameters,
    cotangent: Tensor,
) -> dict[tuple[str, ...], tuple[Place, ...]]:
    """Keep the layers whose factors are the gradients of rows run alone."""
    # Inputs that all rows share are repeated first; where the network does not bear that, their
    # layers are given up. Entries of a row that do not lie together lie apart.
    kept: dict[tuple[str, ...], tuple[Place, ...]] = {}
    waiting = dict(places)
    for repeated in (True, False):
        tried = {
            names: where
            for names, where in waiting.items()
            if repeated or all(place.axis is not None for place in where)
        }
        while tried:
            try:
                right = _right(network, rows, parameters, tried, truth, cotangent)
            except Unusual as error:
                tried.pop(error.layer.names, None)
                waiting.pop(error.layer.names, None)
                continue
            if right is None:
                break
            kept |= right
            return kept | _apart(network, rows, parameters, tried, right, truth, cotangent)
        if not any(place.axis is None for where in waiting.values() for place in where):
            break
    return kept


def _apart(
    network: Network,
    rows: Rows,
    parameters: Parameters,
    tried: dict[tuple[str, ...], tuple[Place, ...]],
    right: dict[tuple[str, ...], tuple[Place, ...]],
    truth: Parameters,
    cotangent: Tensor,
) -> dict[tuple[str, ...], tuple[Place, ...]]:
    others = {
        names: tuple(replace(place, rows_last=place.fold > 1) for place in where)
        for names, where in tried.items()
        if names not in right and any(place.fold > 1 for place in where)
    }
    if not others:
        return {}
    found = _right(network, rows, parameters, right | others, truth, cotangent) or {}
    return {names: where for names, where in found.items() if names in others}


def _right(
    network: Network,
    rows: Rows,
    parameters: Parameters,
    places: dict[tuple[str, ...], tuple[Place, ...]],
    truth: Parameters,
    cotangent: Tensor,
) -> dict[tuple[str, ...], tuple[Place, ...]] | None:
    """Say which factors are right; None where the network runs differently under the hooks."""
    layers = [layer for layer in Plan(places).layers(network.module, parameters) if layer.sites]
    plain = network(rows).detach()
    try:
        tape = record(network, rows, layers)
        if tape.outputs.shape != plain.shape or not torch.allclose(
            tape.outputs.detach(), plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())
        ):
            return None
        factors = tape.pull(cotangent)
    except Unusual:
        raise
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        return None  # an input repeated for each row does not fit where the network puts it
    right = {}
    for layer, factor in zip(layers, factors, strict=True):
        expected = torch.cat([truth[name] for name in layer.names], 1)
        found = _in_order(layer, written_out(factor), parameters)
        if found.shape == expected.shape and _close(found, expected):
            right[layer.names] = layer.places
    return right


def _in_order(layer: Layer, matrix: Tensor, parameters: Parameters) -> Tensor:
    """Undo the layout of a matrix with its bias: (n, n_weights) -> (n, n_weights)."""
    if layer.matrix_shape is None or not layer.bias:
        return matrix
    table = matrix.view(len(matrix), len(parameters[layer.names[1]]), -1)
    return torch.cat([table[:, :, :-1].flatten(1), table[:, :, -1]], 1)


def _close(found: Tensor, expected: Tensor) -> bool:
    size = float(expected.abs().max())
    tolerance = _RTOL.get(expected.dtype, 1e-3)
    return float((found - expected).abs().max()) <= tolerance * size + 1e-12


def _must_loop(
    network: Network,
    rows: Rows,
    parameters: Parameters,
    names: Sequence[str] | Parameters,
    truth: Parameters | None = None,
    cotangent: Tensor | None = None,
) -> bool:
    """Say whether vmap gives other gradients than rows one after the other."""
    if truth is None or cotangent is None:
        truth, cotangent = _truth(network, rows, parameters)
    layer = one_by_one(list(names), parameters)
    expected = torch.cat([truth[name] for name in layer.names], 1)
    try:
        return not _close(alone(network, rows, layer, cotangent), expected)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return True
