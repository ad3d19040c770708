"""The record of rounds and its statistics."""

import json

import numpy as np
import pytest

from skperf.performative.trajectory import ARRAYS, Trajectory, measure_by_name


def record(n_rounds=4, lag=1):
    statistics = np.arange(2.0 * n_rounds).reshape(n_rounds, 2)
    counts = 10.0 * np.arange(2 * n_rounds).reshape(n_rounds, 2)
    trajectory = Trajectory.empty(2, 2, lag=lag)
    for number, (statistic, counted) in enumerate(zip(statistics, counts, strict=True)):
        trajectory = trajectory.append(number, statistic, counted)
    return trajectory


def test_counts_are_paired_with_the_statistic_of_the_round_before():
    trajectory = record()
    inputs, counts = trajectory.pairs()
    np.testing.assert_array_equal(inputs.statistics[:, 0], trajectory.statistics[:3])
    np.testing.assert_array_equal(inputs.mixes[:, 0], trajectory.mixes[:3])
    np.testing.assert_array_equal(inputs.mixes[2, 2], trajectory.mixes[0])
    assert np.isnan(inputs.statistics[0, 1]).all()
    np.testing.assert_array_equal(counts, trajectory.counts[1:])
    np.testing.assert_array_equal(trajectory.coming().statistics[0, 0], trajectory.statistics[3])


def test_a_longer_lag():
    trajectory = record(lag=2)
    inputs, counts = trajectory.pairs()
    np.testing.assert_array_equal(inputs.statistics[:, 0], trajectory.statistics[:2])
    np.testing.assert_array_equal(counts, trajectory.counts[2:])
    np.testing.assert_array_equal(trajectory.coming().statistics[0, 0], trajectory.statistics[2])
    assert np.isnan(record(1, lag=2).coming().statistics[0, 0]).all()
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
    for name in ("rounds", *ARRAYS):
        np.testing.assert_array_equal(getattr(again, name), getattr(trajectory, name))
    assert again.lag == trajectory.lag


NONE = np.zeros((4, 3))  # scores that recalls do not read


def test_recall_by_hand():
    y_true, y_pred = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])
    plain = measure_by_name("recall", y_true, y_pred, NONE, smoothing=0.0)
    np.testing.assert_allclose(plain, [2 / 3, 0.0, 0.5])  # no rows: the pooled accuracy
    smooth = measure_by_name("recall", y_true, y_pred, NONE)
    np.testing.assert_allclose(smooth, [(2 + 1) / 5, (0 + 1) / 3, 0.5])
    # as released: the mean of the recalls above zero
    released = measure_by_name("released", y_true, y_pred, NONE)
    np.testing.assert_allclose(released, [2 / 3, 0.0, 2 / 3])


def test_recall_by_stratum_by_hand():
    y_true, y_pred = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    groups = {"strata": np.array([0, 1, 1, 1]), "n_strata": 2, "smoothing": 0.0}
    found = measure_by_name("stratum", y_true, y_pred, NONE, **groups)
    np.testing.assert_allclose(found, [1.0, 2 / 3])
    cells = measure_by_name("class_stratum", y_true, y_pred, NONE[:, :2], **groups)
    np.testing.assert_allclose(cells, [1.0, 0.5, 0.75, 1.0])  # class by class, no rows: pooled


def test_weights_count_as_repetitions():
    y_true, y_pred = np.array([0, 1, 1]), np.array([0, 0, 1])
    rows, weight = np.array([0, 1, 1, 2]), np.array([1.0, 2.0, 1.0])
    for name in ("recall", "confusion"):
        weighted = measure_by_name(name, y_true, y_pred, np.zeros((3, 2)), weight)
        repeated = measure_by_name(name, y_true[rows], y_pred[rows], np.zeros((4, 2)))
        np.testing.assert_allclose(weighted, repeated)


def test_confusion_rows_are_shares():
    rng = np.random.default_rng(0)
    codes, predicted = rng.integers(3, size=(2, 50))
    table = measure_by_name("confusion", codes, predicted, np.zeros((50, 4))).reshape(4, 4)
    np.testing.assert_allclose(table.sum(axis=1), 1.0)


def test_predicted_marginal():
    scores = np.log([[0.2, 0.8], [0.4, 0.6]])
    none = np.zeros(2, int)
    found = measure_by_name("predicted_marginal", none, none, scores)
    np.testing.assert_allclose(found, [0.3, 0.7])


def test_a_record_of_ten_thousand_rounds_keeps_the_last_thousand():
    trajectory = Trajectory.empty(2, 2)
    for number in range(1200):
        trajectory = trajectory.append(number, np.ones(2), np.ones(2))
    assert len(trajectory) == 1000
    assert trajectory.rounds[-1] == 1199
    assert all(len(getattr(trajectory, name)) == 1000 for name in ARRAYS)
