import numpy as np
import pytest
import torch
from influence_nets import mlp
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.parameters import select_parameters
from skperf.influence.captures import record, recording
from skperf.influence.layers import find_layers


def layers_of(module):
    return find_layers(module, select_parameters(module))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(torch.relu(self.shared(x)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize(("kind", "times"), [(Twice, 2), (Functional, 0)])
def test_layers_must_run_once(kind, times):
    network = Network(kind(), np.arange(3))
    layers = layers_of(network.module)
    with recording(network.module), pytest.raises(ValueError, match=f"ran {times} times"):
        record(network, torch.zeros(2, 4), layers)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.LSTM(4, 4)), r"layer '0' \(LSTM\) has no factorised gradients"),
        (nn.MultiheadAttention(4, 2), r"layer '' \(MultiheadAttention\) has no factorised"),
        (nn.Embedding(5, 3, max_norm=1.0), "renormalises"),
    ],
)
def test_unsupported_layers_are_named(module, message):
    with pytest.raises(ValueError, match=message):
        layers_of(module)


class Centred(nn.Module):
    """Mixes the rows of a batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (x - x.mean(0)) * self.scale


class Branching(Centred):
    def forward(self, x):
        return x * self.scale if float(x.detach().sum()) > 0 else x


class Pair(Centred):
    def forward(self, x):
        return x * self.scale, x


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Centred()], "layer '0' .Centred. gives a row another output alone than in its batch"),
        ([Branching()], "layer '0' .Branching. cannot be differentiated row by row"),
        ([Pair(), First()], "layer '0' .Pair. .*does not turn one tensor into another"),
    ],
)
def test_parts_that_cannot_be_taken_row_by_row_are_named(parts, message):
    module = nn.Sequential(*parts, nn.Linear(4, 3))
    network = Network(module, np.arange(3))
    inputs = torch.arange(8.0).view(2, 4)
    with recording(module), pytest.raises(ValueError, match=message):
        record(network, inputs, layers_of(module)).pull(torch.ones(2, 3))


def test_nothing_is_remembered_below_the_first_layer_asked_for():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(x.requires_grad)
            return x

    module = nn.Sequential(nn.Linear(4, 4), Probe(), nn.Linear(4, 3))
    network, inputs = Network(module, np.arange(3)), torch.ones(2, 4)
    with recording(module):
        for names in ("all", "2.*"):
            layers = find_layers(module, select_parameters(module, names))
            record(network, inputs, layers).pull(torch.ones(2, 3))
    assert seen == [True, False]


def test_tied_weights_are_named():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' is shared by several layers"):
        layers_of(module)


class Stubborn(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)


@pytest.mark.parametrize("layer", [Stubborn(4), nn.BatchNorm1d(4, track_running_stats=False)])
def test_batch_dependent_layers_are_refused(layer):
    module = nn.Sequential(layer, nn.Linear(4, 3))
    with (
        pytest.raises(ValueError, match=r"layer '0' .* normalises by the batch"),
        recording(module),
    ):
        pass


def test_gradients_that_are_not_finite_are_named():
    network = Network(mlp(4, 3), np.arange(3))
    inputs = torch.zeros(5, 4, dtype=torch.float64)
    cotangents = torch.zeros(5, 3, dtype=torch.float64)
    cotangents[2, 1] = torch.inf
    with recording(network.module):
        tape = record(network, inputs, layers_of(network.module))
        with pytest.raises(ValueError, match="layer '0' is not finite, first at row 2"):
            tape.pull(cotangents)
