"""Prior correction, estimation of a mix from a batch, calibration."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from skperf.performative.label_shift import (
    bbse_prior,
    em_prior,
    estimate_base_prior,
    fit_calibration,
    log_loss,
    probabilities,
    smooth_shares,
    soft_confusion,
)

EQUAL = np.log(np.full(3, 1 / 3))


@pytest.fixture(scope="module")
def gaussians():
    """Bayes-optimal scores at equal shares of three overlapping classes, and a sampler."""
    means = np.array([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]])

    def draw(prior, n, seed):
        rng = np.random.default_rng(seed)
        y = rng.choice(3, n, p=prior)
        X = means[y] + rng.normal(size=(n, 2))
        return -0.5 * ((X[:, None] - means) ** 2).sum(axis=2), y

    return draw


def test_correction_by_hand():
    proba = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    base, prior = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.1, 0.8])
    expected = proba * prior / base
    expected /= expected.sum(axis=1, keepdims=True)
    corrected = np.log(proba) + np.log(prior) - np.log(base)
    np.testing.assert_allclose(probabilities(corrected), expected, atol=1e-10)


@given(
    st.lists(st.floats(-30, 30), min_size=3, max_size=3),
    st.floats(-100, 100),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_a_constant_in_a_row_changes_nothing(scores, constant, shares):
    logits, prior = np.array([scores]), np.log(np.array(shares) / sum(shares))
    plain = probabilities(logits + prior - EQUAL)
    shifted = probabilities(logits + constant + prior - EQUAL)
    np.testing.assert_allclose(plain, shifted, atol=1e-9)
    np.testing.assert_allclose(plain.sum(), 1.0)


def em_by_elements(proba, base, n_iter):
    prior = base.copy()
    for _ in range(n_iter):
        responsibilities = proba * prior / base
        responsibilities /= responsibilities.sum(axis=1, keepdims=True)
        prior = responsibilities.mean(axis=0)
    return prior


def test_em_equals_the_element_wise_form(gaussians):
    logits, _ = gaussians([0.2, 0.1, 0.7], 400, 0)
    reference = em_by_elements(softmax(logits, axis=1), np.full(3, 1 / 3), 25)
    estimate = em_prior(logits, EQUAL, max_iter=25, tol=0.0)
    np.testing.assert_allclose(estimate, reference, atol=1e-12)


def test_em_maximises_the_likelihood(gaussians):
    logits, _ = gaussians([0.2, 0.1, 0.7], 400, 0)
    estimate = em_prior(logits, EQUAL)
    np.testing.assert_allclose(estimate, em_prior(logits, EQUAL, max_iter=5000), atol=1e-6)

    def likelihood(prior):
        return np.log(np.exp(logits) @ prior).sum()

    best = likelihood(estimate)
    for other in np.random.default_rng(0).dirichlet(np.ones(3), size=200):
        assert likelihood(other) <= best + 1e-6


@pytest.mark.parametrize("method", ["em", "bbse"])
def test_a_batch_tells_its_mix(gaussians, method):
    truth = np.array([0.1, 0.2, 0.7])
    logits, _ = gaussians(truth, 20_000, 1)
    if method == "em":
        prior = em_prior(logits, EQUAL)
    else:
        known, codes = gaussians([0.6, 0.3, 0.1], 20_000, 2)
        prior = bbse_prior(softmax(logits, axis=1), soft_confusion(softmax(known, axis=1), codes))
    np.testing.assert_allclose(prior, truth, atol=0.02)


def test_map_em_lies_between_batch_and_expectation(gaussians):
    logits, _ = gaussians([0.1, 0.2, 0.7], 500, 3)
    mean = np.array([0.6, 0.2, 0.2])
    free = em_prior(logits, EQUAL)
    distances = [
        np.abs(em_prior(logits, EQUAL, mean=mean, strength=s) - free).sum()
        for s in (0.0, 50.0, 500.0, 1e7)
    ]
    assert distances[0] < 1e-4
    assert sorted(distances) == distances
    np.testing.assert_allclose(em_prior(logits, EQUAL, mean=mean, strength=1e7), mean, atol=1e-3)


def test_bbse_stays_a_mix_and_bears_a_class_never_seen(gaussians):
    logits, codes = gaussians([0.5, 0.5, 0.0], 300, 4)
    proba = softmax(logits, axis=1)
    prior = bbse_prior(proba, soft_confusion(proba, codes))
    assert prior.min() >= 0
    np.testing.assert_allclose(prior.sum(), 1.0)


def test_temperature_is_recovered(gaussians):
    logits, codes = gaussians(np.full(3, 1 / 3), 20_000, 5)
    calibration = fit_calibration(3.0 * logits, codes, np.zeros(3))
    assert calibration.temperature == pytest.approx(3.0, rel=0.05)
    np.testing.assert_array_equal(calibration.bias, 0.0)


def test_temperature_and_bias_are_recovered_from_rows_of_another_mix(gaussians):
    mix = np.array([0.7, 0.2, 0.1])
    logits, codes = gaussians(mix, 20_000, 6)
    bias = np.array([0.5, -0.5, 0.0])
    calibration = fit_calibration(
        2.0 * (logits - bias), codes, np.log(mix) - EQUAL, kind="bcts", l2=1e-3
    )
    assert calibration.temperature == pytest.approx(2.0, rel=0.05)
    np.testing.assert_allclose(calibration.bias, bias - bias.mean(), atol=0.08)
    offset = np.log(mix) - EQUAL
    calibrated = log_loss(calibration(2.0 * (logits - bias)) + offset, codes)
    assert calibrated == pytest.approx(log_loss(logits + offset, codes), abs=1e-3)


def test_base_mix_of_a_trained_classifier_is_found(gaussians):
    base = np.array([0.6, 0.3, 0.1])
    logits, codes = gaussians([0.2, 0.3, 0.5], 20_000, 7)
    found = estimate_base_prior(logits + np.log(base), codes)
    np.testing.assert_allclose(found, base, atol=0.02)


def test_base_mix_of_few_rows_stays_near_their_shares():
    logits, codes = np.zeros((4, 3)), np.array([0, 1, 1, 2])
    shares = smooth_shares(np.bincount(codes).astype(float))
    np.testing.assert_allclose(estimate_base_prior(logits, codes), shares, atol=0.05)


def test_a_class_without_rows_may_be_as_common_as_another(gaussians):
    logits, codes = gaussians([0.5, 0.5, 0.0], 5000, 7)
    found = estimate_base_prior(logits + np.log([0.5, 0.3, 0.2]), codes)
    assert found[2] == pytest.approx(1 / 3)
    assert found[0] / found[1] == pytest.approx(5 / 3, rel=0.15)


def test_log_loss_with_weights():
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    expected = -log_softmax(logits, axis=1)[[0, 1], [0, 0]]
    assert log_loss(logits, np.array([0, 0]), np.array([3.0, 1.0])) == pytest.approx(
        (3 * expected[0] + expected[1]) / 4
    )


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_scores_too_bold_or_too_timid_do_not_bend_the_base_mix(gaussians, scale):
    base = np.array([0.7, 0.2, 0.1])
    logits, codes = gaussians([0.1, 0.3, 0.6], 5000, 3)
    found = estimate_base_prior(scale * (logits + np.log(base)), codes)
    np.testing.assert_allclose(found, base, atol=0.06)


@pytest.mark.parametrize("l2", [0.5, 20.0])
def test_the_base_mix_minimises_its_penalised_loss(gaussians, l2):
    logits, codes = gaussians([0.2, 0.5, 0.3], 60, 3)
    logits = logits + np.log([0.6, 0.3, 0.1])
    weights = np.random.default_rng(0).uniform(0.5, 2.5, 60)
    counts = np.array([weights[codes == c].sum() for c in range(3)])
    centre = np.log((counts + 1 / 3) / (counts.sum() + 1))

    def loss(theta):
        *base, heat = theta  # the logarithm of a temperature
        scores = logits * np.exp(-heat) + np.log(counts / counts.sum()) - base
        told = -(weights * np.log(softmax(scores, axis=1)[np.arange(60), codes])).sum()
        return told + l2 / 2 * (((base - centre) ** 2).sum() + heat**2)

    best = minimize(loss, np.zeros(4), method="BFGS").x
    found = estimate_base_prior(logits, codes, l2=l2, weight=weights)
    np.testing.assert_allclose(found, softmax(best[:3]), atol=2e-4)
    # the penalty matters here
    plain = estimate_base_prior(logits, codes, l2=1e-6, weight=weights)
    assert np.abs(plain - found).max() > 0.005


@pytest.mark.parametrize("kind", ["temperature", "bcts"])
def test_a_class_that_was_never_shown_keeps_one_share_in_every_row(gaussians, kind):
    logits, codes = gaussians([0.3, 0.3, 0.4], 3000, 8)
    shown = np.array([True, True, False])
    known = 3.0 * logits[:, :2]
    within = np.logaddexp.reduce(known, axis=1)
    given, offset = np.column_stack([known, within + np.log(0.25)]), np.log([1.0, 1.5, 2.0])
    found = fit_calibration(given, codes, offset, kind=kind, shown=shown)
    share = softmax(found(given), axis=1)[:, 2]
    np.testing.assert_allclose(share, share[0], atol=1e-12)

    def penalised(theta):  # the same model written as two classes and a share apart
        bias = theta[1:] if kind == "bcts" else np.zeros(3)
        two = log_softmax(known * np.exp(-theta[0]) + bias[:2], axis=1)
        scores = np.column_stack([two, np.full(len(two), np.log(0.25) + bias[2])])
        return len(codes) * log_loss(scores + offset, codes) + 0.5 * theta @ theta

    best = minimize(penalised, np.zeros(4 if kind == "bcts" else 1), tol=1e-10).fun
    theta = np.append(np.log(found.temperature), found.bias if kind == "bcts" else [])
    moved = np.linspace(-2, 2, 401)  # biases are kept up to a constant
    reached = min(penalised(theta + np.append(0.0, np.full(len(theta) - 1, m))) for m in moved)
    assert reached == pytest.approx(best, abs=0.01)
