import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.datasets import load_digits

from skperf.influence import FadingDisplay, InfluenceDisplay, InfluenceScorer


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def fitted():
    X, y = load_digits(n_class=3, return_X_y=True)
    X = X[:80] / 16
    return InfluenceScorer(random_state=0).fit(X[:60], y[:60]), X, y


def test_a_query_beside_its_rows(fitted):
    scorer, X, y = fitted
    display = InfluenceDisplay.from_estimator(
        scorer, X[60:62], y[60:62], k=2, class_names=["zero", "one", "two"]
    )
    assert display.axes_.shape == (2, 5)
    top = scorer.top_k(X[60:62], y[60:62], 2)
    np.testing.assert_array_equal(display.proponents.indices, top.indices)
    titles = [ax.get_title() for ax in display.axes_.flat]
    assert titles[0].startswith("query: ")
    assert titles[1].split("\n")[0] in ("zero", "one", "two")
    image = display.axes_[0, 1].images[0].get_array()
    np.testing.assert_allclose(image, X[top.indices[0, 0]].reshape(8, 8))


def test_texts_images_and_features(fitted):
    scorer, X, y = fitted
    matrix = scorer.influence(X[60:61], y[60:61])
    texts = [f"text {i} " * 30 for i in range(60)]
    InfluenceDisplay.from_predictions(matrix, ["why?"], y[60:61], texts, y[:60], k=1)
    InfluenceDisplay.from_predictions(
        matrix, np.zeros((1, 3, 5, 5)), y[60:61], np.zeros((60, 1, 5, 5)), y[:60], k=1
    )
    InfluenceDisplay.from_predictions(
        matrix, np.zeros((1, 6)), y[60:61], np.zeros((60, 6)), y[:60], k=1
    )
    figure, axes = plt.subplots(1, 2)
    display = InfluenceDisplay.from_predictions(matrix, X[60:61], y[60:61], X[:60], y[:60], k=1)
    assert display.plot(ax=axes[0]).figure_ is figure


def test_fading_curves(fitted):
    scorer, X, y = fitted
    options = {"steps": (1, 3), "n_train": 5, "learning_rate": 0.1}
    display = FadingDisplay.from_estimator(
        {"a": scorer, "b": scorer}, X[60:70], y[60:70], **options
    )
    assert len(display.lines_) == 2
    np.testing.assert_array_equal(display.lines_[0].get_xdata(), [1, 3])
    single = FadingDisplay.from_estimator(scorer, X[60:70], y[60:70], name="mine", **options)
    assert "mine" in single.ax_.get_legend().get_texts()[0].get_text()
    curve = display.curves["a"]
    again = FadingDisplay.from_predictions([1, 3], curve.predicted, curve.actual)
    np.testing.assert_allclose(again.curves["influence"].pearson, curve.pearson)
