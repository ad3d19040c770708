"""Answers to another statistic than the last."""

import numpy as np

from skperf.performative.record import Record  # noqa: F401


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
