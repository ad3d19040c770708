import numpy as np
import pytest
import torch
from influence_nets import brute_gradients, mlp
from torch import nn

from skperf import InfluenceScorer
from skperf.backbone.network import Network
from skperf.backbone.parameters import select_parameters
from skperf.backbone.rows import Rows
from skperf.backbone.views import view
from skperf.influence.captures import _is_short, alone, record, recording
from skperf.influence.layers import find_layers, one_by_one, to_vectors
from skperf.influence.placement import plan


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


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(2, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x.view(len(x), 2, 2))[0].sum(1)


def planned(*parts, how="auto"):
    torch.manual_seed(0)
    module = nn.Sequential(*parts, nn.Linear(4, 3)).double()
    network = Network(module, np.arange(3))
    inputs = Rows(torch.randn(9, 4, dtype=torch.float64))
    parameters = select_parameters(module)
    return network, inputs, parameters, plan(network, inputs, parameters, how)


ALONE = {
    "functional": ([Functional(), nn.Linear(3, 4)], {"0.layer.weight", "0.layer.bias"}),
    "recurrent": ([Recurrent()], {f"0.layer.{n}" for n, _ in nn.LSTM(2, 4).named_parameters()}),
    "branching": ([Branching()], {"0.scale"}),
    "pair": ([Pair(), First()], {"0.scale"}),
}


@pytest.mark.parametrize("name", ALONE)
def test_only_what_does_not_factorise_goes_row_by_row(name):
    parts, alone = ALONE[name]
    network, inputs, parameters, found = planned(*parts)
    factorised = {n for names in found.places for n in names}
    assert set(parameters) - factorised == alone
    cotangents = torch.randn(9, 3, dtype=torch.float64)
    layers = found.layers(network.module, parameters)
    with recording(network.module):
        pulled = record(network, inputs, layers).pull(cotangents)
    expected = brute_gradients(network, inputs.array, cotangents)
    torch.testing.assert_close(to_vectors(layers, pulled, parameters), expected)
    with pytest.raises(ValueError, match="gradients='factorised': no factorised gradients of"):
        planned(*parts, how="factorised")


def test_layers_that_run_twice_and_tied_ones_factorise():
    tied = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
    tied[2].weight, tied[2].bias = tied[0].weight, tied[0].bias
    for parts in ([Twice(), nn.Tanh()], tied):
        network, inputs, parameters, found = planned(*parts)
        assert sorted(map(len, found.places.values())) == [1, 2]
        layers = found.layers(network.module, parameters)
        cotangents = torch.randn(9, 3, dtype=torch.float64)
        assert all(layer.sites for layer in layers)
        with recording(network.module):
            pulled = record(network, inputs, layers).pull(cotangents)
        expected = brute_gradients(network, inputs.array, cotangents)
        torch.testing.assert_close(to_vectors(layers, pulled, parameters), expected)


def test_networks_that_mix_rows_are_refused():
    with pytest.raises(ValueError, match="gives a row another output alone than in its batch"):
        planned(Centred())


def test_nothing_is_remembered_below_the_first_layer_asked_for():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(x.requires_grad)
            return x

    module = nn.Sequential(nn.Linear(4, 4), Probe(), nn.Linear(4, 3))
    module = view(module)
    network, inputs = Network(module, np.arange(3)), Rows(torch.ones(2, 4))
    with recording(module):
        for names in ("all", "2.*"):
            layers = find_layers(module, select_parameters(module, names))
            record(network, inputs, layers).pull(torch.ones(2, 3))
    assert seen == [True, False]


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
    inputs = Rows(torch.zeros(5, 4, dtype=torch.float64))
    cotangents = torch.zeros(5, 3, dtype=torch.float64)
    cotangents[2, 1] = torch.inf
    with recording(network.module):
        tape = record(network, inputs, layers_of(network.module))
        with pytest.raises(ValueError, match="layer '0' is not finite, first at row 2"):
            tape.pull(cotangents)


class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("looped", [False, True])
def test_what_a_forward_does_not_use_has_a_gradient_of_zero(looped):
    module = Spare().double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    layer = one_by_one([*parameters], parameters, looped=looped)
    X, slopes = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    found = alone(Network(module, None), Rows(X), layer, slopes)
    weight = torch.einsum("no,ni->noi", slopes, X).flatten(1)
    torch.testing.assert_close(found, torch.cat([weight, slopes, torch.zeros(5, 6).double()], 1))


class Resting(nn.Module):
    def __init__(self, context):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.context = nn.Linear(4, 5), nn.Linear(5, 3), context

    def forward(self, x):
        with self.context():
            hidden = self.body(x).tanh()
        return self.head(hidden.clone())


def test_what_runs_in_inference_mode_has_no_gradient():
    X, y = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.arange(9) % 3
    found = [
        InfluenceScorer(Resting(context), method="gradient_dot").fit(X, y).influence(X, y)
        for context in (torch.inference_mode, torch.no_grad)
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)
    assert np.ptp(found[0]) > 0


def test_a_sequence_is_short_where_products_of_rows_are_fewer_than_weights():
    assert _is_short(1, 8, 8)
    assert not _is_short(2, 8, 8)  # 4 x 16 = 8 x 8
    assert not _is_short(3, 8, 8)


NORMS = {
    "layer": (nn.LayerNorm(4), (5, 3, 4)),
    "layer over two axes": (nn.LayerNorm((3, 4)), (5, 2, 3, 4)),
    "rms": (nn.RMSNorm(4), (5, 3, 2, 4)),
    "group": (nn.GroupNorm(2, 4), (5, 4, 3, 3)),
    "batch": (nn.BatchNorm2d(4), (5, 4, 3, 2)),
    "instance": (nn.InstanceNorm1d(4, affine=True), (5, 4, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_scales_and_shifts_are_summed_over_the_positions(name):
    norm, shape = NORMS[name]
    norm = norm.double().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in norm.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    module = nn.Sequential(norm, nn.Flatten())
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    network = Network(module, None)
    layers = layers_of(module)
    with recording(module):
        tape = record(network, Rows(rows), layers)
        cotangent = torch.randn(tape.outputs.shape, generator=generator, dtype=torch.float64)
        found = to_vectors(layers, tape.pull(cotangent), select_parameters(module))
    torch.testing.assert_close(found, brute_gradients(network, rows, cotangent))
