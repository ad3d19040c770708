"""Ridge and priors against closed forms and brute force."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

from skperf.components.estimation import mean_correlation, ridge
from skperf.components.priors import (
    PathSums,
    mixture,
    path_prior,
    population,
    with_singles,
)

rng = np.random.default_rng(0)
N, M, EXAMPLES = 12, 60, 5
TRUTH = rng.normal(size=(EXAMPLES, N))
MASKS = rng.random((M, N)) > 0.2
NOISE = 0.3 * rng.normal(size=(M, EXAMPLES))
OUTCOMES = MASKS @ TRUTH.T + 2.0 + NOISE


def sums_around(truth, noise=0.2, n_passes=6):
    sums = PathSums(N, len(truth))
    for number in range(n_passes):
        tested = np.broadcast_to(np.arange(N) % 2 == number % 2, truth.shape)
        sums.add(truth + noise * rng.normal(size=truth.shape), tested)
    return sums


def some_prior():
    sums = sums_around(TRUTH)
    return path_prior(sums, population(sums))


def test_plain_ridge_equals_scikit_learn():
    fit = ridge(MASKS, OUTCOMES, penalty=3.0)
    theirs = Ridge(alpha=3.0).fit(MASKS, OUTCOMES)
    np.testing.assert_allclose(fit.coefficients, theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(fit.intercept, theirs.intercept_, atol=1e-9)


def test_a_vanishing_penalty_gives_least_squares_whatever_the_prior():
    theirs = LinearRegression().fit(MASKS, OUTCOMES)
    fit = ridge(MASKS, OUTCOMES, some_prior(), slopes=np.array([0.3, 0.5, 0, 0]), penalty=1e-9)
    np.testing.assert_allclose(fit.coefficients, theirs.coef_, atol=1e-5)


def test_ridge_around_a_prior_solves_its_normal_equations():
    prior, slopes = some_prior(), np.array([0.2, 0.7, 0.1, -0.1])
    fit = ridge(MASKS, OUTCOMES, prior, slopes=slopes, penalty=2.0)
    V = MASKS - MASKS.mean(0)
    mean = mixture(prior, slopes)
    residual = OUTCOMES - OUTCOMES.mean(0) - V @ mean.T
    moved = np.linalg.solve(V.T @ V + 2.0 * np.diag(1 / prior.variance), V.T @ residual)
    np.testing.assert_allclose(fit.coefficients, mean + moved.T, atol=1e-8)


def test_the_out_of_bag_score_equals_leaving_masks_out_by_hand():
    fit = ridge(MASKS, OUTCOMES, penalty=1.5)
    predicted = []
    for left in range(M):
        kept = np.arange(M) != left
        model = Ridge(alpha=1.5).fit(MASKS[kept], OUTCOMES[kept])
        predicted.append(model.predict(MASKS[[left]])[0])
    assert fit.oob_score == pytest.approx(mean_correlation(np.array(predicted).T, OUTCOMES.T))


def test_more_masks_than_components_give_the_fit_of_the_kernel():
    prior, slopes = some_prior(), np.array([0.2, 0.7, 0.1, -0.1])
    few = ridge(MASKS, OUTCOMES, prior, slopes=slopes, penalty=2.0)
    # the kernel of the masks themselves, as where there are fewer masks than components
    V = np.vstack([MASKS]) - MASKS.mean(0)
    residual = OUTCOMES - OUTCOMES.mean(0) - V @ mixture(prior, slopes).T
    inverse = np.linalg.inv((V * prior.variance) @ V.T + 2.0 * np.eye(M))
    spread = prior.variance[:, None] * (V.T @ inverse)
    np.testing.assert_allclose(few.coefficients, mixture(prior, slopes) + (spread @ residual).T)
    hat = (V * prior.variance) @ V.T @ inverse + 1 / M
    left = residual - hat @ residual
    noise = left**2 / ((np.eye(M) - hat) ** 2).sum(1)[:, None]
    unmoved = 1 - np.einsum("jm,mj->j", spread, V)
    square = (spread**2 @ noise).T + (unmoved * slopes[0]) ** 2 * prior.noise
    np.testing.assert_allclose(few.stderr, np.sqrt(square))


def test_the_penalty_is_small_for_clean_outcomes_and_large_for_noise():
    clean = ridge(MASKS, MASKS @ TRUTH.T).penalty
    noise = ridge(MASKS, rng.normal(size=(M, EXAMPLES))).penalty
    assert clean < 1e-2 < noise


@pytest.mark.parametrize("n_masks", [15, 30, 150])
def test_standard_errors_match_the_spread_of_repeated_draws(n_masks):
    fits = []
    for _ in range(300):
        masks = rng.random((n_masks, N)) > 0.2
        outcomes = masks @ TRUTH.T + 0.5 * rng.normal(size=(n_masks, EXAMPLES))
        fits.append(ridge(masks, outcomes, penalty=1.0))
    spread = np.var([fit.coefficients for fit in fits], 0)
    claimed = np.mean([fit.stderr**2 for fit in fits], 0)
    np.testing.assert_allclose(claimed.mean(), spread.mean(), rtol=0.2)


def test_correlation_leaves_constant_rows_out():
    assert mean_correlation(np.array([[1.0, 2], [3, 3]]), np.array([[2.0, 4], [1, 2]])) == 1
    assert np.isnan(mean_correlation(np.ones((1, 3)), np.ones((1, 3))))


def test_few_noisy_masks_hardly_move_a_guess():
    guess, few = with_singles(None, TRUTH), MASKS[:14]
    outcomes = few @ TRUTH.T + 3 * rng.normal(size=(14, EXAMPLES))
    careful, free = (
        ridge(few, outcomes, guess, slopes=np.ones(1), penalty=penalty) for penalty in (None, 1e-6)
    )
    drift, free_drift = (np.square(fit.coefficients - TRUTH).mean() for fit in (careful, free))
    assert drift < 0.3 * free_drift
