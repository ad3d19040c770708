"""The record of rounds and its statistics."""

import json

import numpy as np
import pytest

from skperf.performative.trajectory import (
    Trajectory,
    predicted_marginal,
    smoothed_confusion,
    smoothed_recall,
)


def record(n_rounds=4, lag=1):
    statistics = np.arange(2.0 * n_rounds).reshape(n_rounds, 2)
    counts = 10.0 * np.arange(2 * n_rounds).reshape(n_rounds, 2)
    return Trajectory.from_arrays(statistics, counts, lag=lag)


def test_counts_are_paired_with_the_statistic_of_the_round_before():
    trajectory = record()
    inputs, counts = trajectory.pairs()
    np.testing.assert_array_equal(inputs.statistics[:, 0], trajectory.statistics[:3])
    np.testing.assert_array_equal(inputs.mixes[:, 0], trajectory.mixes[:3])
    np.testing.assert_array_equal(inputs.mixes[2, 2], trajectory.mixes[0])
    assert np.isnan(inputs.statistics[0, 1]).all()
    np.testing.assert_array_equal(counts, trajectory.counts[1:])
    np.testing.assert_array_equal(trajectory.in_force(), trajectory.statistics[3])


def test_a_longer_lag():
    trajectory = record(lag=2)
    inputs, counts = trajectory.pairs()
    np.testing.assert_array_equal(inputs.statistics[:, 0], trajectory.statistics[:2])
    np.testing.assert_array_equal(counts, trajectory.counts[2:])
    np.testing.assert_array_equal(trajectory.in_force(), trajectory.statistics[2])
    assert record(1, lag=2).in_force() is None
    assert len(record(1, lag=2).pairs()[0]) == 0


def test_append_is_in_order_and_changes_nothing():
    trajectory = record()
    longer = trajectory.append(9, np.ones(2), np.ones(2))
    assert (len(trajectory), len(longer)) == (4, 5)
    for number in (3, 1):
        with pytest.raises(ValueError, match="last round seen, 3"):
            trajectory.append(number, np.ones(2), np.ones(2))


def test_latest_rounds():
    assert record().latest(2).rounds.tolist() == [2, 3]
    assert len(record().latest(None)) == 4


def test_json_round_trip():
    trajectory = record()
    again = Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict())))
    for name in ("rounds", "statistics", "counts", "hits"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trajectory, name))


def test_recall_by_hand():
    classes = np.arange(3)
    y_true, y_pred = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])
    plain = smoothed_recall(y_true, y_pred, None, classes, smoothing=0.0)
    np.testing.assert_allclose(plain, [2 / 3, 0.0, 0.5])  # no rows: the pooled accuracy
    smooth = smoothed_recall(y_true, y_pred, None, classes, smoothing=2.0)
    np.testing.assert_allclose(smooth, [(2 + 1) / 5, (0 + 1) / 3, 0.5])


def test_weights_count_as_repetitions():
    y_true, y_pred = np.array([0, 1, 1]), np.array([0, 0, 1])
    rows = np.array([0, 1, 1, 2])
    for statistic in (smoothed_recall, smoothed_confusion):
        weighted = statistic(y_true, y_pred, None, np.arange(2), np.array([1.0, 2.0, 1.0]))
        repeated = statistic(y_true[rows], y_pred[rows], None, np.arange(2))
        np.testing.assert_allclose(weighted, repeated)


def test_confusion_rows_are_shares():
    rng = np.random.default_rng(0)
    table = smoothed_confusion(
        rng.integers(3, size=50), rng.integers(3, size=50), None, np.arange(4)
    ).reshape(4, 4)
    np.testing.assert_allclose(table.sum(axis=1), 1.0)


def test_predicted_marginal():
    proba = np.array([[0.2, 0.8], [0.4, 0.6]])
    np.testing.assert_allclose(predicted_marginal(None, None, proba, None), [0.3, 0.7])
