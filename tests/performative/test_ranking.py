"""The mix that is expected whatever is deployed."""

from dataclasses import replace

import numpy as np
import pytest

from skperf.performative.ranking import exogenous_prior, score_under


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
