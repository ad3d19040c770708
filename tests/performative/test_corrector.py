"""What is applied, and when it is not: options scored one by one on rows."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax

from skperf.performative.corrector import (
    BAD,
    CHANGED,
    FAST,
    JUDGED,
    MIXES,
    SLOW,
    STRENGTHS,
    Corrector,
    Option,
)
from skperf.performative.label_shift import Calibration

K = 3
BASE = np.log([0.5, 0.3, 0.2])
CALIBRATORS = (
    None,
    Calibration(2.0, np.zeros(K)),
    Calibration(0.5, np.array([0.4, 0.0, -0.4])),
)


def corrector(strengths=STRENGTHS, mixes=MIXES, calibrators=CALIBRATORS):
    zeros = np.zeros((len(calibrators), len(strengths), len(mixes)))
    return Corrector(strengths, mixes, calibrators, zeros, zeros, zeros, zeros)


def some_round(n=40, seed=0):
    rng = np.random.default_rng(seed)
    logits, codes = rng.normal(size=(n, K)), rng.integers(0, K, n)
    answer = log_softmax(rng.normal(size=K))
    return logits, codes, rng.uniform(0.5, 2, n), answer, logits.argmax(1) == codes


def blended(answer, strength, mix):
    mixed = np.log((1 - mix) * np.exp(answer) + mix * np.exp(BASE))
    return log_softmax(BASE + strength * (mixed - BASE))


def by_hand(logits, codes, weight, answer, own):
    """Loss, accuracy and variance of every option, option by option."""
    weight, shape = weight / weight.sum(), (len(CALIBRATORS), len(STRENGTHS), len(MIXES))
    losses, right, each = np.zeros(shape), np.zeros(shape), np.zeros((*shape, len(codes)))
    for at in np.ndindex(shape):
        calibrator = CALIBRATORS[at[0]]
        scores = logits if calibrator is None else calibrator(logits)
        moved = scores + blended(answer, STRENGTHS[at[1]], MIXES[at[2]]) - BASE
        each[at] = -log_softmax(moved, axis=1)[np.arange(len(codes)), codes]
        losses[at], right[at] = weight @ each[at], weight @ (moved.argmax(1) == codes)
        if at[0] < 2 and at[1] == 0:
            right[at] = weight @ own  # nothing moves: the classifier's own rule
    gaps = each - each[0, 0, 0]
    noise = ((gaps - (gaps @ weight)[..., None]) ** 2) @ weight**2
    return losses, right, noise


def test_every_option_is_scored_on_the_rows_and_older_rounds_fade():
    start, first, second = corrector(), some_round(), some_round(seed=1)
    found = start
    for logits, codes, weight, answer, own in (first, second):
        found = found.judged(logits, codes, weight, answer, BASE, own)
    one, two = by_hand(*first), by_hand(*second)
    np.testing.assert_allclose(found.slow, SLOW * one[0] + two[0])
    np.testing.assert_allclose(found.fast, FAST * one[0] + two[0])
    np.testing.assert_allclose(found.right, SLOW * one[1] + two[1])
    np.testing.assert_allclose(found.noise, FAST**2 * one[2] + two[2], atol=1e-12)
    assert found.weight == pytest.approx(SLOW + 1)
    assert found.n_rounds == 2
    assert found.n_rows == pytest.approx(SLOW * 40 + 40)
    owns = [weight @ own / weight.sum() for _, _, weight, _, own in (first, second)]
    assert found.own_right == pytest.approx(SLOW * owns[0] + owns[1])
    assert found.proposed_right == pytest.approx(found.own_right)  # of nothing
    assert found.swings == 0
    assert not found.failed


def test_proposals_are_held_against_the_round_after_them():
    logits, codes, weight, answer, own = some_round()
    start = replace(corrector(), proposed=Option(2, 1.0, 0.1))
    found = start.judged(logits, codes, weight, answer, BASE, own)
    _, right, _ = by_hand(logits, codes, weight, answer, own)
    hits = right[2, 5, 3]
    gain = hits - weight @ own / weight.sum()
    assert found.proposed_right == pytest.approx(hits)
    assert found.swings == pytest.approx(max(0.0, gain**2 - CHANGED / 40))
    assert found.failed is bool(gain < -np.sqrt(CHANGED / 40))
    worse = start.judged(logits, codes, weight, answer, BASE, np.ones(40, bool))
    assert worse.failed


def test_of_many_rows_some_are_judged():
    logits, codes, weight, answer, own = some_round(3000)
    kept = np.linspace(0, 2999, JUDGED).astype(int)
    found = corrector().judged(logits, codes, weight, answer, BASE, own)
    part = corrector().judged(logits[kept], codes[kept], weight[kept], answer, BASE, own[kept])
    np.testing.assert_allclose(found.slow, part.slow)
    assert found.n_rows == JUDGED


def test_counts_alone_score_what_was_expected():
    counts, answer = np.array([10.0, 60.0, 30.0]), log_softmax(np.array([0.0, 1.0, 0.5]))
    found = corrector().judged_by_shares(counts, answer, BASE)
    for at in np.ndindex(found.slow.shape):
        each = -blended(answer, STRENGTHS[at[1]], MIXES[at[2]])
        assert found.slow[at] == pytest.approx(each @ counts / 100)
        gaps = each + BASE
        variance = ((gaps - gaps @ counts / 100) ** 2) @ counts / 100
        assert found.noise[at] == pytest.approx(variance / 100)


def told(option):
    return option.calibration, option.strength, option.mix


def scored(losses, right=None, **known):
    """A corrector whose options stand at given losses, of ten rounds of 100 rows."""
    own = corrector()
    slow = np.full(own.slow.shape, 10.0)
    for at, value in losses.items():
        slow[at] = value
    hits = np.full(own.slow.shape, 5.0)
    for at, value in (right or {}).items():
        hits[at] = value
    found = {"slow": slow, "fast": slow, "right": hits, "own_right": 5.0, "proposed_right": 5.0}
    return replace(own, **found | {"weight": 10.0, "n_rows": 1000.0, "n_rounds": 10} | known)


def test_the_option_of_least_loss_is_applied():
    at = (1, 3, 2)
    found = scored({at: 8.0}, {at: 6.0}).chosen(10, 3)
    assert told(found.choice) == told(found.proposed) == (1, STRENGTHS[3], MIXES[2])


def test_too_few_rounds_or_none_judged_apply_nothing():
    better = scored({(1, 3, 2): 8.0})
    assert told(better.chosen(2, 3).choice) == (0, 0, 0)
    assert told(replace(better, weight=0.0).chosen(10, 3).choice) == (0, 0, 0)
    forced = corrector(strengths=np.array([0.5, 1.0]))
    assert told(forced.chosen(10, 3).choice) == (0, 1.0, 0.0)
    assert told(forced.chosen(2, 3).choice) == (0, 0, 0)


def test_what_makes_fewer_predictions_right_is_not_eligible():
    chance = np.sqrt(CHANGED / 1000) * 10 / 2
    at, other = (0, 5, 0), (0, 4, 0)
    losses = {at: 5.0, other: 7.0}
    below = scored(losses, {at: 5 - 1.1 * chance, other: 6.0}).chosen(10, 3)
    assert below.choice.strength == STRENGTHS[4]
    within = scored(losses, {at: 5 - 0.9 * chance, other: 6.0}).chosen(10, 3)
    # fewer right than its calibration alone, but far better in loss
    assert within.choice.strength == STRENGTHS[5]


def test_what_makes_no_more_right_has_to_save_a_hundredth():
    for loss, expected in ((9.95, 0.0), (9.85, STRENGTHS[5])):
        assert scored({(0, 5, 0): loss}).chosen(10, 3).choice.strength == expected


def test_a_calibration_has_to_save_a_hundredth_of_what_the_plain_scores_cost():
    plain, bent = (0, 5, 0), (2, 5, 0)
    right = {plain: 6.0, bent: 6.0}
    assert scored({plain: 8.0, bent: 7.95}, right).chosen(10, 3).choice.calibration == 0
    assert scored({plain: 8.0, bent: 7.9}, right).chosen(10, 3).choice.calibration == 2


def test_what_has_cost_something_lately_gives_way():
    at, fast = (0, 5, 0), np.full(corrector().slow.shape, 10.0)
    fast[at], fast[0, 2, 0] = 10.5, 9.0
    losses, right = {at: 8.0, (0, 2, 0): 9.0}, {at: 6.0, (0, 2, 0): 6.0}
    noise = np.full_like(fast, 0.2**2)
    assert scored(losses, right, fast=fast, noise=noise).chosen(10, 3).choice.strength == 0.5
    noise = np.full_like(fast, 0.6**2)
    assert scored(losses, right, fast=fast, noise=noise).chosen(10, 3).choice.strength == 1.0


@pytest.mark.parametrize("moving", [False, True])
def test_proposals_that_lost_are_not_followed(moving):
    at = (0, 5, 0)
    chance = np.sqrt(CHANGED / 1000) * 10 / 2
    known = scored({at: 8.0, (1, 0, 0): 9.0}, {at: 6.0})

    def applied(gained, **more):
        own = replace(known, proposed_right=5.0 + gained, **more)
        return own.chosen(10, 3, moving).choice.strength == 1.0

    if moving:  # a bad round has to be covered
        swings = 0.4
        needed = chance + BAD * np.sqrt(swings / 10)
        assert applied(1.01 * needed, swings=swings)
        assert not applied(0.99 * needed, swings=swings)
        assert not applied(100.0, failed=True)
    else:
        assert applied(-0.9 * chance)
        assert not applied(-1.1 * chance)
        refused = replace(known, proposed_right=5 - 2 * chance).chosen(10, 3)
        # the temperature of least loss, which keeps the order
        assert told(refused.choice) == (1, 0.0, 0.0)
        assert told(refused.proposed) == (0, 1.0, 0.0)


def test_scores_are_calibrated_as_chosen_and_priors_blended():
    logits, *_, answer, _ = some_round()
    own = replace(corrector(), choice=Option(2, 0.5, 0.25))
    np.testing.assert_allclose(own.calibrated(logits), CALIBRATORS[2](logits))
    assert own.calibrated(logits, Option()) is logits
    np.testing.assert_allclose(own.log_prior(answer, BASE), blended(answer, 0.5, 0.25))
    np.testing.assert_allclose(own.log_prior(answer, BASE, 0.9), blended(answer, 0.9, 0.25))
    assert [own.keeps_order(i) for i in range(3)] == [True, True, False]
