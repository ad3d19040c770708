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

#: Calls of the loss for each direction.
CALLS_PER_DIRECTION = {"rge": 1, "spsa": 2}


def estimated_gradient(
    kind: str,
    loss: Callable[[Tensor], Tensor],
    point: Tensor,
    base: Tensor,
    *,
    n_directions: int,
    step: float,
    generator: torch.Generator,
) -> Tensor:
    """Estimate a gradient by differences of the loss: point (...), base () -> (...)."""
    # "rge": `d / step * mean((loss(w + step v) - loss(w)) v)` over unit vectors v; "spsa":
    # `mean((loss(w + step v) - loss(w - step v)) / (2 step) v)` over vectors of signs.
    total = torch.zeros_like(point)
    for _ in range(n_directions):
        if kind == "rge":
            v = torch.randn(point.shape, generator=generator).to(point)
            v /= v.norm()
            total += point.numel() * (loss(point + step * v) - base) * v
        else:
            v = torch.randint(0, 2, point.shape, generator=generator).to(point) * 2 - 1
            total += (loss(point + step * v) - loss(point - step * v)) / 2 * v
    return total / (step * n_directions)
