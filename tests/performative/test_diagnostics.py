"""What a record can and cannot tell."""

import numpy as np
import pytest
from scipy.special import softmax

from skperf.performative.diagnostics import (
    conditional_shift_p_value,
    cycling,
    extrapolation,
    identifiability,
    one_step_gains,
    response_p_value,
)
from skperf.performative.response import fit_tied
from skperf.performative.trajectory import Trajectory

K = 4
EQUAL = np.log(np.full(K, 1 / K))


def test_a_model_that_never_changed_has_rank_zero():
    assert identifiability(np.full((5, 3), 0.7))["rank"] == 0
    assert identifiability(np.full((5, 3), 0.7))["effective_rank"] == 0.0
    line = np.linspace(0, 1, 6)[:, None] * np.ones(3)
    assert identifiability(line)["rank"] == 1
    assert identifiability(line)["effective_rank"] == pytest.approx(1.0)
    cloud = np.random.default_rng(0).normal(size=(500, 3))
    assert identifiability(cloud)["effective_rank"] == pytest.approx(3.0, rel=0.05)


def test_extrapolation():
    seen = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert extrapolation(np.array([1.0, 0.0]), seen) == 0.0
    assert extrapolation(np.array([5.0, 0.0]), seen) == pytest.approx(3.0)
    assert extrapolation(np.array([5.0, 0.0]), seen[:1]) == 0.0


def test_cycling():
    flip = 1000.0 * np.array([[0.9, 0.1], [0.1, 0.9]] * 5)
    found = cycling(flip)
    assert found["cycling_index"] > 0.99
    assert found["tv_1"] == pytest.approx(0.8, abs=0.01)
    drift = 1000.0 * np.column_stack([np.linspace(0.1, 0.9, 10), np.linspace(0.9, 0.1, 10)])
    assert cycling(drift)["cycling_index"] == 0.0
    assert cycling(flip[:2])["cycling_index"] == 0.0


def test_recall_that_stays_and_recall_that_moves():
    rng = np.random.default_rng(0)
    counts = rng.integers(100, 300, size=(30, K))
    stays = rng.binomial(counts, [0.6, 0.7, 0.8, 0.9])
    values = [
        conditional_shift_p_value(counts, rng.binomial(counts, [0.6, 0.7, 0.8, 0.9]))
        for _ in range(200)
    ]
    assert np.mean(np.array(values) < 0.05) < 0.12
    assert conditional_shift_p_value(counts, stays) > 0.001
    moves = rng.binomial(counts, rng.uniform(0.5, 0.9, size=(30, K)))
    assert conditional_shift_p_value(counts, moves) < 1e-6
    assert np.isnan(conditional_shift_p_value(counts, np.full(counts.shape, np.nan)))


def rounds(answers, n_rounds=25, seed=0):
    rng = np.random.default_rng(seed)
    statistics = rng.uniform(0.4, 1.0, size=(n_rounds, K))
    mixes = [softmax(-s / 0.3) if answers else rng.dirichlet(np.full(K, 20.0)) for s in statistics]
    return statistics, np.array([rng.multinomial(500, mix) for mix in mixes], float)


def test_permutations_tell_an_answer_from_drift():
    generator = np.random.default_rng(0)
    keywords = {"log_base": EQUAL, "generator": generator}
    assert response_p_value(*rounds(True), fit_tied, **keywords) == pytest.approx(0.01)
    values = [
        response_p_value(*rounds(False, seed=s), fit_tied, n_permutations=39, **keywords)
        for s in range(20)
    ]
    assert np.mean(np.array(values) <= 0.05) <= 0.2
    few = rounds(True, n_rounds=3)
    assert np.isnan(response_p_value(*few, fit_tied, **keywords))


def test_gains_one_step_ahead():
    statistics, counts = rounds(True)
    # the answer to a statistic comes one round later
    shifted = np.vstack([counts[:1], counts[:-1]])
    trajectory = Trajectory.from_arrays(statistics, shifted)
    gains = one_step_gains(trajectory, fit_tied, log_base=EQUAL)
    assert gains["gain_statistic"] > 0.05
    assert gains["gain_statistic"] > gains["gain_previous_mix"] + 0.03
    short = Trajectory.from_arrays(statistics[:3], counts[:3])
    assert np.isnan(one_step_gains(short, fit_tied, log_base=EQUAL)["gain_statistic"])
