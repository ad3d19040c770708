"""Finding and naming components."""

import pytest
from torch import nn

from skperf.components.units import Component, find_components, find_places
from tests.components.networks import Residual, SeparateTransformer, Tied, TorchTransformer, made


def names(module, selection="auto"):
    return [component.name for component in find_components(module, selection)]


def test_filters_are_found_once_under_the_first_of_their_names():
    module, _, _ = made(Residual)
    assert names(module) == [f"stem[{i}]" for i in range(6)] + [f"conv1[{i}]" for i in range(6)]
    assert names(module, "alias")[:1] == ["conv1[0]"]


def test_tied_weights_are_one_row_of_components_that_acts_on_both_layers():
    module, _, _ = made(Tied)
    place = find_places(module)[0]
    assert place.acts_on == ("first", "second")
    assert len(find_components(module, "neurons")) == 6


def test_a_layer_tied_to_an_embedding_is_left_out():
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    module[2].weight = module[0].weight
    assert {place.module for place in find_places(module)} == {"1"}


@pytest.mark.parametrize("kind", [TorchTransformer, SeparateTransformer])
def test_heads_of_both_makes(kind):
    module, _, _ = made(kind)
    assert len(find_components(module)) == 2
    assert {c.kind for c in find_components(module)} == {"attention_head"}


def test_feed_forward_neurons_are_those_of_the_widening_layer():
    assert names(made(SeparateTransformer)[0], "mlp_neurons") == [f"up[{i}]" for i in range(16)]
    assert len(names(made(TorchTransformer)[0], "mlp_neurons")) == 16


def test_fused_projections_hold_their_heads_in_the_last_third():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.qkv = nn.Linear(8, 24)

    place = next(p for p in find_places(Attention()) if p.kind == "attention_head")
    assert (place.offset, place.width, place.n_units) == (16, 4, 2)


def test_lists_globs_records_and_functions():
    module, _, _ = made(Residual)
    record = Component("conv1", "conv_filter", 2)
    assert names(module, ["st*", record]) == [f"stem[{i}]" for i in range(6)] + ["conv1[2]"]
    assert names(module, lambda _: [record]) == ["conv1[2]"]
    assert names(module, "layers") == ["stem", "conv1"]


def test_a_network_with_nothing_hidden_gives_the_rows_of_its_only_layer():
    assert names(nn.Linear(4, 3)) == ["[0]", "[1]", "[2]"]


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ("layer9.*", ValueError, r"matches nothing.*'stem' \(6 x conv_filter\)"),
        ([Component("stem", "conv_filter", 6)], ValueError, "has no component"),
        (3, TypeError, "it is int"),
        (lambda _: [], ValueError, "selects nothing"),
        (lambda _: ["stem"], TypeError, "Component records"),
    ],
)
def test_what_does_not_exist_is_refused_with_a_list_of_what_does(selection, error, message):
    with pytest.raises(error, match=message):
        find_components(made(Residual)[0], selection)
