"""The pages: every public name is on one, and the snippets beside other libraries' run."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpydoc.validate import validate
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

import skperf
from skperf import MLP, Net
from skperf.backbone._sklearn import DOC_LINK

DOCS = Path(__file__).parents[1] / "docs"
SNIPPETS = sorted((DOCS / "guide" / "peers").glob("*/skperf.py"))
EXPECTED = {"component_ablation": (100, 12), "rejection": (200,), "label_shift": (100,)}


def _extension(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = ("backbone", "performative", "reprogramming", "influence", "components")
MODULES += ("datasets", "metrics", "model_selection")
reference = _extension("reference")
LISTED = reference.listed_names()
# the public names of the reference and of their public methods that we define
SHOWN = [
    name
    for listed in LISTED
    if inspect.isroutine(value := reference.resolve(listed)) or inspect.isclass(value)
    for name in (listed, *(f"{listed}.{each}" for each in reference.own_methods(listed)))
]
# numpydoc's checks, but for three: a method of one sentence needs no second one, and the
# reference links the notebooks that use a name in place of "See Also" and of an example each
CHECKS_LEFT_OUT = {"ES01", "EX01", "SA01"}
DOCSTRINGS = [
    pytest.param(name, marks=pytest.mark.xfail(strict=False, reason="waits for its turn"))
    if name.startswith(reference.UNFINISHED)
    else name
    for name in SHOWN
]


def test_every_public_name_is_in_the_reference():
    modules = [skperf, *(importlib.import_module(f"skperf.{name}") for name in MODULES)]
    public = {name for module in modules for name in module.__all__}
    listed = {name.rpartition(".")[2] for name in LISTED}
    # a dict, which the guide to reprogramming explains
    assert sorted(public - listed) == ["RELEASED_SETTINGS"]


def test_the_reference_lists_a_name_once():
    assert len(LISTED) == len(set(LISTED))
    for name in LISTED:
        reference.resolve(name)


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_docstring_of_the_reference(name):
    errors = [error for error in validate(name)["errors"] if error[0] not in CHECKS_LEFT_OUT]
    assert errors == []


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_one_entry_a_parameter(name):
    assert [entry for entry in reference.documented(name) if "," in entry] == []


@pytest.mark.parametrize(
    "name",
    [
        "InfluenceScorer",
        "ComponentAttributor",
        "ComponentEditor",
        "PerformativeAdapter",
        "Reprogrammer",
    ],
)
def test_the_html_of_an_estimator_links_every_parameter_to_its_page(name):
    estimator = getattr(skperf, name)()
    shown = estimator._repr_html_()
    page = DOC_LINK.format(estimator_name=name)
    assert f"skperf.{name}" in LISTED  # so that `make docs` writes that page
    linked = set(re.findall(rf'href="{re.escape(page)}#:~:text=(\w+),', shown))
    assert linked == set(estimator.get_params(deep=False))


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
