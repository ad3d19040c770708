"""Leave-one-out, selection, attacks, denoisers and every method's actions, against the truth."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from influence_nets import mlp
from scipy.stats import pearsonr
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler
from skorch.dataset import ValidSplit
from torch import nn
from torch.nn.functional import cross_entropy

from skperf import MLP, Net, from_module
from skperf.backbone._opening import open_network
from skperf.backbone.losses import Penalty, resolve_loss
from skperf.influence import (
    EKFAC,
    GGN,
    GIF,
    InfluenceScorer,
    LiSSA,
    Nearest,
    PerDraw,
    TracIn,
    noised,
)
from skperf.influence._trust import _recipe_of


@pytest.fixture(scope="module")
def cancer():
    X, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))[:120]
    return StandardScaler().fit_transform(X)[order], y[order]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("weight", [None, "balanced", {0: 10, 1: 1}])
def test_leaving_rows_out_of_weighted_training(cancer, weight, given):
    X, y = cancer
    own = np.random.default_rng(1).uniform(0.2, 3, 100) if given else np.ones(100)
    model = LogisticRegression(C=0.1, class_weight=weight, tol=1e-10, max_iter=9999)

    def losses(rows):
        fitted = clone(model).fit(X[rows], y[rows], own[rows])
        return -fitted.predict_log_proba(X[100:])[np.arange(20), y[100:]]

    rows = np.arange(100)
    actual = np.stack([losses(np.delete(rows, j)) - losses(rows) for j in range(0, 100, 10)], 1)
    frozen = FrozenEstimator(clone(model).fit(X[:100], y[:100], own))
    scorer = InfluenceScorer(frozen).fit(X[:100], y[:100], own if given else None)
    found = scorer.loo_effect(X[100:], y[100:])[:, ::10]
    assert pearsonr(found.ravel(), actual.ravel())[0] > 0.99
    assert np.linalg.norm(found - actual) / np.linalg.norm(actual) < 0.1
    # the penalty is known, and used without being asked for
    total = own.sum() if weight != {0: 10, 1: 1} else own @ np.where(y[:100] == 0, 10, 1)
    if weight != "balanced":
        assert scorer.damping_ == pytest.approx(1 / (0.1 * total), rel=1e-6)
        plain = scorer.influence(X[100:], y[100:])[:, ::10]
        assert pearsonr(plain.ravel(), actual.ravel())[0] > 0.95


def optimum(loss, X, y, weights, decay):
    """Fit a linear layer to rest: X (n, d), y (n, ...), weights (n,)."""
    layer = nn.Linear(X.shape[1], 3).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16
    )

    def closure():
        optimizer.zero_grad()
        value = (weights * loss.value(layer(X), y)).sum() / len(X)
        value = value + decay / 2 * sum(p.square().sum() for p in layer.parameters())
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return layer


@pytest.mark.parametrize(
    ("given", "decay"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), 0.01),
        (nn.CrossEntropyLoss(torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)), 0.01),
        (nn.CrossEntropyLoss(), 0.002),
        (nn.MSELoss(), 0.01),
    ],
    ids=["smoothed", "weighted", "hardly penalised", "regression"],
)
def test_leaving_rows_out_of_other_heads(given, decay):
    """Leave-one-out itself: for a squared error by one step, for others by as many as it takes."""
    rng = np.random.default_rng(0)
    loss, X = resolve_loss(given), torch.as_tensor(rng.normal(size=(50, 6)))
    classes = isinstance(given, nn.CrossEntropyLoss)
    y = torch.as_tensor(rng.integers(0, 3, 50) if classes else rng.normal(size=(50, 3)))
    ones = loss.weights(y[:40]) if classes and given.weight is not None else torch.ones(40)
    layer = optimum(loss, X[:40], y[:40], ones, decay)
    actual = []
    with torch.no_grad():
        before = loss.value(layer(X[40:]), y[40:])
    for j in range(40):
        weights = ones.clone()
        weights[j] = 0
        other = optimum(loss, X[:40], y[:40], weights, decay)
        with torch.no_grad():
            actual.append(loss.value(other(X[40:]), y[40:]) - before)
    actual = torch.stack(actual, 1).numpy()
    damping = decay / float(ones.mean())
    scorer = InfluenceScorer(layer, loss=given, damping=damping).fit(X[:40].numpy(), y[:40].numpy())
    found = scorer.loo_effect(X[40:].numpy(), y[40:].numpy())
    assert pearsonr(found.ravel(), actual.ravel())[0] > 1 - 1e-5
    error = np.linalg.norm(found - actual) / np.linalg.norm(actual)
    assert error < (0.01 if classes else 1e-6)


@pytest.mark.parametrize(
    "model",
    [
        LogisticRegression(C=0.5, solver="liblinear", tol=1e-10, max_iter=5000),
        LogisticRegression(C=np.inf, tol=1e-10, max_iter=9000),
        LinearRegression(),
        Ridge(alpha=[2.0, 2.0]),
    ],
    ids=["penalised intercept", "no penalty", "least squares", "strengths alike"],
)
def test_leaving_rows_out_of_what_scikit_learn_fits(model):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5)) * [1, 1, 3, 1, 0.2]
    y = X @ rng.normal(size=(5, 2)) + rng.normal(size=(60, 2)) * 2
    y = (y[:, 0] > 0.5).astype(int) if hasattr(model, "C") else y

    def losses(model):
        if hasattr(model, "C"):
            return -model.predict_log_proba(X[40:])[range(20), y[40:]]
        return ((model.predict(X[40:]) - y[40:]) ** 2).reshape(20, -1).mean(1)

    before = losses(clone(model).fit(X[:40], y[:40]))
    kept = [np.delete(np.arange(40), j) for j in range(40)]
    actual = np.stack([losses(clone(model).fit(X[k], y[k])) - before for k in kept], 1)
    found = InfluenceScorer(model).fit(X[:40], y[:40]).loo_effect(X[40:], y[40:])
    assert np.linalg.norm(found - actual) / np.linalg.norm(actual) < 1e-3


@pytest.mark.parametrize(
    "model",
    [
        LogisticRegression(l1_ratio=1.0, solver="saga", max_iter=9000),
        LogisticRegression(solver="liblinear", intercept_scaling=3),
        Ridge(alpha=[1.0, 2.0]),
        LinearRegression(positive=True),
    ],
)
def test_a_penalty_that_is_no_ridge_is_asked_for(model):
    X, y = load_iris(return_X_y=True)
    y = np.stack([y, y], 1) if isinstance(model, Ridge) else (y > 0).astype(int)
    with pytest.raises(ValueError, match=r"no one multiple of the squared weights.*damping="):
        InfluenceScorer(model).fit(X, y).influence(X[:3], y[:3])
    scores = InfluenceScorer(model, damping=0.1).fit(X, y).influence(X[:3], y[:3])
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("net", "spared"),
    [
        (Net, False),
        (partial(NeuralNetClassifier, train_split=None, verbose=0), False),
        (partial(Net, optimizer__param_groups=[("bias", {"weight_decay": 0.0})]), True),
        (partial(Net, criterion__weight=torch.tensor([1.0, 3.0, 0.5])), False),
    ],
    ids=["Net", "skorch", "spared biases", "class weights"],
)
def test_weight_decay_of_a_net_is_its_penalty(net, spared):
    X, y = load_iris(return_X_y=True)
    X, y = ((X - X.mean(0)) / X.std(0)).astype(np.float32)[::3], y[::3]
    rows, targets = torch.as_tensor(X, dtype=torch.float64), torch.as_tensor(y)
    fitted = net(
        nn.Linear(4, 3),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__weight_decay=0.02,
        lr=0.5,
        max_epochs=1500,
        batch_size=len(X),
    )
    # our own nets weigh rows
    ours = isinstance(fitted, Net)
    given = np.linspace(0.5, 2, len(X)) if ours else np.ones(len(X))
    fitted.fit(X, y, **({"sample_weight": given} if ours else {}))
    weight = fitted.criterion_.weight
    each = torch.as_tensor(given) * (1 if weight is None else weight.double()[targets])

    def losses(left_out=None):
        weights = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weights], 1, 500, tolerance_grad=1e-11, tolerance_change=0)
        kept = torch.arange(len(X)) != (-1 if left_out is None else left_out)

        def closure():
            solver.zero_grad()
            logits = rows @ weights[:, :4].T + weights[:, 4]
            value = (cross_entropy(logits, targets, reduction="none") * each * kept).mean()
            value = value + 0.01 * weights[:, : 4 if spared else 5].square().sum()
            value.backward()
            return value

        solver.step(closure)
        logits = (rows @ weights[:, :4].T + weights[:, 4]).detach()
        return cross_entropy(logits, targets, reduction="none").numpy()

    before = losses()
    actual = np.stack([losses(j) - before for j in range(len(X))], 1)
    scorer = InfluenceScorer(FrozenEstimator(fitted)).fit(X, y, sample_weight=given)
    found = scorer.loo_effect(X, y)
    assert np.linalg.norm(found - actual) / np.linalg.norm(actual) < 5e-3


@pytest.mark.parametrize("method", ["auto", "ggn", "ekfac", "arnoldi", "cg", "lissa", "exact"])
def test_a_network_that_is_sure_of_everything_has_no_curvature(method):
    y = np.arange(150) % 3
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3, 4) * 1e6)
    scorer = InfluenceScorer(layer, method=method).fit(np.eye(3, 4)[y], y)
    assert (scorer.influence(np.eye(3, 4), [0, 1, 2]) == 0).all()


def test_decoupled_decay_is_no_penalty():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))], weight_decay=0.1)
    assert Penalty.of(optimizer, "mean") is None


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(n_class=4, return_X_y=True)
    return (X / 16).astype(np.float32)[:260], y[:260]


@pytest.fixture(scope="module")
def net(digits):
    X, y = digits
    return Net(MLP, module__hidden=(12,), lr=0.02, max_epochs=12, random_state=0).fit(
        X[:150], y[:150]
    )


METHODS = ["gradient_dot", "ggn", "ekfac", "kfac", "cg", "arnoldi", "datainf", "trak", "gif"]


@pytest.mark.parametrize("method", [*METHODS, LiSSA(max_iter=50), "exact", "tracin"])
@pytest.mark.filterwarnings("ignore:conjugate gradients stopped")
def test_every_method_acts_on_the_users_own_network(digits, net, method):
    """In its own type and at its own weights, whatever networks the scores are summed over."""
    X, y = digits
    options = {"damping": 0.5, "random_state": 0}
    if method == "tracin":
        first = copy.deepcopy(net.module_)
        with torch.no_grad():
            for p in first.parameters():
                p.mul_(0.1)
        options["checkpoints"] = [first, net.module_]
    if method == "exact":
        options["parameters"] = "last"
    scorer = InfluenceScorer(FrozenEstimator(net), method=method, **options)
    scorer.fit(X[:150], y[:150])
    queries = X[150:156], y[150:156]
    assert scorer.influence(*queries).dtype == np.float32
    np.testing.assert_allclose(
        scorer.transform(X[150:156]),
        scorer.influence(X[150:156], net.predict(X[150:156])),
        rtol=1e-5,
    )
    own = -np.log(net.predict_proba(X[:150])[np.arange(150), y[:150]])
    if method != "tracin":
        np.testing.assert_allclose(scorer.loss_, own, rtol=1e-3, atol=1e-5)
    top = scorer.top_k(*queries, 5)
    assert (np.diff(top.values, axis=1) <= 0).all()
    groups = scorer.group_influence([[0, 1], [5]], *queries)
    np.testing.assert_allclose(groups[:, 1], scorer.influence(*queries)[:, 5], rtol=1e-4, atol=1e-7)
    curve = scorer.fading(*queries, steps=(1,), n_train=4)
    assert curve.actual.shape == (1, 6, 4)
    assert np.isfinite(scorer.score(*queries, n_subsets=3))
    wrong = np.flatnonzero(net.predict(X[150:]) != y[150:])[:1] + 150
    row = wrong if len(wrong) else np.array([150])
    for edited in (
        scorer.repair(X[row], (y[row] + 0) % 4, k=10, max_steps=2, baselines=False),
        scorer.remove([0, 1], max_iter=3, baseline=False),
    ):
        module = edited.to_module()
        dtypes = {p.dtype for p in module.parameters()}
        assert dtypes == {torch.float32}
        moved = max(
            float((a - b).detach().abs().max())
            for a, b in zip(module.parameters(), net.module_.parameters(), strict=True)
        )
        assert moved < 1  # from the weights that were fitted, not from a checkpoint
        module(torch.as_tensor(X[:2]))


def test_settings_are_those_of_fit_and_changed_weights_are_refused(digits, net):
    X, y = digits
    module = copy.deepcopy(net.module_)
    scorer = InfluenceScorer(module, method="gradient_dot").fit(X[:150], y[:150])
    expected = scorer.influence(X[150:], y[150:])
    scorer.set_params(parameters="last", output="margin", damping=3.0, method="ggn")
    np.testing.assert_array_equal(scorer.influence(X[150:], y[150:]), expected)
    with torch.no_grad():
        module.output.weight.data[0, 0] += 1
    for call in (
        lambda: scorer.influence(X[150:], y[150:]),
        lambda: scorer.repair(X[150:151], y[150:151]),
        lambda: scorer.loss_,
    ):
        with pytest.raises(ValueError, match="the weights of estimator_ have changed since"):
            call()


def test_options_of_methods_are_searched(digits):
    X, y = digits
    search = GridSearchCV(
        InfluenceScorer(Net(MLP, module__hidden=(4,), max_epochs=3), method=EKFAC()),
        {"method__rank": [1, None]},
        cv=2,
        error_score="raise",
    ).fit(X[:60], y[:60])
    assert search.best_params_["method__rank"] in (1, None)
    with pytest.raises(ValueError, match="'rank' parameter of EKFAC"):
        InfluenceScorer(method=EKFAC(rank=0)).fit(X, y)
    with pytest.raises(ValueError, match="first name of output"):
        InfluenceScorer(output="logit", target="margin").fit(X, y)


def released_datainf(train, query, split):
    """DataInf as released: a damping a tensor, a loop over rows."""
    total = []
    for rows, asked in zip(train.split(split, 1), query.split(split, 1), strict=True):
        damping = rows.square().mean(1).mean() / 10
        solved = torch.zeros_like(asked)
        for row in rows:
            share = (asked @ row) / (damping + row.square().sum())
            solved += (asked - share[:, None] * row) / (len(rows) * damping)
        total.append(solved @ rows.T / len(rows))
    return sum(total)


def gradients_of(module, X, y):
    found = []
    for row, code in zip(torch.as_tensor(X), torch.as_tensor(y), strict=True):
        value = cross_entropy(module(row[None]), code[None])
        parts = torch.autograd.grad(value, list(module.parameters()))
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def test_datainf_is_the_released_procedure(digits):
    X, y = digits[0].astype(float)[:40], digits[1][:40]
    module = mlp(64, 5, 4)
    gradients = gradients_of(module, X, y)
    split = [p.numel() for p in module.parameters()]
    expected = released_datainf(gradients[:30], gradients[30:], split)
    scorer = InfluenceScorer(module, method="datainf").fit(X[:30], y[:30])
    np.testing.assert_allclose(scorer.influence(X[30:], y[30:]), expected, rtol=1e-6)


@pytest.mark.parametrize("corrected", [False, True])
def test_less_is_its_rewrite(digits, corrected):
    """Cosines of queries' gradients with Adam's steps for rows, summed by learning rate."""
    X, y = digits[0].astype(float)[:40], digits[1][:40]
    stages, moments, expected, rates = [], [], 0, [0.3, 0.1]
    for seed, rate in enumerate(rates):
        module = mlp(64, 5, 4, seed=seed)
        state, parts = {}, []
        generator = torch.Generator().manual_seed(seed)
        for name, p in module.named_parameters():
            mean = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            square = torch.rand(p.shape, generator=generator, dtype=p.dtype)
            state[name] = {"exp_avg": mean, "exp_avg_sq": square}
            if corrected:
                state[name]["step"] = 7
            parts.append((mean.flatten(), square.flatten()))
        mean, square = (torch.cat(part) for part in zip(*parts, strict=True))
        gradients = gradients_of(module, X, y)
        rows, queries = gradients[:30], gradients[30:]
        mean = 0.9 * mean + 0.1 * rows
        square = 0.999 * square + 0.001 * rows**2
        if corrected:
            steps = (mean / (1 - 0.9**8)) / ((square / (1 - 0.999**8)).sqrt() + 1e-8)
        else:
            steps = mean / (square + 1e-8).sqrt()
        unit = [v / v.norm(dim=1, keepdim=True) for v in (queries, steps)]
        expected = expected + rate * unit[0] @ unit[1].T
        stages.append(module.state_dict())
        moments.append(state)
    method = TracIn(learning_rate=rates, normalize=True, moments=moments)
    scorer = InfluenceScorer(module, method=method, checkpoints=stages).fit(X[:30], y[:30])
    assert scorer.unit_ == "cosine"
    np.testing.assert_allclose(scorer.influence(X[30:], y[30:]), expected, rtol=1e-5)
    other = InfluenceScorer(module, method=method, checkpoints=stages).fit(X[:20], y[:20])
    found = other.influence(X[30:], y[30:], rows=(X[20:30], y[20:30]))
    np.testing.assert_allclose(found, expected[:, 20:], rtol=1e-5)


def test_rows_that_were_not_trained_on(digits):
    """Adding a row with a small weight lowers a query's loss by its influence."""
    X, y = torch.as_tensor(digits[0][:60, 16:30]).double(), torch.as_tensor(digits[1][:60])
    loss, decay = resolve_loss("cross_entropy"), 0.05

    def four(weights):
        layer = nn.Linear(14, 4).double()
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=800, tolerance_grad=1e-13, tolerance_change=1e-18
        )

        def closure():
            optimizer.zero_grad()
            value = (weights * loss.value(layer(X[:50]), y[:50])).sum() / 40
            value = value + decay / 2 * sum(p.square().sum() for p in layer.parameters())
            value.backward()
            return value

        for _ in range(3):
            optimizer.step(closure)
        return layer

    base = torch.cat([torch.ones(40), torch.zeros(10)]).double()
    layer = four(base)
    added = base.clone()
    added[43] = 1e-3
    with torch.no_grad():
        change = loss.value(four(added)(X[50:]), y[50:]) - loss.value(layer(X[50:]), y[50:])
    rows = X.numpy(), y.numpy()
    scorer = InfluenceScorer(layer, damping=decay).fit(rows[0][:40], rows[1][:40])
    found = scorer.influence(rows[0][50:], rows[1][50:], rows=(rows[0][40:50], rows[1][40:50]))
    assert found.shape == (10, 10)
    np.testing.assert_allclose(-found[:, 3], change.numpy() / 1e-3, rtol=0.02, atol=1e-3)


def test_candidates_of_every_class(digits, net):
    X, y = digits
    full = InfluenceScorer(FrozenEstimator(net), random_state=0).fit(X[:150], y[:150])
    near = InfluenceScorer(FrozenEstimator(net), candidates=Nearest(5, per_class=True))
    scores = near.fit(X[:150], y[:150]).influence(X[150:160], y[150:160])
    for row, expected in zip(scores, full.influence(X[150:160], y[150:160]), strict=True):
        kept = np.flatnonzero(row)
        assert np.bincount(y[kept]).tolist() == [5, 5, 5, 5]
        np.testing.assert_allclose(row[kept], expected[kept], rtol=1e-3, atol=1e-6)
    assert near.top_k(X[150:152], y[150:152], 20).indices.shape == (2, 20)


@pytest.mark.parametrize("norm", [2, np.inf])
def test_the_effect_of_an_attack_is_that_of_training_under_it(norm):
    """Held against heads trained to rest at two radii."""
    rng = np.random.default_rng(0)
    X = torch.as_tensor(rng.normal(size=(60, 5)))
    y = (X[:, 0] + 0.7 * torch.as_tensor(rng.normal(size=60)) > 0).long()
    decay, small = 0.05, 1e-3

    def trained(radius):
        layer = nn.Linear(5, 2).double()
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
            layer.weight[1, 0] = 0.1
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-18
        )

        def closure():
            optimizer.zero_grad()
            gap = layer.weight[1] - layer.weight[0]
            dual = gap.abs().sum() if norm == np.inf else gap.norm()
            outputs = layer(X[:40])
            sign = 2.0 * y[:40] - 1
            margin = (outputs[:, 1] - outputs[:, 0]) * sign - radius * dual
            value = nn.functional.softplus(-margin).mean()
            value = value + decay / 2 * sum(p.square().sum() for p in layer.parameters())
            value.backward()
            return value

        for _ in range(4):
            optimizer.step(closure)
        return layer

    layer = trained(0.0)
    with torch.no_grad():
        losses = [
            cross_entropy(m(X[40:]), y[40:], reduction="none") for m in (layer, trained(small))
        ]
    actual = ((losses[1] - losses[0]) / small).numpy()
    scorer = InfluenceScorer(layer, damping=decay).fit(X[:40].numpy(), y[:40].numpy())
    found = scorer.radius_effect(X[40:].numpy(), y[40:].numpy(), norm=norm)
    assert pearsonr(found, actual)[0] > 0.99
    np.testing.assert_allclose(found, actual, rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="'norm' parameter of radius_effect must be"):
        scorer.radius_effect(X[40:].numpy(), y[40:].numpy(), norm=1)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Embedding(10, 4)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, images, levels):
        return self.last((self.first(images) + self.level(levels)[:, :, None, None]).tanh())


def test_denoisers_average_over_drawn_levels():
    torch.manual_seed(0)
    denoiser = Denoiser().double()
    images = np.random.default_rng(0).normal(size=(12, 1, 5, 5))
    kept = np.linspace(0.95, 0.05, 10)
    X, noise = noised(images, kept, n_draws=3)
    gradients, curvature = [], 0
    own = dict(denoiser.named_parameters())
    for i in range(12):
        rows = torch.as_tensor(X[0][i]), torch.as_tensor(X[1][i])
        value = (denoiser(*rows) - torch.as_tensor(noise[i])).square().mean()
        parts = torch.autograd.grad(value, list(own.values()))
        gradients.append(torch.cat([p.flatten() for p in parts]))
        jacobian = torch.func.jacrev(
            lambda p, rows=rows: torch.func.functional_call(denoiser, p, rows).flatten()
        )(own)
        matrix = torch.cat([jacobian[n].flatten(1) for n in own], 1).detach()
        curvature = curvature + 2 * matrix.T @ matrix / len(matrix) / 12
    gradients = torch.stack(gradients)
    damped = curvature + 0.1 * torch.eye(len(curvature))
    expected = gradients @ torch.linalg.solve(damped, gradients.T) / 12
    given = {"loss": "squared_error", "damping": 0.1}
    scorer = InfluenceScorer(PerDraw(denoiser), method=GGN(1.0, None), **given).fit(X, noise)
    scores = scorer.influence(X, noise)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-9)
    drawn = InfluenceScorer(PerDraw(denoiser), method=GGN(0.9, 500), **given).fit(X, noise)
    assert pearsonr(drawn.influence(X, noise).ravel(), scores.ravel())[0] > 0.97


def test_the_assumptions_are_measured(digits):
    X, y = digits
    nets = [
        Net(MLP, module__hidden=(8,), lr=0.02, max_epochs=10, random_state=i).fit(X[:150], y[:150])
        for i in range(2)
    ]
    found = InfluenceScorer(nets, random_state=0).fit(X[:150], y[:150])
    report = found.diagnose(X[150:170], y[150:170], n_train=4, steps=(1, 3))
    names = ["convexity", "stability_of_numbers", "trajectory", "divergence", "first_order"]
    assert list(report) == [*names, "stability"]
    for entry in report.values():
        assert {"value", "threshold", "verdict", "advice"} <= set(entry)
        assert np.isfinite(entry.value)
    assert report.stability_of_numbers.batch_size < 1e-3
    assert report.first_order.half_to_whole == pytest.approx(0.5, abs=0.1)
    layer = from_module(nn.Linear(64, 4).double(), np.arange(4))
    convex = InfluenceScorer(layer, method="ggn").fit(X[:150], y[:150])
    report = convex.diagnose(X[150:160], y[150:160], n_train=4, steps=(1,))
    assert report.convexity.verdict == "holds"
    assert report.convexity.value < 1e-6


def test_what_cannot_be_known_is_asked_for(digits):
    X = np.random.default_rng(0).normal(size=(30, 5))
    layer = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="binary_cross_entropy"):
        InfluenceScorer(layer).fit(X, (X[:, :3] > 0).astype(int))
    with pytest.raises(ValueError, match="squared_error"):
        InfluenceScorer(layer).fit(X, X[:, 0])
    scorer = InfluenceScorer(layer, loss="squared_error").fit(X, X[:, :3])
    for call in (
        lambda: scorer.repair(X[:1], X[:1, :3]),
        lambda: scorer.transform(X),
    ):
        with pytest.raises(ValueError, match="predicted labels"):
            call()
    with pytest.raises(ValueError, match="needs class labels"):
        InfluenceScorer(layer, loss="squared_error", output="margin").fit(X, X[:, :3])


def test_removal_is_judged_by_rows_that_chose_nothing(digits, net):
    X, y = digits
    scorer = InfluenceScorer(FrozenEstimator(net), random_state=0).fit(X[:150], y[:150])
    few = np.r_[np.flatnonzero(y[150:] == 2)[:1], np.flatnonzero(y[150:] != 2)[:20]] + 150
    with pytest.raises(ValueError, match="guard holds 1 rows of class"):
        scorer.remove(class_=2, guard=(X[few], y[few]))
    report = scorer.remove(class_=2, guard=(X[150:], y[150:]), max_iter=10).edit_report_
    others = (y[150:] != 2).sum()
    assert report["n_judged"] == others - others // 2


@pytest.mark.parametrize("k", [20, 70])
def test_repair_is_never_judged_by_the_rows_it_trained_on(digits, net, k):
    X, y = digits
    scorer = InfluenceScorer(FrozenEstimator(net), random_state=0).fit(X[:80], y[:80])
    asked = (scorer.estimator_.predict(X[200:201]) + 1) % 4
    report = scorer.repair(X[200:201], asked, k=k, max_steps=2, baselines=False).edit_report_
    assert np.isnan(report["judged_after"]) == (k == 70)
    assert np.isfinite(report["guard_after"])


def test_gif_options_reach_removal(digits, net):
    X, y = digits
    scorer = InfluenceScorer(FrozenEstimator(net), method=GIF(ratio=0.3, curvature="ggn"))
    report = scorer.fit(X[:150], y[:150]).remove(class_=1, max_iter=5).edit_report_
    assert 0.2 < report["share_changed"] <= 0.3


@pytest.mark.filterwarnings("ignore:.*keeps rows out")
@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [LRScheduler("StepLR", step_size=1)]},
        {"optimizer__param_groups": [("0*", {"lr": 0.0})]},
        {"train_split": ValidSplit(5)},
        {"train_only": {"2.bias": torch.tensor([True, False, True])}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_retraining_that_is_more_than_steps_is_the_nets_own(options):
    X, y = load_iris(return_X_y=True)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    net = Net(module, max_epochs=2, random_state=0, **options).fit(X, y)
    assert _recipe_of(net, open_network(net), 150) is None
    scorer = InfluenceScorer(FrozenEstimator(net), method="gradient_dot", parameters="2*").fit(X, y)
    assert np.isfinite(scorer.score(X[:30], y[:30], n_subsets=3))


def test_retraining_of_plain_steps_is_by_a_recipe():
    X, y = load_iris(return_X_y=True)
    net = Net(nn.Linear(4, 3), max_epochs=2, random_state=0, callbacks="disable").fit(X, y)
    assert _recipe_of(net, open_network(net), 150) is not None
