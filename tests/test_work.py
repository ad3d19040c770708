"""How often the network runs, counted in rows: a guard against lost speed without a stopwatch.

The bounds are what is needed, plus the few rows that are looked at when a network is opened.
"""

import numpy as np
import pytest
import torch
from torch import nn

from skperf import ComponentAttributor, InfluenceScorer, PerformativeAdapter, from_module

N, N_FEATURES, N_CLASSES = 96, 6, 3
LOOK = 32  # rows that opening a network and checking its layers may take


class Counting(nn.Module):
    """A small network that counts the rows it has seen, in a list that its copies share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(N_FEATURES, 8), nn.ReLU(), nn.Linear(8, N_CLASSES))
        self.seen = Tally()

    def forward(self, X):
        self.seen.rows += len(X)
        return self.layers(X)


class Tally:
    """A count that a copy of a network shares."""

    def __init__(self):
        self.rows = 0

    def __deepcopy__(self, memo):
        return self

    def since(self, work):
        """Rows that some work takes."""
        before = self.rows
        work()
        return self.rows - before


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, N_FEATURES)).astype(np.float32)
    return X, (X @ rng.normal(size=(N_FEATURES, N_CLASSES))).argmax(1)


@pytest.fixture
def module():
    return Counting().eval()


def test_predictions_run_every_row_once(module, data):
    X, y = data
    adapter = PerformativeAdapter(from_module(module), random_state=0)
    adapter.fit(X, y, rounds=np.repeat(np.arange(6), N // 6))
    for method in (adapter.predict, adapter.predict_proba):
        assert module.seen.since(lambda method=method: method(X)) == N


def test_an_adapter_is_fitted_on_one_pass(module, data):
    X, y = data
    adapter = PerformativeAdapter(from_module(module), random_state=0)
    rounds = np.repeat(np.arange(6), N // 6)
    assert module.seen.since(lambda: adapter.fit(X, y, rounds=rounds)) <= N + LOOK


# gradients take one pass; curvature one for the outputs, and one for each class or statistic
PASSES = {"gradient_dot": 1, "ggn": 4, "ekfac": 4}


@pytest.mark.parametrize("method", PASSES)
def test_influence_runs_training_rows_once_and_queries_once(module, data, method):
    X, y = data
    scorer = InfluenceScorer(from_module(module), method=method, random_state=0)
    assert module.seen.since(lambda: scorer.fit(X, y)) <= PASSES[method] * N + LOOK
    # what is needed of the training rows was kept: they do not run again
    for n_queries in (1, N // 2):
        queries = X[:n_queries], y[:n_queries]
        assert module.seen.since(lambda rows=queries: scorer.influence(*rows)) <= n_queries


@pytest.mark.parametrize("budget", [10, 40])
def test_ablations_run_as_often_as_the_budget_says(module, data, budget):
    X, y = data
    attributor = ComponentAttributor(
        from_module(module),
        components="neurons",
        method="regression",
        budget=budget,
        random_state=0,
    )
    # beside the masks: the intact outputs, and the masks by which the fast path is verified
    assert module.seen.since(lambda: attributor.fit(X, y)) <= (budget + 3) * N
    assert attributor.n_forward_equivalents_ == budget
