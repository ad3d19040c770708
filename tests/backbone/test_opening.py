import pickle
import warnings
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Freezer
from skorch.dataset import Dataset, ValidSplit
from skorch.helper import predefined_split
from torch import nn
from torch.utils.data import default_collate

from skperf import (
    MLP,
    ComponentAttributor,
    EditedClassifier,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    Sparse,
    from_module,
)
from skperf.backbone._edited import edited
from skperf.backbone._opening import class_logits, fit_estimator, open_network, source_of
from skperf.backbone._validation import check_labelled_rows, check_rows
from skperf.backbone.network import Network

X, y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]
TWO = y < 2


def trained_module():
    return Net(MLP, lr=0.01, max_epochs=20, random_state=0).fit(X, y).module_


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
@pytest.mark.parametrize("rows", [slice(None), TWO], ids=["three classes", "two classes"])
def test_mlp_classifier_is_converted_exactly(activation, rows):
    mlp = MLPClassifier((5, 4), activation=activation, random_state=0, max_iter=2000, tol=1e-2)
    mlp.fit(X[rows], NAMES[rows])
    network = open_network(mlp)
    assert network.dtype == torch.float64
    proba = network.logits(X[rows]).softmax(1).numpy()
    np.testing.assert_allclose(proba, mlp.predict_proba(X[rows]), atol=1e-12)


@pytest.mark.parametrize("rows", [slice(None), TWO], ids=["three classes", "two classes"])
@pytest.mark.parametrize("intercept", [True, False])
def test_logistic_regression_is_converted_exactly(rows, intercept):
    model = LogisticRegression(fit_intercept=intercept, max_iter=1000).fit(X[rows], NAMES[rows])
    network = open_network(model)
    proba = network.logits(X[rows]).softmax(1).numpy()
    np.testing.assert_allclose(proba, model.predict_proba(X[rows]), atol=1e-12)
    n_parameters = sum(p.numel() for p in network.module.parameters())
    assert n_parameters == model.coef_.size + intercept * len(model.coef_)


def test_a_classifier_is_cloned_and_fitted():
    net = Net(MLP, max_epochs=2)
    fitted = fit_estimator(net, X, NAMES, random_state=0)
    assert fitted is not net
    assert not net.initialized_
    assert fitted.classes_.tolist() == ["setosa", "versicolor", "virginica"]


def test_a_fitted_classifier_is_fitted_anew_with_a_warning():
    with pytest.warns(UserWarning, match=r"its weights are not used.*FrozenEstimator\(estimator\)"):
        fit_estimator(GaussianNB().fit(X, y), X, y)


@pytest.mark.parametrize("freeze", [FrozenEstimator, lambda e: from_module(e.module_, e.classes_)])
def test_a_frozen_network_is_used_as_it_is(freeze):
    net = Net(MLP, max_epochs=5, random_state=0).fit(X, NAMES)
    frozen = freeze(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit_estimator(clone(frozen), X, NAMES)
    assert source_of(fitted) is net.module_
    assert open_network(fitted).module is not net.module_
    assert open_network(fitted).classes.tolist() == net.classes_.tolist()


@pytest.mark.parametrize("form", [lambda module: module, FrozenEstimator], ids=["bare", "frozen"])
def test_a_module_means_codes_as_labels(form):
    module = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)), nn.Flatten())
    fitted = fit_estimator(form(module), X, y)
    assert source_of(fitted) is module
    assert open_network(fitted).module is not module
    assert fitted.classes_.tolist() == [0, 1, 2]


def test_a_module_must_return_one_row_of_logits_for_each_row():
    with pytest.raises(ValueError, match=r"must return logits of shape \(n, n_classes\).*readout="):
        fit_estimator(nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)), X, y)


def test_a_single_logit_separates_two_classes():
    module = nn.Linear(4, 1)
    classifier = from_module(module, ["no", "yes"])
    z = module(torch.tensor(X, dtype=torch.float32))[:, 0].detach()
    np.testing.assert_allclose(classifier.predict_proba(X)[:, 1], z.sigmoid(), rtol=1e-5)
    np.testing.assert_allclose(classifier.decision_function(X), z, rtol=1e-5)


def test_a_wrong_number_of_classes_is_refused():
    classifier = from_module(nn.Linear(4, 3), ["a", "b"])
    with pytest.raises(ValueError, match="classes= names 2"):
        classifier.predict(X)


def test_from_module_refuses_what_is_no_module_and_repeated_labels():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got GaussianNB"):
        from_module(GaussianNB())
    with pytest.raises(ValueError, match="different labels"):
        from_module(nn.Linear(4, 2), ["a", "a"])


def test_the_number_of_classes_is_seen_on_a_row_and_not_guessed():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.gate = nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, rows):
            return self.head(rows) * torch.sigmoid(self.gate(rows))

    classifier = from_module(Gated())
    with pytest.raises(AttributeError, match=r"classes=\["):
        _ = classifier.classes_
    assert classifier.predict_proba(X).shape == (150, 3)
    assert classifier.classes_.tolist() == [0, 1, 2]


@pytest.mark.parametrize("labels", [y, NAMES], ids=["codes", "names"])
def test_stock_skorch_nets(labels):
    net = NeuralNetClassifier(
        MLP(4, 3),
        criterion=nn.CrossEntropyLoss,
        lr=0.1,
        max_epochs=150,
        train_split=None,
        iterator_train__shuffle=True,
        verbose=0,
    )
    weights = [parameter.clone() for parameter in net.module.parameters()]
    fitted = fit_estimator(net, X, labels, random_state=0)
    assert (fitted.predict_proba(X.astype("f4")).argmax(1) == y).mean() > 0.9
    assert open_network(fitted).classes.tolist() == np.unique(labels).tolist()
    assert all(map(torch.equal, weights, net.module.parameters()))


def test_stock_net_with_probabilities_is_read_as_their_logarithm():
    module = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    net = NeuralNetClassifier(module, train_split=None, verbose=0, max_epochs=2)
    fitted = fit_estimator(net, X, y, random_state=0)
    proba = open_network(fitted).logits(X).softmax(1).numpy()
    np.testing.assert_allclose(proba, fitted.predict_proba(X.astype("f4")), rtol=1e-5)


def test_stock_binary_net():
    net = NeuralNetBinaryClassifier(
        nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), train_split=None, verbose=0, max_epochs=2
    )
    fitted = fit_estimator(net, X[TWO], y[TWO], random_state=0)
    proba = open_network(fitted).logits(X[TWO]).softmax(1).numpy()
    np.testing.assert_allclose(proba, fitted.predict_proba(X[TWO].astype("f4")), rtol=1e-5)


def test_stock_nets_take_sample_weight():
    net = NeuralNetClassifier(
        MLP(4, 3), criterion=nn.CrossEntropyLoss, lr=0.1, train_split=None, verbose=0
    )
    some = np.where(y == 2, 0.0, 1.0)
    fitted = fit_estimator(net, X, y, sample_weight=some, random_state=0)
    assert not (fitted.predict(X) == 2).any()
    numbers = NeuralNetRegressor(nn.Linear(4, 1), train_split=None, verbose=0, max_epochs=1)
    with pytest.raises(ValueError, match="takes no sample_weight"):
        fit_estimator(numbers, X, X[:, :1], sample_weight=some)
    fitted = fit_estimator(numbers, X, X[:, :1], random_state=0)
    assert open_network(fitted).classes is None


def test_what_has_to_module_is_used_as_it_is():
    class Reprogrammed:
        classes_ = np.array(["a", "b", "c"])

        def __init__(self):
            self.module = trained_module()

        def fit(self, X, y):
            raise AssertionError("must not be fitted")

        def __sklearn_is_fitted__(self):
            return True

        def to_module(self):
            return self.module

    estimator = Reprogrammed()
    assert fit_estimator(estimator, X, y) is estimator
    assert source_of(estimator) is estimator.module
    assert open_network(estimator).classes.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("wrong", ["resnet50", 3, object()])
def test_other_objects_are_refused(wrong):
    with pytest.raises(TypeError, match=r"estimator must be a scikit-learn classifier.*got"):
        fit_estimator(wrong, X, y)


def test_a_classifier_without_a_network_says_so():
    with pytest.raises(TypeError, match="no torch network inside: GaussianNB"):
        open_network(GaussianNB().fit(X, y))


def test_class_logits_of_any_classifier():
    proba = GaussianNB().fit(X, y)
    logits = class_logits(proba, X)
    shift = logits - np.log(np.clip(proba.predict_proba(X), np.finfo(float).tiny, None))
    assert np.abs(shift).max() < 1e-12
    margin = RidgeClassifier().fit(X[TWO], y[TWO])
    np.testing.assert_array_equal(class_logits(margin, X)[:, 1], margin.decision_function(X))
    with pytest.raises(TypeError, match="must have predict_proba or decision_function"):
        class_logits(Mute(), X)


class Mute:
    classes_ = (0, 1)


class Improper(Mute):
    def predict_proba(self, X):
        return np.full((len(X), 2), 0.7)


@pytest.mark.parametrize("frozen", [False, True])
def test_probabilities_are_those_of_a_nets_own_nonlinearity(frozen):
    net = NeuralNetClassifier(
        nn.Linear,
        module__in_features=3,
        module__out_features=3,
        criterion=nn.CrossEntropyLoss,
        predict_nonlinearity=lambda outputs: (outputs / 2).softmax(-1),
        train_split=None,
        max_epochs=2,
        verbose=0,
    )
    rng = np.random.default_rng(0)
    rows = 3 * rng.normal(size=(40, 3)).astype(np.float32)
    net.fit(rows, np.arange(40) % 3)
    logits = class_logits(FrozenEstimator(net) if frozen else net, rows)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(shares, net.predict_proba(rows), rtol=1e-5)


def test_class_logits_refuses_improper_probabilities():
    with pytest.raises(ValueError, match="each row summing to 1"):
        class_logits(Improper(), X)


def test_seeds_decide_and_leave_the_global_stream_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fits = [fit_estimator(None, X, y, random_state=s).predict_proba(X) for s in (0, 0, 1)]
    assert np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])
    assert torch.equal(state, torch.get_rng_state())


def test_tensor_casts_by_what_the_module_takes():
    floats = Network(nn.Linear(4, 2), np.arange(2))
    assert floats.inputs(np.arange(4)).tree.dtype == torch.float32
    images = np.full((2, 1, 3, 3), 255, dtype=np.uint8)
    assert floats.inputs(images).tree.max() == 1
    assert floats.inputs(images.reshape(2, 9)).tree.max() == 255
    tokens = Network(nn.EmbeddingBag(10, 2), np.arange(2))
    assert tokens.inputs(np.arange(4)).tree.dtype == torch.long
    double = Network(nn.Linear(4, 2).double(), np.arange(2))
    assert double.inputs(X.astype("f4")).tree.dtype == torch.float64


def test_codes_follow_the_classes_and_refuse_others():
    network = Network(nn.Linear(4, 3), np.array(["b", "c", "a"]))
    assert network.codes(["a", "b", "c"]).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"does not know: \['z'\].*'b', 'c', 'a'"):
        network.codes(["a", "z"])


def test_logits_do_not_depend_on_the_batch_size():
    network = Network(trained_module(), np.arange(3))
    torch.testing.assert_close(network.logits(X, 7), network.logits(X, 1000))


def test_rows_and_labels_are_needed():
    classifier = from_module(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        classifier.predict(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="requires y to be passed"):
        check_labelled_rows(LogisticRegression(), X, None)


def test_rows_may_be_tensors_frames_or_images():
    class Bare(BaseEstimator):
        pass

    bare = Bare()
    assert check_rows(bare, torch.tensor(X), reset=True).shape == X.shape
    check_labelled_rows(bare, pd.DataFrame(X, columns=[*"abcd"]), NAMES, reset=True)
    assert bare.feature_names_in_.tolist() == [*"abcd"]
    images = check_rows(bare, np.zeros((5, 3, 8, 8), np.uint8), reset=True)
    assert not hasattr(bare, "n_features_in_")
    assert images.array.dtype == np.uint8
    with pytest.raises(ValueError, match="NaN"):
        check_rows(Bare(), np.full((3, 2), np.nan), reset=True)
    with pytest.raises(ValueError, match="Unknown label type"):
        check_labelled_rows(Bare(), X, X[:, 0], reset=True)


def test_edited_classifier():
    original = FrozenEstimator(Net(MLP, max_epochs=5, random_state=0).fit(X, NAMES))
    network = open_network(original).copy()
    with torch.no_grad():
        list(network.module.parameters())[-1].add_(torch.tensor([0.0, 100.0, 0.0]))
    classifier = edited(original, network, {"k": 1})
    assert isinstance(classifier, EditedClassifier)
    assert (classifier.predict(X) == "versicolor").all()
    assert classifier.edit_report_ == {"k": 1}
    assert classifier.revert() is original
    assert clone(classifier) is classifier
    assert fit_estimator(classifier, X, NAMES) is classifier
    loaded = pickle.loads(pickle.dumps(classifier))
    assert np.array_equal(loaded.predict_proba(X), classifier.predict_proba(X))
    assert (original.predict(X) != "versicolor").any()


def test_the_steps_of_nested_pipelines_all_come_before_the_network():
    inner = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    fitted = make_pipeline(PCA(3, random_state=0), inner).fit(X, NAMES)
    network = open_network(FrozenEstimator(fitted))
    proba = network.logits(X).softmax(1).numpy()
    np.testing.assert_allclose(proba, fitted.predict_proba(X), atol=1e-6)


class Doubled(NeuralNetClassifier):
    def infer(self, x, **fit_params):
        return 2 * super().infer(x, **fit_params)


class Focal(NeuralNetClassifier):
    def get_loss(self, y_pred, y_true, *args, **kwargs):
        return super().get_loss(y_pred, y_true, *args, **kwargs) ** 2


class Turned(NeuralNetClassifier):
    def evaluation_step(self, batch, training=False):
        return -super().evaluation_step(batch, training)


class Tempered(NeuralNetClassifier):
    def predict_proba(self, X):
        return super().predict_proba(X) / 2 + 1 / 6


class OfOurs(Net):
    def get_loss(self, *args, **kwargs):
        return 2 * super().get_loss(*args, **kwargs)


class Scaled(Dataset):
    def transform(self, X, y):
        inputs, targets = super().transform(X, y)
        return inputs / 10, targets


OPTIONS = {"criterion": nn.CrossEntropyLoss, "max_epochs": 2, "lr": 0.1, "verbose": 0}


def of_own_class(kind, **options):
    X, y = load_iris(return_X_y=True)
    options = OPTIONS | ({} if issubclass(kind, Net) else {"train_split": None}) | options
    return kind(nn.Linear(4, 3), **options).fit(X.astype("f4"), y), X.astype("f4"), y


def test_infer_of_ones_own_is_run():
    net, X, y = of_own_class(Doubled)
    frozen = FrozenEstimator(net)
    raw = X[:4] @ net.module_.weight.detach().numpy().T + net.module_.bias.detach().numpy()
    before = net.module_.weight.detach().clone()
    np.testing.assert_allclose(open_network(frozen).logits(X[:4]), 2 * raw, rtol=1e-5)
    found = InfluenceScorer(frozen, method="gradient_dot", output="logit").fit(X, y)
    # the gradient of a doubled logit by one row of weights
    inputs = np.c_[X, np.ones(len(X), "f4")]
    proba = net.predict_proba(X)
    slope = (proba - np.eye(3)[y])[:, y[:4]].T * 2
    expected = -slope * 2 * (inputs[:4] @ inputs.T)
    np.testing.assert_allclose(found.influence(X[:4], y[:4]), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(net.module_.weight, before)


@pytest.mark.parametrize("kind", [Turned, Tempered])
def test_answers_of_ones_own_are_asked_for(kind):
    net, X, y = of_own_class(kind)
    for room in (InfluenceScorer, ComponentAttributor, PerformativeAdapter):
        with pytest.raises(TypeError, match=r"whose own .* would be lost: pass skperf.from_module"):
            room(FrozenEstimator(net)).fit(X, y)


@pytest.mark.parametrize(
    "options", [{"iterator_valid__collate_fn": default_collate}, {"dataset": Scaled}]
)
def test_ways_in_of_ones_own_are_asked_for(options):
    net, X, y = of_own_class(NeuralNetClassifier, **options)
    with pytest.raises(TypeError, match=r"whose own .* would be lost: pass skperf.from_module"):
        InfluenceScorer(FrozenEstimator(net)).fit(X, y)


@pytest.mark.parametrize("kind", [Focal, OfOurs])
def test_a_loss_of_ones_own_is_asked_for(kind):
    net, X, y = of_own_class(kind)
    frozen = FrozenEstimator(net)
    for asked in (InfluenceScorer(frozen), ComponentAttributor(frozen, output="loss")):
        with pytest.raises(ValueError, match=r"own get_loss says no loss .*loss="):
            asked.fit(X, y)
    found = InfluenceScorer(frozen, loss="cross_entropy").fit(X, y).influence(X[:3], y[:3])
    same = from_module(net.module_, classes=[0, 1, 2], loss="cross_entropy")
    expected = InfluenceScorer(same).fit(X, y).influence(X[:3], y[:3])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert ComponentAttributor(frozen, components="layers").fit(X, y).attributions_.shape[0] == 150


class Deep(nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.body.requires_grad_(not frozen)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Net, {"train_only": "head*"}),
        *product(
            (Net, NeuralNetClassifier),
            (
                {"module__frozen": True},
                {"callbacks": [Freezer("body*")]},
                {"optimizer__param_groups": [("body*", {"lr": 0.0})]},
            ),
        ),
    ],
)
def test_what_a_net_did_not_train_has_no_part(kind, options):
    options = OPTIONS | ({} if kind is Net else {"train_split": None}) | options
    inputs = X.astype("f4")
    net = kind(Deep, optimizer=torch.optim.SGD, **options).fit(inputs, y)
    found = InfluenceScorer(FrozenEstimator(net), method="gradient_dot").fit(inputs, y)
    with torch.no_grad():
        features = torch.tanh(net.module_.body(torch.as_tensor(inputs))).numpy()
        slope = net.module_(torch.as_tensor(inputs)).softmax(1).numpy() - np.eye(3)[y]
    features = np.c_[features, np.ones(150)]
    expected = (slope[:5] @ slope.T) * (features[:5] @ features.T)
    np.testing.assert_allclose(found.influence(inputs[:5], y[:5]), expected, rtol=1e-3, atol=1e-5)


def test_single_entries_that_train_are_asked_about():
    inputs = X.astype("f4")
    net = Net(Deep, train_only=Sparse(ratio=0.3), max_epochs=2, random_state=0).fit(inputs, y)
    frozen = FrozenEstimator(net)
    with pytest.raises(ValueError, match=r"train_only chose single entries of .*parameters="):
        InfluenceScorer(frozen).fit(inputs, y)
    whole = InfluenceScorer(frozen, method="gradient_dot", parameters="head*").fit(inputs, y)
    assert whole.influence(inputs[:2], y[:2]).shape == (2, 150)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(nn.functional.dropout(self.body(inputs), 0.3, training=True))


@pytest.mark.filterwarnings("ignore:gating the network")
@pytest.mark.parametrize("kind", [Net, NeuralNetClassifier, from_module])
def test_what_draws_when_it_predicts_draws_from_no_stream_of_others(kind):
    inputs, trained = X.astype("f4"), Dropping()
    if kind is from_module:
        frozen = from_module(trained)
    else:
        options = OPTIONS | ({} if kind is Net else {"train_split": None})
        frozen = FrozenEstimator(kind(trained, **options).fit(inputs, y))
    before = torch.get_rng_state()
    attributor = ComponentAttributor(frozen, budget=16, random_state=0)
    rounds = np.arange(150) % 5
    found = [
        (
            PerformativeAdapter(frozen).fit(X, y, rounds=rounds).predict_proba(X[:4]),
            attributor.fit(inputs[:20], y[:20]).attributions_,
        )
        for _ in range(2)
    ]
    assert torch.equal(before, torch.get_rng_state())
    for once, again in zip(*found, strict=True):
        np.testing.assert_array_equal(once, again)


class Several(nn.Module):
    def __init__(self, named=False):
        super().__init__()
        self.own, self.other, self.named = nn.Linear(4, 3), nn.Linear(4, 2), named

    def forward(self, inputs):
        own, other = self.own(inputs), self.other(inputs)
        return {"other": other, "logits": own} if self.named else (own, other)


class OfSeveral(NeuralNetClassifier):
    def get_loss(self, y_pred, *args, **kwargs):
        outputs = y_pred["logits"] if isinstance(y_pred, dict) else y_pred[0]
        return super().get_loss(outputs, *args, **kwargs)


@pytest.mark.parametrize("named", [False, True])
def test_stock_nets_whose_modules_return_several(named):
    inputs = X.astype("f4")
    net = OfSeveral(Several, module__named=named, train_split=None, **OPTIONS).fit(inputs, y)
    frozen = FrozenEstimator(net)
    asked = {"method": "gradient_dot", "loss": "cross_entropy"}
    scorer = InfluenceScorer(frozen, **asked).fit(inputs, y)
    own = net.module_.own
    plain = InfluenceScorer(own, **asked).fit(inputs, y)
    expected = plain.influence(inputs[:3], y[:3])
    np.testing.assert_allclose(scorer.influence(inputs[:3], y[:3]), expected, rtol=1e-4)
    again = pickle.loads(pickle.dumps(scorer))
    np.testing.assert_allclose(again.influence(inputs[:3], y[:3]), expected, rtol=1e-4)
    proba = PerformativeAdapter(frozen).fit(inputs, y).predict_proba(inputs[:3])
    raw = own(torch.as_tensor(inputs[:3])).softmax(1).detach()
    np.testing.assert_allclose(proba, raw, rtol=1e-5)


@pytest.mark.parametrize("kind", [Net, NeuralNetClassifier])
def test_rows_that_a_net_held_out_are_warned_of(kind):
    inputs = X.astype("f4")
    net = kind(nn.Linear(4, 3), train_split=ValidSplit(5), **OPTIONS).fit(inputs, y)
    with pytest.warns(UserWarning, match=r"train_split=ValidSplit, which keeps rows out"):
        InfluenceScorer(FrozenEstimator(net)).fit(inputs, y)
    with pytest.warns(UserWarning, match=r"early_stopping=True, which keeps rows out"):
        InfluenceScorer(MLPClassifier((4,), early_stopping=True)).fit(inputs, y)
    apart = predefined_split(Dataset(inputs[:9], y[:9]))
    net = kind(nn.Linear(4, 3), train_split=apart, **OPTIONS).fit(inputs, y)
    InfluenceScorer(FrozenEstimator(net)).fit(inputs, y)


@pytest.mark.parametrize("squeezed", [True, False])
def test_targets_of_one_axis_beside_outputs_of_two_are_refused(squeezed):
    X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    parts = [nn.Linear(4, 1), nn.Flatten(0)] if squeezed else [nn.Linear(4, 1)]
    net = NeuralNetRegressor(nn.Sequential(*parts), train_split=None, max_epochs=2, verbose=0)
    if squeezed:
        assert fit_estimator(net, X, X[:, 0]).module_ is not None
        return
    with pytest.raises(ValueError, match=r"y has shape \(12,\).* returns \(n, 1\).*y\[:, None\]"):
        fit_estimator(net, X, X[:, 0])
    fitted = fit_estimator(net, X, X[:, :1])
    assert open_network(fitted).loss.kind == "values"
