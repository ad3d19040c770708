import matplotlib.pyplot as plt
import numpy as np
import pytest
from torch import nn

from skperf.reprogramming import (
    AlphaPathDisplay,
    LabelMapDisplay,
    OODScoreDisplay,
    ProgramDisplay,
    Reprogrammer,
)


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def fitted(towers, pictures, parameters):
    return Reprogrammer(towers, **parameters).fit(*pictures)


def test_scores(fitted, pictures):
    X, _ = pictures
    rows, inside = np.concatenate([X, 1 - X]), np.repeat([1, 0], len(X))
    display = OODScoreDisplay.from_estimator(fitted, rows, inside)
    again = OODScoreDisplay.from_predictions(inside, fitted.score_samples(rows), name="mcm")
    assert display.auroc == again.auroc
    assert f"{display.auroc:.3f}" in display.ax_.get_title()
    assert again.ax_.get_title().startswith("mcm: ")
    assert len(display.ax_.lines) == 1
    assert not again.ax_.lines


def test_alpha_path(fitted, pictures):
    X, y = pictures
    display = AlphaPathDisplay.from_estimator(fitted, X, y, alphas=(0.0, 0.5, 1.0))
    drawn = display.ax_.lines[0].get_ydata()
    np.testing.assert_allclose(drawn, fitted.alpha_path(X, y, (0.0, 0.5, 1.0)).accuracy)
    _, ax = plt.subplots()
    given = AlphaPathDisplay.from_predictions([0, 1], [0.2, 0.3], auroc=[0.5, 0.6], ax=ax)
    assert given.ax_ is ax
    assert len(ax.lines) == 2


def test_program(fitted, pictures):
    X, _ = pictures
    display = ProgramDisplay.from_estimator(fitted, X)
    assert len(display.axes_) == 3
    np.testing.assert_array_equal(display.after, fitted.reprogram(X[:1])[0])


def test_label_map(fitted, pictures):
    with pytest.raises(ValueError, match="no label map"):
        LabelMapDisplay.from_estimator(fitted)
    source = nn.Sequential(nn.Conv2d(3, 2, 3, stride=3), nn.Flatten(), nn.Linear(32, 5))
    model = Reprogrammer(source, border=2, max_epochs=1).fit(*pictures)
    display = LabelMapDisplay.from_estimator(model, source_names=list("abcde"), top=1)
    assert [t.get_text() for t in display.ax_.get_xticklabels()] == ["bird", "cat", "dog"]
    assert {t.get_text() for t in display.ax_.get_yticklabels()} <= set("abcde")
