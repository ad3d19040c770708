import sys

import pytest

from skperf import AlphaPathDisplay
from skperf.backbone.plotting import pyplot


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'skperf\[plot\]'"):
        AlphaPathDisplay.from_predictions([0, 1], [0.5, 0.6])


def test_with_matplotlib():
    assert pyplot() is sys.modules["matplotlib.pyplot"]
