"""The scorer with method="replay", against the run itself and against refits."""

import pickle
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.frozen import FrozenEstimator
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, GradientNormClipping
from torch import nn

from skperf import InfluenceScorer, Net, TrainingRun, from_module
from skperf.influence import Replay

X, y = load_iris(return_X_y=True)
X = X.astype(np.float32)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]
TRAIN, QUERY = slice(0, None, 2), slice(1, None, 10)


def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def net(**params):
    settings = {"optimizer": torch.optim.SGD, "lr": 0.05, "max_epochs": 15, "batch_size": 25}
    return Net(module(), **settings | params)


def scorer(estimator=None, method="replay", **params):
    estimator = net() if estimator is None else estimator
    return InfluenceScorer(estimator, method=method, random_state=0, **params)


@pytest.fixture(scope="module")
def fitted():
    return scorer().fit(X[TRAIN], NAMES[TRAIN])


def losses(estimator):
    proba = estimator.predict_proba(X[QUERY])
    return -np.log(proba[np.arange(len(proba)), y[QUERY]])


def test_scores_are_what_refits_do(fitted):
    found = fitted.influence(X[QUERY], NAMES[QUERY])
    assert found.shape == (15, 75)
    assert fitted.unit_ == "loss"
    base, actual = losses(fitted.estimator_), []
    for row in range(0, 75, 7):
        weights = np.ones(75)
        weights[row] = 0
        again = clone(fitted.estimator_).fit(X[TRAIN], NAMES[TRAIN], sample_weight=weights)
        actual.append(losses(again) - base)
    assert np.corrcoef(np.ravel(actual), found[:, ::7].T.ravel())[0, 1] > 0.99
    same = clone(fitted.estimator_).fit(X[TRAIN], NAMES[TRAIN], sample_weight=np.ones(75))
    assert np.array_equal(losses(same), base)


def test_every_question_reads_one_matrix(fitted):
    exact = scorer(method=Replay(tolerance=0)).fit(X[TRAIN], NAMES[TRAIN])
    found = exact.influence(X[QUERY], NAMES[QUERY])
    tolerance = {"rtol": 1e-3, "atol": 1e-5 * np.abs(found).max()}
    for how in ("sum", "mean"):
        np.testing.assert_allclose(
            exact.influence(X[QUERY], NAMES[QUERY], aggregate=how),
            getattr(found, how)(0),
            **tolerance,
        )
    out = np.empty_like(found)
    assert exact.influence(X[QUERY], NAMES[QUERY], out=out) is out
    np.testing.assert_allclose(out, found, **tolerance)
    top = exact.top_k(X[QUERY], NAMES[QUERY], k=3)
    np.testing.assert_allclose(top.values, -np.sort(-found, 1)[:, :3], **tolerance)
    groups = exact.group_influence([[0, 3], [5]], X[QUERY], NAMES[QUERY])
    np.testing.assert_allclose(groups[:, 0], found[:, 0] + found[:, 3], **tolerance)
    own = exact.influence(X[TRAIN], NAMES[TRAIN]).diagonal()
    np.testing.assert_allclose(exact.self_influence_, own, rtol=1e-3, atol=1e-6)
    predicted = exact.transform(X[QUERY])
    labels = exact.estimator_.predict(X[QUERY])
    np.testing.assert_allclose(predicted, exact.influence(X[QUERY], labels), **tolerance)
    odds = scorer(method=Replay(tolerance=0), output="log_odds").fit(X[TRAIN], NAMES[TRAIN])
    both = np.corrcoef(odds.influence(X[QUERY], NAMES[QUERY]).ravel(), found.ravel())[0, 1]
    assert both > 0.5


def test_labels_and_settings(fitted):
    found = fitted.influence(X[QUERY], NAMES[QUERY], change="label")
    assert found.shape == (15, 75, 3)
    row, new = 40, 2
    changed = NAMES[TRAIN].copy()
    changed[row] = "virginica"
    again = clone(fitted.estimator_).fit(X[TRAIN], changed)
    actual = losses(again) - losses(fitted.estimator_)
    assert np.corrcoef(actual, found[:, row, new])[0, 1] > 0.95
    slopes = fitted.hyperparameter_gradient(X[QUERY], NAMES[QUERY])
    up, down = (
        losses(clone(fitted.estimator_).set_params(lr=0.05 + h).fit(X[TRAIN], NAMES[TRAIN]))
        for h in (1e-3, -1e-3)
    )
    assert np.corrcoef((up - down) / 2e-3, slopes["lr"])[0, 1] > 0.999
    assert set(slopes) == {"lr", "weight_decay"}


def test_smoothness_and_the_score_of_the_same_run(fitted):
    assert fitted.smoothness_ > 0.98
    assert fitted.score(X[QUERY], NAMES[QUERY], drop=0.1, n_subsets=15) > 0.9
    rough = scorer(net(lr=3.0, max_epochs=30)).fit(X[TRAIN], NAMES[TRAIN])
    with pytest.warns(UserWarning, match="the run is rough"):
        assert rough.smoothness_ < 0.98


def test_weights_and_pickles():
    weights = np.random.default_rng(0).uniform(0.5, 2, 75)
    weights[4] = 0
    one = scorer().fit(X[TRAIN], NAMES[TRAIN], sample_weight=weights)
    found = one.influence(X[QUERY], NAMES[QUERY])
    assert not found[:, 4].any()
    loaded = pickle.loads(pickle.dumps(one))
    np.testing.assert_allclose(
        loaded.influence(X[QUERY], NAMES[QUERY]), found, rtol=1e-5, atol=1e-9
    )


def test_other_forms_of_estimators():
    stock = NeuralNetClassifier(
        nn.Sequential(module(), nn.Softmax(1)), lr=0.05, max_epochs=3, train_split=None, verbose=0
    )
    assert scorer(stock).fit(X[TRAIN], NAMES[TRAIN]).influence(X[:2], NAMES[:2]).shape == (2, 75)
    trained = net(record_run=True, random_state=0).fit(X[TRAIN], NAMES[TRAIN])
    frozen = scorer(FrozenEstimator(trained)).fit(X[TRAIN], NAMES[TRAIN])
    assert frozen.influence(X[:2], NAMES[:2]).shape == (2, 75)
    with pytest.raises(ValueError, match="does not reproduce its end"):
        scorer(FrozenEstimator(trained)).fit(X[TRAIN][::-1].copy(), NAMES[TRAIN])
    with pytest.raises(ValueError, match="comes without one: give an estimator"):
        scorer(module()).fit(X[TRAIN], y[TRAIN])
    with pytest.raises(ValueError, match="needs method='replay'"):
        scorer(method="gradient_dot").fit(X, y).influence(X[:2], y[:2], change="label")


def test_a_loop_of_ones_own():
    own = module()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = torch.tensor(X[TRAIN]), torch.tensor(y[TRAIN])
    batches = [(rows, (inputs[rows], targets[rows])) for rows in torch.arange(75).split(25)] * 5
    with TrainingRun.record(own, optimizer, batches) as run:
        for _, (some, wanted) in run:
            optimizer.zero_grad()
            nn.functional.cross_entropy(own(some), wanted).backward()
            optimizer.step()
    method = Replay(run=run)
    found = scorer(own, method).fit(X[TRAIN], y[TRAIN]).influence(X[QUERY], y[QUERY])
    weights = np.ones(75)
    weights[30] = 0
    actual = losses(run.reweighted(weights)) - losses(run.reweighted(np.ones(75)))
    assert np.corrcoef(actual, found[:, 30])[0, 1] > 0.99
    with pytest.raises(ValueError, match="run ends at other weights than estimator has"):
        scorer(module(), method).fit(X[TRAIN], y[TRAIN])


class _Frozen(Callback):
    def __init__(self, last):
        self.last = last

    def on_epoch_begin(self, net, **kwargs):
        next(net.module_.parameters()).requires_grad_(len(net.history) > self.last)


class _Halved(Callback):
    def on_grad_computed(self, net, named_parameters, **kwargs):
        for _, parameter in named_parameters:
            parameter.grad.mul_(0.5)


class _Clamped(Callback):
    def on_epoch_begin(self, net, **kwargs):
        with torch.no_grad():
            next(net.module_.parameters()).clamp_(-0.1, 0.1)


class _Penalised(Net):
    def get_loss(self, *args, **kwargs):
        return super().get_loss(*args, **kwargs) + 0.01 * sum(
            p.abs().sum() for p in self.module_.parameters()
        )


def _fit_replay(net=Net, **kwargs):
    estimator = net(module(), max_epochs=2, batch_size=64, random_state=0, **kwargs)
    return InfluenceScorer(estimator, method="replay").fit(X, y)


def test_layers_that_a_callback_freezes_do_not_train_in_the_run():
    scorer = _fit_replay(callbacks=[("frozen", _Frozen(99))])
    weights = np.ones(150)
    scores, losses = scorer.influence(X[50:53], y[50:53])[:, 7], []
    for by in (0.1, -0.1):
        weights[7] = 1 + by
        again = clone(scorer.estimator_).fit(X, y, sample_weight=weights)
        p = again.predict_proba(X[50:53])
        losses.append(-np.log(p[np.arange(3), y[50:53]]))
    np.testing.assert_allclose(-(losses[0] - losses[1]) / 0.2, scores, rtol=0.05, atol=2e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"callbacks": [("frozen", _Frozen(1))]}, "frozen or thawed"),
        ({"callbacks": [("clamped", _Clamped())]}, "weights were changed"),
        ({"callbacks": [("halved", _Halved())]}, "does not reproduce its step"),
        ({"net": _Penalised}, "does not reproduce its step"),
    ],
)
def test_a_training_that_is_more_than_its_steps_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _fit_replay(**kwargs)


# Whole runs in double precision ---------------------------------------------------------------


class _Inputs(nn.Module):
    """Takes off a mean of past inputs, in a buffer that is replaced by another at every step."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.last(torch.tanh(self.first(x - self.mean)))


class _Activations(_Inputs):
    """Takes off a mean of past activations."""

    def forward(self, x):
        hidden = torch.tanh(self.first(x))[:, :4]
        if self.training:
            self.mean.mul_(0.9).add_(hidden.mean(0).detach(), alpha=0.1)
        return self.last(torch.cat([hidden - self.mean, hidden[:, :2]], 1))


class _Noisy(_Inputs):
    """Adds noise, drops rows and uses its first layer's weights twice."""

    def forward(self, x):
        if self.training:
            x = x + 0.1 * torch.randn_like(x) * (torch.rand(len(x), 1) < 0.7)
        again = torch.tanh(self.first(x))[:, :4]
        return {"logits": self.last(torch.tanh(self.first(again)))}


def _plain(layer):
    return layer


def _normed(norm):
    return nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


PARAMETRIZATIONS = nn.utils.parametrizations
DOUBLE = {
    "weight norm": (lambda: _normed(PARAMETRIZATIONS.weight_norm), {}),
    "buffers that follow inputs": (_Inputs, {"batch_size": 11}),
    "noise and shared weights": (_Noisy, {"optimizer__momentum": 0.9}),
    "Adam without a mean": (
        lambda: _normed(_plain),
        {"optimizer": torch.optim.Adam, "lr": 0.01, "optimizer__betas": (0.0, 0.9)},
    ),
    "AdamW without a mean square": (
        lambda: _normed(_plain),
        {
            "optimizer": torch.optim.AdamW,
            "lr": 0.001,
            "optimizer__betas": (0.5, 0.0),
            "optimizer__eps": 0.1,
        },
    ),
}


def _double(build, **params):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = build().double()
    settings = {"optimizer": torch.optim.SGD, "lr": 0.1, "max_epochs": 3, "batch_size": 8}
    return Net(own, random_state=0, **settings | params)


@pytest.mark.parametrize("kind", DOUBLE)
def test_scores_are_derivatives_of_whole_runs(kind):
    build, params = DOUBLE[kind]
    rows, labels = X[::7].astype(float), y[::7]
    fitted = scorer(_double(build, **params), Replay(tolerance=0)).fit(rows, labels)
    found = fitted.influence(X[QUERY].astype(float), y[QUERY])

    def refit(j, by):
        weights = np.ones(len(rows))
        weights[j] += by
        again = clone(fitted.estimator_).fit(rows, labels, sample_weight=weights)
        outputs = again.module_.eval()(torch.tensor(X[QUERY], dtype=torch.float64))
        outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
        return nn.functional.cross_entropy(outputs, torch.tensor(y[QUERY]), reduction="none")

    for j in (0, 9, 21):
        wide, near = ((refit(j, -h) - refit(j, h)) / (2 * h) for h in (1e-3, 5e-4))
        slope = ((4 * near - wide) / 3).detach().numpy()
        np.testing.assert_allclose(found[:, j], slope, atol=1e-6 * np.abs(slope).max())


LOGITS = nn.functional.binary_cross_entropy_with_logits


@pytest.mark.parametrize("weight", [None, torch.tensor([3.0], dtype=torch.float64)])
def test_binary_nets_are_gone_back_through(weight):
    rows, labels, asked = X[::7].astype(float), y[::7] > 0, torch.tensor(X[QUERY]).double()
    params = {} if weight is None else {"criterion__pos_weight": weight}
    net = _double(lambda: nn.Linear(4, 1), criterion=nn.BCEWithLogitsLoss, **params)
    fitted = scorer(net, Replay(tolerance=0)).fit(rows, labels)
    found = fitted.influence(asked.numpy(), y[QUERY] > 0)
    relabelled = fitted.influence(asked.numpy(), y[QUERY] > 0, change="label")

    def train(weights, targets):
        run = fitted.estimator_.run_.recorded
        own = nn.Linear(4, 1).double()
        own.load_state_dict(run.module.state_dict())
        optimizer, inputs = torch.optim.SGD(own.parameters(), lr=0.1), torch.tensor(rows)
        for step in run.steps:
            some = step.rows.long()
            optimizer.zero_grad()
            outputs = own(inputs[some])[:, 0]
            loss = LOGITS(outputs, targets[some], pos_weight=weight, reduction="none")
            (loss * weights[some]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            return LOGITS(own(asked)[:, 0], torch.tensor(y[QUERY] > 0).double(), reduction="none")

    ones, targets, h = torch.ones(22).double(), torch.tensor(labels).double(), 1e-4
    for j in (0, 20):
        one = torch.eye(22)[j].double() * h
        slope = ((train(ones - one, targets) - train(ones + one, targets)) / (2 * h)).numpy()
        np.testing.assert_allclose(found[:, j], slope, atol=1e-6 * np.abs(slope).max())
        other = one * (1 - 2 * targets)  # towards the other label
        up, down = train(ones, targets + other), train(ones, targets - other)
        slope = ((up - down) / (2 * h)).numpy()
        new = relabelled[:, j, int(1 - targets[j])]
        np.testing.assert_allclose(new, slope, atol=1e-6 * np.abs(slope).max())


def _numbers(k):
    return torch.tensor(X[::7, :k]).double() / 5 + 0.1


LOOPS = {
    "values": (1, "squared_error", nn.MSELoss(reduction="none"), _numbers(1)),
    "several values": (2, nn.SmoothL1Loss(), nn.SmoothL1Loss(reduction="none"), _numbers(2)),
    "labels": (
        3,
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(reduction="none"),
        (torch.tensor(X[::7, :3]) > 3).double(),
    ),
    "shares": (
        3,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="none"),
        (lambda some: some / some.sum(1, keepdim=True))(_numbers(3)),
    ),
    "augmented": (3, "cross_entropy", nn.CrossEntropyLoss(reduction="none"), torch.tensor(y[::7])),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_loops_on_other_targets_and_augmented_rows(kind):
    k, loss, value, targets = LOOPS[kind]
    inputs, generator = torch.tensor(X[::7]).double(), torch.Generator().manual_seed(0)
    batches = []
    for rows in torch.randperm(22, generator=generator).split(8) * 3:
        noise = torch.randn(len(rows), 4, generator=generator) * (kind == "augmented")
        batches.append((rows, (inputs[rows] + noise, targets[rows])))
    asked = inputs[:5] + 0.1

    def train(own, watched, weights):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
        with watched(own, optimizer, batches) as run:
            for rows, (some, wanted) in run:
                optimizer.zero_grad()
                losses = value(own(some), wanted).reshape(len(rows), -1).mean(1)
                (losses * weights[rows]).mean().backward()
                optimizer.step()
        with torch.no_grad():
            return run, value(own(asked), targets[:5]).reshape(5, -1).mean(1)

    def own():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, k)).double()

    module, ones, h = own(), torch.ones(22).double(), 1e-4
    run, _ = train(module, partial(TrainingRun.record, loss=loss), ones)
    wrapped = from_module(module, loss=loss)
    fitted = scorer(wrapped, Replay(run=pickle.loads(pickle.dumps(run)), tolerance=0))
    found = fitted.fit(inputs.numpy(), targets.numpy()).influence(asked, targets[:5].numpy())
    for j in (0, 20):
        one = torch.eye(22)[j].double() * h
        down, up = (
            train(own(), lambda a, b, c: nullcontext(c), w)[1] for w in (ones - one, ones + one)
        )
        slope = ((down - up) / (2 * h)).numpy()
        np.testing.assert_allclose(found[:, j], slope, atol=1e-6 * np.abs(slope).max())
    again = run.reweighted(np.ones(22)).module_.state_dict()
    assert all(torch.equal(again[name], own) for name, own in module.state_dict().items())


@pytest.mark.parametrize(
    ("build", "params", "message"),
    [
        (_Activations, {}, "buffer 'mean' follows the weights"),
        (lambda: _normed(PARAMETRIZATIONS.spectral_norm), {}, "_u' follows the weights"),
        (lambda: _normed(_plain), {"optimizer": torch.optim.RMSprop}, "run of RMSprop"),
        (
            lambda: _normed(_plain),
            {"optimizer": torch.optim.Adam, "optimizer__amsgrad": True},
            "amsgrad=True can't be gone back through",
        ),
        (
            lambda: _normed(_plain),
            {"callbacks": [("clip", GradientNormClipping(0.3, float("inf")))]},
            "one callback of the 2-norm",
        ),
    ],
)
def test_what_cannot_be_gone_back_through_is_refused(build, params, message):
    asked = scorer(_double(build, **params))
    with pytest.raises(ValueError, match=message):
        asked.fit(X[::7].astype(float), y[::7]).influence(X[QUERY].astype(float), y[QUERY])


class _Unseeded(_Inputs):
    """Draws where no seed of the run reaches."""

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))) * (1 + 0.1 * float(np.random.rand()))


def test_layers_that_draw_unseeded_are_refused():
    with pytest.raises(ValueError, match="or a layer is not deterministic"):
        scorer(_double(_Unseeded)).fit(X[::7].astype(float), y[::7])


def test_a_budget_below_four_states_is_refused_and_four_will_do():
    module, rows = _normed(_plain).double(), torch.arange(22)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    inputs, targets = torch.tensor(X[::7]).double(), torch.tensor(y[::7])
    with TrainingRun.record(module, optimizer, [(rows, (inputs, targets))] * 12) as run:
        for _, (some, wanted) in run:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(some), wanted).backward()
            optimizer.step()
    size = 8 * sum(parameter.numel() for parameter in module.parameters())

    def asked(budget):
        method = Replay(run=run, tolerance=0)
        return scorer(module, method, memory_budget=budget).fit(inputs.numpy(), targets.numpy())

    with pytest.raises(ValueError, match=f"is too small: .* {size} bytes .* are {8 * size} bytes"):
        asked(8 * size - 1).influence(inputs, targets)
    few, many = (asked(b).influence(inputs, targets) for b in (8 * size, "1GB"))
    np.testing.assert_allclose(few, many, rtol=1e-12)


@pytest.mark.parametrize("across", [False, True])
def test_slices_of_rows_round_as_they_did(across):
    # 64-bit rows of 4: slices begin where no kernel for aligned memory may read, or lie crosswise
    module, inputs = _normed(_plain).double(), torch.tensor(X[::7]).double()
    inputs = inputs.T.contiguous().T if across else inputs
    optimizer, targets = torch.optim.SGD(module.parameters(), lr=0.1), torch.tensor(y[::7])
    parts = [slice(0, 7), slice(7, 15), slice(15, 22)]
    batches = [(torch.arange(22)[part], (inputs[part], targets[part])) for part in parts * 3]
    with TrainingRun.record(module, optimizer, batches) as run:
        for _, (some, wanted) in run:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(some), wanted).backward()
            optimizer.step()
    fitted = scorer(module, Replay(run=run)).fit(inputs.numpy(), targets.numpy())
    assert np.isfinite(fitted.influence(inputs.numpy(), targets.numpy())).all()
    again = run.reweighted(np.ones(22)).module_.state_dict()
    assert all(torch.equal(again[name], own) for name, own in module.state_dict().items())
