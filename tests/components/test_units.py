"""Finding and naming components."""

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.backbone.views import view
from skperf.components.finding import find, size_at
from skperf.components.taps import opened_attention
from skperf.components.units import Component, Place, select
from tests.components.networks import Residual, SeparateTransformer, Tied, TorchTransformer, made


def looked_at(module, row):
    network = Network(opened_attention(view(module)), np.arange(3))
    rows = Rows(torch.as_tensor(row))
    return network, rows, find(network, rows)


def row_of(module):
    kinds = {Residual: (1, 1, 6, 6), Tied: (1, 6)}
    shape = kinds.get(type(module), (1, 24))
    parameter = next(module.parameters())
    return np.random.default_rng(0).normal(size=shape).astype(str(parameter.dtype)[6:])


def chosen(module, selection="auto", row=None):
    network, rows, found = looked_at(module, row_of(module) if row is None else row)
    return select(found, selection, module, lambda place: size_at(network, rows, place))[0]


def names(module, selection="auto", row=None):
    return [component.name for component in chosen(module, selection, row)]


def sites(module, row=None):
    return looked_at(module, row_of(module) if row is None else row)[2].sites


def test_filters_are_found_once_under_the_first_of_their_names():
    module, _, _ = made(Residual)
    assert names(module) == [f"stem[{i}]" for i in range(6)] + [f"conv1[{i}]" for i in range(6)]
    assert names(module, "alias")[:1] == ["conv1[0]"]


def test_tied_weights_are_one_row_of_components_that_acts_on_both_layers():
    module, _, _ = made(Tied)
    assert [spot.module for spot in sites(module)[0].spots] == ["first", "second"]
    assert len(chosen(module, "neurons")) == 6


def test_a_layer_tied_to_an_embedding_is_left_out():
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    module[2].weight = module[0].weight
    assert {site.module for site in sites(module, np.array([[1, 2]]))} == {"1"}


@pytest.mark.parametrize("kind", [TorchTransformer, SeparateTransformer])
def test_auto_is_heads_and_feed_forward_neurons(kind):
    module, _, _ = made(kind)
    kinds = [component.kind for component in chosen(module)]
    assert kinds == ["attention_head"] * 2 + ["mlp_neuron"] * 16


def test_feed_forward_neurons_are_those_of_the_widening_layer():
    assert names(made(SeparateTransformer)[0], "mlp_neurons") == [f"up[{i}]" for i in range(16)]
    assert len(names(made(TorchTransformer)[0], "mlp_neurons")) == 16


class Interleaved(nn.Module):
    """Query, key and value of a head next to each other, under names that say nothing."""

    def __init__(self, n_heads=4, width=3, n_groups=4, softmax=False):
        super().__init__()
        self.n, self.w, self.g, self.softmax = n_heads, width, n_groups, softmax
        self.a = nn.Linear(8, (n_heads + 2 * n_groups) * width)
        self.b = nn.Linear(n_heads * width, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x):
        x = x.view(len(x), -1, 8)
        per = self.n // self.g
        mixed = self.a(x).view(*x.shape[:2], self.g, per + 2, self.w).permute(0, 2, 3, 1, 4)
        query = mixed[:, :, :per].flatten(1, 2)
        key, value = (mixed[:, :, i].repeat_interleave(per, 1) for i in (per, per + 1))
        if self.softmax:
            heads = (query @ key.transpose(2, 3)).softmax(-1) @ value
        else:
            heads = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.c(self.b(heads.transpose(1, 2).flatten(2)).mean(1))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_heads_are_found_at_the_input_of_the_output_projection(softmax, n_groups):
    module = Interleaved(n_groups=n_groups, softmax=softmax)
    head = next(site for site in sites(module) if site.kind == "attention_head")
    assert (head.n_units, head.start, head.width) == (4, 0, 3)
    assert [(spot.module, spot.side) for spot in head.spots] == [("b", "input")]
    groups = [site for site in sites(module) if site.kind == "key_value_group"]
    assert [(site.n_units, site.width) for site in groups] == (
        [] if n_groups == 4 else [(n_groups, 12 // n_groups)]
    )


def test_declared_places_count_what_fits():
    module, _, _ = made(Residual)
    place = Place("conv1", dim=1, start=1, width=2, name="pair")
    assert names(module, [place]) == ["conv1:pair[0]", "conv1:pair[1]"]
    assert names(module, [Place("out", "weight", dim=1, width=None)]) == ["out:weight[0]"]
    assert len(names(module, [Place("out", "input", dim=1)])) == 6


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place("nowhere"), "names the module 'nowhere'"),
        (Place("out", "gradient"), "must be 'output', 'input' or a parameter of 'out'"),
        (Place("out", dim=2), "has shape .*no dimension 2"),
        (Place("out", dim=1, start=1, width=2, n_units=2), "which has 3"),
    ],
)
def test_places_that_are_not_there_by_message(place, message):
    with pytest.raises(ValueError, match=message):
        chosen(made(Residual)[0], [place])


def test_lists_globs_records_and_functions():
    module, _, _ = made(Residual)
    record = Component("conv1", "conv_filter", 2)
    assert names(module, ["st*", record]) == [f"stem[{i}]" for i in range(6)] + ["conv1[2]"]
    assert names(module, lambda _: [record]) == ["conv1[2]"]
    assert names(module, "layers") == ["stem", "conv1"]


def test_a_network_with_nothing_hidden_gives_the_rows_of_its_only_layer():
    row = np.ones((1, 4), np.float32)
    assert names(nn.Linear(4, 3), row=row) == ["[0]", "[1]", "[2]"]


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ("layer9.*", ValueError, r"matches nothing.*'stem' \(6 x conv_filter\)"),
        ([Component("stem", "conv_filter", 6)], ValueError, "has no component"),
        (3, TypeError, "it is int"),
        (lambda _: [], ValueError, "selects nothing"),
        (lambda _: [3], TypeError, "Component or Place, got int"),
    ],
)
def test_what_does_not_exist_is_refused_with_a_list_of_what_does(selection, error, message):
    with pytest.raises(error, match=message):
        chosen(made(Residual)[0], selection)


class EqualWidths(nn.Module):
    """A transformer whose feed-forward layers are as wide as its rows, or narrower."""

    def __init__(self, width):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, width, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pooler, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.pooler(self.body(x)[:, 0]).tanh())


@pytest.mark.parametrize("width", [12, 5, 20])
def test_feed_forward_layers_are_found_whatever_their_width(width):
    torch.manual_seed(0)
    found = chosen(
        EqualWidths(width).eval(), row=np.random.default_rng(0).normal(size=(1, 4, 12)).astype("f4")
    )
    neurons = {c.module: c.kind for c in found if c.kind != "attention_head"}
    assert set(neurons) == {f"body.layers.{i}.linear1" for i in range(2)}
    assert sum(component.kind == "attention_head" for component in found) == 6
