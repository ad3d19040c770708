"""ComponentAttributor: truth and contract."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from joblib import parallel_config
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from torch import nn

from skperf import EditedClassifier, default_net, from_module
from skperf.backbone.parameters import fingerprint
from skperf.components import Component, ComponentAttributor
from skperf.components import passes as passes_module
from tests.components.networks import Residual, linear, made

METHODS = ["auto", "regression", "path_gradient", "loo", "gradient"]


def closed_form(module, X, y):
    """Part of the margin that each hidden row (without its bias) carries."""
    rows = X @ module.hidden.weight.detach().numpy().T
    weight = module.out.weight.detach().numpy()
    return rows * (weight[y] - weight[1 - y])


def state(module):
    return (
        fingerprint(module),
        [part.training for part in module.modules()],
        [(p.requires_grad, p.grad) for p in module.parameters()],
        [len(part._forward_hooks) for part in module.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_on_a_linear_network(method):
    module, X, y = linear()
    model = ComponentAttributor(module, method=method, budget=80, fraction=0.2, random_state=0).fit(
        X, y
    )
    truth = closed_form(module, X, y)
    np.testing.assert_allclose(model.attributions_, truth, atol=2e-3)
    masks = np.random.default_rng(1).random((6, 8)) > 0.3
    np.testing.assert_allclose(
        model.predict_counterfactual(masks), model.counterfactual(masks), atol=5e-3
    )
    np.testing.assert_allclose(model.attribute(X[:4], y[:4]), truth[:4], atol=2e-3)
    assert model.score(X, y, n_masks=20) > 0.999


def test_the_shapes_and_names_of_the_contract():
    module, X, y = made(Residual)
    model = ComponentAttributor(module, fraction=0.2, budget=60, random_state=0).fit(X, y)
    assert model.attributions_.shape == model.stderr_.shape == (40, 12)
    assert model.intercept_.shape == model.baseline_output_.shape == (40,)
    assert model.components_.dtype.names == ("index", "module", "kind", "unit")
    assert model.components_[7].module == "conv1"
    assert model.get_feature_names_out()[7] == "conv1[1]"
    assert model.n_forward_equivalents_ == 60
    assert -1 <= model.oob_score_ <= 1
    masks = np.ones((3, 12))
    assert model.predict_counterfactual(masks, X[:5], y[:5]).shape == (5, 3)
    assert model.counterfactual(masks[0]).shape == (40, 1)
    np.testing.assert_allclose(model.counterfactual(masks)[:, 0], model.baseline_output_)
    frame = model.set_output(transform="pandas").transform(X[:5])
    assert list(frame.columns) == list(model.get_feature_names_out())


def test_attributions_say_how_much_the_output_falls():
    module, X, y = made(Residual)
    model = ComponentAttributor(module, method="loo", components=["stem"]).fit(X, y)
    changed, _, _ = made(Residual)
    with torch.no_grad():
        changed.stem.weight[3] = 0
    other = ComponentAttributor(changed, method="loo", components=["stem"]).fit(X, y)
    fall = model.baseline_output_ - other.baseline_output_
    np.testing.assert_allclose(model.attributions_[:, 3], fall, atol=1e-9)


def test_transform_takes_predicted_labels_and_each_row_by_itself():
    module, X, y = made(Residual)
    model = ComponentAttributor(module, fraction=0.2, budget=60, random_state=0).fit(X, y)
    predicted = from_module(module).predict(X)
    np.testing.assert_allclose(model.transform(X), model.attribute(X, predicted))
    np.testing.assert_allclose(model.transform(X)[[3, 9]], model.transform(X[[3, 9]]), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_the_users_module_is_as_it_was(method, ablation):
    module, X, y = made(Residual)
    module.train()
    module.stem.weight.requires_grad_(False)
    before = state(module)
    model = ComponentAttributor(
        FrozenEstimator(from_module(module).estimator),
        method=method,
        ablation=ablation,
        budget=30,
        fraction=0.2,
    ).fit(X, y)
    model.transform(X[:3])
    model.score(X, y, n_masks=5)
    model.edit([0, 1], k=2)
    model.ablate(np.zeros(12))
    assert state(module) == before


def test_the_module_is_as_it_was_after_an_exception_and_an_interrupt():
    module, X, y = made(Residual)
    before = state(module)

    for error in (RuntimeError, KeyboardInterrupt):
        calls = []

        def output(logits, codes, error=error, calls=calls):
            calls.append(1)
            if len(calls) > 12:
                raise error
            return logits[:, 0]

        with pytest.raises(error):
            ComponentAttributor(module, output=output, fraction=0.2).fit(X, y)
        assert state(module) == before


def test_an_interrupted_fit_keeps_what_it_has_and_can_go_on(monkeypatch):
    module, X, y = made(Residual)
    task, calls = passes_module._masks, []

    def interrupted(question, numbers):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(numbers)
        return task(question, numbers)

    options = {"fraction": 0.2, "method": "regression", "random_state": 0}
    model = ComponentAttributor(module, budget=129, **options)
    with monkeypatch.context() as patch:
        patch.setattr(passes_module, "_masks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fit(X, y)
    assert model.n_forward_equivalents_ == 65
    assert model.score(n_masks=20) > 0.5
    model.set_params(budget=64).partial_fit(X, y)
    whole = ComponentAttributor(module, budget=129, **options).fit(X, y)
    np.testing.assert_allclose(model.attributions_, whole.attributions_, atol=1e-9)


def test_a_refit_that_fails_keeps_the_last_and_one_that_is_interrupted_keeps_none(monkeypatch):
    module, X, y = made(Residual)
    options = {"fraction": 0.2, "method": "regression", "budget": 65, "random_state": 0}
    model = ComponentAttributor(module, **options).fit(X, y)
    expected = model.attributions_
    with pytest.raises(ValueError, match="no_such"):
        model.set_params(components="no_such").fit(X[:20], y[:20])
    assert model.attributions_ is expected
    assert model.score(n_masks=20) > 0.5

    def interrupted(question, numbers):
        raise KeyboardInterrupt

    model.set_params(components="auto")
    with monkeypatch.context() as patch:
        patch.setattr(passes_module, "_masks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fit(X[:20], y[:20])
    with pytest.raises(NotFittedError):
        model.score(n_masks=20)
    assert model.partial_fit(X[:20], y[:20]).attributions_.shape[0] == 20


def test_auto_goes_on_where_it_was_interrupted_among_single_ablations(monkeypatch):
    module, X, y = made(Residual)
    options = {"fraction": 0.2, "random_state": 0}

    def interrupted(question, numbers):
        raise KeyboardInterrupt

    model = ComponentAttributor(module, budget=60, **options)
    with monkeypatch.context() as patch:
        patch.setattr(passes_module, "_singles", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fit(X, y)
    done = model._study.measured.done
    assert done.gradients
    assert not done.masks
    assert np.isfinite(model.attributions_).all()
    model.partial_fit(X, y)
    assert model._study.measured.alone.shape == model.attributions_.shape


def test_single_ablations_stand_until_there_are_masks_to_better_them():
    module, X, y = made(Residual)
    options = {"fraction": 0.2, "random_state": 0}
    alone = ComponentAttributor(module, method="loo", **options).fit(X, y)
    few, more = (ComponentAttributor(module, budget=b, **options).fit(X, y) for b in (18, 200))
    np.testing.assert_array_equal(few.attributions_, alone.attributions_)
    assert few.n_forward_equivalents_ == 18
    assert more.score(n_masks=50) > few.score(n_masks=50)


def test_a_network_left_in_training_mode_is_attributed_as_it_predicts():
    module, X, y = made(Residual)
    options = {"fraction": 0.2, "budget": 60, "random_state": 0}
    expected = ComponentAttributor(module.eval(), **options).fit(X, y).attributions_
    before = state(module.train())
    model = ComponentAttributor(module, **options).fit(X, y)
    np.testing.assert_array_equal(model.attributions_, expected)
    assert module.training
    assert state(module) == before


@pytest.mark.parametrize("method", ["auto", "regression", "path_gradient"])
def test_more_budget_later_equals_all_at_once(method):
    module, X, y = made(Residual)
    options = {"fraction": 0.2, "method": method, "random_state": 0}
    later = ComponentAttributor(module, budget=31, warm_start=True, **options).fit(X, y)
    later.set_params(budget=61).fit(X, y)
    whole = ComponentAttributor(module, budget=61, **options).fit(X, y)
    assert later.n_forward_equivalents_ == 61
    if method != "auto":
        np.testing.assert_allclose(later.attributions_, whole.attributions_, atol=1e-8)


@pytest.mark.parametrize(("backend", "n_jobs"), [("loky", 2), ("threading", 3)])
def test_workers_change_nothing(backend, n_jobs):
    module, X, y = made(Residual)
    options = {"fraction": 0.2, "budget": 160, "random_state": 0}
    alone = ComponentAttributor(module, **options).fit(X, y)
    with parallel_config(backend=backend):
        together = ComponentAttributor(module, n_jobs=n_jobs, **options).fit(X, y)
    np.testing.assert_array_equal(alone.attributions_, together.attributions_)


def test_early_stopping_spends_less():
    module, X, y = linear()
    model = ComponentAttributor(module, budget=2000, fraction=0.2, tol=0.01, random_state=0)
    assert model.fit(X, y).n_forward_equivalents_ < 1700


@pytest.mark.parametrize("output", ["margin", "log_odds", "logit", "loss", "proba"])
def test_outputs(output):
    module, X, y = linear()
    model = ComponentAttributor(module, output=output, method="loo").fit(X, y)
    logits = module(torch.as_tensor(X)).detach()
    expected = {
        "margin": logits[range(30), y] - logits[range(30), 1 - y],
        "log_odds": logits[range(30), y] - logits[range(30), 1 - y],
        "logit": logits[range(30), y],
        "loss": nn.functional.cross_entropy(logits, torch.as_tensor(y), reduction="none"),
        "proba": logits.softmax(1)[range(30), y],
    }
    np.testing.assert_allclose(model.baseline_output_, expected[output], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regressor", [LinearRegression(), Lasso(alpha=1e-4)])
def test_any_regressor_of_scikit_learn(regressor):
    module, X, y = linear()
    model = ComponentAttributor(
        module, method="regression", budget=80, fraction=0.2, regressor=regressor, random_state=0
    ).fit(X, y)
    np.testing.assert_allclose(model.attributions_, closed_form(module, X, y), atol=0.05)
    assert model.score(X, y) > 0.99
    assert model.transform(X[:2]).shape == (2, 8)


@pytest.mark.parametrize(
    "estimator",
    [LogisticRegression(), MLPClassifier((12,), max_iter=20), default_net(max_epochs=2), None],
    ids=["logistic", "mlp", "net", "none"],
)
def test_classifiers_are_cloned_and_fitted(estimator):
    X, y = load_iris(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ComponentAttributor(estimator, budget=40, random_state=0).fit(X, names)
    assert list(model.classes_) == ["a", "b", "c"]
    assert model.transform(X[:2]).shape == (2, model.n_components_)


def test_grid_search_over_fraction_method_and_budget():
    module, X, y = made(Residual)
    search = GridSearchCV(
        ComponentAttributor(from_module(module), random_state=0),
        {"fraction": [0.1, 0.2], "method": ["auto", "gradient"], "budget": [30]},
        cv=2,
    ).fit(X, y)
    assert search.best_params_["method"] == "auto"
    assert search.best_score_ > 0.5


def test_clone_and_pickle():
    module, X, y = made(Residual)
    model = ComponentAttributor(from_module(module), fraction=0.2, budget=40, random_state=0)
    fitted = pickle.loads(pickle.dumps(clone(model).fit(X, y)))
    np.testing.assert_allclose(fitted.transform(X[:3]), model.fit(X, y).transform(X[:3]))


def test_components_by_record_glob_and_kind():
    module, X, y = made(Residual)
    chosen = [Component("conv1", "conv_filter", 2), "stem"]
    model = ComponentAttributor(module, components=chosen, fraction=0.2, budget=20).fit(X, y)
    assert model.get_feature_names_out()[0] == "conv1[2]"
    assert model.n_components_ == 7


def test_edits_realise_what_they_promise_and_leave_the_original():
    module, X, y = made(Residual)
    y = from_module(module).predict(X)
    y[:4] = (y[:4] + 1) % 3
    model = ComponentAttributor(module, fraction=0.2, budget=100, random_state=0).fit(X, y)
    edited = model.edit([0, 1, 2, 3], max_drop=0.1)
    report = edited.edit_report_
    assert isinstance(edited, EditedClassifier)
    assert report["k"] == len(report["components"]) == (~report["mask"]).sum()
    logits = edited.to_module()(torch.as_tensor(X)).detach().numpy()
    label = logits[np.arange(40), y]
    logits[np.arange(40), y] = -np.inf
    margins = label - logits.max(1)
    step = next(s for s in report["path"] if s["k"] == report["k"])
    assert margins[:4].mean() == pytest.approx(step["target_output"])
    assert step["guard_score"] >= report["path"][0]["guard_score"] - 0.1
    assert edited.revert() is model.estimator_
    np.testing.assert_array_equal(edited.predict(X), model.ablate(report["mask"]).predict(X))


@pytest.mark.parametrize("ablation", ["zero", "zero_output", "mean", "resample", 0.3])
def test_an_edited_classifier_is_the_ablated_network_for_any_ablation(ablation):
    module, X, y = made(Residual)
    model = ComponentAttributor(
        module, ablation=ablation, fraction=0.2, budget=20, output="logit"
    ).fit(X, y)
    mask = np.arange(12) % 4 > 0
    edited = pickle.loads(pickle.dumps(model.ablate(mask)))
    logits = edited.to_module()(torch.as_tensor(X)).detach().numpy()
    np.testing.assert_allclose(
        logits[np.arange(40), y], model.counterfactual(mask)[:, 0], atol=1e-9
    )
    again = ComponentAttributor(edited, fraction=0.2, budget=20).fit(X, y)
    assert again.attributions_.shape[0] == 40


@pytest.mark.parametrize("criterion", ["welch", "budgeted"])
def test_directions(criterion):
    module, X, y = linear()
    model = ComponentAttributor(module, fraction=0.2, budget=100, random_state=0).fit(X, y)
    up = model.edit(np.arange(3), k=2, criterion=criterion)
    down = model.edit(np.arange(3), k=2, criterion=criterion, direction="decrease")
    assert up.edit_report_["realised_change"] > down.edit_report_["realised_change"]
    assert up.edit_report_["realised_change"] == pytest.approx(
        up.edit_report_["predicted_change"], abs=0.01
    )


def test_top_components_are_those_whose_loss_hurts_most():
    module, X, y = linear()
    model = ComponentAttributor(module, method="loo").fit(X, y)
    top = model.top_components(3, examples=[0])
    np.testing.assert_array_equal(top["index"], np.argsort(-model.attributions_[0])[:3])
