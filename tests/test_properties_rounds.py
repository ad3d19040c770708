"""What is applied after a round, and what is foretold, against loops over options and rows."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from skperf import PerformativeWarning
from skperf.performative._steps import _warn_of_harm as warn_of_harm
from skperf.performative.anticipation import Anticipation, Candidate, Contender, _with_entrants
from skperf.performative.corrector import FAST, SLOW, Corrector, Option
from skperf.performative.label_shift import Calibration
from skperf.performative.ranking import _row_draws, score_under
from skperf.performative.record import worst_share
from skperf.performative.response import Form
from skperf.performative.trajectory import Trajectory

K, N = 3, 40
STRENGTHS, MIXES = np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.25])
CALIBRATORS = (None, Calibration(2.0, np.array([0.3, -0.1, -0.2])))
RNG = np.random.default_rng(0)
LOGITS, CODES = 2 * RNG.normal(size=(N, K)), RNG.integers(0, K, N)
WEIGHT = RNG.uniform(0.5, 2, N)  # rows of weight zero have been left out before
BASE, ANSWER = np.log([0.5, 0.3, 0.2]), np.log([0.1, 0.3, 0.6])


def blended(strength, mix):
    mixed = (1 - mix) * np.exp(ANSWER) + mix * np.exp(BASE)
    prior = np.exp(BASE) * (mixed / np.exp(BASE)) ** strength
    return prior / prior.sum()


def tables(logits, codes, weight):
    """Loss, accuracy and variance of the loss against no correction, of every option."""
    share = weight / weight.sum()
    losses, right, noise = np.zeros((3, 2, len(STRENGTHS), len(MIXES)))
    plain = None
    for c, calibrator in enumerate(CALIBRATORS):
        scores = logits if calibrator is None else logits / 2.0 + calibrator.bias
        for s, strength in enumerate(STRENGTHS):
            for m, mix in enumerate(MIXES):
                p = softmax(scores, axis=1) * blended(strength, mix) / np.exp(BASE)
                p = p / p.sum(1, keepdims=True)
                each = -np.log(p[np.arange(len(codes)), codes])
                plain = each if plain is None else plain
                losses[c, s, m] = share @ each
                right[c, s, m] = share @ (p.argmax(1) == codes)
                gap = each - plain
                noise[c, s, m] = share**2 @ (gap - share @ gap) ** 2
    return losses, right, noise


def started(strengths, mixes, calibrators):
    none = np.zeros((len(calibrators), len(strengths), len(mixes)))
    return Corrector(strengths, mixes, calibrators, none, none, none, none)


def start():
    return started(STRENGTHS, MIXES, CALIBRATORS)


def test_options_are_judged_by_the_rows_of_a_round_and_older_rounds_fade():
    losses, right, noise = tables(LOGITS, CODES, WEIGHT)
    own = RNG.uniform(size=len(CODES)) < 0.7
    own_right = WEIGHT @ own / WEIGHT.sum()
    right[0, 0] = own_right  # without calibration and correction the classifier's own rule predicts
    once = start().judged(LOGITS, CODES, WEIGHT, ANSWER, BASE, own)
    for found, expected in ((once.slow, losses), (once.fast, losses), (once.right, right)):
        np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(once.noise, noise, atol=1e-12)
    assert (once.weight, once.n_rounds, once.n_rows) == (1, 1, 40)
    assert once.own_right == pytest.approx(own_right)
    other = tables(LOGITS[:25], CODES[:25], np.ones(25))
    other[1][0, 0] = own[:25].mean()
    twice = once.judged(LOGITS[:25], CODES[:25], np.ones(25), ANSWER, BASE, own[:25])
    np.testing.assert_allclose(twice.slow, SLOW * losses + other[0])
    np.testing.assert_allclose(twice.fast, FAST * losses + other[0])
    np.testing.assert_allclose(twice.right, SLOW * right + other[1])
    np.testing.assert_allclose(twice.noise, FAST**2 * noise + other[2], atol=1e-12)
    assert twice.weight == pytest.approx(SLOW + 1)
    assert twice.n_rows == pytest.approx(SLOW * 40 + 25)
    assert twice.own_right == pytest.approx(SLOW * own_right + own[:25].mean())
    assert once.n_rounds == 1  # what was known stays as it was


def test_many_rows_are_judged_by_five_hundred_spread_over_them():
    logits, codes = RNG.normal(size=(1700, K)), RNG.integers(0, K, 1700)
    kept = np.linspace(0, 1699, 500).astype(int)
    expected = tables(logits[kept], codes[kept], np.ones(500))
    own = RNG.uniform(size=1700) < 0.5
    found = start().judged(logits, codes, np.ones(1700), ANSWER, BASE, own)
    np.testing.assert_allclose(found.slow, expected[0])
    # a lead over the classifier's own rule is one on the same rows
    assert found.own_right == pytest.approx(own[kept].mean())
    assert found.n_rows == 500


def test_without_rows_options_are_judged_by_the_shares_of_labels():
    counts = np.array([10.0, 30.0, 60.0])
    found = start().judged_by_shares(counts, ANSWER, BASE)
    for s, strength in enumerate(STRENGTHS):
        for m, mix in enumerate(MIXES):
            each = -np.log(blended(strength, mix))
            gap = each + np.log(blended(0.0, 0.0))
            shares = counts / 100
            np.testing.assert_allclose(found.slow[:, s, m], shares @ each)
            spread = shares @ (gap - shares @ gap) ** 2 / 100
            np.testing.assert_allclose(found.noise[:, s, m], spread, atol=1e-12)


def known(slow, fast=None, right=None, noise=0.0, **more):
    """A corrector that has seen one round."""
    slow = np.array(slow, float)
    tables = {
        "slow": slow,
        "fast": slow if fast is None else np.array(fast, float),
        "right": np.ones_like(slow) if right is None else np.array(right, float),
        "noise": np.full_like(slow, noise),
    }
    empty = started(STRENGTHS[: slow.shape[1]], np.array([0.0]), (None,) * len(slow))
    return replace(empty, **({"weight": 1.0, "n_rounds": 1, "n_rows": 400.0} | tables | more))


def test_the_best_over_the_rounds_is_chosen_once_there_are_enough():
    best = known([[[1.0], [0.8], [0.9]]])
    assert best.chosen(2, 3).choice.strength == 0.0
    assert best.chosen(3, 3).choice.strength == 0.5
    unseen = replace(best, weight=0.0)
    assert unseen.chosen(9, 3).choice.strength == 0.0
    fixed = started(np.array([0.8]), np.array([0.1]), (None,))
    assert (fixed.chosen(9, 3).choice.strength, fixed.chosen(9, 3).choice.mix) == (0.8, 0.1)
    assert fixed.chosen(1, 3).choice.strength == 0.0


def test_what_has_cost_lately_gives_way_to_what_has_not():
    slow, fast = [[[1.0], [0.8], [0.9]]], [[[0.5], [0.7], [0.4]]]
    assert known(slow, fast, noise=0.01).chosen(9, 3).choice.strength == 1.0
    # a cost of 0.2 within chance is none
    assert known(slow, fast, noise=0.05).chosen(9, 3).choice.strength == 0.5


def test_a_correction_that_makes_fewer_predictions_right_is_not_applied():
    slow, right = [[[1.0], [0.8], [0.9]]], [[[0.7], [0.6], [0.699]]]
    alone = {"own_right": 0.7, "proposed_right": 0.7}
    # given up may be half a standard error of 400 rows of which a tenth change
    found = known(slow, right=right, **alone)
    assert found.chosen(9, 3).choice.strength == 1.0
    few = known(slow, right=right, **alone, n_rows=2.0)
    assert few.chosen(9, 3).choice.strength == 0.5
    worse = known(slow, right=[[[0.5], [0.4], [0.5]]], **alone)
    assert worse.chosen(9, 3).choice.strength == 0.0


def test_choices_that_made_fewer_predictions_right_a_round_later_are_withheld():
    slow, right = [[[1.0], [0.8], [0.9]]], [[[0.7], [0.8], [0.7]]]
    for before, strength in ((0.7, 0.5), (0.68, 0.0)):
        found = known(slow, right=right, own_right=0.7, proposed_right=before).chosen(9, 3)
        assert found.choice.strength == strength
        assert found.proposed.strength == 0.5  # goes on being judged


@pytest.mark.parametrize(("saved", "used"), [(0.009, 0), (0.011, 1)])
def test_a_calibration_has_to_save_a_hundredth(saved, used):
    slow = [[[1.0], [0.8], [0.9]], [[1.0], [0.8 * (1 - saved)], [0.9]]]
    assert known(slow).chosen(9, 3).choice.calibration == used


def test_what_a_withdrawn_correction_has_cost_a_row_is_told():
    def record(costs, n_rows=301.0, strength=1.0):
        told = [{"adapter": 1.0 + cost, "none": 1.0, "strength": strength} for cost in costs]
        return SimpleNamespace(losses=told, corrector=SimpleNamespace(n_rows=n_rows))

    costs = np.array([0.1, 0.0, 0.3])
    cost = costs @ FAST ** np.arange(3)[::-1] / (1 + FAST + FAST**2)
    with pytest.warns(PerformativeWarning, match=f"after round 7.* cost {cost:.3f} nats"):
        warn_of_harm(record(costs), 7)
    for silent in (record(costs, 300.0), record(costs[1:]), record(costs, strength=0.0)):
        warn_of_harm(silent, 7)
    warn_of_harm(record([0.0, 0.009, 0.009]), 7)


def test_the_choice_is_applied_to_answers_and_scores():
    corrector = replace(start(), choice=Option(1, 0.5, 0.25))
    np.testing.assert_allclose(np.exp(corrector.log_prior(ANSWER, BASE)), blended(0.5, 0.25))
    np.testing.assert_allclose(np.exp(corrector.log_prior(ANSWER, BASE, 1.0)), blended(1.0, 0.25))
    expected = LOGITS / 2 + CALIBRATORS[1].bias
    np.testing.assert_allclose(corrector.calibrated(LOGITS), expected)
    np.testing.assert_array_equal(corrector.calibrated(LOGITS, Option()), LOGITS)


# Maps together ---------------------------------------------------------------------------------


def contender(weight, free=0.0, *, reads=True):
    with np.errstate(divide="ignore"):
        return Contender(None, np.log([weight, free]), 1.0, 0, reads, "tied")


def test_maps_are_mixed_by_their_weights_where_they_answer():
    one, two = contender(0.5), contender(0.3)
    three = contender(0.2, 0.6, reads=False)
    four = contender(0.0, 0.4, reads=False)
    maps = {"one": one, "two": two, "three": three, "four": four}
    state = Anticipation(BASE, Trajectory.empty(K, K), maps)
    assert state.leader == "one"
    answers = {name: np.log(RNG.dirichlet(np.ones(K), 2)) for name in maps}
    answers["two"][1] = np.nan
    mixes = {name: np.exp(answer) for name, answer in answers.items()}
    found = np.exp(state.mixture(answers))
    np.testing.assert_allclose(
        found[0], 0.5 * mixes["one"][0] + 0.3 * mixes["two"][0] + 0.2 * mixes["three"][0]
    )
    np.testing.assert_allclose(found[1], (0.5 * mixes["one"][1] + 0.2 * mixes["three"][1]) / 0.7)
    free = np.exp(state.mixture(answers, model_free=True))
    np.testing.assert_allclose(free, 0.6 * mixes["three"] + 0.4 * mixes["four"])
    silent = {name: np.full((1, K), np.nan) for name in maps}
    np.testing.assert_allclose(state.mixture(silent), BASE[None])
    np.testing.assert_allclose(state.mixture({"one": answers["one"]}, model_free=True), [BASE] * 2)


def test_maps_that_enter_get_the_weight_of_one_among_equals():
    maps = {
        "old": contender(0.7, 0.9, reads=False),
        "reads": contender(0.3),
        "new": contender(0.0, reads=False),
        "new that reads": contender(0.0),
    }
    found = _with_entrants(maps, ["new", "new that reads"])
    weights = {name: np.exp(one.log_weights[0]) for name, one in found.items()}
    assert weights["old"] == pytest.approx(0.35)
    assert weights["reads"] == pytest.approx(0.15)
    assert weights["new"] == weights["new that reads"] == pytest.approx(0.25)
    assert np.exp(found["old"].log_weights[1]) == pytest.approx(0.45)
    assert np.exp(found["new"].log_weights[1]) == pytest.approx(0.5)
    assert found["reads"].log_weights[1] == found["new that reads"].log_weights[1] == -np.inf
    assert logsumexp([one.log_weights[0] for one in found.values()]) == pytest.approx(0)


def test_maps_are_fitted_anew_when_enough_is_new():
    steady, fading = Candidate(Form()), Candidate(Form(), decay=0.9)
    growing = Candidate(Form(), growth=1.2)
    assert steady.due(10, 9, 3)
    assert not steady.due(100, 97, 3)
    assert steady.due(100, 96, 3)
    assert not steady.due(100, 91, 31)
    assert steady.due(100, 90, 31)
    assert fading.due(100, 99, 3)
    assert not growing.due(119, 100, 3)
    assert growing.due(120, 100, 3)
    assert fading.window == int(np.log(0.01) / np.log(0.9))
    assert Candidate(Form(), decay=0.3).window == 8


# Rows under other mixes ------------------------------------------------------------------------


def test_scores_under_a_mix_and_worst_shares_by_counting():
    prior, scores = np.array([0.2, 0.3, 0.5]), RNG.random(N)
    codes = np.where(CODES == 1, 0, CODES)  # the second class has no rows
    expected = (0.2 * scores[codes == 0].mean() + 0.5 * scores[codes == 2].mean()) / 0.7
    assert score_under(prior, scores, codes) == pytest.approx(expected)
    right = scores > 0.4
    worst = min(right[codes == 0].mean(), right[codes == 2].mean())
    assert worst_share(codes, right) == pytest.approx(worst)


def test_rows_are_drawn_again_within_their_classes():
    codes = np.array([2, 0, 2, 2, 0, 4])
    draws = _row_draws(codes, 300, np.random.default_rng(0))
    assert (np.sort(codes[draws], axis=1) == np.sort(codes)).all()
    assert set(draws[:, :2].ravel()) == {1, 4}
    assert set(draws[:, 2:5].ravel()) == {0, 2, 3}
    assert set(draws[:, 5]) == {5}
