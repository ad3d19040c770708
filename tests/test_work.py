"""How often the network runs, forwards and back, and how large its tensors get.

A guard against lost speed and memory without a stopwatch. Rows are counted; the bounds are what is
needed, plus the few rows that are looked at when a network is opened.
"""

import numpy as np
import pytest
import torch
from sklearn.frozen import FrozenEstimator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from skperf import MLP, ComponentAttributor, InfluenceScorer, Net, PerformativeAdapter, from_module
from skperf.components.gates import STACKED

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
        logits = self.layers(X)
        if logits.requires_grad:
            logits.register_hook(self.seen.went_back)
        return logits


class Tally:
    """A count that a copy of a network shares."""

    def __init__(self):
        self.rows = self.rows_back = 0

    def went_back(self, slope):
        self.rows_back += len(slope)

    def __deepcopy__(self, memo):
        return self

    def since(self, work):
        """Rows that some work takes."""
        return self.both_since(work)[0]

    def both_since(self, work):
        """Rows that go forwards and rows that go back in some work."""
        before = self.rows, self.rows_back
        work()
        return self.rows - before[0], self.rows_back - before[1]


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator returns while the mode is on."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        returned = operator(*args, **(kwargs or {}))
        for each in returned if isinstance(returned, tuple | list) else [returned]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.nbytes)
        return returned


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


@pytest.mark.parametrize("method", ["auto", "ggn", "ekfac", "arnoldi", "trak"])
def test_what_lies_below_a_head_that_alone_trains_runs_once(module, data, method):
    X, y = data
    last = f"{list(dict(module.named_parameters()))[-1].rpartition('.')[0]}.*"
    scorer = InfluenceScorer(from_module(module), method=method, parameters=last, random_state=0)
    assert module.seen.since(lambda: scorer.fit(X, y)) <= N + LOOK
    assert module.seen.since(lambda: scorer.influence(X[:5], y[:5])) <= 5


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
    # beside the masks: the intact outputs, and the masks by which the fast path is verified, one
    # stack of them of the size of real passes
    assert module.seen.since(lambda: attributor.fit(X, y)) <= (budget + 3) * N + STACKED
    assert attributor.n_forward_equivalents_ == budget


@pytest.mark.parametrize(("method", "passes"), {"gradient_dot": 1, "ggn": 4, "ekfac": 4}.items())
def test_a_fit_goes_back_once_for_a_gradient_and_once_for_each_class(module, data, method, passes):
    X, y = data
    scorer = InfluenceScorer(from_module(module), method=method, random_state=0)
    assert module.seen.both_since(lambda: scorer.fit(X, y))[1] <= passes * N + LOOK
    back = module.seen.both_since(lambda: scorer.influence(X[:20], y[:20]))[1]
    assert back <= 20


def test_predictions_never_go_back(module, data):
    X, y = data
    adapter = PerformativeAdapter(from_module(module), random_state=0)
    adapter.fit(X, y, rounds=np.repeat(np.arange(6), N // 6))
    assert module.seen.both_since(lambda: adapter.predict(X)) == (N, 0)


@pytest.mark.parametrize("budget", [12, 48])
def test_gradients_of_components_are_within_the_budget(module, data, budget):
    X, y = data
    attributor = ComponentAttributor(
        from_module(module),
        components="neurons",
        method="path_gradient",
        budget=budget,
        random_state=0,
    )
    forward, back = module.seen.both_since(lambda: attributor.fit(X, y))
    # a pass back is charged as two passes; beside them the intact outputs and the verification
    assert forward + 2 * back <= (budget + 3) * N + LOOK


@pytest.mark.parametrize("method", ["gradient_dot", "ggn", "ekfac"])
def test_no_tensor_holds_the_gradients_of_all_rows(method):
    n, width = 400, 1024
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 64)).astype(np.float32)
    y = (X @ rng.normal(size=(64, 5))).argmax(1)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 5))
    n_parameters = sum(each.numel() for each in wide.parameters())
    with Largest() as largest:
        scorer = InfluenceScorer(from_module(wide), method=method, random_state=0).fit(X, y)
        scorer.influence(X[:20], y[:20])
    # the largest are the eigenvectors of a Kronecker factor, and the products of curvature rows
    assert largest.bytes <= n * n_parameters * 4 / 10


def test_going_back_through_a_run_takes_its_steps_a_fixed_number_of_times(data):
    X, y = data
    calls = {}
    for n_epochs in (4, 8):
        net = Net(MLP, module__hidden=(8,), max_epochs=n_epochs, batch_size=24, random_state=0)
        net.set_params(record_run=True).fit(X, y)
        scorer = InfluenceScorer(FrozenEstimator(net), method="replay").fit(X, y)
        with Calls() as counted:
            scorer.influence(X[:5], y[:5], aggregate="mean")
        calls[n_epochs] = counted.matmuls
    # twice the steps take at most twice the products
    assert 0 < calls[8] <= 2.1 * calls[4]


class Calls(TorchDispatchMode):
    """The number of matrix products while the mode is on."""

    matmuls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.matmuls += operator.overloadpacket.__name__ in {"mm", "addmm", "bmm", "baddbmm"}
        return operator(*args, **(kwargs or {}))
