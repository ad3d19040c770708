"""Which parameters are differentiated together, and how their gradients are laid out."""

import pytest
import torch
from torch import nn

from skperf.influence.gradients import Dense
from skperf.influence.layers import find_layers, from_vectors, one_by_one, to_vectors


def named(module):
    return dict(module.named_parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.ones(2))
        self.rnn, self.norm = nn.GRU(3, 2), nn.LayerNorm(3)


def test_tied_tables_are_one_layer_and_recurrent_ones_go_row_by_row():
    module = Tied()
    found = {layer.name: layer for layer in find_layers(module, named(module))}
    # the module's own parameter makes it no whole layer, since it holds others
    assert set(found) == {"words", "norm", "(row by row)"}
    assert found["words"].sites == (module.words, module.head)
    assert found["words"].module is module.words
    assert found["words"].matrix_shape is None
    assert found["(row by row)"].names[0] == "scale"
    assert found["(row by row)"].n_weights == 2 + sum(p.numel() for p in module.rnn.parameters())
    assert not found["(row by row)"].known
    assert found["norm"].weight
    assert found["norm"].bias


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (3, 5)),
        (nn.Linear(4, 3, bias=False), (3, 4)),
        (nn.Conv2d(2, 3, (2, 5)), (3, 21)),
        (nn.Conv1d(2, 6, 3, groups=2, bias=False), (6, 3)),
        (nn.Embedding(4, 3), None),
        (nn.LayerNorm(3), None),
    ],
)
def test_the_shape_of_the_matrix_counts_a_bias_as_an_input(layer, shape):
    (found,) = find_layers(layer, named(layer))
    assert found.matrix_shape == shape
    assert found.n_weights == sum(p.numel() for p in layer.parameters())


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_forward_of_its_own_is_of_no_known_kind():
    (found,) = find_layers(layer := Own(2, 2), named(layer))
    assert not found.known
    assert found.sites == (layer,)
    assert found.matrix_shape is None


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_tables_that_do_more_than_look_up_go_row_by_row(options):
    (found,) = find_layers(table := nn.Embedding(4, 2, **options), named(table))
    assert found.sites == ()


def test_only_the_parameters_asked_for_are_found():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    (found,) = find_layers(module, {"1.bias": module[1].bias})
    assert (found.name, found.names, found.weight, found.bias) == ("1", ("1.bias",), False, True)


def test_vectors_are_cut_and_joined_in_the_order_of_the_parameters():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 4, bias=False))
    like = named(module)
    layers = find_layers(module, like)
    vectors = torch.randn(5, sum(p.numel() for p in like.values()))
    cut = from_vectors(layers, vectors, like)
    # a linear layer's bias is the last column of its matrix
    weights, bias = vectors[:, :6].view(5, 2, 3), vectors[:, 6:8]
    torch.testing.assert_close(cut[0].values.view(5, 2, 4)[:, :, :3], weights)
    torch.testing.assert_close(cut[0].values.view(5, 2, 4)[:, :, 3], bias)
    torch.testing.assert_close(to_vectors(layers, cut, like), vectors)
    assert torch.equal(to_vectors([], [Dense(vectors)], like), vectors)
    assert torch.equal(from_vectors([], vectors, like)[0].values, vectors)


def test_row_by_row_counts_its_weights():
    layer = one_by_one(["a", "b"], {"a": torch.ones(2, 3), "b": torch.ones(4)}, looped=True)
    assert (layer.n_weights, layer.looped, layer.sites) == (10, True, ())
