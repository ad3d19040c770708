import pytest
import torch

from skperf.reprogramming.black_box import CALLS_PER_DIRECTION, estimated_gradient


@pytest.mark.parametrize("name", ["rge", "spsa"])
def test_mean_estimate_is_the_gradient(name):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, generator=generator).double()
    hessian = factor @ factor.T
    point = torch.randn(6, generator=generator).double()
    calls = []

    def loss(w):
        calls.append(1)
        return w @ hessian @ w / 2

    estimate = estimated_gradient(
        name, loss, point, loss(point), n_directions=5_000, step=1e-4, generator=generator
    )
    exact = hessian @ point
    assert len(calls) == 1 + 5_000 * CALLS_PER_DIRECTION[name]
    assert torch.linalg.norm(estimate - exact) < 0.1 * torch.linalg.norm(exact)


def test_rge_by_hand():
    """One direction in one dimension: the difference quotient itself."""
    point = torch.tensor([2.0], dtype=torch.float64)

    def square(w):
        return w.square().sum()

    estimate = estimated_gradient(
        "rge",
        square,
        point,
        square(point),
        n_directions=1,
        step=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    assert min(abs(estimate.item() - slope) for slope in (4.1, 3.9)) < 1e-9
