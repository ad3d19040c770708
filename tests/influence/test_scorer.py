"""What InfluenceScorer promises, held against refits and hand calculation."""

import pickle

import joblib
import numpy as np
import pytest
import torch
from influence_nets import mlp
from scipy.stats import pearsonr
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from skorch import NeuralNetClassifier
from torch import nn

from skperf import MLP, Net, from_module
from skperf.backbone._opening import source_of
from skperf.backbone.parameters import fingerprint
from skperf.influence import CG, GGN, InfluenceScorer, LiSSA


@pytest.fixture(scope="module")
def data():
    X, y = load_digits(n_class=4, return_X_y=True)
    names = np.array(["zero", "one", "two", "three"])
    return (X / 16).astype(np.float32)[:160], names[y[:160]]


@pytest.fixture(scope="module")
def net(data):
    X, y = data
    return Net(MLP, module__hidden=(12,), lr=0.02, max_epochs=15, random_state=0).fit(
        X[:120], y[:120]
    )


@pytest.fixture(scope="module")
def scorer(net, data):
    X, y = data
    return InfluenceScorer(FrozenEstimator(net), random_state=0).fit(X[:120], y[:120])


def effects_of_refits(model, X, y, X_query, y_query):
    """Rise of the queries' loss when each row's weight is set to zero and the model refitted."""

    def losses(weights):
        fitted = clone(model).fit(X, y, sample_weight=weights)
        proba = fitted.predict_proba(X_query)
        return -np.log(proba[np.arange(len(y_query)), np.searchsorted(fitted.classes_, y_query)])

    full = losses(np.ones(len(X)))
    return np.stack([losses(np.arange(len(X)) != i) - full for i in range(len(X))], 1)


@pytest.mark.parametrize("n_class", [2, 4])
def test_loo_effect_is_leave_one_out_of_a_linear_head(n_class):
    X, y = load_digits(n_class=n_class, return_X_y=True)
    X, y = X[:100, 16:40] / 16, y[:100]
    model = LogisticRegression(C=0.5, tol=1e-10, max_iter=5000)
    actual = effects_of_refits(model, X[:70], y[:70], X[70:], y[70:])
    scorer = InfluenceScorer(model).fit(X[:70], y[:70])
    predicted = scorer.loo_effect(X[70:], y[70:])
    assert pearsonr(predicted.ravel(), actual.ravel())[0] > 0.999
    assert np.linalg.norm(predicted - actual) / np.linalg.norm(actual) < 0.05
    plain = InfluenceScorer(model, damping=1 / (0.5 * 70)).fit(X[:70], y[:70])
    assert plain.method_ == "exact"
    assert pearsonr(plain.influence(X[70:], y[70:]).ravel(), actual.ravel())[0] > 0.98


def test_group_effects_of_second_order_are_nearer_to_refits():
    X, y = load_digits(n_class=3, return_X_y=True)
    X, y = X[:120, 16:40] / 16, y[:120]
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000, fit_intercept=False)
    scorer = InfluenceScorer(model, damping=1 / 80).fit(X[:80], y[:80])
    groups = [np.arange(0, 25), np.flatnonzero(y[:80] == 1)[:20]]
    actual = []
    for group in groups:
        weights = np.ones(80)
        weights[group] = 0
        full, less = (
            clone(model).fit(X[:80], y[:80], sample_weight=w).predict_log_proba(X[80:])
            for w in (np.ones(80), weights)
        )
        actual.append((full - less)[np.arange(40), y[80:]])
    actual = np.stack(actual, 1)
    first = scorer.group_influence(groups, X[80:], y[80:])
    second = scorer.group_influence(groups, X[80:], y[80:], order=2)
    matrix = scorer.influence(X[80:], y[80:])
    np.testing.assert_allclose(first, np.stack([matrix[:, g].sum(1) for g in groups], 1))
    errors = [np.linalg.norm(p - actual) for p in (first, second)]
    assert errors[1] < 0.6 * errors[0]
    labels = np.full(80, -1)
    labels[groups[0]] = 0
    by_label = scorer.group_influence(labels, X[80:], y[80:])
    np.testing.assert_allclose(by_label[:, 0], first[:, 0])


def test_sample_weights_scale_rows_and_leave_out_zeros(data, net):
    X, y = data
    weights = np.random.default_rng(0).random(120)
    weights[:10] = 0
    frozen = FrozenEstimator(net)
    for method in (GGN(kept_trace=1.0, max_rows=None), "ekfac", "exact", "datainf"):
        params = {"method": method, "damping": 0.1}
        weighted = InfluenceScorer(frozen, **params).fit(X[:120], y[:120], sample_weight=weights)
        scores = weighted.influence(X[120:], y[120:])
        assert (scores[:, :10] == 0).all()
        doubled = InfluenceScorer(frozen, **params).fit(X[:120], y[:120], sample_weight=2 * weights)
        np.testing.assert_allclose(
            doubled.influence(X[120:], y[120:]), scores, rtol=1e-3, atol=1e-7
        )
        less = InfluenceScorer(frozen, **params).fit(X[10:120], y[10:120], weights[10:])
        np.testing.assert_allclose(
            less.influence(X[120:], y[120:]), scores[:, 10:], rtol=2e-3, atol=1e-6
        )


def test_every_target_is_positive_for_proponents(data, net):
    X, y = data

    def minus_loss(logits, codes):
        return -nn.functional.cross_entropy(logits, codes, reduction="none")

    scores = {
        name: InfluenceScorer(FrozenEstimator(net), output=target, damping=0.1)
        .fit(X[:120], y[:120])
        .influence(X[120:], y[120:])
        for name, target in {
            "loss": "loss",
            "minus_loss": minus_loss,
            "log_odds": "log_odds",
            "logit": "logit",
            "margin": "margin",
        }.items()
    }
    np.testing.assert_allclose(scores["minus_loss"], scores["loss"], rtol=1e-4, atol=1e-6)
    for name in ("log_odds", "logit", "margin"):
        rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores[name], scores["loss"], strict=True)]
        assert np.median(rows) > 0.7


def test_targets_that_mix_rows_are_refused(data, net):
    X, y = data

    def mean(logits, codes):
        return nn.functional.cross_entropy(logits, codes, reduction="none") - logits.mean()

    scorer = InfluenceScorer(FrozenEstimator(net), output=mean).fit(X, y)
    with pytest.raises(ValueError, match="not separable"):
        scorer.influence(X[:3], y[:3])
    scalar = InfluenceScorer(FrozenEstimator(net), output=nn.functional.cross_entropy).fit(X, y)
    with pytest.raises(ValueError, match="one number for each example"):
        scalar.influence(X[:3], y[:3])


@pytest.mark.parametrize("method", ["gradient_dot", "ggn", "ekfac", "cg", "trak", "gif"])
def test_results_do_not_depend_on_how_the_work_is_cut(data, net, method, tmp_path):
    X, y = data
    base = {"method": method, "random_state": 0, "damping": 0.1}
    whole = InfluenceScorer(FrozenEstimator(net), **base).fit(X[:120], y[:120])
    expected = whole.influence(X[120:], y[120:])
    # the least-squares iteration stops at a tolerance, the others are exact up to rounding
    scale = np.abs(expected).max() * (20 if method == "gif" else 1)
    row = sum(t[0].numel() * 4 for f in whole._learned.stages[0].fit.train for t in f.tensors)
    for other in (
        {"batch_size": 13},
        {"memory_budget": 60 * row, "storage": tmp_path},
        {"n_jobs": 2, "memory_budget": 60 * row},
    ):
        cut = InfluenceScorer(FrozenEstimator(net), **base, **other).fit(X[:120], y[:120])
        out = np.memmap(tmp_path / "scores", expected.dtype, "w+", shape=expected.shape)
        assert cut.influence(X[120:], y[120:], out=out) is out
        np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5 * scale)
    if method != "gradient_dot":
        return
    with joblib.parallel_backend("loky"):
        cut = InfluenceScorer(FrozenEstimator(net), n_jobs=2, memory_budget=60 * row, **base)
        np.testing.assert_allclose(
            cut.fit(X[:120], y[:120]).influence(X[120:], y[120:]),
            expected,
            rtol=2e-4,
            atol=2e-5 * scale,
        )
    for mode in ("sum", "mean"):
        np.testing.assert_allclose(
            whole.influence(X[120:], y[120:], aggregate=mode),
            getattr(expected, mode)(0),
            rtol=1e-4,
            atol=1e-5 * scale,
        )


def test_a_budget_too_small_for_one_tile_says_which_would_fit(data, net):
    X, y = data
    scorer = InfluenceScorer(FrozenEstimator(net), memory_budget=500).fit(X[:120], y[:120])
    with pytest.raises(ValueError, match=r"smallest budget that fits is ([\d,]+) bytes") as caught:
        scorer.influence(X[120:], y[120:])
    needed = int(str(caught.value).rsplit("is ", 1)[1].removesuffix(" bytes.").replace(",", ""))
    scorer.set_params(memory_budget=needed).fit(X[:120], y[:120])
    assert scorer.influence(X[120:125], y[120:125]).shape == (5, 120)
    with pytest.raises(ValueError, match="not understood"):
        InfluenceScorer(FrozenEstimator(net), memory_budget="plenty").fit(X, y)


def test_top_k_streams_what_the_matrix_holds(data, net, scorer):
    X, y = data
    matrix = scorer.influence(X[120:], y[120:])
    row = sum(t[0].numel() * 4 for f in scorer._learned.stages[0].fit.train for t in f.tensors)
    tiled = InfluenceScorer(FrozenEstimator(net), memory_budget=30 * row).fit(X[:120], y[:120])
    for one in (scorer, tiled):
        for kind, sign in (("proponents", 1), ("opponents", -1)):
            top = one.top_k(X[120:], y[120:], 7, kind=kind)
            values = np.take_along_axis(matrix, top.indices, 1)
            np.testing.assert_allclose(top.values, values, rtol=1e-3, atol=1e-6)
            expected = np.sort(sign * matrix, 1)[:, ::-1][:, :7]
            np.testing.assert_allclose(sign * top.values, expected, rtol=1e-3, atol=1e-6)


def test_candidates_are_the_nearest_rows(data, net, scorer):
    X, y = data
    limited = InfluenceScorer(FrozenEstimator(net), candidates=15).fit(X[:120], y[:120])
    scores = limited.influence(X[120:], y[120:])
    full = scorer.influence(X[120:], y[120:])
    assert ((scores != 0).sum(1) == 15).all()
    np.testing.assert_allclose(scores[scores != 0], full[scores != 0], rtol=1e-4, atol=1e-7)
    hidden = net.module_.hidden(torch.as_tensor(X)).detach().numpy()
    distances = ((hidden[120:, None] - hidden[None, :120]) ** 2).sum(2)
    nearest = np.argsort(distances, 1)[:, :15]
    assert [set(r) for r in nearest] == [set(np.flatnonzero(r)) for r in scores]
    top = limited.top_k(X[120:], y[120:], 5, kind="opponents")
    assert np.isfinite(top.values).all()
    # rows that are no candidates have no score anywhere
    curve = limited.fading(X[120:], y[120:], steps=(1,), n_train=40, learning_rate=1e-3)
    np.testing.assert_allclose(curve.predicted[0], scores[:, curve.rows], rtol=1e-4, atol=1e-7)
    head = FrozenEstimator(LogisticRegression(C=0.1).fit(X[:120], y[:120]))
    of_head = InfluenceScorer(head, candidates=15).fit(X[:120], y[:120])
    effects = of_head.loo_effect(X[120:], y[120:])
    np.testing.assert_array_equal(effects != 0, of_head.influence(X[120:], y[120:]) != 0)


def test_transform_uses_predicted_labels(data, net, scorer):
    X, _ = data
    np.testing.assert_allclose(
        scorer.transform(X[120:]), scorer.influence(X[120:], net.predict(X[120:])), rtol=1e-5
    )


def test_ensembles_average_their_members(data):
    X, y = data
    nets = [
        Net(MLP, module__hidden=(8,), lr=0.02, max_epochs=8, random_state=i).fit(X[:120], y[:120])
        for i in range(3)
    ]
    kwargs = {"damping": 0.1, "random_state": 0}
    together = InfluenceScorer(nets, **kwargs).fit(X[:120], y[:120])
    singles = [
        InfluenceScorer(FrozenEstimator(n), **kwargs)
        .fit(X[:120], y[:120])
        .influence(X[120:], y[120:])
        for n in nets
    ]
    np.testing.assert_allclose(
        together.influence(X[120:], y[120:]), np.mean(singles, 0), rtol=1e-3, atol=1e-6
    )
    assert len(together.estimators_) == 3
    with pytest.raises(ValueError, match="empty list"):
        InfluenceScorer([]).fit(X, y)


def test_every_accepted_form_of_estimator(data):
    X, y = data
    module = mlp(64, 6, 4, dtype=torch.float32)
    for estimator in (
        None,
        LogisticRegression(max_iter=500),
        MLPClassifier((5,), solver="lbfgs", max_iter=3000, random_state=0),
        Net(MLP, max_epochs=2),
        from_module(module, ["one", "three", "two", "zero"]),
    ):
        scorer = InfluenceScorer(estimator, random_state=0).fit(X[:80], y[:80])
        scores = scorer.influence(X[80:90], y[80:90])
        assert scores.shape == (10, 80)
        assert np.isfinite(scores).all()
        assert 0 < scorer.coverage_ <= 1
    bare = InfluenceScorer(module).fit(X[:80], np.unique(y[:80], return_inverse=True)[1])
    np.testing.assert_allclose(bare.influence(X[80:90], np.zeros(10, int)).shape, (10, 80))
    last = InfluenceScorer(module, parameters="last").fit(X[:80], bare.y_)
    assert last.coverage_ == pytest.approx(28 / (28 + 390))


def actions(scorer, X, y):
    yield lambda: scorer.influence(X, y)
    yield lambda: scorer.transform(X)
    yield lambda: scorer.top_k(X, y, 3)
    yield lambda: scorer.self_influence_
    yield lambda: scorer.group_influence([[1, 2]], X, y, order=2)
    yield lambda: scorer.loo_effect(X, y)
    yield lambda: scorer.fading(X, y, steps=(1, 2), n_train=3)
    yield lambda: scorer.repair(X[:2], y[:2], max_steps=2, k=3)
    yield lambda: scorer.remove([1, 2, 3], max_iter=3)
    yield lambda: scorer.detect_mislabels(class_aware=True)


def state_of(module):
    return (
        fingerprint(module),
        [part.training for part in module.modules()],
        [
            (p.requires_grad, None if p.grad is None else p.grad.clone())
            for p in module.parameters()
        ],
        [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
    )


def test_a_convolutional_network_may_view_its_activations():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolve, self.output = nn.Conv2d(3, 4, 3), nn.Linear(36, 2)

        def forward(self, images):
            return self.output(torch.relu(self.convolve(images)).view(len(images), -1))

    torch.manual_seed(0)
    X, y = np.random.default_rng(0).normal(size=(12, 3, 5, 5)), np.arange(12) % 2
    module = Viewing().double()
    flattened = nn.Sequential(module.convolve, nn.ReLU(), nn.Flatten(), module.output)
    expected = InfluenceScorer(flattened, damping=0.1).fit(X, y).influence(X, y)
    found = InfluenceScorer(module, damping=0.1).fit(X, y).influence(X, y)
    np.testing.assert_allclose(found, expected)


def test_the_network_is_left_as_it_was(data):
    X, y = data
    codes = np.unique(y, return_inverse=True)[1]
    module = nn.Sequential(
        nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4)
    )
    module[0].weight.requires_grad_(False)
    module[4].weight.grad = torch.ones_like(module[4].weight)
    module[1].eval()
    before = state_of(module)

    def same():
        after = state_of(module)
        assert before[0] == after[0]
        assert before[1] == after[1]
        assert before[3:] == after[3:]
        for (needs, grad), (needs_after, grad_after) in zip(before[2], after[2], strict=True):
            assert needs == needs_after
            assert (grad is None) == (grad_after is None)

    for method in ("ggn", "ekfac", CG(max_iter=50), LiSSA(max_iter=5), "gif", "trak", "exact"):
        scorer = InfluenceScorer(module, method=method, random_state=0, damping=50.0)
        with np.errstate(all="ignore"):
            scorer.fit(X[:60], codes[:60]).influence(X[60:65], codes[60:65])
        same()
    scorer = InfluenceScorer(module, random_state=0).fit(X[:60], codes[:60])
    for action in actions(scorer, X[60:70], codes[60:70]):
        action()
        same()

    def broken(logits, codes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InfluenceScorer(module, output=broken).fit(X, codes).influence(X[:5], codes[:5])
    same()


def test_mislabels_are_found(data):
    X, y = load_digits(return_X_y=True)
    X = (X[:600] / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    flipped = rng.random(600) < 0.1
    noisy = np.where(flipped, (y[:600] + rng.integers(1, 10, 600)) % 10, y[:600])
    net = Net(MLP, module__hidden=(32,), lr=0.01, max_epochs=25, random_state=0)
    scorer = InfluenceScorer(net, random_state=0).fit(X, noisy)
    assert roc_auc_score(flipped, scorer.detect_mislabels()) > 0.95
    assert roc_auc_score(flipped, scorer.detect_mislabels(class_aware=True)) > 0.85
    assert roc_auc_score(flipped, scorer.loss_) > 0.9


def test_mislabels_are_ranked_by_their_leave_one_out_loss():
    X, y = load_iris(return_X_y=True)
    X, y = X[50:, :2] - X[50:, :2].mean(0), y[50:] == 2
    y[[3, 60]] = ~y[[3, 60]]
    model = LogisticRegression(C=1.0, fit_intercept=False)
    scorer = InfluenceScorer(model, damping=1 / len(X)).fit(X, y)
    actual = []
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        kept = LogisticRegression(C=1.0, fit_intercept=False).fit(X[rest], y[rest])
        actual.append(-kept.predict_log_proba(X[[i]])[0, int(y[i])])
    found = scorer.detect_mislabels()
    assert np.corrcoef(found, actual)[0, 1] > 0.999
    assert np.abs(found - actual).mean() < 0.2 * np.abs(scorer.loss_ - actual).mean()


def test_scores_that_are_no_losses_give_the_influence_on_itself_alone(data):
    X, y = data
    for options in ({"method": "gradient_dot"}, {"output": "margin"}):
        scorer = InfluenceScorer(random_state=0, **options).fit(X[:60], y[:60])
        np.testing.assert_array_equal(scorer.detect_mislabels(), scorer.self_influence_)


def test_a_new_damping_costs_no_new_pass(data, net, scorer, monkeypatch):
    X, y = data
    expected = InfluenceScorer(FrozenEstimator(net), damping=0.3, random_state=0)
    expected = expected.fit(X[:120], y[:120]).influence(X[120:], y[120:])
    again = scorer.with_damping(0.3)
    np.testing.assert_allclose(again.influence(X[120:], y[120:]), expected, rtol=1e-4, atol=1e-7)
    assert again.damping_ == 0.3
    assert scorer.damping_ != 0.3
    with pytest.raises(ValueError, match="needs method='ggn' or"):
        InfluenceScorer(FrozenEstimator(net), method="cg").fit(X, y).with_damping(0.1)


def test_horizon_ties_the_damping(data, net):
    X, y = data
    frozen = FrozenEstimator(net)
    tied = InfluenceScorer(frozen, horizon=50).fit(X[:120], y[:120])
    assert tied.damping_ == pytest.approx(1 / (50 * 0.02))
    same = InfluenceScorer(frozen, horizon=25, learning_rate=0.04, damping="horizon")
    assert same.fit(X[:120], y[:120]).damping_ == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs horizon"):
        InfluenceScorer(frozen, damping="flow").fit(X, y)
    with pytest.raises(ValueError, match="'flow' needs method='ggn' or 'exact', not 'ekfac'"):
        InfluenceScorer(frozen, method="ekfac", damping="flow", horizon=5).fit(X, y)
    with pytest.raises(ValueError, match="needs learning_rate"):
        InfluenceScorer(net.module_, horizon=5).fit(X[:50], np.arange(50) % 4)


def test_the_flow_filter_at_a_short_horizon_is_gradient_dot(data, net):
    X, y = data
    frozen = FrozenEstimator(net)
    flow = InfluenceScorer(frozen, damping="flow", horizon=1, learning_rate=1e-4)
    dot = InfluenceScorer(frozen, method="gradient_dot").fit(X[:120], y[:120])
    np.testing.assert_allclose(
        flow.fit(X[:120], y[:120]).influence(X[120:], y[120:]) * 120 / 1e-4,
        dot.influence(X[120:], y[120:]),
        rtol=0.01,
        atol=1e-3,
    )


def test_pickle_clone_and_search(data, net, scorer):
    X, y = data
    again = pickle.loads(pickle.dumps(scorer))
    np.testing.assert_array_equal(
        again.influence(X[120:], y[120:]), scorer.influence(X[120:], y[120:])
    )
    assert clone(scorer).get_params()["random_state"] == 0
    search = GridSearchCV(
        InfluenceScorer(Net(MLP, module__hidden=(4,), max_epochs=5, lr=0.02), random_state=0),
        {"damping": [0.01, 1.0], "method": ["ggn", "gradient_dot"]},
        cv=2,
        error_score="raise",
    ).fit(X[:60], y[:60])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize("value", [0, -1.0, "none"])
def test_damping_must_be_positive(value, data):
    with pytest.raises(ValueError, match="damping"):
        InfluenceScorer(damping=value).fit(*data)


def test_bad_input_is_named(data, net, scorer):
    X, y = data
    with pytest.raises(ValueError, match="does not know: \\['four'\\]"):
        scorer.influence(X[:2], ["four", "one"])
    with pytest.raises(ValueError, match="features"):
        scorer.influence(X[:2, :30], y[:2])
    with pytest.raises(ValueError, match="out has shape"):
        scorer.influence(X[:2], y[:2], out=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="aggregate"):
        scorer.influence(X[:2], y[:2], aggregate="max")
    with pytest.raises(ValueError, match="'kind' parameter of top_k must be"):
        scorer.top_k(X[:2], y[:2], kind="both")
    with pytest.raises(ValueError, match="k=500 exceeds"):
        scorer.top_k(X[:2], y[:2], 500)
    with pytest.raises(ValueError, match="'order' parameter of group_influence must be"):
        scorer.group_influence([[1]], X[:2], y[:2], order=3)
    with pytest.raises(ValueError, match="a group is empty"):
        scorer.group_influence([[1], []], X[:2], y[:2])
    dot = InfluenceScorer(FrozenEstimator(net), method="gradient_dot").fit(X, y)
    with pytest.raises(ValueError, match="no unit of loss"):
        dot.loo_effect(X[:2], y[:2])
    with pytest.raises(ValueError, match="order=2 needs a curvature"):
        dot.group_influence([[1]], X[:2], y[:2], order=2)
    broken = mlp(64, 5, 4)
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        InfluenceScorer(broken).fit(X, np.arange(160) % 4)
    with pytest.raises(ValueError, match="Kronecker-factored curvature needs"):
        InfluenceScorer(FrozenEstimator(net), method="ekfac", gradients="reference").fit(X, y)


def test_an_interrupted_fit_leaves_no_files(data, net, tmp_path, monkeypatch):
    X, y = data
    from skperf.influence import tiles

    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return recorded(*args)

    recorded = tiles._recorded
    monkeypatch.setattr(tiles, "_recorded", interrupted)
    scorer = InfluenceScorer(
        FrozenEstimator(net), memory_budget=1000, storage=tmp_path, batch_size=20
    )
    with pytest.raises(KeyboardInterrupt):
        scorer.fit(X[:120], y[:120])
    del scorer
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_loaded_by_the_user(data, net):
    X, y = data
    scorer = InfluenceScorer(FrozenEstimator(net), method="tracin", checkpoints=["epoch1.pt"])
    with pytest.raises(TypeError, match=r"checkpoint 0 is a str; needed is a state dict"):
        scorer.fit(X[:120], y[:120])


def test_an_interrupted_refit_keeps_the_last_fit(data, net, monkeypatch):
    X, y = data
    scorer = InfluenceScorer(FrozenEstimator(net), random_state=0).fit(X[:120], y[:120])
    expected = scorer.influence(X[120:], y[120:])
    from skperf.influence import tiles

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tiles, "_recorded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scorer.fit(X[:60], y[:60])
    np.testing.assert_array_equal(scorer.influence(X[120:], y[120:]), expected)


def test_unit_and_sign_on_a_row_scored_against_itself(data, net, scorer):
    X, y = data
    assert (scorer.self_influence_ >= 0).all()
    matrix = scorer.influence(X[:120], y[:120])
    np.testing.assert_allclose(np.diag(matrix), scorer.self_influence_, rtol=1e-2, atol=1e-6)
    assert source_of(scorer.estimator_) is net.module_


def test_groups_and_out_of_the_wrong_kind_are_refused():
    X, y = load_iris(return_X_y=True)
    scorer = InfluenceScorer(method="gradient_dot", random_state=0).fit(X, y)
    for group in ([0.5, 1.7], np.array([True, False]), [[1, 2]]):
        with pytest.raises(ValueError, match="a group must be"):
            scorer.group_influence([group], X[:2], y[:2])
    with pytest.raises(ValueError, match="out holds int64"):
        scorer.influence(X[:2], y[:2], out=np.zeros((2, 150), int))


ASKED_WRONGLY = {
    "rows must be a pair": lambda s, q: s.influence(*q, rows=q[0]),
    "guard must be a pair": lambda s, q: s.repair(*q, guard=q[0]),
    "reference must be a pair": lambda s, q: s.detect_mislabels(True, reference=q[0]),
    "'k' parameter of top_k": lambda s, q: s.top_k(*q, k=2.5),
    "'k' parameter of repair": lambda s, q: s.repair(*q, k=0),
    "'class_aware' parameter": lambda s, q: s.detect_mislabels("yes"),
    "'radius' parameter": lambda s, q: s.radius_effect(*q, radius=-1),
    "steps must be positive": lambda s, q: s.fading(*q, steps=(0.5, 2)),
    "'n_train' parameter of fading": lambda s, q: s.fading(*q, n_train=-1),
    "'n_train' parameter of diagnose": lambda s, q: s.diagnose(*q, n_train=0),
    "'batch_size' parameter": lambda s, q: s.fading(*q, batch_size=0),
    "'learning_rate' parameter": lambda s, q: s.fading(*q, learning_rate=-1),
    "'fraction' parameter": lambda s, q: s.score(*q, fraction=1.0),
    "'n_subsets' parameter": lambda s, q: s.score(*q, n_subsets=1),
    "'max_drop' parameter": lambda s, q: s.remove([0], max_drop=-1),
    "'ratio' parameter": lambda s, q: s.remove([0], ratio=2),
    "'ridge' parameter": lambda s, q: s.remove([0], ridge=-1),
    "is none of the classes": lambda s, q: s.remove(class_=[0, 1]),
    "or a mask, got": lambda s, q: s.remove(np.array([True, False])),
    "'damping' parameter": lambda s, q: s.with_damping(0),
    "'horizon' parameter": lambda s, q: s.with_damping("horizon", horizon=0),
}


@pytest.mark.parametrize("message", ASKED_WRONGLY)
def test_what_methods_are_asked_is_checked_at_the_door(data, scorer, message):
    X, y = data
    before = scorer.damping_
    with pytest.raises(ValueError, match=message):
        ASKED_WRONGLY[message](scorer, (X[120:], y[120:]))
    assert scorer.damping_ == before


@pytest.mark.parametrize("method", ["exact", "ggn", "cg", "ekfac", "kfac", "lissa", "arnoldi"])
def test_an_intercept_that_no_penalty_holds_is_not_damped(method):
    class_weight = {0: 0.3, 1: 1.0, 2: 5.0}
    rng = np.random.RandomState(0)
    X, y = rng.randn(90, 4) + 0.7, np.r_[np.zeros(20), np.ones(30), np.full(40, 2)].astype(int)
    X[np.arange(90), y] += 1.5

    def fitted(weight):
        # so strong a penalty that an intercept held by it would stay near zero
        model = LogisticRegression(C=0.02, class_weight=class_weight, tol=1e-10, max_iter=5000)
        return model.fit(X, y, sample_weight=weight)

    def losses(model):
        return -np.log(model.predict_proba(X[::9])[np.arange(10), y[::9]])

    whole = fitted(np.ones(90))
    rows = np.arange(0, 90, 7)
    moved = [losses(fitted((np.arange(90) != i) * 1.0)) - losses(whole) for i in rows]
    scorer = InfluenceScorer(FrozenEstimator(whole), method=method).fit(X, y)
    scores = scorer.influence(X[::9], y[::9])[:, rows]
    least = 0.97 if "fac" in method else 0.998
    assert np.corrcoef(scores.ravel(), np.ravel(np.transpose(moved)))[0, 1] > least


def cooled(outputs):
    return (outputs / 3).softmax(-1)


@pytest.mark.parametrize("output", ["proba", "log_odds"])
def test_probabilities_are_by_the_nonlinearity_of_the_net(output):
    X, y = load_digits(n_class=3, return_X_y=True)
    X = (X[:50] / 16).astype(np.float32)
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 3)),
        criterion=nn.CrossEntropyLoss,
        predict_nonlinearity=cooled,
        train_split=None,
        verbose=0,
    ).fit(X, y[:50])
    scorer = InfluenceScorer(FrozenEstimator(net), method="gradient_dot", output=output)
    found = scorer.fit(X[:40], y[:40]).influence(X[40:], y[40:50])
    parameters = list(net.module_.parameters())

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])

    for i in range(10):
        p = cooled(net.module_(torch.as_tensor(X[40 + i])))[y[40 + i]]
        own = gradient(p if output == "proba" else p.logit())
        for j in range(0, 40, 7):
            logits = net.module_(torch.as_tensor(X[[j]]))
            row = gradient(nn.functional.cross_entropy(logits, torch.as_tensor(y[[j]])))
            # a row that helps raises the output where leaving it out would lower it
            assert abs(found[i, j]) == pytest.approx(abs(float(own @ row)), rel=1e-4, abs=1e-6)
