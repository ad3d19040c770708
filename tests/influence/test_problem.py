"""What a method is fitted on, in one pass each."""

import numpy as np
import pytest
import torch
from torch import nn

from skperf import InfluenceScorer
from skperf.influence import problem as module_of
from skperf.influence.problem import curvature_rows, weighted

N, LENGTH, K = 7, 3, 4
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, LENGTH, 3)), RNG.integers(K, size=(N, LENGTH))
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5, 0.25, 3.0, 0.75])


@pytest.fixture
def problem():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, K)).double()
    scorer = InfluenceScorer(module, method="gradient_dot").fit(X, Y, sample_weight=WEIGHTS)
    return scorer._learned.opened().first


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 2)])
def test_rows_are_multiplied_by_their_weights(shape):
    values, weights = torch.randn(shape), torch.linspace(-1, 3, 5)
    expected = torch.stack([v * w for v, w in zip(values, weights, strict=True)])
    torch.testing.assert_close(weighted(values, weights), expected)


def test_only_gradients_of_all_training_rows_take_room_on_the_shelf(problem):
    problem.shelf.used = 0
    rows = problem.gradients(problem.loss, problem.X[:3], problem.targets[:3])
    assert problem.shelf.used == 0
    assert {len(factor) for factor in rows} == {3}
    gradients = problem.train_gradients()
    stored = sum(t.numel() * t.element_size() for f in gradients for t in f.tensors)
    assert problem.shelf.used == stored > 0


@pytest.mark.parametrize("room", [N * (LENGTH * K) ** 2, N * (LENGTH * K) ** 2 - 1])
@pytest.mark.parametrize("kept_trace", [1.0, 0.9])
@pytest.mark.parametrize("max_rows", [None, 13])
def test_rows_of_many_outputs_are_exact_where_they_fit(
    problem, monkeypatch, room, kept_trace, max_rows
):
    taken = []
    monkeypatch.setattr(module_of, "_MOST_OUTPUTS", room)
    for name in ("loss_rows", "sampled_rows"):
        monkeypatch.setattr(module_of, name, lambda *_, name=name, **__: taken.append(name))
    curvature_rows(problem, kept_trace=kept_trace, max_rows=max_rows)
    fits = room == N * (LENGTH * K) ** 2 and kept_trace == 1.0 and max_rows is None
    assert taken == ["loss_rows" if fits else "sampled_rows"]


def test_rows_of_one_axis_of_outputs_are_always_exact(monkeypatch):
    taken = []
    monkeypatch.setattr(module_of, "_MOST_OUTPUTS", 0)
    monkeypatch.setattr(module_of, "loss_rows", lambda *_, **__: taken.append(1))
    single = InfluenceScorer(nn.Linear(3, K).double(), method="gradient_dot")
    single.fit(X[:, 0], Y[:, 0])
    curvature_rows(single._learned.opened().first, kept_trace=0.9)
    assert taken
