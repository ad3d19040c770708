import pytest
import torch

from skperf.influence.curvature import RowSpace
from skperf.influence.gradients import Dense
from skperf.influence.source import Segment, unrolled

P, N, Q = 7, 9, 4


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(matrix):
    """Two layers."""
    return [Dense(matrix[:, :3].contiguous()), Dense(matrix[:, 3:].contiguous())]


def segment(seed, time, rank=4):
    rows, curvature = draw(N, P, seed=seed), draw(rank, P, seed=seed + 1)
    return rows, curvature.T @ curvature, Segment(split(rows), RowSpace.of(split(curvature)), time)


@pytest.mark.parametrize("times", [[3.0], [0.5, 2.0], [0.2, 0.7, 0.01]])
def test_against_gradient_descent_on_changing_quadratics(times):
    # small steps of theta' = theta - rate * (C theta + weight * g), by hand, for each row
    parts = [segment(10 * i, time) for i, time in enumerate(times)]
    queries = draw(Q, P, seed=99)
    found = unrolled([part for _, _, part in parts], split(queries))
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
    rows, curvature, part = segment(0, 1e6, rank=P)
    queries = draw(Q, P, seed=99)
    expected = queries @ torch.linalg.solve(curvature, rows.T) / N
    torch.testing.assert_close(unrolled([part], split(queries)), expected, rtol=1e-6, atol=1e-8)


def test_what_came_long_before_has_faded():
    first, last = segment(0, 1.0)[2], segment(10, 1e6, rank=P)[2]
    queries = split(draw(Q, P, seed=99))
    torch.testing.assert_close(unrolled([first, last], queries), unrolled([last], queries))
    with pytest.raises(ValueError, match="at least one"):
        unrolled([], queries)
