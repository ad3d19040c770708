"""The pages: every public name is on one, and the snippets beside other libraries' run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

import skperf
import skperf.datasets
from skperf import MLP, Net

DOCS = Path(__file__).parents[1] / "docs"
SNIPPETS = sorted((DOCS / "guide" / "peers").glob("*/skperf.py"))
EXPECTED = {"component_ablation": (100, 12), "rejection": (200,), "label_shift": (100,)}


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^   (\w+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    public = {*skperf.__all__, *skperf.datasets.__all__}
    # a dict, which the guide to reprogramming explains
    assert public - listed == {"RELEASED_SETTINGS"}


@pytest.fixture(scope="module")
def names():
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    net = Net(MLP, lr=0.01, random_state=0).fit(X[:200], y[:200])
    filters = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(432, 10)
    )
    return {
        "np": np,
        "torch": torch,
        "networks": {"component_ablation": filters},
        "module": net.module_,
        "classifier": LogisticRegression(max_iter=500).fit(X[:200], y[:200]),
        "X_train": X[:200],
        "y_train": y[:200],
        "X_test": X[200:300],
        "y_test": y[200:300],
        "X_other": np.random.default_rng(0).random((100, 64), dtype=np.float32),
    }


@pytest.mark.parametrize("path", SNIPPETS, ids=lambda path: path.parent.name)
def test_snippet(path, names):
    task = path.parent.name
    namespace = dict(names) | {"module": names["networks"].get(task, names["module"])}
    if task == "rejection":
        for name in ("X_train", "X_test", "X_other"):
            namespace[name] = namespace[name].reshape(-1, 1, 8, 8)
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    result = namespace.get("scores", namespace.get("predictions"))
    assert result.shape == EXPECTED.get(task, (100, 200))
    assert result.dtype.kind in "iu" or np.isfinite(result).all()
