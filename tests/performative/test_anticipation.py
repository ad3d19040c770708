"""One-step-ahead choice of map, strength and mix."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from skperf.performative.anticipation import (
    Anticipation,
    Candidate,
    Rows,
    Settings,
    blend,
    observe,
)
from skperf.performative.response import FITTERS, fit_tied
from skperf.performative.trajectory import Trajectory

K = 5
EQUAL = np.log(np.full(K, 1 / K))
LADDER = Settings({name: Candidate(fit) for name, fit in FITTERS.items()})


def live(answer, settings=LADDER, n_rounds=40, seed=0, size=2000):
    rng = np.random.default_rng(seed)
    state, statistic, expected, realised = Anticipation(EQUAL, Trajectory.empty(K, K)), None, [], []
    for t in range(n_rounds):
        prior = np.exp(EQUAL) if statistic is None else answer(statistic, rng)
        counts = rng.multinomial(size, prior).astype(float)
        expected.append(state.log_prior(statistic))
        realised.append(prior)
        statistic = rng.uniform(0.3, 1.0, size=K)
        state = observe(state, settings, t, statistic, counts)
    return state, np.array(expected), np.array(realised)


def lost(expected, realised):
    return np.sum(realised * (np.log(realised) - expected), axis=1)


def test_blend_by_hand():
    answer, base = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    mixed = 0.9 * answer + 0.1 * base
    expected = base * (mixed / base) ** 0.5
    result = np.exp(blend(np.log(answer), np.log(base), 0.5, 0.1))
    np.testing.assert_allclose(result, expected / expected.sum(), atol=1e-12)


@pytest.mark.parametrize(("strength", "mix"), [(0.0, 0.0), (0.0, 0.3)])
def test_no_strength_is_the_base(strength, mix):
    answer = log_softmax(np.arange(K))
    np.testing.assert_allclose(blend(answer, EQUAL, strength, mix), EQUAL, atol=1e-12)


def test_full_strength_without_mix_is_the_answer():
    answer = log_softmax(np.arange(float(K)))
    np.testing.assert_allclose(blend(answer, EQUAL, 1.0, 0.0), answer, atol=1e-12)


def test_a_responding_world_is_anticipated():
    state, expected, realised = live(lambda s, rng: softmax(-s / 0.2))
    assert state.choice.name in ("tied", "curve")
    assert state.choice.strength >= 0.9
    assert lost(expected[10:], realised[10:]).mean() < 0.02
    assert lost(EQUAL, realised[10:]).mean() > 0.1


@pytest.mark.parametrize("concentration", [5.0, 100.0])
def test_a_world_that_does_not_answer_costs_little(concentration):
    _, expected, realised = live(
        lambda s, rng: rng.dirichlet(np.full(K, concentration)), n_rounds=60
    )
    excess = (realised * (EQUAL - expected)).sum(axis=1)
    assert excess.mean() < 0.005


def test_choice_does_not_see_the_round_it_is_for():
    full, _, _ = live(lambda s, rng: softmax(-s / 0.2), n_rounds=12)
    part, _, _ = live(lambda s, rng: softmax(-s / 0.2), n_rounds=11)
    scores = {name: one.scores for name, one in part.contenders.items()}
    _, counts = full.trajectory.pairs()
    before = full.trajectory.statistics[-2]
    for name, one in full.contenders.items():
        answer = part.contenders[name].response.log_prior(before[None])[0]
        gained = counts[-1] @ blend(answer, EQUAL, 1.0, 0.0)
        assert one.scores[-1, 0] == pytest.approx(scores[name][-1, 0] + gained)


def test_observe_leaves_the_state_as_it_was():
    state, _, _ = live(lambda s, rng: softmax(-s / 0.2), n_rounds=6)
    before = state.log_prior(np.full(K, 0.5))
    observe(state, LADDER, 99, np.full(K, 0.5), np.full(K, 10.0))
    assert len(state.trajectory) == 6
    np.testing.assert_array_equal(state.log_prior(np.full(K, 0.5)), before)


def test_nothing_is_corrected_before_the_least_rounds():
    settings = Settings({"tied": Candidate(fit_tied)}, strengths=np.ones(1), mixes=np.zeros(1))
    for n_rounds in (1, 2):
        state, _, _ = live(lambda s, rng: softmax(-s / 0.2), settings, n_rounds=n_rounds)
        np.testing.assert_array_equal(state.log_prior(np.full(K, 0.5)), EQUAL)
    state, _, _ = live(lambda s, rng: softmax(-s / 0.2), settings, n_rounds=3)
    assert state.choice.strength == 1.0


def test_the_buffer_is_bounded():
    settings = Settings({"tied": Candidate(fit_tied)}, buffer_size=5)
    state, _, _ = live(lambda s, rng: softmax(-s / 0.2), settings, n_rounds=20)
    assert len(state.trajectory) == 6
    assert (state.n_rounds, state.n_pairs) == (20, 19)


def test_decay_forgets_a_world_that_changed():
    turns = {"n": 0}

    def answer(s, rng):
        turns["n"] += 1
        return softmax((-s if turns["n"] < 30 else s) / 0.3)

    def late(decay):
        turns["n"] = 0
        settings = Settings({"tied": Candidate(fit_tied)}, decay=decay)
        _, expected, realised = live(answer, settings, n_rounds=60)
        return lost(expected[40:], realised[40:]).mean()

    assert late(0.8) < 0.3 * late(1.0)


def test_a_costly_map_is_refitted_rarely():
    fitted = []

    def fit(statistics, counts, **keywords):
        fitted.append(len(counts))
        return fit_tied(statistics, counts, **keywords)

    live(
        lambda s, rng: softmax(-s / 0.2),
        Settings({"x": Candidate(fit, first_pair=4, growth=1.5)}),
        n_rounds=21,
    )
    assert fitted == [4, 6, 9, 14]


def test_log_loss_objective_absorbs_a_miscalibrated_bias():
    """Scores with a wrong bias: the mix that minimises the loss is not the realised one."""
    rng = np.random.default_rng(0)
    bias = np.array([1.0, 0, 0, 0, -1.0])
    settings = Settings({"fixed": Candidate(FITTERS["fixed"])}, mixes=np.zeros(1))
    state = Anticipation(EQUAL, Trajectory.empty(K, K))
    means = rng.normal(size=(K, 3)) * 1.2
    for t in range(12):
        codes = rng.integers(K, size=500)
        X = means[codes] + rng.normal(size=(500, 3))
        logits = -0.5 * ((X[:, None] - means) ** 2).sum(axis=2) + bias
        rows = Rows(logits - EQUAL, codes, np.ones(500))
        counts = np.bincount(codes, minlength=K).astype(float)
        state = observe(state, settings, t, np.full(K, 0.5), counts, rows=rows)
    found = state.log_prior(np.full(K, 0.5))
    np.testing.assert_allclose(found - found.mean(), -bias, atol=0.2)
