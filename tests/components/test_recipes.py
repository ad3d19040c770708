"""Linear models of falls, by hand."""

import numpy as np
import pytest

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
