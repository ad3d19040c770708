"""Gradients of functions that can only be called.

References
----------
Tsai, Chen, Ho, "Transfer Learning without Knowing: Reprogramming Black-box Machine
Learning Models with Scarce Data and Limited Resources" (ICML 2020, one-sided averaged
estimate); Spall, "Multivariate stochastic approximation using a simultaneous perturbation
gradient approximation" (IEEE TAC 1992).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def random_gradient(
    loss: Loss,
    point: Tensor,
    base: Tensor,
    *,
    n_directions: int,
    step: float,
    generator: torch.Generator,
) -> Tensor:
    """Estimate a gradient from one-sided differences along random directions: base ()."""
    # `d / step * mean((loss(w + step v) - loss(w)) v)` over unit vectors v.
    total = torch.zeros_like(point)
    for _ in range(n_directions):
        direction = torch.randn(point.shape, generator=generator).to(point)
        direction /= direction.norm()
        total += (loss(point + step * direction) - base) * direction
    return total * (point.numel() / (step * n_directions))


def simultaneous_gradient(
    loss: Loss,
    point: Tensor,
    base: Tensor,
    *,
    n_directions: int,
    step: float,
    generator: torch.Generator,
) -> Tensor:
    """Estimate a gradient from two-sided differences along random signs (SPSA): base ()."""
    # `mean((loss(w + step v) - loss(w - step v)) / (2 step) v)` over sign vectors v.
    total = torch.zeros_like(point)
    for _ in range(n_directions):
        signs = torch.randint(0, 2, point.shape, generator=generator).to(point) * 2 - 1
        total += (loss(point + step * signs) - loss(point - step * signs)) * signs
    return total / (2 * step * n_directions)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "rge": random_gradient,
    "spsa": simultaneous_gradient,
}

#: Calls of the loss for each direction.
CALLS_PER_DIRECTION = {"rge": 1, "spsa": 2}
