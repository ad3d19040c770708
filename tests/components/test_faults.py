"""ComponentAttributor: what it refuses and warns about."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from torch import nn

from skperf.components import Ablation, ComponentAttributor
from tests.components.networks import Linear, linear


class Nan(nn.Module):
    """Gives no number once its first component is gone."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(5, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.hidden(x)
        return self.out(hidden / hidden[:, :1].abs())


class Noisy(Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(len(x), 2)


class Cut(Linear):
    def forward(self, x):
        return self.out(self.hidden(x).detach().clone()).detach()


FAULTS = {
    "fraction outside": ({"fraction": 1.0}, "fraction"),
    "fraction below one": ({"fraction": 0.01}, "fraction=0.01 of 8 components is less than one"),
    "no component": ({"components": "nothing*"}, "matches nothing.*'hidden'"),
    "budget": ({"budget": 2}, "budget=2 is too small"),
    "budget for masks": ({"method": "regression", "budget": 1}, "budget=1 is too small"),
    "ablation": ({"ablation": Ablation("nil")}, "ablation='nil' is unknown"),
    "output name": ({"output": "margins"}, "output='margins' is unknown"),
    "output shape": (
        {"output": lambda logits, codes: logits[:, :, None]},
        "one number for each example",
    ),
    "output nan": (
        {"output": lambda logits, codes: logits[:, 0] * torch.nan},
        "not finite",
    ),
    "regressor": ({"regressor": "lasso"}, "regressor='lasso' must be"),
    "regressor unused": ({"regressor": LinearRegression(), "method": "loo"}, "no regression"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_parameters_by_message(fault):
    module, X, y = linear()
    options, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        ComponentAttributor(module, **options).fit(X, y)


def test_a_component_that_leaves_no_number_is_named():
    _, X, y = linear()
    with pytest.raises(ValueError, match=r"not finite under mask \d+ .*hidden\[0\]"):
        ComponentAttributor(Nan(), method="loo").fit(X, y)


def test_without_gradients_auto_spends_all_on_masks():
    _, X, y = linear()
    torch.manual_seed(0)
    model = ComponentAttributor(Cut(), fraction=0.2, budget=40).fit(X, y)
    assert model._study.measured.done.gradients == 0
    with pytest.raises(ValueError, match="needs gradients"):
        ComponentAttributor(Cut(), fraction=0.2, method="path_gradient").fit(X, y)


def test_bad_data_by_message():
    module, X, y = linear()
    model = ComponentAttributor(module, fraction=0.2, budget=20)
    with pytest.raises(NotFittedError):
        model.transform(X)
    with pytest.raises(ValueError, match=r"labels that the estimator does not know: \[7\]"):
        model.fit(X, np.where(y == 1, 7, 0))
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.where(X > 2, np.nan, X) * np.nan, y)
    with pytest.raises(ValueError, match="requires y to be passed"):
        model.fit(X, None)
    model.fit(X, y)
    with pytest.raises(ValueError, match="features"):
        model.transform(X[:, :3])
    with pytest.raises(ValueError, match="examples given to fit"):
        model.partial_fit(X[:5], y[:5])


def test_one_class_by_message():
    _, X, _ = linear()
    with pytest.raises(ValueError, match="knows 1 class"):
        ComponentAttributor().fit(X, np.zeros(30, int))


def test_an_estimator_without_a_network_by_message():
    _, X, y = linear()
    with pytest.raises(TypeError, match="no torch network inside"):
        ComponentAttributor(RandomForestClassifier(2)).fit(X, y)


def test_bad_masks_and_edits_by_message():
    module, X, y = linear()
    model = ComponentAttributor(module, fraction=0.2, budget=40).fit(X, y)
    with pytest.raises(ValueError, match=r"shape \(2, 7\), expected \(m, 8\)"):
        model.counterfactual(np.ones((2, 7)))
    with pytest.raises(TypeError, match="numbers or booleans"):
        model.predict_counterfactual([["a"] * 8])
    with pytest.raises(ValueError, match="between 0"):
        model.ablate(np.full(8, 2))
    with pytest.raises(ValueError, match="number of components"):
        model.edit([0, 1], k=9)
    with pytest.raises(ValueError, match="number of components"):
        model.top_components(9)
    with pytest.raises(ValueError, match="k='most' must be"):
        model.edit([0, 1], k="most")
    with pytest.raises(ValueError, match="ablate takes one mask, got 2"):
        model.ablate(np.ones((2, 8)))
    with pytest.raises(ValueError, match="fraction=2 must lie between 0 and 1"):
        model.score(fraction=2)
    with pytest.raises(ValueError, match="direction='up'"):
        model.edit([0, 1], direction="up")
    with pytest.raises(ValueError, match="criterion='best'"):
        model.edit([0, 1], criterion="best")
    with pytest.raises(ValueError, match="target names row 30"):
        model.edit([30])
    with pytest.raises(ValueError, match="boolean mask of shape"):
        model.edit(np.ones(3, bool))
    with pytest.raises(ValueError, match="reference selects no row"):
        model.edit([0, 1], np.zeros(30, bool))
    with pytest.warns(UserWarning, match="single row"):
        model.edit([0], criterion="welch", k=1)


def test_constant_outputs_are_warned_about():
    _, X, y = linear()
    module = Linear()
    nn.init.zeros_(module.out.weight)
    model = ComponentAttributor(module, fraction=0.2, method="loo").fit(X, y)
    with pytest.warns(UserWarning, match="30 of 30 examples are constant"):
        assert model.score(X, y) == 0
