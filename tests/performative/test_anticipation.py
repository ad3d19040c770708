"""One-step-ahead choice of map, strength and mix."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from skperf.performative import anticipation
from skperf.performative._options import MAPS
from skperf.performative.anticipation import (
    SHARE,
    Anticipation,
    Candidate,
    Rows,
    Settings,
    blend,
    observe,
)
from skperf.performative.response import fit_map
from skperf.performative.trajectory import Trajectory

K = 5
EQUAL = np.log(np.full(K, 1 / K))
FORMS = {kind: form for kind, name, _, form, _ in MAPS if not name}
LADDER = Settings({name: Candidate(form) for name, form in FORMS.items()})
TIED = Settings({"tied": Candidate(FORMS["tied"])})


def live(answer, settings=LADDER, n_rounds=40, seed=0, size=2000, see=lambda *_: None):
    rng = np.random.default_rng(seed)
    state, statistic, expected, realised = Anticipation(EQUAL, Trajectory.empty(K, K)), None, [], []
    for t in range(n_rounds):
        prior = np.exp(EQUAL) if statistic is None else answer(statistic, rng)
        counts = rng.multinomial(size, prior).astype(float)
        expected.append(state.log_answer(state.trajectory.coming())[0])
        realised.append(prior)
        statistic = rng.uniform(0.3, 1.0, size=K)
        see(state, t)
        state = observe(state, settings, state.trajectory.append(t, statistic, counts))
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
    assert state.leader in ("tied", "curve")
    assert lost(expected[10:], realised[10:]).mean() < 0.02
    assert lost(EQUAL, realised[10:]).mean() > 0.1


@pytest.mark.parametrize("concentration", [5.0, 100.0])
def test_a_world_that_does_not_answer_costs_little(concentration):
    _, expected, realised = live(
        lambda s, rng: rng.dirichlet(np.full(K, concentration)), n_rounds=60
    )
    excess = (realised * (EQUAL - expected)).sum(axis=1)
    assert excess[5:].mean() < 0.01


def test_weights_do_not_see_the_round_they_are_for():
    seen = {}

    def see(state, t):
        seen[t] = {name: one.log_weights[0] for name, one in state.contenders.items()}

    live(lambda s, rng: softmax(-s / 0.2), n_rounds=12, see=see)
    early, _, _ = live(lambda s, rng: softmax(-s / 0.2), n_rounds=9)
    for name, one in early.contenders.items():
        assert one.log_weights[0] == pytest.approx(seen[9][name])


def test_weights_by_hand():
    """Likelihood over dispersion, less the cost of a form, then a share dealt out anew."""
    before, _, _ = live(lambda s, rng: softmax(-s / 0.2), n_rounds=8)
    counts = np.array([100.0, 300, 50, 500, 50])
    grown = before.trajectory.append(8, np.full(K, 0.5), counts)
    after = observe(before, LADDER, grown)
    names = list(before.contenders)
    answers = before.answers(before.trajectory.coming())
    scores = np.array(
        [
            before.contenders[n].log_weights[0]
            + (answers[n][0] @ counts - FORMS[n].cost) / before.spread
            for n in names
        ]
    )
    expected = (1 - SHARE) * softmax(scores) + SHARE / len(names)
    found = np.exp([after.contenders[n].log_weights[0] for n in names])
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(found.sum(), 1.0)


def test_observe_leaves_the_state_as_it_was():
    state, _, _ = live(lambda s, rng: softmax(-s / 0.2), n_rounds=6)
    before = state.log_answer(state.trajectory.coming())
    observe(state, LADDER, state.trajectory.append(99, np.full(K, 0.5), np.full(K, 10.0)))
    assert len(state.trajectory) == 6
    np.testing.assert_array_equal(state.log_answer(state.trajectory.coming()), before)


def test_maps_without_the_model_do_not_hear_of_it():
    state, _, _ = live(lambda s, rng: softmax(-s / 0.2), n_rounds=15)
    inputs = state.trajectory.coming()
    for statistic in (np.full((1, K), 0.5), np.linspace(0.1, 0.9, K)[None]):
        free = state.log_answer(inputs.at(statistic), model_free=True)
        np.testing.assert_array_equal(free, state.log_answer(inputs, model_free=True))
    assert not np.allclose(state.log_answer(inputs.at(statistic)), state.log_answer(inputs))


def flipping(at):
    turns = {"n": 0}

    def answer(s, rng):
        turns["n"] += 1
        return softmax((-s if turns["n"] < at else s) / 0.3)

    return answer


def test_decay_forgets_a_world_that_changed():
    def late(decay):
        settings = Settings({"tied": Candidate(FORMS["tied"], decay)})
        _, expected, realised = live(flipping(30), settings, n_rounds=60)
        return lost(expected[40:], realised[40:]).mean()

    assert late(0.8) < 0.3 * late(1.0)


def test_horizons_in_competition_follow_a_change_and_lose_nothing_before():
    competing = Settings({str(d): Candidate(FORMS["tied"], d) for d in (1.0, 0.8)})
    _, expected, realised = live(flipping(30), competing, n_rounds=60)
    _, steady, _ = live(flipping(30), TIED, n_rounds=60)
    before, after = slice(10, 30), slice(40, 60)
    assert lost(expected[before], realised[before]).mean() < (
        lost(steady[before], realised[before]).mean() + 0.002
    )
    assert lost(expected[after], realised[after]).mean() < (
        0.3 * lost(steady[after], realised[after]).mean()
    )


def test_a_costly_map_is_refitted_rarely():
    fitted = []

    def fit(inputs, counts, *, log_base, l2, start):
        fitted.append(len(counts))
        return fit_map(inputs, counts, form=FORMS["tied"], log_base=log_base, l2=l2)

    costly = Candidate(FORMS["tied"], fit=fit, first_pair=4, growth=1.25)
    live(lambda s, rng: softmax(-s / 0.2), Settings({"x": costly}), n_rounds=21)
    assert fitted == [4, 5, 7, 9, 12, 15, 19]


def test_a_map_kept_from_round_to_round_is_the_one_of_its_window_alone():
    def answer(s, rng):
        return softmax(rng.normal(size=K) * 0.3 - s / 0.3)

    settings, before = Settings({"tied": Candidate(FORMS["tied"], 0.9)}, l2=0.7), []
    state, *_ = live(answer, settings, 60, see=lambda state, _: before.append(state))
    statistics, counts = state.trajectory.statistics[-44:-1], state.trajectory.counts[-43:]
    weights = 0.9 ** np.arange(42, -1, -1) / before[-1].contenders["tied"].dispersion

    def loss(theta):
        log_prior = log_softmax(EQUAL + theta[:K] + theta[K] * statistics, axis=1)
        penalty = 0.35 * (theta[:K] @ theta[:K] + 0.1 * theta[K] ** 2)
        return penalty - weights @ (counts * log_prior).sum(axis=1)

    found = minimize(loss, np.zeros(K + 1), options={"gtol": 1e-7}).x
    slope = state.contenders["tied"].response.coefficients
    np.testing.assert_allclose(slope, found[K:], rtol=1e-5)


def test_a_round_costs_as_much_after_a_thousand(monkeypatch):
    """What maps are fitted to and what is read of the record, counted by rows."""
    seen, fit, read = [0], fit_map, Trajectory._inputs

    def fitted(inputs, counts, **options):
        seen[0] += len(counts)
        return fit(inputs, counts, **options)

    def inputs(self, rows, covariates=None):
        seen[0] += len(rows)
        return read(self, rows, covariates)

    monkeypatch.setattr(anticipation, "fit_map", fitted)
    monkeypatch.setattr(Trajectory, "_inputs", inputs)
    cost = []

    def see(state, t):
        cost.append(seen[0])

    settings = Settings({f"tied {d}": Candidate(FORMS["tied"], d) for d in (1.0, 0.9)})
    live(lambda s, _: softmax(-s / 0.3), settings, 1201, see=see)
    early, late = (cost[t + 240] - cost[t] for t in (480, 960))
    assert late == early


def test_late_labels_teach_as_labels_in_time():
    rng = np.random.default_rng(0)
    state, statistic = Anticipation(EQUAL, Trajectory.empty(K, K)), None
    late = state
    for t in range(15):
        prior = np.exp(EQUAL) if statistic is None else softmax(-statistic / 0.2)
        counts = rng.multinomial(2000, prior).astype(float)
        statistic = rng.uniform(0.3, 1.0, size=K)
        state = observe(state, LADDER, state.trajectory.append(t, statistic, counts))
        # recorded without labels, which come before the next round
        late = observe(late, LADDER, late.trajectory.append(t, statistic, 0 * counts))
        told = late.trajectory.labelled_later(t, statistic, counts, counts, counts.sum())
        late = observe(late, LADDER, told, at=t)
    assert (late.n_rounds, late.n_pairs) == (state.n_rounds, state.n_pairs)
    coming = state.trajectory.coming()
    np.testing.assert_allclose(late.log_answer(coming), state.log_answer(coming), atol=1e-9)


def test_log_loss_objective_absorbs_a_miscalibrated_bias():
    """Scores with a wrong bias: the mix that minimises the loss is not the realised one."""
    rng = np.random.default_rng(0)
    bias = np.array([1.0, 0, 0, 0, -1.0])
    settings = Settings({"fixed": Candidate(FORMS["fixed"])})
    state = Anticipation(EQUAL, Trajectory.empty(K, K))
    means = rng.normal(size=(K, 3)) * 1.2
    for t in range(12):
        codes = rng.integers(K, size=500)
        X = means[codes] + rng.normal(size=(500, 3))
        logits = -0.5 * ((X[:, None] - means) ** 2).sum(axis=2) + bias
        rows = Rows(logits - EQUAL, codes, np.ones(500))
        counts = np.bincount(codes, minlength=K).astype(float)
        trajectory = state.trajectory.append(t, np.full(K, 0.5), counts)
        state = observe(state, settings, trajectory, rows=rows)
    found = state.log_answer(state.trajectory.coming())[0]
    np.testing.assert_allclose(found - found.mean(), -bias, atol=0.2)
