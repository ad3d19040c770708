"""Pictures of a trajectory."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from skperf import PerformativeAdapter, TrajectoryDisplay


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_from_estimator(lived):
    adapter, (X, y, rounds) = lived
    display = TrajectoryDisplay.from_estimator(adapter)
    assert list(display.lines_) == ["none", "last", "adapter", "oracle"]
    np.testing.assert_array_equal(
        display.lines_["adapter"].get_ydata(), adapter.prequential_.adapter
    )
    assert len(display.ax_) == 3
    assert display.figure_ is display.ax_[0].figure
    _, ax = plt.subplots()
    one = TrajectoryDisplay.from_estimator(adapter, X, y, rounds=rounds, ax=ax, linewidth=3)
    assert one.ax_ is ax
    assert list(one.lines_) == ["adapter"]
    assert one.lines_["adapter"].get_linewidth() == 3
    titled = display.plot(title="a world that answers")
    assert titled.ax_[0].get_title() == "a world that answers"
    assert titled.ax_[1].get_legend().get_title().get_text() == "class"
    with pytest.raises(NotFittedError):
        TrajectoryDisplay.from_estimator(PerformativeAdapter())


def test_no_rounds_no_picture(lived):
    adapter, (X, y, _) = lived
    with pytest.raises(ValueError, match="there are no rounds to draw"):
        TrajectoryDisplay.from_estimator(clone(adapter).fit(X, y))


def test_from_predictions(lived, frozen):
    adapter, (X, y, rounds) = lived
    proba = {"none": frozen.predict_proba(X), "mine": adapter.replay(X, y, rounds=rounds)}
    display = TrajectoryDisplay.from_predictions(y, proba, rounds=rounds)
    now = rounds == 3
    expected = -np.log(proba["none"][now, y[now]]).mean()
    assert display.losses["none"][3] == pytest.approx(expected)
    np.testing.assert_allclose(display.realised.sum(axis=1), 1.0)
    assert display.lines_["mine"].get_label() == "mine"
    # columns in an order that is not the labels' own
    turned = {name: values[:, ::-1] for name, values in proba.items()}
    other = TrajectoryDisplay.from_predictions(y, turned, rounds=rounds, classes=[3, 2, 1, 0])
    np.testing.assert_allclose(other.losses["mine"], display.losses["mine"])
    with pytest.raises(ValueError, match="labels unknown to classes"):
        TrajectoryDisplay.from_predictions(y, proba, rounds=rounds, classes=[0, 1, 2, 7])


def test_from_a_record_without_rows(lived):
    adapter, _ = lived
    record = adapter.trajectory_
    alone = PerformativeAdapter(adapter="tied").fit_trajectory(record.statistics, record.counts)
    assert TrajectoryDisplay.from_estimator(alone).figure_ is not None
