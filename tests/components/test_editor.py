"""ComponentEditor and the displays."""

import numpy as np
import pytest
import sklearn
import torch
from sklearn.datasets import load_iris
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import GridSearchCV

from skperf import EditedClassifier, default_net, from_module
from skperf.components import (
    ComponentAttributor,
    ComponentDisplay,
    ComponentEditor,
    EditPathDisplay,
)
from tests.components.networks import Residual, made


def spoiled():
    """Labels that the network gets right except in one group."""
    module, X, _ = made(Residual)
    y = from_module(module).predict(X)
    groups = (np.arange(40) < 8).astype(int)
    y[:8] = (y[:8] + 1) % 3
    return module, X, y, groups


def attributor():
    return ComponentAttributor(fraction=0.2, budget=60)


def test_it_edits_for_the_worst_group():
    module, X, y, groups = spoiled()
    editor = ComponentEditor(
        module, attributor(), target="worst_group", max_drop=0.2, random_state=0
    ).fit(X, y, groups=groups)
    assert isinstance(editor.edited_, EditedClassifier)
    before, after = editor.estimator_.predict(X), editor.predict(X)
    assert (after == y)[:8].mean() >= (before == y)[:8].mean()
    assert editor.edit_report_["k"] > 0
    assert editor.predict_proba(X).shape == (40, 3)


def test_no_component_no_change():
    module, X, y, _ = spoiled()
    editor = ComponentEditor(module, attributor(), k=0).fit(X, y)
    np.testing.assert_array_equal(editor.predict(X), from_module(module).predict(X))


def worst_group_accuracy(y_true, y_pred, groups):
    return min(accuracy_score(y_true[groups == g], y_pred[groups == g]) for g in np.unique(groups))


def test_groups_reach_it_through_grid_search():
    module, X, y, groups = spoiled()
    order = np.random.default_rng(0).permutation(40)
    with sklearn.config_context(enable_metadata_routing=True):
        editor = ComponentEditor(
            from_module(module), attributor(), target="worst_group", random_state=0
        ).set_fit_request(groups=True)
        scorer = make_scorer(worst_group_accuracy).set_score_request(groups=True)
        search = GridSearchCV(editor, {"k": [0, 3]}, scoring=scorer, cv=2)
        search.fit(X[order], y[order], groups=groups[order])
    assert set(search.cv_results_["param_k"]) == {0, 3}


def test_targets_by_function_and_bad_ones_by_message():
    module, X, y, _groups = spoiled()
    chosen = ComponentEditor(
        module, attributor(), target=lambda X, y, predicted, groups: y == 1, k=2
    ).fit(X, y)
    assert chosen.edit_report_["k"] == 2
    with pytest.raises(ValueError, match="needs groups"):
        ComponentEditor(module, attributor(), target="worst_group").fit(X, y)
    with pytest.raises(ValueError, match="boolean mask of shape"):
        ComponentEditor(module, attributor(), target=lambda *_: np.arange(3)).fit(X, y)


def test_a_net_is_fitted_and_edited():
    X, y = load_iris(return_X_y=True)
    editor = ComponentEditor(default_net(max_epochs=5), attributor(), random_state=0).fit(X, y)
    assert editor.score(X, y) >= editor.estimator_.score(X, y) - 0.02
    with torch.no_grad():
        logits = editor.to_module()(torch.as_tensor(X)).numpy()
    np.testing.assert_allclose(editor.decision_function(X), logits, atol=1e-5)
    np.testing.assert_array_equal(editor.predict(X), logits.argmax(1))


def test_displays():
    import matplotlib.pyplot as plt

    module, X, y, _ = spoiled()
    model = ComponentAttributor(module, fraction=0.2, budget=60).fit(X, y)
    display = ComponentDisplay.from_estimator(model, examples=[0])
    assert display.image_.get_array().shape == (2, 6)
    assert [t.get_text() for t in display.ax_.get_yticklabels()] == ["stem", "conv1"]
    edited = model.edit(np.arange(8), max_drop=0.3)
    path = EditPathDisplay.from_estimator(edited, name="an edit")
    assert len(path.lines_) == 2
    assert path.ax_.get_title() == "an edit"
    plt.close("all")
