"""The layer that runs last, and the rows that are nearest before it."""

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.influence.neighbours import features_of, last_layer, nearest

X = Rows(np.random.default_rng(0).normal(size=(7, 4)))


class Nested(nn.Module):
    """Its layers are made in another order than they run, and it holds a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(5, 2), nn.Sequential(nn.Linear(4, 5), nn.Tanh())

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize("trainable", [None, ("first.0.weight",)])
def test_the_last_layer_is_the_innermost_that_holds_what_trains(trainable):
    module = Nested().double()
    network = Network(module, None, trainable=trainable)
    name, layer = last_layer(network, X)
    expected = "last" if trainable is None else "first.0"
    assert name == expected
    assert layer is module.get_submodule(expected)


def test_features_are_the_inputs_of_the_last_layer_averaged_over_positions():
    module = Nested().double()
    rows = torch.tensor(X.array)
    found = features_of(Network(module, None, batch_size=3), X)
    torch.testing.assert_close(found, module.first(rows).detach())
    positions = Rows(np.random.default_rng(1).normal(size=(7, 6, 4)))
    found = features_of(Network(module, None, batch_size=3), positions)
    torch.testing.assert_close(found, module.first(torch.tensor(positions.array)).mean(1).detach())


@pytest.mark.parametrize("groups", [None, np.array([2, 0, 0, 2, 2, 0, 2])])
def test_the_nearest_are_nearest_in_every_group(groups):
    train, queries = torch.randn(7, 3), torch.randn(5, 3)
    found = nearest(train, queries, 2, groups=groups, chunk=2)
    distances = torch.cdist(queries, train).numpy()
    for row, close in zip(distances, found, strict=True):
        kinds = [np.arange(7)] if groups is None else [np.flatnonzero(groups == g) for g in (0, 2)]
        expected = {i for own in kinds for i in own[np.argsort(row[own])[:2]]}
        assert set(close.tolist()) == expected
        assert len(close) == len(expected)
