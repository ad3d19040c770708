"""Sums over gradient passes and what is guessed from them, against plain arithmetic."""

import numpy as np
import pytest

from skperf.components.priors import (
    PathSums,
    Prior,
    mixture,
    path_prior,
    pooled_slopes,
    population,
    with_singles,
)

rng = np.random.default_rng(0)
N, EXAMPLES = 12, 5
TRUTH = rng.normal(size=(EXAMPLES, N))
MASKS = rng.random((60, N)) > 0.2


def sums_around(truth, noise=0.2, n_passes=6):
    sums = PathSums(N, len(truth))
    for number in range(n_passes):
        tested = np.broadcast_to(np.arange(N) % 2 == number % 2, truth.shape)
        sums.add(truth + noise * rng.normal(size=truth.shape), tested)
    return sums


def test_noise_of_the_path_follows_the_scale_of_each_example():
    scale = np.array([1.0, 10.0, 0.1])[:, None]
    sums = PathSums(N, 3)
    for number in range(400):
        tested = np.broadcast_to(np.arange(N) % 2 == number % 2, (3, N))
        sums.add(scale * rng.normal(size=(3, N)), tested)
    noise = path_prior(sums, population(sums)).noise
    np.testing.assert_allclose(noise.mean(1), scale[:, 0] ** 2 / 200, rtol=0.15)


def test_path_means_recover_a_linear_network_exactly():
    sums = sums_around(TRUTH, noise=0.0)
    on_path, open_gate = sums.means()
    np.testing.assert_allclose(on_path, TRUTH)
    np.testing.assert_allclose(open_gate, TRUTH)


def test_slopes_find_the_guess_that_is_right():
    wrong = rng.normal(size=TRUTH.shape)
    features = np.stack([MASKS @ wrong.T, MASKS @ (TRUTH.T / 2)])
    slopes = pooled_slopes([(features, MASKS @ TRUTH.T)])
    np.testing.assert_allclose(slopes, [0, 2], atol=0.01)


def test_sums_over_passes_do_not_depend_on_the_cut():
    whole, parts = PathSums(N, 2), [PathSums(N, 2), PathSums(N, 2)]
    for number in range(6):
        gradient, tested = rng.normal(size=(2, N)), rng.random((2, N)) < 0.5
        whole.add(gradient, tested)
        parts[number > 3].add(gradient, tested)
    parts[0].merge(parts[1])
    for a, b in zip(whole.means(), parts[0].means(), strict=True):
        np.testing.assert_allclose(a, b)


def some_passes(n_passes=7):
    gradients = rng.normal(size=(n_passes, EXAMPLES, N))
    tested = rng.random((n_passes, EXAMPLES, N)) < 0.4
    tested[:, :, 0], tested[:, :, 1], tested[1:, 0, 2], tested[0, 0, 2] = False, True, False, True
    sums = PathSums(N, EXAMPLES)
    for each, which in zip(gradients, tested, strict=True):
        sums.add(each, which)
    return gradients, tested, sums


def test_means_and_spreads_entry_by_entry():
    gradients, tested, sums = some_passes()
    on_path, open_gate = sums.means()
    spread = sums.spread(on_path)
    for i in range(EXAMPLES):
        for j in range(N):
            inside = gradients[tested[:, i, j], i, j]
            outside = gradients[~tested[:, i, j], i, j]
            opened = outside.mean() if len(outside) else inside.mean()
            assert open_gate[i, j] == pytest.approx(opened)
            path = inside.mean() if len(inside) else opened
            assert on_path[i, j] == pytest.approx(path)
            squares = ((inside - path) ** 2).sum() if len(inside) > 1 else 0.0
            assert spread[i, j] == pytest.approx(squares, abs=1e-9)


def test_examples_are_pooled_by_how_often_each_was_tested():
    gradients, tested, sums = some_passes()
    shared = population(sums)
    on_path, open_gate = sums.means()
    spread = sums.spread(on_path)
    freedom = np.maximum(tested.sum(0) - 1, 0)
    typical = spread.sum() / freedom.sum()
    support = 0.1 * max(freedom.sum(0).mean(), 1.0)
    for j in range(N):
        inside = gradients[:, :, j][tested[:, :, j]]
        expected = inside.mean() if len(inside) else open_gate[:, j].mean()
        assert shared.on_path[j] == pytest.approx(expected)
        single = spread[:, j].sum() + support * typical
        assert shared.single[j] == pytest.approx(single / (freedom[:, j].sum() + support))
    np.testing.assert_allclose(shared.open_gate, open_gate.mean(0))
    prior = path_prior(sums, shared)
    for guess, expected in zip(
        prior.guesses, [on_path, open_gate, shared.on_path, shared.open_gate], strict=True
    ):
        np.testing.assert_allclose(guess, np.broadcast_to(expected, guess.shape))
    own = spread.sum(1) / (freedom * shared.single).sum(1)
    typical = shared.single / np.maximum(tested.sum(0), 1)
    np.testing.assert_allclose(prior.variance, typical.mean(0))
    np.testing.assert_allclose(prior.noise, own[:, None] * typical)


def test_one_pass_takes_the_gap_between_the_guesses_for_their_spread():
    sums = PathSums(2, 1)
    sums.add(np.array([[1.0, 5.0]]), np.array([[True, False]]))
    shared = population(sums)
    # nothing was seen twice, and both guesses are the one number there is
    np.testing.assert_allclose(shared.single, 0, atol=1e-11)
    np.testing.assert_allclose(shared.on_path, [1.0, 5.0])


def test_single_ablations_come_last_or_alone():
    alone = rng.normal(size=(EXAMPLES, N))
    only = with_singles(None, alone)
    np.testing.assert_array_equal(only.guesses, [alone])
    np.testing.assert_array_equal(only.variance, np.ones(N))
    assert not only.noise.any()
    both = with_singles(only, 2 * alone)
    np.testing.assert_array_equal(both.guesses, [alone, 2 * alone])


def test_guesses_are_mixed_by_their_slopes():
    guesses = rng.normal(size=(3, EXAMPLES, N))
    prior = Prior(guesses, np.ones(N), np.ones((EXAMPLES, N)))
    found = mixture(prior, np.array([0.5, -2.0, 3.0]))
    np.testing.assert_allclose(found, 0.5 * guesses[0] - 2 * guesses[1] + 3 * guesses[2])
