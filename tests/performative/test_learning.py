"""What a round is said to have cost and how much of it was right."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.frozen import FrozenEstimator

from skperf import PerformativeAdapter
from skperf.performative.learning import (
    STEP,
    Expected,
    _judged,
    _stepped,
    counted_round,
    learned,
    remembering,
    replaced,
)
from skperf.performative.record import COVERED, WORTHS, Memory, Round
from skperf.performative.trajectory import KEPT_ROUNDS
from tests.performative.conftest import K


def test_accuracies_of_a_round_are_those_of_its_predictions(classifier, world):
    adapter = PerformativeAdapter(FrozenEstimator(classifier), adapter="tied", random_state=0)
    weights = np.random.default_rng(0).uniform(0.5, 2, 300)
    told = []
    for number in range(8):
        X, y = world.draw(300, [0.7, 0.1, 0.1, 0.1] if number % 2 else np.full(K, 1 / K))
        predicted = adapter.predict(X) if number else classifier.predict(X)
        told.append(
            [
                np.average(hits, weights=weights)
                for hits in (predicted == y, classifier.predict(X) == y)
            ]
        )
        adapter.partial_fit(X, y, rounds=number, sample_weight=weights, classes=range(K))
    record = adapter.prequential_
    np.testing.assert_allclose(record.accuracy_none, [one[1] for one in told])
    assert record.accuracy[1:] == pytest.approx([one[0] for one in told[1:]])


RNG = np.random.default_rng(0)
LOGITS, CODES = RNG.normal(size=(9, K)), RNG.integers(K, size=9)
PART = Round(99, LOGITS, LOGITS.argmax(1), CODES, RNG.uniform(0.5, 2, 9))


@pytest.fixture
def record(lived):
    return lived[0].record_


def test_losses_of_batches_forget_a_fifth_a_round(record):
    options = replace(record.options, transductive="map_em", prior_strength="auto")
    answer = np.log([0.4, 0.3, 0.2, 0.1])
    expected = Expected(answer, answer, answer, 1.0)
    record = replace(record, options=options, batch_losses=None)
    now = _judged(record, PART, expected).batch_losses
    # the worth of infinity is the anticipation itself
    plain = np.log(softmax(LOGITS + answer - record.log_base, axis=1))[np.arange(9), CODES]
    assert WORTHS[0] == np.inf
    assert now[0] == pytest.approx(-np.average(plain, weights=PART.weight), abs=0.2)
    before = np.linspace(1, 3, len(WORTHS))
    after = _judged(replace(record, batch_losses=before), PART, expected).batch_losses
    np.testing.assert_allclose(after, 0.8 * before + 0.2 * now)


def test_as_many_rounds_are_told_of_as_are_kept(record):
    record = replace(record, losses=record.losses[-1:] * KEPT_ROUNDS)
    later = learned(record, PART)
    assert len(later.losses) == KEPT_ROUNDS
    assert later.losses[-1]["round"] == 99


def test_a_round_of_counts_has_realised_their_shares(record):
    counts = np.array([3.0, 1.0, 0.0, 12.0])
    coming = record.anticipation.trajectory.coming()
    found = counted_round(record, 99, counts, coming.statistics[0, 0])
    np.testing.assert_allclose(found.losses[-1]["realised"], counts / 16)
    mix = np.log(found.losses[-1]["predicted"])
    assert found.losses[-1]["adapter"] == pytest.approx(-(counts / 16) @ mix)
    np.testing.assert_array_equal(found.anticipation.trajectory.counts[-1], counts)


def test_rows_known_before_are_remembered_and_counted_by_class(record):
    options = replace(record.options, calibrations=(None,))
    record = replace(record, options=options, memory=Memory.empty(K), confusion=np.zeros((K, K)))
    found = remembering(record, LOGITS, CODES, PART.weight)
    np.testing.assert_array_equal(found.memory.codes, CODES)
    np.testing.assert_allclose(found.memory.scores, LOGITS, rtol=1e-6)
    confusion = np.zeros((K, K))
    proba = softmax(found.corrector.calibrated(LOGITS), axis=1)
    for code, row, weight in zip(CODES, proba, PART.weight, strict=True):
        confusion[code] += weight * row
    np.testing.assert_allclose(found.confusion, confusion)


def test_of_another_classifier_only_its_own_rows_are_known(record):
    base = np.array([0.4, 0.3, 0.2, 0.1])
    found = replaced(record, (LOGITS, CODES), base)
    np.testing.assert_array_equal(found.memory.codes, CODES)
    np.testing.assert_allclose(np.exp(found.log_base), base)
    assert found.base_rows == len(CODES)
    assert found.batch_width == 1.0
    assert found.calibrated_at == 0
    assert found.corrector.own_right == 0.0
    assert not found.corrector.right.any()
    assert found.corrector.choice.calibration == 0
    assert np.isnan(found.anticipation.trajectory.hits).all()
    for name in ("slow", "fast"):
        before = getattr(record.corrector, name)
        np.testing.assert_array_equal(
            getattr(found.corrector, name), before[:1].repeat(len(before), 0)
        )
    assert replaced(record, None, None).base_rows == 0
    np.testing.assert_array_equal(replaced(record, None, None).log_base, record.log_base)


def test_intervals_widen_by_what_they_missed_and_narrow_by_what_they_held():
    wide = _stepped(2.0, np.array([True, True, False, False]))
    narrow = _stepped(2.0, np.zeros(4, bool))
    assert wide == pytest.approx(2.0 * np.exp(STEP * (0.5 - (1 - COVERED))))
    assert narrow == pytest.approx(2.0 * np.exp(-STEP * (1 - COVERED)))
    assert narrow < 2.0 < wide
