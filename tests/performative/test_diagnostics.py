"""What a record can and cannot tell."""

import numpy as np
import pytest
from scipy.special import softmax

from skperf.performative.diagnostics import (
    conditional_shift_p_value,
    cycling,
    extrapolation,
    identifiability,
    response_p_value,
)
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


def pairs(step, n_rounds=40, seed=0):
    """Record of a world: ``step(statistic, log_mix, rng)`` gives the next log mix."""
    rng = np.random.default_rng(seed)
    record, logs, statistic = Trajectory.empty(K, K), np.zeros(K), rng.uniform(0.4, 1.0, size=K)
    told = []
    for t in range(n_rounds):
        logs = step(statistic, logs, rng)
        counts = rng.multinomial(500, softmax(logs)).astype(float)
        # an adapting model's recall follows the mix it had expected: the one measured before
        expected = record.mixes[-1] if t else np.zeros(K)
        statistic = np.clip(0.5 + 0.2 * expected + rng.normal(scale=0.1, size=K), 0, 1)
        record = record.append(t, statistic, counts)
        told.append(expected)
    return *record.pairs(), np.array(told[:-1])


def p_value(inputs, counts, expected, n_permutations=59, seed=0):
    generator = np.random.default_rng(seed)
    keywords = {"n_permutations": n_permutations, "generator": generator}
    return response_p_value(inputs, counts, expected, **keywords)


def test_an_answer_is_found():
    assert p_value(*pairs(lambda s, x, rng: -s / 0.2)) == pytest.approx(1 / 60)
    assert p_value(*pairs(lambda s, x, rng: 0.6 * x - s)) == pytest.approx(1 / 60)
    assert np.isnan(p_value(*pairs(lambda s, x, rng: -s, n_rounds=5)))


@pytest.mark.parametrize(
    "step",
    [
        lambda s, x, rng: 0.5 * rng.normal(size=K),
        lambda s, x, rng: x + 0.25 * rng.normal(size=K),
        lambda s, x, rng: x + 0.04 * np.arange(K) + 0.05 * rng.normal(size=K),
    ],
    ids=["independent", "walk", "trend"],
)
def test_mixes_that_wander_on_their_own_are_rarely_taken_for_an_answer(step):
    values = np.array([p_value(*pairs(step, seed=seed), seed=seed) for seed in range(200)])
    assert np.mean(values <= 0.05) <= 0.081  # two standard errors above the nominal size
    assert np.mean(values) == pytest.approx(0.5, abs=0.06)


def test_mixes_that_wander_to_rare_classes_are_not_taken_for_an_answer():
    """Log shares and recalls of a class are both noisy while it is rare, though neither answers."""

    def lived(seed):
        rng = np.random.default_rng(seed)
        record, logs, told = Trajectory.empty(K, K), np.zeros(K), []
        for t in range(50):
            logs = logs + 0.4 * rng.normal(size=K)
            counts = rng.multinomial(200, softmax(logs)).astype(float)
            expected = record.mixes[-1] if t else np.zeros(K)
            recall = np.clip(0.6 + 0.1 * expected, 0.05, 0.95)
            hits = rng.binomial(counts.astype(int), recall)
            told.append(expected)
            statistic = (hits + 2 * hits.sum() / 200) / (counts + 2)
            record = record.append(t, statistic, counts)
        return *record.pairs(), np.array(told[:-1])

    values = np.array([p_value(*lived(seed), seed=seed) for seed in range(200)])
    assert np.mean(values <= 0.05) <= 0.081


def test_effective_rank_is_that_of_the_covariance():
    statistics = np.random.default_rng(0).normal(size=(9, 3)) * [1.0, 0.5, 0.1]
    covariance = np.cov(statistics.T, ddof=0)
    found = identifiability(statistics)
    expected = np.trace(covariance) ** 2 / np.trace(covariance @ covariance)
    assert found["effective_rank"] == pytest.approx(expected)
    assert found["spread"] == pytest.approx(np.sqrt(np.trace(covariance)))
    assert found["rank"] == 3
