"""Response maps against closed forms, brute force and known worlds."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from skperf.performative._neural import fit_neural
from skperf.performative.paper import fit_paper
from skperf.performative.response import (
    FITTERS,
    SLOPE_SHARE,
    deviance,
    dispersion,
    fit_curve,
    fit_fixed,
    fit_linear,
    fit_tied,
)

K, R = 4, 40
EQUAL = np.log(np.full(K, 1 / K))


def rounds(answer, *, n_rounds=R, size=1000, seed=0):
    rng = np.random.default_rng(seed)
    statistics = rng.uniform(0.2, 1.0, size=(n_rounds, K))
    return statistics, np.array([rng.multinomial(size, answer(s)) for s in statistics], float)


def adversarial(temperature=0.3):
    return lambda s: softmax(-s / temperature)


def divergence(p, log_q):
    return np.sum(p * (np.log(p) - log_q), axis=1).mean()


def test_fixed_map_is_the_pooled_mix():
    statistics, counts = rounds(adversarial())
    response = fit_fixed(statistics, counts, log_base=EQUAL, l2=1e-9)
    pooled = counts.sum(axis=0) / counts.sum()
    np.testing.assert_allclose(np.exp(response.log_prior(statistics[:1])[0]), pooled, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_tied_slope_is_recovered(temperature):
    statistics, counts = rounds(adversarial(temperature), n_rounds=30)
    response = fit_tied(statistics, counts, log_base=EQUAL)
    assert -response.weights[0, 0] == pytest.approx(1 / temperature, rel=0.1)
    fresh = np.random.default_rng(1).uniform(0.2, 1.0, size=(50, K))
    truth = softmax(-fresh / temperature, axis=1)
    assert divergence(truth, response.log_prior(fresh)) < 0.01


def test_tied_map_is_the_minimum_of_its_objective():
    statistics, counts = rounds(adversarial(), n_rounds=6, size=30)

    def objective(theta):
        log_prior = log_softmax(EQUAL + theta[:K] + theta[K] * statistics, axis=1)
        return -np.sum(counts * log_prior) + 0.5 * (
            theta[:K] @ theta[:K] + SLOPE_SHARE * theta[K] ** 2
        )

    brute = minimize(objective, np.zeros(K + 1), tol=1e-10).x
    response = fit_tied(statistics, counts, log_base=EQUAL, l2=1.0)
    assert response.weights[0, 0] == pytest.approx(brute[K], abs=1e-3)
    np.testing.assert_allclose(response.offset - EQUAL, brute[:K], atol=1e-3)


def test_linear_map_is_the_minimum_of_its_objective():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(K, K)) * 2
    statistics, counts = rounds(lambda s: softmax(matrix @ s), n_rounds=200)
    response = fit_linear(statistics, counts, log_base=EQUAL)
    fresh = rng.uniform(0.2, 1.0, size=(50, K))
    assert divergence(softmax(fresh @ matrix.T, axis=1), response.log_prior(fresh)) < 1e-3
    restarted = fit_linear(statistics, counts, log_base=EQUAL, start=response)
    np.testing.assert_allclose(response.log_prior(fresh), restarted.log_prior(fresh), atol=5e-3)


def test_curve_follows_what_a_slope_cannot():
    def bent(s):
        return softmax(-np.tanh(6 * (s - s.mean())) / 0.3)

    statistics, counts = rounds(bent, n_rounds=60)
    fresh = np.random.default_rng(1).uniform(0.2, 1.0, size=(50, K))
    truth = np.array([bent(s) for s in fresh])
    straight = divergence(truth, fit_tied(statistics, counts, log_base=EQUAL).log_prior(fresh))
    curved = divergence(truth, fit_curve(statistics, counts, log_base=EQUAL).log_prior(fresh))
    assert curved < 0.25 * straight
    assert curved < 0.05


@pytest.mark.parametrize("name", FITTERS)
def test_a_class_that_never_occurs_keeps_a_share(name):
    statistics, counts = rounds(lambda s: np.array([0.5, 0.3, 0.2, 0.0]))
    response = FITTERS[name](statistics, counts, log_base=EQUAL)
    log_prior = response.log_prior(statistics)
    assert np.isfinite(log_prior).all()
    np.testing.assert_allclose(np.exp(log_prior).sum(axis=1), 1.0)


@pytest.mark.parametrize("name", FITTERS)
def test_one_round_of_one_label_moves_little(name):
    response = FITTERS[name](np.full((1, K), 0.5), np.eye(K)[:1], log_base=EQUAL)
    moved = 0.5 * np.abs(np.exp(response.log_prior(np.full((1, K), 0.5))[0]) - 1 / K).sum()
    assert moved < 0.35


@pytest.mark.parametrize("fit", [fit_tied, fit_curve])
def test_shared_slopes_need_one_entry_a_class(fit):
    with pytest.raises(ValueError, match="one entry a class"):
        fit(np.zeros((2, 3)), np.ones((2, K)), log_base=EQUAL)


def test_linear_map_takes_any_statistic():
    rng = np.random.default_rng(0)
    statistics = rng.normal(size=(60, 2))
    matrix = rng.normal(size=(K, 2))
    truth = softmax(statistics @ matrix.T, axis=1)
    response = fit_linear(statistics, 1000 * truth, log_base=EQUAL)
    assert divergence(truth, response.log_prior(statistics)) < 1e-3


def test_dispersion_of_pure_and_of_noisy_rounds():
    statistics, counts = rounds(adversarial(), n_rounds=200)
    response = fit_tied(statistics, counts, log_base=EQUAL)
    assert dispersion(response, statistics, counts) < 1.3
    rng = np.random.default_rng(0)
    noisy = np.array([rng.multinomial(1000, p) for p in rng.dirichlet(np.full(K, 5.0), 200)])
    level = fit_fixed(statistics, noisy.astype(float), log_base=EQUAL)
    # a Dirichlet of total A inflates the variance of n labels by (n + A) / (1 + A)
    assert dispersion(level, statistics, noisy) == pytest.approx(1020 / 21, rel=0.25)


def test_deviance_of_the_realised_mix_is_zero():
    counts = np.array([[3.0, 1.0, 0.0, 0.0]])
    realised = np.log(np.maximum(counts / 4, 1e-300))
    np.testing.assert_allclose(deviance(realised, counts), 0.0, atol=1e-12)
    expected = 2 * (3 * np.log(0.75 * K) + np.log(0.25 * K))
    np.testing.assert_allclose(deviance(EQUAL[None], counts), expected)


def test_neural_map_learns_and_is_reproducible():
    statistics, counts = rounds(adversarial(), n_rounds=100)
    one, two = (
        fit_neural(statistics, counts, log_base=EQUAL, hidden=(32,), max_epochs=60, seed=3)
        for _ in range(2)
    )
    fresh = np.random.default_rng(1).uniform(0.3, 0.9, size=(50, K))
    np.testing.assert_array_equal(one.log_prior(fresh), two.log_prior(fresh))
    truth = softmax(-fresh / 0.3, axis=1)
    assert divergence(truth, one.log_prior(fresh)) < 0.3 * divergence(truth, EQUAL[None])
    further = fit_neural(statistics, counts, log_base=EQUAL, hidden=(32,), max_epochs=60, start=one)
    assert divergence(truth, further.log_prior(fresh)) < divergence(truth, EQUAL[None])


def test_paper_adapter_makes_two_or_three_steps_a_round():
    statistics, counts = rounds(adversarial(), n_rounds=7)
    response = None
    for t in range(1, 8):
        response = fit_paper(statistics[:t], counts[:t], log_base=EQUAL, start=response)
    assert response.n_updates == 7
    steps = {state["step"].item() for state in response.optimizer.state.values()}
    assert steps == {sum(-(-t // max(1, t // 2)) for t in range(1, 8))}
    sizes = [p.numel() for p in response.module.parameters()]
    assert sum(sizes) == K * 256 + 256 + 256 * 256 + 256 + 256 * K + K


def test_paper_adapter_leaves_its_past_alone():
    statistics, counts = rounds(adversarial(), n_rounds=3)
    first = fit_paper(statistics, counts, log_base=EQUAL)
    before = first.log_prior(statistics)
    fit_paper(statistics, counts, log_base=EQUAL, start=first)
    np.testing.assert_array_equal(first.log_prior(statistics), before)
