"""Where rows lie in a tensor, and when the first gate acts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.backbone.views import view
from skperf.components.finding import find, size_at
from skperf.components.units import Site, Spot, select
from skperf.components.wiring import Layout, Wiring, _layout, _Seen, wire


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("in_turn", [False, True])
def test_rows_are_brought_to_the_front_and_back(axis, in_turn):
    rows = [torch.randn(4, 2, 3).movedim(0, axis) for _ in range(5)]  # 4 entries a row
    entries = [row.movedim(axis, 0) for row in rows]
    if in_turn:  # first entries of all rows, then second ones
        whole = torch.stack([row[j] for j in range(4) for row in entries])
    else:
        whole = torch.cat(entries)
    tensor, layout = whole.movedim(0, axis), Layout(axis, in_turn)
    split = layout.split(tensor, 5)
    assert split.shape == (5, 4, 2, 3)
    for i in range(5):
        assert torch.equal(split[i], entries[i])
    assert torch.equal(layout.join(split), tensor)
    assert _layout(tensor, rows) == layout


def test_gated_plainly_nothing_is_remembered_nor_folded():
    wiring = Wiring((), (), prefix=("stem",), followers={"conv": "norm"})
    plain = wiring.plainly()
    assert (plain.plain, plain.prefix, plain.followers) == (True, (), {})
    assert wiring.knows_rows
    assert not plain.knows_rows


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(2, 2) for _ in range(3))
        self.third.weight = self.first.weight


def test_a_gate_on_a_parameter_acts_where_anyone_who_holds_it_begins():
    module = Shares()
    seen = _Seen(
        began={"": 0, "third": 1, "first": 3, "second": 5},
        ended={"third": 2, "first": 4, "second": 6, "": 7},
        n_calls=dict.fromkeys(("", "first", "second", "third"), 1),
        returns_tensor={"", "first", "second", "third"},
    )
    # the parent of the module that holds it may use a parameter, so that nothing is before it
    seen.began[""] = 9
    assert seen._first_gate({Spot("first", "weight", 0)}, module) == 1
    assert seen._first_gate({Spot("second", "weight", 0)}, module) == 5
    assert seen._first_gate({Spot("second", "bias", 0)}, module) == 5
    # what a module has returned may be remembered, what it takes may not
    assert seen._first_gate({Spot("first", "output", 1)}, module) == 4
    assert seen._first_gate({Spot("first", "input", 1)}, module) == 3
    assert seen._first_gate(set(), module) == 0
    seen.n_calls["first"] = 2
    assert seen._first_gate({Spot("first", "output", 1)}, module) == 3


def test_batch_normalisation_is_folded_where_that_changes_nothing():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    network = Network(view(module.eval()), np.arange(2))
    rows = Rows(torch.randn(4, 2, 4))
    found = find(network, rows[:1])
    components, sites = select(
        found, "conv_filters", module, lambda p: size_at(network, rows[:1], p)
    )
    wiring = wire(network, components, sites, rows, outputs_themselves=False)
    assert wiring.followers == {"0": "1"}


def test_rows_are_known_where_every_call_of_every_gated_tensor_tells_them():
    spot, other = Spot("a", "output", 1), Spot("b", "output", 1)
    site = Site("a", "neuron", 3, (spot, other))
    layouts = {(spot, 0): None, (spot, 1): None, (other, 0): None}
    known = Wiring((), (site,), n_calls={spot: 2, other: 1}, layouts=layouts)
    assert known.knows_rows
    assert not replace(known, n_calls={spot: 2}).knows_rows  # never seen to run
    assert not replace(known, n_calls={spot: 3, other: 1}).knows_rows
    weight = replace(site, spots=(Spot("a", "weight", 0),))
    assert not replace(known, sites=(weight,)).knows_rows
