"""What a new user tries: odd networks, odd arrays, arguments that can't be meant."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from torch import nn

from skperf import (
    MLP,
    ComponentAttributor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    from_module,
)
from skperf.backbone.batch_norm import prediction_time_batch_norm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4)).astype(np.float32)
y = np.arange(30) % 3


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, u, v):
        return self.first(u) - self.second(v)


class Through(nn.Module):
    def __init__(self, function, width=3):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.function = nn.Linear(4, width), function

    def forward(self, inputs):
        return self.function(self.linear(inputs))


def softmax(values, axis):
    shares = np.exp(values - values.max(axis, keepdims=True))
    return shares / shares.sum(axis, keepdims=True)


def test_the_classes_of_tokens_stand_behind_the_tokens():
    tokens = RNG.normal(size=(5, 6, 4)).astype(np.float32)
    for width in (2, 3):
        module = nn.Linear(4, width)
        logits = module(torch.tensor(tokens)).detach().numpy()
        classifier = from_module(module, classes=list("abc")[:width])
        np.testing.assert_allclose(classifier.predict_proba(tokens), softmax(logits, 2), rtol=1e-4)
        assert (classifier.predict(tokens) == np.array(list("abc"))[logits.argmax(2)]).all()
        want = logits[..., 1] - logits[..., 0] if width == 2 else logits
        np.testing.assert_allclose(classifier.decision_function(tokens), want, rtol=1e-4, atol=1e-6)
    # maps, as torch has them
    maps = RNG.normal(size=(5, 4, 6)).astype(np.float32)
    module = nn.Conv1d(4, 3, 1)
    want = softmax(module(torch.tensor(maps)).detach().numpy(), 1)
    classifier = from_module(module, classes=list("abc"))
    np.testing.assert_allclose(classifier.predict_proba(maps), want, rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.sigmoid().squeeze(1),
        lambda z: z.sigmoid().clamp(1e-6, 1 - 1e-6),
        lambda z: z.sigmoid()[:, 0],
        lambda z: z.sigmoid().reshape(-1).unsqueeze(1),
    ],
    ids=["squeeze", "clamp", "select", "unsqueeze"],
)
def test_one_probability_is_never_read_as_a_logit(function):
    module = Through(function, 1)
    p = module.linear(torch.tensor(X)).sigmoid().detach().numpy()
    found = from_module(module).predict_proba(X)
    np.testing.assert_allclose(found, np.hstack([1 - p, p]), rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: 1 / (1 + torch.exp(-z)),
        lambda z: 1 - z.sigmoid(),
        lambda z: z.sigmoid() * z.cos().square(),
        lambda z: 0.5 * (z / 2).tanh() + 0.5,
    ],
    ids=["reciprocal", "complement", "product", "tanh"],
)
def test_what_may_be_probabilities_is_asked_about(function):
    module = Through(function, 1)
    with pytest.raises(ValueError, match=r"operation .* probabilities, or logits.*readout="):
        InfluenceScorer(module).fit(X, y % 2)
    labels = from_module(Through(function, 3), loss="binary_cross_entropy")
    with pytest.raises(ValueError, match=r"operation .* probabilities, or logits.*readout="):
        InfluenceScorer(labels).fit(X, np.eye(3)[y])
    said = from_module(module, [0, 1], readout=lambda p: torch.cat([1 - p, p], 1).log())
    p = module(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(said.predict_proba(X), np.hstack([1 - p, p]), rtol=1e-4)


def test_a_scaled_logit_is_known_by_the_other_rows():
    module = Through(lambda z: 0.5 * z, 1)
    z = module(torch.tensor(X))[:, 0].detach().numpy()
    first = np.argsort(np.abs(z - 0.5))[:2]
    assert ((z[first] > 0) & (z[first] < 1)).all()
    order = np.r_[first, np.setdiff1d(np.arange(30), first)]
    found = from_module(module).decision_function(X[order])
    np.testing.assert_allclose(found, z[order], rtol=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_hidden_probabilities_are_asked_about(width):
    module = Through(lambda z: z.detach().sigmoid(), width)
    with pytest.raises(ValueError, match=r"probabilities, or logits.*readout="):
        from_module(module).predict_proba(X)


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_predict_and_are_refused_where_parameters_vary():
    module = nn.Sequential(nn.Linear(4, 3))
    for scripted in (torch.jit.script(module), torch.jit.trace(module, torch.zeros(2, 4))):
        want = from_module(module).predict_proba(X)
        np.testing.assert_allclose(from_module(scripted).predict_proba(X), want, rtol=1e-6)
        with pytest.raises(ValueError, match="scripted module, whose parameters can't be varied"):
            InfluenceScorer(from_module(scripted)).fit(X, y).influence(X[:2], y[:2])
        with pytest.raises(ValueError, match="scripted module, whose parameters can't be varied"):
            ComponentAttributor(from_module(scripted)).fit(X, y)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))

    def forward(self, x):
        x.sub_(0.5).mul_(2)  # writes to its input
        return self.net(x)


@pytest.mark.parametrize("method", ["gradient_dot", "exact"])
def test_a_forward_that_writes_to_its_input_gets_the_rows_every_time(method):
    module, rows = Centred(), X.copy()
    inner, shifted = module.net, (X - 0.5) * 2
    found, wanted = (
        InfluenceScorer(net, method=method).fit(x, y).influence(x[:4], y[:4])
        for net, x in ((module, rows), (inner, shifted))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    model = ComponentAttributor(module, output="logit", budget=30, random_state=0).fit(rows, y)
    logits = inner(torch.as_tensor(shifted)).detach().numpy()
    np.testing.assert_allclose(model.baseline_output_, logits[range(30), y], atol=1e-6)
    assert model.verified_ < 1e-5
    np.testing.assert_array_equal(rows, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive"),
        ({"batch_size": 2.5}, "batch_size must be a positive"),
        ({"readout": lambda returned: 3}, "readout must return a tensor.*got int"),
        ({"readout": lambda returned: returned.sum()}, "readout must return a tensor"),
        ({"readout": lambda returned: returned[:, 0]}, "its readout returned one number a row"),
        ({"readout": lambda returned: returned[:, :1]}, "its readout returned one number a row"),
        ({"readout": lambda returned: returned[:1]}, r"got shape \(1, 3\) for 2 rows"),
        ({"forward": lambda module, rows: None}, "forward returns a NoneType"),
        ({"loss": torch.optim.SGD}, "loss must be a name"),
        ({"classes": list("abcd")}, "3 outputs a row, but classes= names 4"),
    ],
)
def test_from_module_names_the_argument(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        from_module(nn.Linear(4, 3), **options).predict(X)


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        ("binary_cross_entropy", np.full((30, 3), 5), "y must lie in 0..1"),
        ("squared_error", np.full((30, 3), "a"), "must hold numbers"),
        ("squared_error", np.full(30, "a"), "y must hold numbers"),
    ],
)
def test_targets_that_the_loss_cannot_mean(loss, targets, message):
    with pytest.raises(ValueError, match=message):
        InfluenceScorer(from_module(nn.Linear(4, 3), loss=loss)).fit(X, targets)


def test_several_inputs_may_be_nullable_tables_or_objects():
    want = Net(Two, max_epochs=2, random_state=0).fit((X, X), y).predict_proba((X, X))
    for other in (pd.DataFrame(X).astype("Float32"), X.astype(object)):
        net = Net(Two, max_epochs=2, random_state=0).fit({"u": X, "v": other}, y)
        np.testing.assert_allclose(net.predict_proba({"v": other, "u": X}), want, rtol=1e-5)
    missing = X.astype(object)
    missing[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"X\['v'\] contains NaN or infinity, first at row 3"):
        Net(Two).fit({"u": X, "v": missing}, y)
    with pytest.raises(TypeError, match=r"X\['v'\] is sparse"):
        Net(Two).fit({"u": X, "v": csr_matrix(X)}, y)


@pytest.mark.parametrize(
    "returned",
    [lambda z: (z, z * 0), lambda z: {"other": z * 0, "logits": z}],
    ids=["tuple", "dict"],
)
def test_a_net_may_return_a_record(returned):
    plain = Net(Through, module__function=nn.Identity(), max_epochs=3, random_state=0).fit(X, y)
    net = Net(Through, module__function=returned, max_epochs=3, random_state=0).fit(X, y)
    np.testing.assert_array_equal(net.predict_proba(X), plain.predict_proba(X))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_trains_in_float32(kind):
    module = nn.Linear(4, 3).to(kind)
    found = Net(module, max_epochs=3, random_state=0).fit(X, y).predict_proba(X)
    want = Net(module.float(), max_epochs=3, random_state=0).fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("options", "labels", "weight", "message"),
    [
        ({"module": nn.Linear(4, 2)}, y, None, r"outputs of shape \(30, 2\) for the 3 classes"),
        ({"module": nn.Linear(4, 5)}, y, None, r"; CrossEntropyLoss takes \(n, 3\)"),
        ({"criterion": nn.MSELoss}, y, None, "criterion=MSELoss"),
        ({"criterion": nn.BCEWithLogitsLoss}, y, None, "criterion=BCEWithLogitsLoss"),
        ({"train_only": []}, y, None, "train_only"),
        ({"batch_size": 0}, y, None, "batch_size"),
        ({"lr": -1}, y, None, "lr must be a number from 0 on, got -1"),
        ({"lr": "fast"}, y, None, "lr must be a number"),
        ({"batch_size": -5}, y, None, "batch_size"),
        ({"module": nn.Linear(4, 3).requires_grad_(False)}, y, None, "requires_grad"),
        ({}, np.array([1, "a", 2.5], dtype=object)[y], None, "y mixes texts"),
        ({}, y, ["a"] * 30, "sample_weight must hold numbers"),
        ({}, y, np.full(30, 1e300), r"sample_weight holds 1e\+300"),
    ],
)
def test_net_names_the_argument(options, labels, weight, message):
    options = {"module": nn.Linear(4, 3)} | options
    with pytest.raises(ValueError, match=message):
        Net(**options, max_epochs=1).fit(X, labels, sample_weight=weight)


@pytest.mark.parametrize(
    "option", ["module", "criterion", "optimizer", "iterator_train", "train_split"]
)
def test_net_names_what_is_no_class(option):
    options = {"module": nn.Linear(4, 3)} | {option: "adam"}
    with pytest.raises(TypeError, match=f"{option} must be a class or a function, got 'adam'"):
        Net(**options).fit(X, y)


@pytest.mark.parametrize(
    "changed",
    [
        {"module": nn.Linear(4, 3)},
        {"module__hidden": (3,)},
        {"criterion": nn.NLLLoss, "criterion__reduction": "sum"},
        {"optimizer": torch.optim.SGD, "lr": 0.5},
        {"callbacks": None, "max_epochs": 1, "batch_size": 3},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_net_answers_as_fitted_until_it_is_fitted_anew(changed):
    net = Net(MLP, module__hidden=(5,), max_epochs=2, random_state=0).fit(X, y)
    before = net.predict_proba(X)
    np.testing.assert_array_equal(net.set_params(**changed).predict_proba(X), before)
    if "callbacks" not in changed:
        with pytest.raises(ValueError, match="were set since the fit, and partial_fit goes on"):
            net.partial_fit(X, y)
    if "module" in changed:
        net.set_params(module__hidden=None)
        del net.module__hidden
    again = clone(net).fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(net.fit(X, y).predict_proba(X), again)
    assert np.abs(again - before).max() > 1e-4
    net.partial_fit(X, y)


def test_a_warm_start_goes_on_and_refits_what_has_changed():
    shared = {"module__hidden": (5,), "batch_size": -1, "iterator_train__shuffle": False}
    whole = Net(MLP, max_epochs=4, random_state=0, **shared).fit(X, y)
    warm = Net(MLP, max_epochs=2, random_state=0, warm_start=True, **shared).fit(X, y)
    first = warm.predict_proba(X)
    np.testing.assert_allclose(warm.fit(X, y).predict_proba(X), whole.predict_proba(X), rtol=1e-5)
    warm.set_params(module__hidden=(7,)).fit(X, y)
    assert warm.module_.hidden[0].out_features == 7
    warm.set_params(module__hidden=(5,)).fit(X, y)
    np.testing.assert_array_equal(warm.predict_proba(X), first)
    with pytest.raises(ValueError, match="labels that the estimator does not know"):
        warm.fit(X, y + 1)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_row_alone_has_no_batch_to_normalise_by(tracked):
    norm = nn.BatchNorm1d(5, track_running_stats=tracked)
    module = nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 3))
    with pytest.raises(ValueError, match="batch_size than 29 for 30 rows, or iterator_train__drop"):
        Net(module, batch_size=29).fit(X, y)
    net = Net(module, batch_size=29, iterator_train__drop_last=True, max_epochs=1).fit(X, y)
    if tracked:
        assert net.predict(X[:1]) == net.predict(X)[:1]
        return
    with torch.no_grad():
        expected = net.module_(torch.tensor(X)).numpy()
    np.testing.assert_allclose(net.decision_function(X), expected, atol=1e-6)
    frozen = from_module(module)
    for call in (
        lambda: net.predict(X[:1]),
        lambda: frozen.predict(X[:1]),
        lambda: InfluenceScorer(module).fit(X, y),
        lambda: ComponentAttributor(module).fit(X, y),
        lambda: PerformativeAdapter(module).fit(X, y).predict(X[:1]),
    ):
        with pytest.raises(ValueError, match=r"BatchNorm1d has no running statistics"):
            call()


def test_prediction_time_batch_norm_wants_a_module():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got str"):
        prediction_time_batch_norm("net").__enter__()


@pytest.mark.parametrize("estimator", [InfluenceScorer, PerformativeAdapter])
@pytest.mark.parametrize("size", [1e300, 1e-300])
def test_weights_of_an_absurd_size_are_refused(estimator, size):
    with pytest.raises(ValueError, match="sample_weight holds 1e"):
        estimator(from_module(nn.Linear(4, 3))).fit(X, y, sample_weight=np.full(30, size))


@pytest.mark.parametrize("indices", [[0.5], "a", 5, [[0], [1]]], ids=repr)
def test_rows_to_forget_are_numbers_of_rows(indices):
    scorer = InfluenceScorer(from_module(nn.Linear(4, 3))).fit(X, y)
    with pytest.raises(ValueError, match="indices must be a list of row numbers or a mask"):
        scorer.remove(indices=indices)


def test_influence_refuses_labels_of_mixed_types():
    mixed = np.array([1, "a", 2.5], dtype=object)[y]
    with pytest.raises(ValueError, match="y mixes texts"):
        InfluenceScorer(from_module(nn.Linear(4, 3))).fit(X, mixed)


def test_labels_that_are_fractions_are_labels_where_they_are_named():
    module, names = nn.Linear(4, 3), np.array([10.5, 2.5, 3.5])
    plain = InfluenceScorer(module, method="gradient_dot").fit(X, y)
    named = InfluenceScorer(from_module(module, names), method="gradient_dot").fit(X, names[y])
    np.testing.assert_allclose(named.influence(X, names[y]), plain.influence(X, y), rtol=1e-6)
    with pytest.raises(ValueError, match="y holds numbers"):
        InfluenceScorer(from_module(module, names)).fit(X, y + 0.25)
