import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn

from skperf import InfluenceScorer
from skperf.influence import GGN, Source
from skperf.influence.curvature import RowSpace
from skperf.influence.gradients import Dense
from skperf.influence.source import Segment, Unrolled
from skperf.influence.tiles import meet

P, N, Q = 7, 9, 4


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(matrix):
    """Two layers."""
    return [Dense(matrix[:, :3].contiguous()), Dense(matrix[:, 3:].contiguous())]


def segment(seed, time, rank=4):
    rows, curvature = draw(N, P, seed=seed), draw(rank, P, seed=seed + 1)
    return rows, curvature.T @ curvature, Segment(RowSpace.of(split(curvature)), time)


def unrolled(parts, queries):
    rows = [layer for rows, _, _ in parts for layer in split(rows)]
    lift = Unrolled(tuple(part for _, _, part in parts))
    return meet(lift(None, split(queries)), rows) / N


@pytest.mark.parametrize("times", [[3.0], [0.5, 2.0], [0.2, 0.7, 0.01]])
def test_against_gradient_descent_on_changing_quadratics(times):
    # small steps of theta' = theta - rate * (C theta + weight * g), by hand, for each row
    parts = [segment(10 * i, time) for i, time in enumerate(times)]
    queries = draw(Q, P, seed=99)
    found = unrolled(parts, queries)
    moved = torch.zeros(N, P, dtype=torch.float64)
    for (rows, curvature, _), time in zip(parts, times, strict=True):
        n_steps = 20000
        step = torch.eye(P, dtype=torch.float64) - time / n_steps * curvature
        power, total = torch.eye(P, dtype=torch.float64), torch.zeros(P, P, dtype=torch.float64)
        for _ in range(n_steps):
            total += power
            power = power @ step
        # left out, a row does not push its gradient down
        moved = moved @ power + time / n_steps * rows @ total / N
    torch.testing.assert_close(found, queries @ moved.T, rtol=2e-3, atol=1e-5)


def test_a_long_segment_is_the_optimum_on_what_is_curved():
    part = segment(0, 1e6, rank=P)
    queries = draw(Q, P, seed=99)
    expected = queries @ torch.linalg.solve(part[1], part[0].T) / N
    torch.testing.assert_close(unrolled([part], queries), expected, rtol=1e-6, atol=1e-8)


def test_what_came_long_before_has_faded():
    first, last = segment(0, 1.0), segment(10, 1e6, rank=P)
    queries = draw(Q, P, seed=99)
    torch.testing.assert_close(unrolled([first, last], queries), unrolled([last], queries))


# Through the scorer ------------------------------------------------------------------------------

X, y = load_iris(return_X_y=True)
X = X[::3]
y = y[::3]


def scorer(method, **params):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return InfluenceScorer(module, method=method, **params), module


def test_one_checkpoint_is_influence_damped_by_its_horizon():
    own, _ = scorer(Source(kept_trace=1.0), horizon=30, learning_rate=0.1)
    # for large damping both are the first step of training
    short, _ = scorer(Source(n_steps=1, kept_trace=1.0), learning_rate=1e-6)
    damped, _ = scorer(GGN(kept_trace=1.0), damping=1e6)
    found, first, last = (s.fit(X, y).influence(X[:4], y[:4]) for s in (own, short, damped))
    np.testing.assert_allclose(first, last, rtol=1e-3)
    assert np.corrcoef(found.ravel(), first.ravel())[0, 1] < 0.999
    assert own.unit_ == "loss"


def test_a_stretch_may_be_cut_in_two():
    whole, module = scorer(Source(n_steps=50), learning_rate=0.2)
    cut, _ = scorer(
        Source(n_steps=[20, 30]), learning_rate=0.2, checkpoints=[module, module.state_dict()]
    )
    slow, _ = scorer(
        Source(n_steps=25), learning_rate=[0.16, 0.24], checkpoints=[module, module.state_dict()]
    )
    expected = whole.fit(X, y).influence(X[:5], y[:5])
    np.testing.assert_allclose(cut.fit(X, y).influence(X[:5], y[:5]), expected, rtol=1e-6)
    np.testing.assert_allclose(slow.fit(X, y).influence(X[:5], y[:5]), expected, rtol=1e-6)


def test_what_is_not_known_is_asked_for():
    with pytest.raises(ValueError, match=r"needs Source\(n_steps=...\), .* got None"):
        scorer("source", learning_rate=0.1)[0].fit(X, y)
    with pytest.raises(ValueError, match=r"needs learning_rate, .* got None"):
        scorer("source", horizon=5)[0].fit(X, y)
    one, module = scorer(Source(n_steps=[1, 2, 3]), learning_rate=0.1)
    with pytest.raises(ValueError, match=r"each of the 2 checkpoints, got \[1, 2, 3\]"):
        one.set_params(checkpoints=[module, module]).fit(X, y)
    one.set_params(method=Source(n_steps=3)).fit(X, y)
    with pytest.raises(ValueError, match="scores training rows against queries only"):
        one.influence(X[:2], y[:2], rows=(X[:3], y[:3]))
