"""Rest points and candidates."""

import numpy as np
import pytest
from scipy.special import softmax

from skperf.performative.equilibrium import plain_gaps, stable_prior
from skperf.performative.ranking import score_under


def test_a_contraction_comes_to_rest_at_its_fixed_point():
    target = np.array([0.2, 0.3, 0.5])

    def answer(prior):
        return 0.5 * prior + 0.5 * target

    rest = stable_prior(answer, np.full(3, 1 / 3), tol=1e-6, max_iter=2000)
    assert rest["converged"]
    np.testing.assert_allclose(rest["prior"], target, atol=1e-5)
    assert plain_gaps(answer, np.full(3, 1 / 3))[0] < 1e-3


def test_damping_settles_what_cycles():
    def answer(prior):
        return softmax(-8 * prior * np.array([1.0, 1.2]))

    one, two = plain_gaps(answer, np.array([0.5, 0.5]))
    assert one > 0.3
    assert two < 0.01
    rest = stable_prior(answer, np.array([0.5, 0.5]), damping=0.1)
    assert rest["converged"]
    np.testing.assert_allclose(answer(rest["prior"]), rest["prior"], atol=0.01)


def test_an_answer_that_jumps_is_met_on_average():
    def answer(prior):
        return np.array([0.9, 0.1]) if prior[0] < 0.4 else np.array([0.1, 0.9])

    rest = stable_prior(answer, np.array([0.5, 0.5]), damping=0.05, tol=0.05)
    assert rest["prior"][0] == pytest.approx(0.4, abs=0.1)


def test_no_rest_is_said():
    rest = stable_prior(
        lambda prior: softmax(-8 * prior), np.array([0.9, 0.1]), max_iter=5, tol=1e-4
    )
    assert not rest["converged"]
    assert rest["residual"] > 1e-4
    assert rest["n_iter"] == 5


def test_score_under_a_mix():
    scores, codes = np.array([1.0, 0.0, 1.0]), np.array([0, 0, 1])
    assert score_under(np.array([0.2, 0.8]), scores, codes) == pytest.approx(0.2 * 0.5 + 0.8)
    # a class without rows is left out
    assert score_under(np.array([0.1, 0.4, 0.5]), scores, codes) == pytest.approx(
        (0.1 * 0.5 + 0.4) / 0.5
    )
