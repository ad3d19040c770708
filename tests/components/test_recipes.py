"""Linear models of falls, by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from skperf import ComponentAttributor
from skperf.components.recipes import _spread, exact


def test_a_model_without_noise_gives_back_the_baseline_with_all_gates_open():
    coefficients, baseline = np.array([[1.0, -2.0, 4.0], [0.5, 0.25, 8.0]]), np.array([7.0, -1.0])
    fit = exact(coefficients, baseline)
    np.testing.assert_array_equal(fit.coefficients, coefficients)
    np.testing.assert_allclose(fit.intercept, [4.0, -9.75])
    np.testing.assert_allclose(fit.intercept + coefficients @ np.ones(3), baseline)


@pytest.mark.parametrize(("count", "most"), [(10, 4), (3, 8), (1, 5), (7, 7)])
def test_some_of_many_are_spread_from_the_first_to_the_last(count, most):
    found = _spread(count, most)
    assert len(found) == min(count, most)
    assert found[0] == 0
    assert found[-1] == count - 1 or most == 1
    assert found == sorted(set(found))


class Sums(nn.Module):
    """A logit that is linear in what its neurons add, whatever the row."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.inner(x))


@pytest.mark.parametrize("method", ["path_gradient", "regression", "loo", "auto"])
def test_of_a_network_linear_in_its_gates_every_method_finds_all(method):
    torch.manual_seed(0)
    X, y = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32), np.arange(7) % 2
    module = Sums()
    model = ComponentAttributor(
        module, components="inner", output="logit", method=method, budget=80, random_state=0
    ).fit(X, y)
    with torch.no_grad():
        added = module.inner(torch.as_tensor(X))[:, None] * module.head.weight  # (7, 2, 6)
        expected = added[range(7), y].numpy()
        offsets = module.head.bias[y].numpy()
    tolerance = 1e-2 if method == "regression" else 1e-3
    np.testing.assert_allclose(model.attributions_, expected, atol=tolerance)
    masks = np.random.default_rng(1).integers(0, 2, (5, 6))
    found = model.predict_counterfactual(masks)
    np.testing.assert_allclose(found, expected @ masks.T + offsets[:, None], atol=3 * tolerance)
