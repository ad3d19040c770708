"""The mix that is expected whatever is deployed."""

from dataclasses import replace

import numpy as np
import pytest

from skperf.performative import ranking
from skperf.performative.ranking import (
    Candidate,
    answers_the_model,
    exogenous_prior,
    predict_scores,
    score_under,
)


@pytest.mark.parametrize("last_is_better", [True, False])
def test_it_is_the_last_mix_or_the_answer_that_reads_no_model(lived, last_is_better):
    record = lived[0].record_
    gain = 1.0 if last_is_better else -1.0
    losses = [one | {"gain_last": gain, "gain_model_free": 0.0} for one in record.losses]
    found = exogenous_prior(replace(record, losses=losses))
    coming = record.anticipation.trajectory.coming()
    free = np.exp(record.anticipation.log_answer(coming, model_free=True)[0])
    np.testing.assert_allclose(found, np.exp(record.last_mix()) if last_is_better else free)
    assert found.shape == free.shape == (4,)
    np.testing.assert_allclose(found.sum(), 1)


def test_scores_under_a_mix_leave_out_classes_that_are_not_there():
    codes, scores = np.array([0, 0, 2]), np.array([1.0, 0.0, 0.25])
    found = score_under(np.array([0.2, 0.5, 0.3]), scores, codes)
    assert found == pytest.approx((0.2 * 0.5 + 0.3 * 0.25) / 0.5)


@pytest.mark.parametrize(("errors", "expected"), [(1.5, False), (2.5, True)])
def test_the_mix_answers_where_a_gain_is_two_standard_errors(lived, errors, expected):
    record, n = lived[0].record_, 16
    each = np.tile([-1.0, 1.0], n // 2)
    each = each + errors * each.std(ddof=1) / np.sqrt(n)
    losses = [
        record.losses[-1] | {"gain_all": gain, "gain_model_free": 0.0, "gain_last": -9.0}
        for gain in each
    ]
    assert answers_the_model(replace(record, losses=losses)) is expected


class Constant:
    def __init__(self, mix):
        self.mix = mix

    def log_prior(self, inputs):
        return np.log(self.mix)[None]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("known", [True, False])
def test_intervals_look_at_resampled_maps_that_have_an_answer(lived, monkeypatch, known):
    record = lived[0].record_
    corrector = replace(
        record.corrector, choice=replace(record.corrector.choice, strength=1.0, mix=0.1)
    )
    losses = [one | {"realised": one["expected"]} for one in record.losses]  # never off
    record = replace(record, corrector=corrector, losses=losses)
    mix = np.array([0.85, 0.05, 0.05, 0.05]) if known else np.full(4, np.nan)
    monkeypatch.setattr(ranking, "resampled_maps", lambda *_: [Constant(mix)])
    statistic = record.anticipation.trajectory.coming().statistics[0, 0]
    candidate = Candidate(lambda rows: statistic, lambda prior, rows: float(prior[0]))
    codes = np.repeat(np.arange(4), 3)
    (value, low, high, prior), *_ = predict_scores(
        record, [candidate], codes, 20, np.random.default_rng(0), answers=True
    )
    assert value == pytest.approx(prior[0])
    # what a world answers, of which the adapter would apply less
    assert [low, high] == pytest.approx([value, 0.85] if known else [value, value])


def test_what_a_candidate_meets_is_not_weakened_with_the_correction(lived):
    record = lived[0].record_
    statistic = record.anticipation.trajectory.coming().statistics[0, 0]
    candidate = Candidate(lambda rows: statistic, lambda prior, rows: float(prior[0]))
    found = []
    for strength in (0.0, 1.0):
        choice = replace(record.corrector.choice, strength=strength)
        own = replace(record, corrector=replace(record.corrector, choice=choice))
        generator = np.random.default_rng(0)
        codes = np.repeat(np.arange(4), 3)
        found.append(predict_scores(own, [candidate], codes, 5, generator, answers=True)[0][3])
    inputs = record.anticipation.trajectory.coming().at(statistic[None])
    expected = np.exp(record.anticipation.log_answer(inputs)[0])
    np.testing.assert_allclose(found, [expected, expected], atol=1e-12)
    assert np.abs(expected - np.exp(record.log_base)).max() > 0.01
