"""Changes of the mathematics that no test once noticed, each against a formula of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize
from sklearn.datasets import load_iris
from sklearn.frozen import FrozenEstimator
from torch import nn
from torch.nn.functional import cross_entropy

from skperf import InfluenceScorer, Net, PerformativeAdapter, from_module
from skperf.backbone import prediction_time_batch_norm
from skperf.backbone._opening import open_network
from skperf.backbone.parameters import select_parameters
from skperf.backbone.rows import Rows
from skperf.components import ComponentAttributor
from skperf.influence import GIF, _actions
from skperf.influence.gradients import Outer
from skperf.influence.kronecker import kronecker_basis
from skperf.influence.repair import accuracy, distance, doubt, largest_allowed, smallest_flip
from skperf.performative.anticipation import _updated_spread
from skperf.performative.diagnostics import conditional_shift_p_value
from skperf.performative.label_shift import fit_calibration
from skperf.performative.response import dispersion

X, y = load_iris(return_X_y=True)
X = ((X - X.mean(0)) / X.std(0)).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    return Net(nn.Linear(4, 3), lr=0.05, max_epochs=8, random_state=0).fit(X[::2], y[::2])


@pytest.fixture(scope="module")
def scorer(net):
    return InfluenceScorer(FrozenEstimator(net), random_state=0).fit(X[::2], y[::2])


@pytest.mark.parametrize(("how", "sign"), [("descend", 1), ("ascend", -1)])
def test_repair_trains_on_rows_that_help_or_against_rows_that_harm(
    net, scorer, how, sign, monkeypatch
):
    lessons = []

    def noted(network, start, lesson, *args, **options):
        lessons.append((network, start, replace(lesson, kept=None)))
        return smallest_flip(network, start, lesson, *args, **options)

    monkeypatch.setattr(_actions, "smallest_flip", noted)
    query, wanted = X[[51]], np.array([2 if net.predict(X[[51]])[0] == 1 else 1])
    edited = scorer.repair(query, wanted, how=how, k=5, max_steps=3, baselines=False)
    network, start, lesson = lessons[0]
    rows = edited.edit_report_["indices"]
    assert (sign * scorer.influence(query, wanted)[0, rows] > 0).all()
    assert (sign * lesson.weights > 0).all()
    moved = {n: start[n] - 0.01 * g for n, g in lesson.gradient(network, start).items()}
    before, after = (doubt(network(lesson.rows[0], p), lesson.rows[1]) for p in (start, moved))
    # the odds of rows that help rise, those of rows that harm fall
    assert sign * float(((after - before) * lesson.weights.abs()).mean()) < 0


def test_no_more_accuracy_is_given_up_than_allowed():
    network = open_network(from_module(nn.Linear(1, 2)))
    rows = Rows(torch.linspace(-1, 1, 41)[:, None])
    targets = torch.as_tensor(rows.array[:, 0] > 0).long()
    start = {"weight": torch.tensor([[-1.0], [1.0]]), "bias": torch.zeros(2)}
    end = {"weight": start["weight"], "bias": torch.tensor([-2.0, 2.0])}
    guard, shares = (rows, targets), []
    for max_drop in (0.0, 0.1, 0.3, 1.0):
        found, share, kept = largest_allowed(
            network, start, end, guard, before=1.0, max_drop=max_drop
        )
        assert kept == pytest.approx(accuracy(network, found, guard))
        assert kept >= 1 - max_drop
        moved = found["bias"][1] / end["bias"][1]
        assert float(moved) == pytest.approx(share)
        shares.append(share)
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0


def test_removal_goes_no_further_than_the_drop_allowed(scorer):
    scales = []
    for max_drop in (0.0, 0.1, 1.0):
        options = {
            "how": "plain",
            "select": "output",
            "ratio": 1.0,
            "max_drop": max_drop,
            "baseline": False,
        }
        edited = scorer.remove(np.arange(40), guard=(X[1::2], y[1::2]), **options)
        scales.append(edited.edit_report_["scale"])
    assert scales[0] <= scales[1] < scales[2] == 1


def test_removal_is_a_newton_step_on_the_rows_that_stay():
    """By autograd: the gradient of what goes and the curvature of what stays, over its share."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    weight = np.linspace(0.5, 3, 75)
    removed = np.arange(0, 50)  # many, so that what stays differs from what was there
    options = {"how": "plain", "select": "output", "ratio": 1.0, "ridge": 0.0, "max_iter": 400}
    method = GIF(curvature="hessian", ratio=0.5)
    scorer = InfluenceScorer(module, method=method, damping=0.1).fit(
        X[::2].astype(float), y[::2], sample_weight=weight
    )
    guard = (X[1::2].astype(float), y[1::2])
    edited = scorer.remove(removed, guard=guard, max_drop=1.0, **options)
    ours = torch.cat([p.detach().flatten() for p in edited.to_module().parameters()])
    start = torch.cat([p.detach().flatten() for p in module.parameters()])
    rows, labels = torch.tensor(X[::2].astype(float)), torch.tensor(y[::2])
    share = torch.tensor(weight / weight.sum())

    def loss(flat, kept):
        outputs = rows[kept] @ flat[:12].view(3, 4).T + flat[12:]
        return (share[kept] * cross_entropy(outputs, labels[kept], reduction="none")).sum()

    kept = np.setdiff1d(np.arange(75), removed)
    left = share[kept].sum()
    hessian = torch.autograd.functional.hessian(lambda t: loss(t, kept), start) / left
    gradient = torch.autograd.functional.jacobian(lambda t: loss(t, removed), start) / left
    step = torch.linalg.solve(hessian + 0.1 * torch.eye(15), gradient)
    scale = edited.edit_report_["scale"]
    torch.testing.assert_close(ours - start, scale * step, rtol=1e-3, atol=1e-5)


def test_kfac_averages_outputs_over_positions_and_sums_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64)
    outputs = torch.randn(6, 5, 2, generator=generator, dtype=torch.float64)
    weights = torch.arange(1.0, 7, dtype=torch.float64) / 21
    factor = Outer(inputs, outputs)
    basis = kronecker_basis(factor, factor, (2, 3), corrected=False, weights=weights)
    first = sum(weights[i] * torch.outer(inputs[i, t], inputs[i, t])
                for i in range(6) for t in range(5))  # fmt: skip
    second = sum(torch.outer(outputs[i, t], outputs[i, t]) for i in range(6) for t in range(5)) / 5
    vectors = torch.kron(basis.outputs, basis.inputs)
    found = (vectors * basis.values.flatten()) @ vectors.T
    torch.testing.assert_close(found, torch.kron(second, first))


@pytest.mark.parametrize("scale", [0.3, 0.8, 1.5])
def test_a_scaled_ablation_multiplies_the_weights_by_the_scale(scale):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()
    params = {"components": "neurons", "output": "logit", "budget": 40, "fraction": 0.2}
    model = ComponentAttributor(module, ablation=scale, **params).fit(X.astype(float), y)
    mask = np.ones(len(model.components_))
    mask[[1, 3]] = 0
    assert set(model.components_.module[[1, 3]]) == {"0"}
    found = model.counterfactual(mask[None], X.astype(float), y)[:, 0]
    with torch.no_grad():
        weight = module[0].weight * torch.tensor([1, scale, 1, scale, 1])[:, None]
        hidden = torch.tanh(torch.tensor(X.astype(float)) @ weight.T)
        expected = module[2](hidden).numpy()[np.arange(len(X)), y]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_prediction_time_batch_norm_scales_and_shifts(layer):
    torch.manual_seed(0)
    norm = layer(4, eps=0.3).double().eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    rows = torch.randn((9, 4) if layer is nn.BatchNorm1d else (9, 4, 3, 2)).double() * 3 + 1
    with prediction_time_batch_norm(norm) as opened, torch.no_grad():
        found = opened(rows)
    flat = rows.transpose(0, 1).flatten(1)
    shape = (1, 4, *[1] * (rows.ndim - 2))
    mean, variance = flat.mean(1).view(shape), flat.var(1, unbiased=False).view(shape)
    expected = (rows - mean) / (variance + 0.3).sqrt()
    expected = expected * norm.weight.detach().view(shape) + norm.bias.detach().view(shape)
    torch.testing.assert_close(found, expected)


def record(n_rounds=12, size=400, seed=0):
    """Statistics and counts of a world whose mixes wander more than draws would."""
    rng = np.random.default_rng(seed)
    mixes = rng.dirichlet([8, 5, 3], n_rounds)
    statistics = rng.uniform(0.4, 1, (n_rounds, 3))
    return statistics, np.array([rng.multinomial(size, mix) for mix in mixes])


def test_spread_is_a_plain_mean_at_first_and_then_forgets():
    adapter = PerformativeAdapter(adapter="tied", random_state=0).fit_trajectory(*record())
    state = adapter.record_.anticipation
    rng = np.random.default_rng(1)
    for n_pairs in (0, 3, 9, 40):
        counts = rng.multinomial(300, [0.2, 0.5, 0.3]).astype(float)
        mixes = counts / 300, np.array([0.5, 0.3, 0.2])
        realised, expected = (stats.multinomial.logpmf(counts, 300, mix) for mix in mixes)
        surprise = 2 * (realised - expected) / 2  # K - 1 = 2 degrees of freedom
        share = max(0.1, 1 / (n_pairs + 1))
        found = _updated_spread(
            replace(state, n_pairs=n_pairs, spread=7.0), np.log(mixes[1]), counts
        )
        assert found == pytest.approx(max(1.0, (1 - share) * 7.0 + share * surprise))


def test_dispersion_is_that_of_all_rounds_and_two_more_of_ten():
    _, counts = record()
    log_mix = np.log([0.4, 0.35, 0.25])

    class Fixed:
        def log_prior(self, inputs):
            return np.tile(log_mix, (len(counts), 1))

    realised = [stats.multinomial.logpmf(row, 400, row / 400) for row in counts]
    expected = [stats.multinomial.logpmf(row, 400, np.exp(log_mix)) for row in counts]
    lost = 2 * (np.sum(realised) - np.sum(expected))
    found = dispersion(Fixed(), None, counts.astype(float))
    assert found == pytest.approx((lost + 2 * 10 * 2) / (14 * 2))


def test_intervals_are_quantiles_of_a_beta_around_the_prior():
    adapter = PerformativeAdapter(adapter="tied", random_state=0).fit_trajectory(*record())
    prior, (low, high) = adapter.predict_prior(return_interval=True)
    kept = adapter.record_
    worth = 400 / (kept.anticipation.spread * kept.width)
    lower = stats.beta.ppf(0.05, worth * prior, worth * (1 - prior))
    upper = stats.beta.ppf(0.95, worth * prior, worth * (1 - prior))
    np.testing.assert_allclose(low, np.minimum(np.floor(lower * 400) / 400, prior))
    np.testing.assert_allclose(high, np.maximum(np.ceil(upper * 400) / 400, prior))
    assert (low < prior).all()
    assert (prior < high).all()


def test_changing_recall_is_tested_as_tables_of_hits_and_misses_are():
    rng = np.random.default_rng(0)
    counts = rng.integers(100, 300, size=(6, 3))
    hits = rng.binomial(counts, [0.6, 0.7, 0.75])
    total = freedom = 0
    for k in range(3):
        table = np.stack([hits[:, k], counts[:, k] - hits[:, k]])
        tested = stats.chi2_contingency(table, correction=False)
        total, freedom = total + tested.statistic, freedom + tested.dof
    expected = stats.chi2.sf(total, freedom)
    assert conditional_shift_p_value(counts, hits) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("l2", [0.1, 30.0])
@pytest.mark.parametrize("kind", ["temperature", "bcts"])
def test_calibration_minimises_its_penalised_loss(kind, l2):
    rng = np.random.default_rng(0)
    logits, codes = 3 * rng.normal(size=(80, 3)), rng.integers(0, 3, 80)
    weight, offset = rng.uniform(0.2, 2, 80), np.log([0.2, 0.3, 0.5])

    def objective(theta):
        bias = theta[1:] if kind == "bcts" else 0.0
        scores = logits * np.exp(-theta[0]) + bias + offset
        chosen = scores[np.arange(80), codes] - np.log(np.exp(scores).sum(1))
        return -(weight * chosen).sum() + l2 / 2 * (theta**2).sum()

    theta = minimize(objective, np.zeros(4 if kind == "bcts" else 1), method="BFGS").x
    found = fit_calibration(logits, codes, offset, kind=kind, l2=l2, weight=weight)
    assert found.temperature == pytest.approx(np.exp(theta[0]), rel=1e-3)
    bias = theta[1:] - theta[1:].mean() if kind == "bcts" else np.zeros(3)
    np.testing.assert_allclose(found.bias, bias, atol=2e-3)


def test_selected_parameters_and_distances_are_those_of_vectors():
    module = nn.Linear(2, 2)
    one = {n: p.detach() for n, p in select_parameters(module).items()}
    two = {n: p + 0.5 for n, p in one.items()}
    assert distance(one, two) == pytest.approx(0.5 * 6**0.5, rel=1e-5)
