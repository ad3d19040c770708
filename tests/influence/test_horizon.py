import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from influence_nets import mlp
from scipy.stats import pearsonr, spearmanr

from skperf.backbone.network import Network
from skperf.backbone.outputs import loss
from skperf.backbone.parameters import select_parameters
from skperf.backbone.rows import Rows
from skperf.influence import GGN, InfluenceScorer
from skperf.influence.horizon import (
    FurtherTraining,
    actual_effects,
    agreement,
    further_trained,
    usable_horizon,
)
from skperf.influence.inverses import exact


def test_actual_effects_are_those_of_two_separate_runs():
    torch.manual_seed(0)
    module = mlp(4, 5, 3)
    network = Network(module, np.arange(3))
    inputs, codes = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    queries = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    training = FurtherTraining(0.1, 8, weight_decay=0.01, seed=3)
    effects = actual_effects(
        network,
        select_parameters(module),
        Rows(inputs),
        codes,
        torch.tensor([4, 11]),
        (Rows(queries[0]), queries[1]),
        loss,
        training,
        [1, 5],
    )
    assert effects.shape == (2, 6, 2)

    def run(left_out=-1):
        copy = mlp(4, 5, 3)
        copy.load_state_dict(module.state_dict())
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.1, weight_decay=0.01)
        generator = torch.Generator().manual_seed(3)
        batches, values = [], []
        while len(batches) < 5:
            batches += torch.randperm(20, generator=generator).split(8)
        for step, rows in enumerate(batches[:5], 1):
            optimizer.zero_grad()
            losses = loss(copy(inputs[rows]), codes[rows])
            (losses * (rows != left_out)).mean().backward()
            optimizer.step()
            if step in (1, 5):
                values.append(loss(copy(queries[0]), queries[1]).detach())
        return torch.stack(values)

    for column, row in enumerate((4, 11)):
        torch.testing.assert_close(effects[:, :, column], run(row) - run(), rtol=1e-6, atol=1e-9)


def test_further_training_is_that_of_torch():
    torch.manual_seed(0)
    module = mlp(4, 5, 3)
    network = Network(module, np.arange(3))
    inputs, codes = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    training = FurtherTraining(0.1, 8, weight_decay=0.01, seed=3)
    weights = torch.linspace(0.5, 2, 20)
    stages = further_trained(
        network, select_parameters(module), Rows(inputs), codes, weights[None], training
    )
    end = next(itertools.islice(stages, 5, None))
    copy = mlp(4, 5, 3)
    copy.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1, weight_decay=0.01)
    generator = torch.Generator().manual_seed(3)
    batches = [b for _ in range(2) for b in torch.randperm(20, generator=generator).split(8)]
    for rows in batches[:5]:
        optimizer.zero_grad()
        (loss(copy(inputs[rows]), codes[rows]) * weights[rows]).mean().backward()
        optimizer.step()
    for name, parameter in copy.named_parameters():
        torch.testing.assert_close(end[name][0], parameter)


def test_the_flow_is_linearised_half_way_along_the_horizon():
    torch.manual_seed(0)
    module = mlp(4, 6, 3)
    X, y = torch.randn(60, 4).double().numpy(), np.arange(60) % 3
    flow = {"damping": "flow", "horizon": 40, "learning_rate": 0.1}
    scorer = InfluenceScorer(module, method=GGN(kept_trace=1.0), **flow).fit(X[:50], y[:50])
    middle = mlp(4, 6, 3)
    middle.load_state_dict(scorer._learned.stages[0].state)
    moved = sum(
        float((a - b).detach().norm())
        for a, b in zip(module.parameters(), middle.parameters(), strict=True)
    )
    assert moved > 0.1
    there = InfluenceScorer(middle, method="exact", **flow).fit(X[:50], y[:50])
    # at its own middle the second one has moved on: put it back to compare at the same weights
    learned = there._learned
    problem = learned.problem(learned.network(), learned.stages[0].plan)
    stage = replace(learned.stages[0], state=None, fit=exact(problem))
    there._show(replace(learned, stages=(stage,)), learned.network())
    expected = there.influence(X[50:], y[50:])
    np.testing.assert_allclose(scorer.influence(X[50:], y[50:]), expected, rtol=1e-3, atol=1e-6)
    later = InfluenceScorer(module, method=GGN(1.0), damping=0.1, learning_rate=0.1)
    later.fit(X[:50], y[:50])
    again = later.with_damping("flow", horizon=40)
    np.testing.assert_allclose(again.influence(X[50:], y[50:]), expected, rtol=1e-3, atol=1e-6)
    assert again.with_damping(0.1)._learned.stages[0].state is None
    np.testing.assert_allclose(
        again.with_damping(0.1).influence(X[50:], y[50:]), later.influence(X[50:], y[50:])
    )
    edited = scorer.repair(X[50:52], (y[50:52] + 1) % 3, precondition=True, max_drop=1.0)
    assert edited.edit_report_["n_steps"] > 0


def test_agreement_is_the_mean_correlation():
    rng = np.random.default_rng(0)
    predicted, actual = rng.normal(size=(5, 9)), rng.normal(size=(5, 9))
    actual[:, :3] = np.round(actual[:, :3])
    pearson, spearman, slope = agreement(torch.as_tensor(predicted), torch.as_tensor(actual))
    pairs = list(zip(predicted, actual, strict=True))
    assert pearson == pytest.approx(np.mean([pearsonr(p, a)[0] for p, a in pairs]))
    assert spearman == pytest.approx(np.mean([spearmanr(p, a)[0] for p, a in pairs]))
    assert slope == pytest.approx((predicted * actual).sum() / (predicted**2).sum())


def test_usable_horizon_ends_at_the_first_shortfall():
    assert usable_horizon([1, 2, 5, 10], [0.9, 0.85, 0.7, 0.95]) == 2
    assert usable_horizon([1, 2], [0.1, 0.9]) == 0
    assert usable_horizon([1, 2], [float("nan"), 0.9]) == 0


def test_damping_tied_to_the_horizon_fades_later_than_gradient_dot():
    from sklearn.datasets import load_digits

    X, y = load_digits(n_class=5, return_X_y=True)
    X = X[:400] / 16
    module = mlp(64, 16, 5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    rows, codes = torch.as_tensor(X[:300]), torch.as_tensor(y[:300])
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(rows), codes).backward()
        optimizer.step()
    options = {"steps": (1, 10, 300), "n_train": 24, "learning_rate": 0.03, "batch_size": 300}
    curves = {}
    for name, params in {
        "dot": {"method": "gradient_dot"},
        "horizon": {"damping": "horizon", "horizon": 1, "learning_rate": 0.03},
        "flow": {"damping": "flow", "horizon": 1, "learning_rate": 0.03},
    }.items():
        scorer = InfluenceScorer(module, random_state=0, **params)
        curves[name] = scorer.fit(X[:300], y[:300]).fading(X[300:], y[300:400], **options)
    assert min(curve.pearson[0] for curve in curves.values()) > 0.99
    assert curves["dot"].pearson[2] < curves["horizon"].pearson[2] - 0.05
    assert curves["flow"].pearson[2] > 0.9
    assert 0.5 < curves["flow"].slope[1] < 1.3
    assert curves["flow"].usable_horizon == 300
    assert curves["dot"].predicted.shape == (3, 100, 24)


def test_steps_too_long_for_the_curvature_are_named():
    X, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    scorer = InfluenceScorer(mlp(4, 5, 3)).fit(X, y)
    asked = {"steps": (1,), "n_train": 2}
    with pytest.warns(RuntimeWarning, match="learning_rate=100 is too large"):
        scorer.fading(X[:2], y[:2], learning_rate=100.0, **asked)
    scorer.fading(X[:2], y[:2], learning_rate=0.01, **asked)
