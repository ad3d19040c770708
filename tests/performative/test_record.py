"""Questions that a record answers, each against a sum by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import beta

from skperf import PerformativeAdapter
from skperf.performative.corrector import Option
from skperf.performative.record import COVERED, Memory, Round, counted, worst_share
from tests.performative.conftest import World


def test_a_prior_asked_for_another_statistic_is_that_statistics(lived):
    adapter = lived[0]
    record = adapter.record_
    in_force = record.anticipation.trajectory.coming().statistics[0, 0]
    plain, strength = record.prior()
    same, again = record.prior(np.asarray(in_force))
    np.testing.assert_allclose(same, plain)
    assert again == strength
    other, _ = record.prior(np.asarray(in_force)[::-1].copy())
    assert np.abs(other - plain).max() > 0.01
    np.testing.assert_allclose(np.exp(other).sum(), 1)


CODES = np.array([0, 0, 1, 2, 2, 2, 3])
PREDICTED = np.array([0, 1, 1, 2, 0, 2, 3])
WEIGHT = np.array([0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 0.75])


def test_the_statistic_of_a_round_is_the_recall_of_what_went_out(lived):
    record = lived[0].record_
    scores = np.zeros((7, 4))
    part = Round(0, scores, PREDICTED[::-1], CODES, WEIGHT, deployed=PREDICTED)
    hits, totals = np.zeros(4), np.zeros(4)
    worth = WEIGHT * WEIGHT.sum() / (WEIGHT**2).sum()  # whatever the scale
    for code, predicted, weight in zip(CODES, PREDICTED, worth, strict=True):
        totals[code] += weight
        hits[code] += weight * (code == predicted)
    pooled = hits.sum() / totals.sum()
    expected = (hits + record.options.smoothing * pooled) / (totals + record.options.smoothing)
    np.testing.assert_allclose(record.statistic_of(part, scores), expected)


def test_part_of_a_round_weighs_what_its_rows_are_worth():
    logits = np.arange(14.0).reshape(7, 2)
    data = Round(3, logits, PREDICTED, CODES, WEIGHT, strata=CODES[::-1])
    rows = CODES == 2
    part = data.part(rows)
    assert part.deployed is None
    assert part.number == 3
    np.testing.assert_array_equal(part.logits, logits[rows])
    np.testing.assert_array_equal(part.own, PREDICTED[rows])
    np.testing.assert_array_equal(part.strata, CODES[::-1][rows])
    own = WEIGHT[rows]
    np.testing.assert_allclose(part.weight.sum(), own.sum() ** 2 / (own**2).sum())
    np.testing.assert_allclose(part.weight / own, part.weight[0] / own[0])


@pytest.mark.parametrize("strata", [None, np.array([1, 0, 2, 1, 0, 0, 1])])
def test_memory_keeps_rows_with_their_strata(strata):
    logits = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    memory = Memory.empty(4).with_rows(logits, CODES, strata).with_rows(logits[:2], CODES[:2])
    kept = np.zeros(7, int) if strata is None else strata
    np.testing.assert_array_equal(memory.codes, [*CODES, 0, 0])
    np.testing.assert_array_equal(memory.strata, [*kept, 0, 0])
    np.testing.assert_array_equal(memory.scores, np.concatenate([logits, logits[:2]]))


@pytest.mark.parametrize(("spread", "expected"), [(4.0, (30 - 4) / 3), (1.0, 300.0), (80.0, 1.0)])
def test_an_anticipation_is_at_first_worth_the_concentration_of_mixes(lived, spread, expected):
    record = lived[0].record_
    counts = np.array([[10.0, 15.0, 0, 0], [0, 0, 0, 0], [30.0, 0, 0, 5.0]])
    trajectory = replace(record.anticipation.trajectory, counts=counts)
    state = replace(record.anticipation, trajectory=trajectory, spread=spread)
    options = replace(record.options, prior_strength="auto")
    told = replace(record, anticipation=state, options=options, batch_losses=None)
    assert told.worth() == pytest.approx(expected)


@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_an_answer_is_applied_as_strongly_as_was_chosen(lived, strength):
    record = lived[0].record_
    corrector = replace(record.corrector, choice=Option(0, strength, 0.1))
    record = replace(record, corrector=corrector, options=replace(record.options, floor=None))
    mix, base = np.array([0.7, 0.1, 0.15, 0.05]), np.exp(record.log_base)
    prior, applied = record.applied(np.log(mix))
    assert applied == strength
    towards = np.log(0.9 * mix + 0.1 * base) - np.log(base)
    np.testing.assert_allclose(prior, log_softmax(np.log(base) + strength * towards), atol=1e-12)


def test_the_worth_of_batches_is_found_only_where_it_is_asked_for(frozen):
    X, y = World().draw(160)
    found = {
        (how, worth)
        for how in (None, "em", "map_em", "auto")
        for worth in ("auto", 30.0)
        if PerformativeAdapter(
            frozen, adapter="tied", transductive=how, prior_strength=worth, random_state=0
        )
        .fit(X, y, rounds=np.repeat(range(4), 40))
        .record_.batch_losses
        is not None
    }
    assert found == {("map_em", "auto"), ("auto", "auto")}


def test_sums_by_class_and_the_worst_group_are_those_by_hand():
    expected = [sum(w for c, w in zip(CODES, WEIGHT, strict=True) if c == k) for k in range(5)]
    np.testing.assert_allclose(counted(CODES, WEIGHT, 5), expected)
    groups, right = np.array([0, 0, 3, 5, 5, 5]), np.array([1, 1, 0, 1, 0, 1], bool)
    assert worst_share(groups, right) == 0.0
    assert worst_share(groups[[0, 1, 3, 4, 5]], right[[0, 1, 3, 4, 5]]) == pytest.approx(2 / 3)


def test_an_inverted_confusion_gives_classes_that_are_not_there_a_millionth(lived):
    record = replace(lived[0].record_, confusion=1e6 * np.eye(4))
    prior = record.batch_prior(np.log(np.eye(4)[[0, 0, 1]] + 1e-12), record.log_base, "bbse")
    np.testing.assert_allclose(np.exp(prior), [2 / 3, 1 / 3, 1e-6, 1e-6], rtol=1e-3)


def test_an_interval_holds_nine_in_ten_rounds_of_a_beta_distribution(lived):
    record = lived[0].record_
    prior, size = np.array([0.5, 0.3, 0.15, 0.05]), 200.0
    worth = size / (record.anticipation.spread * record.width)
    low, high = record.interval(prior, size)
    for k, share in enumerate(prior):
        own = beta(worth * share, worth * (1 - share)).ppf([(1 - COVERED) / 2, (1 + COVERED) / 2])
        assert low[k] == pytest.approx(min(np.floor(own[0] * size) / size, share))
        assert high[k] == pytest.approx(max(np.ceil(own[1] * size) / size, share))
    assert (low < prior).any()


def test_the_statistic_of_remembered_rows_is_the_recall_of_the_corrected_model(lived):
    record = lived[0].record_
    log_prior = np.log([0.7, 0.1, 0.1, 0.1])
    scores = record.corrected(record.memory.scores, log_prior)
    codes, right = record.memory.codes, scores.argmax(axis=1) == record.memory.codes
    totals = np.bincount(codes, minlength=4)
    smoothing, pooled = record.options.smoothing, right.mean()
    expected = (np.bincount(codes, right, minlength=4) + smoothing * pooled) / (totals + smoothing)
    np.testing.assert_allclose(record.remembered_statistic(log_prior), expected)
    predicted = np.bincount(scores.argmax(axis=1), minlength=4)
    assert np.abs(totals - predicted).max() > 10  # recall is not precision here
    empty = replace(record, memory=Memory.empty(4))
    assert np.isnan(empty.remembered_statistic(log_prior)).all()


def test_the_worst_recall_is_of_a_class_in_a_group_where_there_are_groups(lived):
    record = lived[0].record_
    codes, groups = record.memory.codes, np.arange(len(record.memory.codes)) % 3
    memory = replace(record.memory, strata=groups)
    grouped = replace(record, memory=memory, strata=np.array(["a", "b", "c"]))
    log_prior = np.log([0.6, 0.2, 0.1, 0.1])
    right = record.corrected(record.memory.scores, log_prior).argmax(axis=1) == codes
    expected = min(right[(codes == c) & (groups == g)].mean() for c in range(4) for g in range(3))
    assert grouped._worst_recall(log_prior) == pytest.approx(expected)
    plain = min(right[codes == c].mean() for c in range(4))
    assert record._worst_recall(log_prior) == pytest.approx(plain)
    assert expected < plain
