"""Gates against brute force."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.losses import CrossEntropy
from skperf.backbone.network import Network
from skperf.backbone.outputs import margin
from skperf.backbone.rows import Rows
from skperf.backbone.views import view
from skperf.components.finding import find, size_at
from skperf.components.gates import Asked, Circuit, Rule
from skperf.components.measures import Measure
from skperf.components.taps import opened_attention
from skperf.components.units import select
from skperf.components.wiring import wire
from tests.components.networks import Residual, SeparateTransformer, Tied, TorchTransformer, made

EXACT = {"rtol": 1e-9, "atol": 1e-9}
KINDS = [
    (Residual, "conv_filters"),
    (Residual, "neurons"),
    (TorchTransformer, "mlp_neurons"),
    (SeparateTransformer, "mlp_neurons"),
    (Tied, "neurons"),
]
MARGIN = Measure("margin", CrossEntropy())


def fresh(module):
    return Network(view(module), np.arange(3))


def wired(module, X, selection, rule=None):
    rule, network, rows = rule or Rule(), fresh(module), Rows(torch.as_tensor(X))
    opened_attention(network.module)
    found = find(network, rows[:1])
    components, sites = select(found, selection, module, lambda p: size_at(network, rows[:1], p))
    return wire(network, components, sites, rows[:3], outputs_themselves=rule.replaces)


def opened(kind, selection, ablation="zero", **options):
    module, X, y = made(kind, **options)
    rule = Rule(ablation, donors=Rows(torch.as_tensor(X)))
    wiring = wired(module, X, selection, rule)
    return Circuit(fresh(module), wiring, rule), module, torch.as_tensor(X), torch.as_tensor(y)


def run(circuit, inputs, codes, masks):
    return circuit.outputs(Asked(Rows(inputs), codes), MARGIN, masks)


def random_masks(n, m=7):
    return (torch.rand(m, n, generator=torch.Generator().manual_seed(1)) > 0.3).double()


def with_rows_zeroed(module, components, mask, inputs, codes, scale=0.0):
    """The released procedure: copy, zero the weight rows, run."""
    changed = copy.deepcopy(module)
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


class Twice(nn.Module):
    """A convolution whose output is used beside its batch normalisation."""

    def __init__(self):
        super().__init__()
        self.convolve, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.output = nn.Linear(4, 3)

    def forward(self, x):
        raw = self.convolve(x)
        return self.output((self.norm(raw) + raw).mean((2, 3)))


def test_a_network_may_view_its_activations():
    torch.manual_seed(0)
    module, inputs = Viewing().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    wiring, codes = wired(module, inputs, "conv_filters"), torch.arange(3)
    masks = random_masks(4)
    expected = [with_rows_zeroed(module, wiring.components, v, inputs, codes) for v in masks]
    actual = run(Circuit(fresh(module), wiring), inputs, codes, masks)
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


@pytest.mark.parametrize(("kind", "selection"), KINDS)
@pytest.mark.parametrize("n", [40, 3, 1])
@pytest.mark.parametrize("plain", [True, False])
def test_zeroing_equals_zeroed_weight_rows(kind, selection, n, plain):
    circuit, module, inputs, codes = opened(kind, selection)
    wiring = circuit.wiring.plainly() if plain else circuit.wiring
    circuit = Circuit(fresh(module), wiring)
    masks = random_masks(circuit.n_components)
    expected = [
        with_rows_zeroed(module, wiring.components, v, inputs[:n], codes[:n]) for v in masks
    ]
    actual = run(circuit, inputs[:n], codes[:n], masks)
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


@pytest.mark.parametrize("n", [40, 2])
def test_layers_and_their_units_may_be_gated_together(n):
    circuit, module, inputs, codes = opened(Residual, ["conv_filters", "layers"])
    masks = random_masks(circuit.n_components)
    components = circuit.wiring.components
    expected = [with_rows_zeroed(module, components, v, inputs[:n], codes[:n]) for v in masks]
    actual = run(circuit, inputs[:n], codes[:n], masks)
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


def test_a_float_scales_the_rows():
    circuit, module, inputs, codes = opened(Residual, "conv_filters", 0.5)
    mask = random_masks(circuit.n_components)[:1]
    components = circuit.wiring.components
    expected = with_rows_zeroed(module, components, mask[0], inputs, codes, scale=0.5)
    torch.testing.assert_close(run(circuit, inputs, codes, mask)[:, 0], expected, **EXACT)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n", [40, 1])
@pytest.mark.parametrize("plain", [True, False])
def test_heads_of_torch_attention_equal_zeroed_columns_of_its_projection(batch_first, n, plain):
    circuit, module, inputs, codes = opened(
        TorchTransformer, "attention_heads", batch_first=batch_first
    )
    if plain:
        circuit = Circuit(fresh(module), circuit.wiring.plainly())
    masks = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).double()
    actual = run(circuit, inputs[:n], codes[:n], masks)
    for mask, one in zip(masks, actual.T, strict=True):
        changed = copy.deepcopy(module)
        with torch.no_grad():
            changed.layer.self_attn.out_proj.weight.view(8, 2, 4)[:, mask == 0] = 0
            expected = margin(changed(inputs[:n]), codes[:n])
        torch.testing.assert_close(one, expected, **EXACT)


@pytest.mark.parametrize("n", [40, 1])
def test_separate_heads_equal_zeroed_columns_of_the_next_layer(n):
    circuit, module, inputs, codes = opened(SeparateTransformer, "attention_heads")
    masks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    actual = run(circuit, inputs[:n], codes[:n], masks)
    for mask, one in zip(masks, actual.T, strict=True):
        changed = copy.deepcopy(module)
        with torch.no_grad():
            changed.dense.weight.view(8, 2, 4)[:, mask == 0] = 0
            expected = margin(changed(inputs[:n]), codes[:n])
        torch.testing.assert_close(one, expected, **EXACT)


def hooked(module, replacements, inputs, codes):
    """Replace outputs of modules by hand, in a copy."""
    changed = copy.deepcopy(module)
    parts = dict(changed.named_modules())
    for name, function in replacements.items():
        parts[name].register_forward_hook(lambda _m, _a, out, f=function: f(out))
    with torch.no_grad():
        return margin(changed(inputs), codes)


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
    circuit, module, inputs, codes = opened(Residual, "stem", ablation, **kind)
    mask = torch.ones(1, circuit.n_components).double()
    mask[0, 2] = 0
    expected = hooked(module, {"norm": replaced(2, value)}, inputs, codes)
    torch.testing.assert_close(run(circuit, inputs, codes, mask)[:, 0], expected, **EXACT)


@pytest.mark.parametrize("per", ["position", "class"])
def test_means_of_positions_and_of_classes(per):
    module, X, y = made(Residual)
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    rule = Rule("mean", per, donors=Rows(inputs), labels=codes)
    circuit = Circuit(fresh(module), wired(module, X, "stem", rule), rule)
    mask = torch.ones(1, 6).double()
    mask[0, 2] = 0

    def value(out):
        if per == "position":
            return out[:, 2].mean(0)
        return torch.stack([out[codes == code, 2].mean(0) for code in range(3)])[codes]

    expected = hooked(module, {"norm": replaced(2, value)}, inputs, codes)
    actual = circuit.outputs(Asked(Rows(inputs), codes), MARGIN, mask)[:, 0]
    torch.testing.assert_close(actual, expected, **EXACT)


def test_each_row_may_have_a_donor_of_its_own():
    module, X, y = made(Residual)
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    others = inputs.flip(0) * 0.5
    rule = Rule("resample", "row", donors=Rows(others))
    circuit = Circuit(fresh(module), wired(module, X, "stem", rule), rule)
    masks = torch.ones(9, 6).double()
    masks[:, 2] = 0
    with torch.no_grad():
        given = module.norm(module.stem(others))[:, 2]
    expected = hooked(module, {"norm": replaced(2, lambda out: given)}, inputs, codes)
    asked = Asked(Rows(inputs), codes, Rows(others))
    actual = circuit.outputs(asked, MARGIN, masks)
    torch.testing.assert_close(actual, expected[:, None].expand(-1, 9), **EXACT)
    few = circuit.outputs(asked[5:8], MARGIN, masks)
    torch.testing.assert_close(few, actual[5:8], **EXACT)


@pytest.mark.parametrize("batch_first", [True, False])
def test_ablation_at_given_positions(batch_first):
    module, X, y = made(TorchTransformer, batch_first=batch_first)
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    rule = Rule("zero_output", positions=(0, 2))
    circuit = Circuit(fresh(module), wired(module, X, "mlp_neurons", rule), rule)
    mask = torch.ones(1, 16).double()
    mask[0, 5] = 0

    def cut(out):
        out = out.clone()
        where = out[:, [0, 2]] if batch_first else out[[0, 2]]
        where[..., 5] = 0
        out[(slice(None), [0, 2]) if batch_first else [0, 2]] = where
        return out

    expected = hooked(module, {"layer.linear1": cut}, inputs, codes)
    torch.testing.assert_close(run(circuit, inputs, codes, mask)[:, 0], expected, **EXACT)


@pytest.mark.parametrize(
    ("kind", "selection"), [*KINDS, (TorchTransformer, "auto"), (SeparateTransformer, "auto")]
)
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_gradients_equal_finite_differences(kind, selection, ablation):
    circuit, _, inputs, codes = opened(kind, selection, ablation)
    rng = torch.Generator().manual_seed(0)
    gates = torch.rand(len(inputs), circuit.n_components, generator=rng).double()
    asked = Asked(Rows(inputs), codes)
    values, gradients = circuit.gradients(asked, MARGIN, gates)
    step = 1e-7
    for j in (0, circuit.n_components - 1):
        moved = gates.clone()
        moved[:, j] += step
        after, _ = circuit.gradients(asked, MARGIN, moved)
        torch.testing.assert_close((after - values) / step, gradients[:, j], rtol=1e-4, atol=1e-5)


def test_rows_by_rows_and_weights_give_the_same_gradients():
    circuit, module, inputs, codes = opened(TorchTransformer, "auto")
    plain = Circuit(fresh(module), circuit.wiring.plainly())
    gates = torch.rand(5, 18, generator=torch.Generator().manual_seed(0)).double()
    asked = Asked(Rows(inputs[:5]), codes[:5])
    for one, other in zip(
        circuit.gradients(asked, MARGIN, gates), plain.gradients(asked, MARGIN, gates), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_batch_normalisation_is_folded_and_nothing_changes():
    circuit, module, inputs, codes = opened(Residual, "conv_filters")
    norms = [p for p in circuit.network.module.modules() if isinstance(p, nn.BatchNorm2d)]
    assert all("forward" in p.__dict__ for p in norms)  # which gives back what it takes
    plain = Circuit(fresh(module), replace(circuit.wiring, followers={}))
    masks = random_masks(circuit.n_components)
    torch.testing.assert_close(
        run(circuit, inputs, codes, masks), run(plain, inputs, codes, masks), **EXACT
    )


def test_folding_leaves_what_is_used_twice():
    torch.manual_seed(0)
    module, inputs = Twice().double(), torch.randn(10, 1, 4, 4).double()
    module(inputs)
    module.eval()
    wiring, codes, masks = wired(module, inputs, "auto"), torch.zeros(10).long(), random_masks(4)
    actual = run(Circuit(fresh(module), wiring), inputs, codes, masks)
    expected = [with_rows_zeroed(module, wiring.components, v, inputs, codes) for v in masks]
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


def test_what_comes_before_the_first_gate_is_computed_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 3))
    module, inputs = module.double().eval(), torch.randn(40, 4).double()
    circuit = Circuit(fresh(module), wired(module, inputs, "2"))
    assert circuit.wiring.prefix == ("0", "1", "2")
    calls = []
    inner = circuit.network.module[0].forward
    circuit.network.module[0].__dict__["forward"] = lambda x: calls.append(1) or inner(x)
    masks, codes = random_masks(4, m=20), torch.zeros(40).long()
    actual = run(circuit, inputs, codes, masks)
    assert len(calls) == 1
    expected = [
        with_rows_zeroed(module, circuit.wiring.components, v, inputs, codes) for v in masks
    ]
    torch.testing.assert_close(actual, torch.stack(expected, 1), **EXACT)


def test_rows_as_the_user_gave_them_become_the_networks_own_once():
    module, X, _ = made(Tied)
    asked = Asked(Rows(np.asarray(X)), None, raw=True)
    ready = asked.ready(fresh(module))
    assert not ready.raw
    assert isinstance(ready.rows.tree, torch.Tensor)
    assert ready.ready(fresh(module)) is ready
