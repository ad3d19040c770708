import numpy as np
import pytest
import torch
from influence_nets import brute_curvature, cases, mlp

from skperf.backbone.network import Network
from skperf.backbone.parameters import select_parameters, unflatten
from skperf.influence.captures import recording
from skperf.influence.generalized import (
    choose_by_saliency,
    choose_units,
    generalized_query,
    generalized_update,
    removal_update,
    row_product,
    unit_strengths,
)
from skperf.influence.layers import find_layers, from_vectors

NETWORK, INPUTS = cases()["mlp"]
PARAMETERS = select_parameters(NETWORK.module)
LAYERS = find_layers(NETWORK.module, PARAMETERS)
H = brute_curvature(NETWORK, INPUTS, torch.full((7,), 1 / 7, dtype=torch.float64))
GRADIENT = torch.randn(len(H), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CHOSEN = torch.arange(len(H)) % 5 == 0
RIDGE = 1e-2


def multiply(vectors):
    return vectors @ H


def test_update_is_ridge_least_squares_on_all_gradients():
    columns = H[:, CHOSEN]
    normal = columns.T @ columns + RIDGE * torch.eye(int(CHOSEN.sum()))
    expected = torch.zeros_like(GRADIENT)
    expected[CHOSEN] = torch.linalg.solve(normal, columns.T @ GRADIENT)
    solved = generalized_update(
        multiply, CHOSEN, GRADIENT[None], ridge=RIDGE, max_iter=300, tol=1e-13
    )
    torch.testing.assert_close(solved.values[0], expected, rtol=1e-6, atol=1e-8)
    y = generalized_query(multiply, CHOSEN, GRADIENT[None], ridge=RIDGE, max_iter=300, tol=1e-13)
    torch.testing.assert_close(y[0], columns @ torch.linalg.solve(normal, GRADIENT[CHOSEN]))


@pytest.mark.parametrize("how", ["freeze", "project", "plain", "ascent"])
def test_the_alternatives_are_what_their_names_say(how):
    def ridged(matrix, right):
        return torch.linalg.solve(matrix @ matrix + RIDGE * torch.eye(len(matrix)), matrix @ right)

    masked = torch.where(CHOSEN, GRADIENT, 0.0)
    both = CHOSEN[:, None] & CHOSEN[None]
    expected = {
        "freeze": lambda: ridged(torch.where(both, H, 0.0), masked),
        "project": lambda: torch.where(CHOSEN, ridged(H, GRADIENT), 0.0),
        "plain": lambda: ridged(H, GRADIENT),
        "ascent": lambda: masked,
    }[how]()
    update = removal_update(how, multiply, CHOSEN, GRADIENT, ridge=RIDGE, max_iter=300)
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_strongest_units_are_taken_whole_until_the_quota_is_full():
    torch.manual_seed(0)
    network = Network(mlp(6, 8, 3), np.arange(3))
    layers = find_layers(network.module, select_parameters(network.module))
    inputs, codes = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    with recording(network.module):
        strengths = unit_strengths(network, inputs, codes, layers, "output")
        by_gradient = unit_strengths(network, inputs, codes, layers, "gradient")
    expected = network.module[0](inputs).mean(0).detach()  # a unit that is off is no strong one
    torch.testing.assert_close(strengths["0"], expected)
    slopes = network(inputs).softmax(1) - torch.nn.functional.one_hot(codes, 3)
    torch.testing.assert_close(by_gradient["2"], slopes.mean(0).abs().detach())
    parameters = select_parameters(network.module)
    chosen = choose_units(layers, parameters, strengths, 0.3, torch.Generator().manual_seed(0))
    named = unflatten(chosen, parameters)
    # 56 weights in the first layer: two units of seven, and two of a third
    order = strengths["0"].argsort(descending=True)
    assert named["0.weight"][order[:2]].all()
    assert named["0.bias"][order[:2]].all()
    assert int(named["0.weight"].sum() + named["0.bias"].sum()) == int(0.3 * 56)
    assert not named["0.weight"][order[3:]].any()


class Shuffled(torch.nn.Module):
    """Layers that run in another order than they stand in, one without slopes, one not at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.idle, self.last = torch.nn.Linear(2, 9), torch.nn.Linear(5, 3)
        self.first, self.fixed = torch.nn.Linear(6, 5), torch.nn.Linear(5, 5)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        with torch.no_grad():
            other = self.fixed(hidden)
        return self.last(hidden + other)


def test_strengths_belong_to_their_layers_whatever_order_these_run_in():
    network = Network(Shuffled().double(), np.arange(3))
    layers = find_layers(network.module, select_parameters(network.module))
    inputs, codes = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    with recording(network.module):
        strengths = unit_strengths(network, inputs, codes, layers, "output")
        by_gradient = unit_strengths(network, inputs, codes, layers, "gradient")
    first = network.module.first(inputs).mean(0).detach()
    torch.testing.assert_close(strengths["first"], first)
    slopes = network(inputs).softmax(1) - torch.nn.functional.one_hot(codes, 3)
    torch.testing.assert_close(by_gradient["last"], slopes.mean(0).abs().detach())
    assert not by_gradient["fixed"].any()
    assert set(strengths) == set(by_gradient) == {"first", "fixed", "last"}


def test_saliency_weighs_gradient_by_curvature():
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0])
    curvature = torch.tensor([0.1, 4.0, 9.0, 100.0])
    assert choose_by_saliency(gradient, curvature, 0.5).tolist() == [True, True, False, False]


def test_lsmr_needs_few_products_where_the_released_iteration_needs_many():
    columns = H[:, CHOSEN]
    best = torch.linalg.lstsq(columns, GRADIENT[:, None]).solution[:, 0]
    optimum = float((columns @ best - GRADIENT).norm() / GRADIENT.norm())
    solved = generalized_update(multiply, CHOSEN, GRADIENT[None], ridge=1e-9, max_iter=12)

    def released(n_iterations):
        scale = 1.05 * float(torch.linalg.eigvalsh(H)[-1]) ** 2
        right = (H @ GRADIENT)[CHOSEN]
        x = right.clone()
        for _ in range(n_iterations):
            x = right + x - columns.T @ (columns @ x) / scale
        return float((columns @ (x / scale) - GRADIENT).norm() / GRADIENT.norm())

    assert optimum <= float(solved.residual) + 1e-9
    assert float(solved.residual) < released(1000)


@pytest.mark.parametrize(
    "damping", [0.3, torch.linspace(0.1, 2, len(H)).double()], ids=["one", "each"]
)
def test_products_with_rows_of_a_curvature_are_damped(damping):
    rows, vectors = torch.randn(5, len(H)).double(), torch.randn(3, len(H)).double()
    product = row_product(LAYERS, PARAMETERS, [*from_vectors(LAYERS, rows, PARAMETERS)], damping)
    torch.testing.assert_close(product(vectors), vectors @ rows.T @ rows + damping * vectors)
