"""Find where a network keeps its rows, layer by layer, by running a few of them.

Nothing is taken from names or from the kind of a layer: what differs between a batch of six and
one of five is where the rows are, and what a row's gradient comes out as alone is what it must
be in a batch. Layers that fail the comparison are differentiated row by row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skperf.backbone.modes import forward_hooks
from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters
from skperf.backbone.rows import Rows
from skperf.influence.captures import HINT, Unusual, alone, record, recording, same_rows, watched
from skperf.influence.layers import CONVOLUTIONS, Layer, Place, find_layers, one_by_one, to_vectors

_TRIED = 6
_RTOL = {torch.float64: 1e-8}

Places = dict[tuple[str, ...], tuple[Place, ...]]


@dataclass(frozen=True)
class Plan:
    """How each parameter of a network is differentiated."""

    places: Places  # of the layers that factorise
    looped: bool = False  # whether the rest takes one row after another
    at_once: int = 2048  # rows whose layers' outputs fit half a gigabyte

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


def plan(
    network: Network, X: Rows, parameters: Parameters, how: str, without: Collection[str] = ()
) -> Plan:
    """Choose how to differentiate: X (n, ...), how "auto", "factorised" or "reference"."""
    with recording(network.module):
        found = (layer for layer in find_layers(network.module, parameters) if layer.sites)
        layers = [layer for layer in found if layer.name not in without]
        places: Places = {}
        size = _at_once(network, network.inputs(X[:1]))
        if how != "reference":
            rows = network.inputs(X[np.linspace(0, len(X) - 1, _TRIED).astype(int)])
            places = _places(network, rows, layers)
        else:
            rows = network.inputs(X[:_TRIED])
        truth = _truth(network, rows, parameters)
        places = _verified(network, parameters, places, truth)
        rest = [name for name in parameters if not any(name in names for names in places)]
        if rest and how == "factorised":
            raise ValueError(
                f"gradients='factorised': no factorised gradients of {rest[:12]}, whose layers "
                "keep rows elsewhere than in the first dimension, hold other layers, or are "
                f"recurrent; gradients='auto' takes these row by row, {HINT}"
            )
        looped = bool(rest) and _must_loop(network, parameters, rest, truth)
        return Plan(places, looped, size)


def _at_once(network: Network, row: Rows) -> int:
    sizes = [1]

    def count(part: nn.Module, args: Any, output: Any) -> None:
        sizes.append(output.nbytes if isinstance(output, Tensor) else 0)

    leaves = [part for part in network.module.modules() if not list(part.children())]
    with torch.no_grad(), forward_hooks(dict.fromkeys(leaves, count)):
        network(row)
    return (1 << 29) // sum(sizes) + 1


def _places(network: Network, rows: Rows, layers: Sequence[Layer]) -> Places:
    """Compare a batch with another of fewer rows in another order."""
    # a network that sorts its rows gives itself away in one of two orders, and so does one that
    # sends rows to different layers by the sizes of what they get
    order = torch.arange(len(rows) - 1).flip(0)
    whole, part = (watched(network, batch, layers) for batch in (rows, rows[order]))
    found: Places = {}
    for layer in layers:
        one, two = whole[layer.names], part[layer.names]
        if len(one) != len(two) or not one or None in (*one, *two):
            continue
        pairs = zip(one, two, strict=True)
        where = [_place(layer, first, second, order) for first, second in pairs]
        places = tuple(place for place in where if place is not None)
        simple = layer.known or (len(places) == 1 and places[0] == Place(0))
        if len(places) == len(where) and simple:
            found[layer.names] = places
    return found


def _place(layer: Layer, one: Any, two: Any, order: Tensor) -> Place | None:
    """Find the rows in one call: of n rows, and of n - 1 of them in another order."""
    n = len(order) + 1
    where, out = _along(one[0].shape, two[0].shape, n), _along(one[1], two[1], n)
    if where is None or where.axis is None:
        return where
    kinds = (*CONVOLUTIONS, nn.modules.batchnorm._NormBase)
    if where != out or (where.axis and isinstance(layer.module, kinds)):
        return None
    for rows_last in (False, True)[: 1 if where.fold == 1 else 2]:
        place = replace(where, rows_last=rows_last)
        if same_rows(one[0], two[0], place, order):
            return place
    return None


def _along(one: torch.Size, two: torch.Size, n: int) -> Place | None:
    if len(one) != len(two):
        return None
    changed = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not changed:
        return Place(None)
    axis = changed[0]
    fold, rest = divmod(one[axis], n)
    if len(changed) > 1 or rest or fold == 0 or two[axis] != (n - 1) * fold:
        return None
    return Place(axis, fold)


@dataclass(frozen=True)
class _Truth:
    """Gradients of some rows, each run alone, by plain autograd."""

    rows: Rows  # (n, ...)
    outputs: Tensor  # (n, ...)
    some: Tensor  # (m,)
    cotangent: Tensor  # (n, ...), zero elsewhere
    gradients: Parameters  # (m, ...) each

    def says(self, names: Sequence[str], found: Tensor) -> bool:
        """Compare: found (m, n_weights)."""
        expected = torch.cat([self.gradients[name] for name in names], 1)
        tolerance = _RTOL.get(expected.dtype, 1e-3) * float(expected.abs().max()) + 1e-12
        same = found.shape == expected.shape
        return same and float((found - expected).abs().max()) <= tolerance


def _truth(network: Network, rows: Rows, parameters: Parameters) -> _Truth:
    """Run some rows alone."""
    outputs = network(rows).detach()
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError("the network's outputs are not finite: its weights hold NaN, or X does.")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    some = torch.arange(len(rows))[:: max(1, len(rows) // 3)]
    cotangent, gradients = torch.zeros_like(drawn), []
    cotangent[some] = drawn[some]
    # the view's own parameters, and whatever else holds them
    leaves = {n: network.module.get_parameter(n).requires_grad_() for n in parameters}
    for i in some.tolist():
        own = network(rows[i : i + 1])
        if not torch.allclose(
            own.detach(), outputs[i : i + 1], rtol=1e-3, atol=1e-3 * float(outputs.abs().max())
        ):
            raise ValueError(
                "the network gives a row another output alone than in its batch: a row's gradient "
                "would depend on the other rows. Does it normalise, sort or pool over the batch?"
            )
        if not own.requires_grad:
            raise ValueError(
                f"the network's outputs hang on none of the parameters {list(leaves)[:12]}: does "
                "its forward run under no_grad, or detach what it returns?"
            )
        found = torch.autograd.grad(
            (own * drawn[i : i + 1]).sum(),
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        gradients.append(dict(zip(leaves, found, strict=True)))
    network.module.requires_grad_(False)
    truth = {n: torch.stack([g[n].flatten() for g in gradients]) for n in parameters}
    return _Truth(rows, outputs, some, cotangent, truth)


def _verified(network: Network, parameters: Parameters, places: Places, truth: _Truth) -> Places:
    """Keep the layers whose factors are the gradients of rows run alone."""
    # Inputs that all rows share are repeated first; where the network does not bear that, their
    # layers are given up.
    waiting = dict(places)
    while waiting:
        try:
            right = _right(network, parameters, waiting, truth)
        except Unusual as error:
            waiting.pop(error.layer.names)
            continue
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError):
            right = None  # an input repeated for each row does not fit where the network puts it
        if right is not None:
            return right
        apart = {n: w for n, w in waiting.items() if all(place.axis is not None for place in w)}
        waiting = apart if len(apart) < len(waiting) else {}
    return {}


def _right(
    network: Network, parameters: Parameters, places: Places, truth: _Truth
) -> Places | None:
    """Say which factors are right; None where the network runs differently under the hooks."""
    layers = [layer for layer in Plan(places).layers(network.module, parameters) if layer.sites]
    tape, plain = record(network, truth.rows, layers), truth.outputs
    if tape.outputs.shape != plain.shape or not torch.allclose(
        tape.outputs.detach(), plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())
    ):
        return None
    right = {}
    for layer, factor in zip(layers, tape.pull(truth.cotangent), strict=True):
        own = {name: parameters[name] for name in layer.names}
        if truth.says(layer.names, to_vectors([layer], [factor[truth.some]], own)):
            right[layer.names] = layer.places
    return right


def _must_loop(
    network: Network, parameters: Parameters, names: Sequence[str], truth: _Truth
) -> bool:
    """Say whether vmap gives other gradients than rows one after the other."""

    def right(looped: bool) -> bool:
        layer, some = one_by_one(names, parameters, looped=looped), truth.some
        found = alone(network, truth.rows[some], layer, truth.cotangent[some])
        return truth.says(layer.names, found)

    try:
        if right(False):
            return False
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        pass
    if not right(True):
        raise ValueError(
            f"of the parameters {list(names)[:12]} some reach the outputs by another way than as "
            "attributes of their modules (through a list of tensors, say): no gradient of a row "
            "sees that."
        )
    return True
