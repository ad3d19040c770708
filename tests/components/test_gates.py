"""Gates against brute force."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.outputs import margin
from skperf.backbone.parameters import fingerprint
from skperf.components.gates import Circuit
from skperf.components.units import find_components
from tests.components.networks import Residual, SeparateTransformer, Tied, TorchTransformer, made

EXACT = {"rtol": 1e-9, "atol": 1e-9}
KINDS = [
    (Residual, "conv_filters"),
    (Residual, "neurons"),
    (TorchTransformer, "mlp_neurons"),
    (SeparateTransformer, "mlp_neurons"),
    (Tied, "neurons"),
]


def opened(kind, selection, ablation="zero", **options):
    module, X, y = made(kind, **options)
    network = Network(module, np.arange(3))
    components = find_components(module, selection)
    circuit = Circuit(network, components, network.tensor(X), ablation=ablation)
    return circuit, network, network.tensor(X), torch.as_tensor(y), components


def random_masks(n, m=7):
    return (torch.rand(m, n, generator=torch.Generator().manual_seed(1)) > 0.3).double()


def with_rows_zeroed(network, components, mask, inputs, codes, scale=0.0):
    """The released procedure: copy, zero the weight rows, run."""
    changed = copy.deepcopy(network.module)
    parts = dict(changed.named_modules())
    with torch.no_grad():
        for component, kept in zip(components, mask, strict=True):
            if not kept:
                rows = slice(None) if component.kind == "layer" else component.unit
                parts[component.module].weight[rows] *= scale
        return margin(changed(inputs), codes)


class Viewing(nn.Module):
    """Insists on the usual order of an image's numbers."""

    def __init__(self):
        super().__init__()
        self.convolve, self.output = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, images):
        return self.output(torch.relu(self.convolve(images)).view(len(images), -1))


def test_a_network_may_view_its_activations():
    torch.manual_seed(0)
    module, inputs = Viewing().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    network, components = Network(module, np.arange(3)), find_components(module, "conv_filters")
    masks, codes = random_masks(len(components)), torch.arange(3)
    actual = Circuit(network, components, inputs).outputs(inputs, codes, margin, masks)
    expected = [with_rows_zeroed(network, components, v, inputs, codes) for v in masks]
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


@pytest.mark.parametrize(("kind", "selection"), KINDS)
@pytest.mark.parametrize("n", [40, 3, 1])
def test_zeroing_equals_zeroed_weight_rows(kind, selection, n):
    circuit, network, inputs, codes, components = opened(kind, selection)
    masks = random_masks(len(components))
    actual = circuit.outputs(inputs[:n], codes[:n], margin, masks)
    expected = [with_rows_zeroed(network, components, v, inputs[:n], codes[:n]) for v in masks]
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


@pytest.mark.parametrize("n", [40, 2])
def test_layers_and_their_units_may_be_gated_together(n):
    circuit, network, inputs, codes, components = opened(Residual, ["conv_filters", "layers"])
    masks = random_masks(len(components))
    expected = [with_rows_zeroed(network, components, v, inputs[:n], codes[:n]) for v in masks]
    actual = circuit.outputs(inputs[:n], codes[:n], margin, masks)
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


def test_a_float_scales_the_rows():
    circuit, network, inputs, codes, components = opened(Residual, "conv_filters", 0.5)
    mask = random_masks(len(components))[:1]
    expected = with_rows_zeroed(network, components, mask[0], inputs, codes, scale=0.5)
    torch.testing.assert_close(
        circuit.outputs(inputs, codes, margin, mask)[:, 0], expected, **EXACT
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n", [40, 1])
def test_heads_of_torch_attention_equal_zeroed_columns_of_the_output_projection(batch_first, n):
    circuit, network, inputs, codes, _ = opened(
        TorchTransformer, "attention_heads", batch_first=batch_first
    )
    masks = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).double()
    for mask, actual in zip(
        masks, circuit.outputs(inputs[:n], codes[:n], margin, masks).T, strict=True
    ):
        changed = copy.deepcopy(network.module)
        with torch.no_grad():
            weight = changed.layer.self_attn.out_proj.weight
            weight.view(8, 2, 4)[:, mask == 0] = 0
            expected = margin(changed(inputs[:n]), codes[:n])
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("n", [40, 1])
def test_separate_heads_equal_zeroed_columns_of_the_next_layer(n):
    circuit, network, inputs, codes, _ = opened(SeparateTransformer, "attention_heads")
    masks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    for mask, actual in zip(
        masks, circuit.outputs(inputs[:n], codes[:n], margin, masks).T, strict=True
    ):
        changed = copy.deepcopy(network.module)
        with torch.no_grad():
            changed.dense.weight.view(8, 2, 4)[:, mask == 0] = 0
            expected = margin(changed(inputs[:n]), codes[:n])
        torch.testing.assert_close(actual, expected, **EXACT)


def hooked(network, replacements, inputs, codes):
    """Replace outputs of modules by hand."""
    parts = dict(network.module.named_modules())
    handles = [
        parts[name].register_forward_hook(lambda _m, _a, out, f=function: f(out))
        for name, function in replacements.items()
    ]
    try:
        with torch.no_grad():
            return margin(network.module(inputs), codes)
    finally:
        for handle in handles:
            handle.remove()


def replaced(unit, value):
    def function(out):
        out = out.clone()
        out[:, unit] = value(out)
        return out

    return function


@pytest.mark.parametrize(
    ("ablation", "value"),
    [
        ("zero_output", lambda out: 0.0),
        ("mean", lambda out: out.mean((0, 2, 3))[2]),
        ("resample", lambda out: out[:1, 2]),
        (lambda out: -out, lambda out: -out[:, 2]),
    ],
)
@pytest.mark.parametrize("kind", [{}, {"bias": True}])
def test_other_ablations_replace_what_comes_out_of_the_batch_normalisation(ablation, value, kind):
    circuit, network, inputs, codes, components = opened(Residual, "stem", ablation, **kind)
    mask = torch.ones(1, len(components)).double()
    mask[0, 2] = 0
    expected = hooked(network, {"norm": replaced(2, value)}, inputs, codes)
    actual = circuit.outputs(inputs, codes, margin, mask)[:, 0]
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize(
    ("kind", "selection"), [*KINDS, (TorchTransformer, "auto"), (SeparateTransformer, "auto")]
)
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_gradients_equal_finite_differences(kind, selection, ablation):
    circuit, _, inputs, codes, components = opened(kind, selection, ablation)
    rng = torch.Generator().manual_seed(0)
    gates = torch.rand(len(inputs), len(components), generator=rng).double()
    values, gradients = circuit.gradients(inputs, codes, margin, gates)
    step = 1e-7
    for j in (0, len(components) - 1):
        moved = gates.clone()
        moved[:, j] += step
        after, _ = circuit.gradients(inputs, codes, margin, moved)
        torch.testing.assert_close((after - values) / step, gradients[:, j], rtol=1e-4, atol=1e-5)


def test_batch_normalisation_is_folded_and_nothing_changes():
    circuit, network, inputs, codes, components = opened(Residual, "conv_filters")
    assert not any(isinstance(p, nn.BatchNorm2d) for p in circuit.network.module.modules())
    plain = Circuit(network, components, inputs, accelerate=False)
    masks = random_masks(len(components))
    torch.testing.assert_close(
        circuit.outputs(inputs, codes, margin, masks),
        plain.outputs(inputs, codes, margin, masks),
        **EXACT,
    )


def test_what_comes_before_the_first_gate_is_computed_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 3))
    calls = []
    module[0].register_forward_hook(lambda *_: calls.append(1))
    network = Network(module.double(), np.arange(3))
    inputs = torch.randn(40, 4).double()
    components = find_components(module, "2")
    circuit = Circuit(network, components, inputs)
    before = len(calls)
    masks = random_masks(4, m=20)
    actual = circuit.outputs(inputs, torch.zeros(40).long(), margin, masks)
    expected = Circuit(network, components, inputs, accelerate=False).outputs(
        inputs, torch.zeros(40).long(), margin, masks
    )
    torch.testing.assert_close(actual, expected, **EXACT)
    assert before < len(calls)
    assert circuit._prefix


def test_folding_is_undone_where_it_would_change_something():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            raw = self.conv(x)
            return self.out((self.norm(raw) + raw).mean((2, 3)))

    torch.manual_seed(0)
    module = Twice().double()
    inputs = torch.randn(10, 1, 4, 4).double()
    module(inputs)
    network = Network(module.eval(), np.arange(3))
    components = find_components(module)
    masks = random_masks(4)
    codes = torch.zeros(10).long()
    actual = Circuit(network, components, inputs).outputs(inputs, codes, margin, masks)
    expected = [with_rows_zeroed(network, components, v, inputs, codes) for v in masks]
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


def test_a_module_that_cannot_be_copied_is_gated_where_it_is():
    module, X, y = made(Residual)
    module.blob = (i for i in range(3))
    network = Network(module, np.arange(3))
    before = fingerprint(module)
    components = find_components(module)
    circuit = Circuit(network, components, network.tensor(X))
    assert not circuit.copied
    masks = random_masks(len(components))
    actual = circuit.outputs(network.tensor(X), torch.as_tensor(y), margin, masks)
    reference, _, _ = made(Residual)
    expected = Circuit(Network(reference, np.arange(3)), components, network.tensor(X)).outputs(
        network.tensor(X), torch.as_tensor(y), margin, masks
    )
    torch.testing.assert_close(actual, expected, **EXACT)
    assert fingerprint(module) == before


def test_an_unknown_ablation_is_refused():
    module, X, _ = made(Residual)
    network = Network(module, np.arange(3))
    with pytest.raises(ValueError, match="ablation='nil' is unknown"):
        Circuit(network, find_components(module), network.tensor(X), ablation="nil")
