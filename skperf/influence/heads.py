"""Exact Newton and leave-one-out steps for models that are linear in their parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_CLOSE_ENOUGH, _MOST_STEPS = 1e-4, 40


def linear_head_hessian(inputs: Tensor, curvatures: Tensor, ridge: Tensor) -> Tensor:
    """Hessian of a loss linear in inputs (n, d): curvatures (n, K, K), ridge (d,) -> (K d, K d)."""
    n_outputs = curvatures.shape[1]
    blocks = ((curvatures[:, k, :, None] * inputs[:, None]).flatten(1) for k in range(n_outputs))
    matrix = torch.cat([inputs.T @ block for block in blocks])
    matrix.diagonal().add_(ridge.repeat(n_outputs))
    return matrix


def leave_one_out_steps(
    inputs: Tensor,
    slopes: Tensor,
    curvatures: Tensor,
    hessian: Tensor,
    *,
    chunk: int = 256,
    left: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Newton steps that leave a row out: inputs (n, d), slopes (n, K) -> (n, K, d)."""
    # For a squared loss the first step lands on the leave-one-out solution itself. For others
    # `left` says what is left of the gradient, and further steps by the same matrices follow.
    n_outputs, d = slopes.shape[1], inputs.shape[1]
    # the unpenalised directions that leave every output as it is have no curvature
    inverse = torch.linalg.pinv(hessian, hermitian=True)
    identity = torch.eye(n_outputs, dtype=inputs.dtype, device=inputs.device)
    steps = []
    for rows in torch.arange(len(inputs)).split(chunk):
        x, curvature = inputs[rows], curvatures[rows]
        reached = torch.einsum("kdme,ne->nkdm", inverse.view(n_outputs, d, n_outputs, d), x)
        leverage = torch.einsum("nd,nkdm->nkm", x, reached)
        # Without row i the Hessian is `H - J_i' C_i J_i`; Woodbury turns its inverse into one of
        # K x K: `(H - J'CJ)^-1 = H^-1 + H^-1 J' (I - C L)^-1 C J H^-1` with L = J H^-1 J'
        middle = torch.linalg.solve(identity - curvature @ leverage, curvature)

        solve = partial(_solved, inverse=inverse, x=x, reached=reached, middle=middle)
        gradient, everyone = slopes[rows][:, :, None] * x[:, None], torch.arange(len(rows))
        if left is None:
            steps.append(solve(gradient, everyone))
        else:
            steps.append(_settled(-gradient, solve, partial(left, rows)))
    return torch.cat(steps)


def _solved(vectors: Any, own: Tensor, *, inverse: Any, x: Any, reached: Any, middle: Any) -> Any:
    """Multiply by the inverses without rows own (m,) of a chunk: vectors (m, K, d) -> (m, K, d)."""
    plain = (vectors.flatten(1) @ inverse).view_as(vectors)
    turned = middle[own] @ (plain @ x[own][:, :, None])
    return plain + (reached[own] @ turned[:, None]).squeeze(3)


def _settled(gradient: Tensor, solve: Any, left: Any) -> Tensor:
    """Step until hardly anything is left of gradients (m, K, d), each as far as it lessens."""
    steps, direction = torch.zeros_like(gradient), solve(gradient, torch.arange(len(gradient)))
    size = (gradient * direction).sum((1, 2))
    share, enough = torch.ones_like(size), _CLOSE_ENOUGH**2 * size
    for _ in range(_MOST_STEPS):
        own = (size > enough).nonzero()[:, 0]
        if len(own) == 0:
            break
        tried = steps[own] - share[own, None, None] * direction[own]
        rest = left(own, tried)
        turned = solve(rest, own)
        # steps of a convex loss lessen the gradient in this length, if they are short enough
        length = (rest * turned).sum((1, 2))
        better = length < size[own]
        share[own] = torch.where(better, share[own], share[own] / 2)
        own, better = own[better], better.nonzero()[:, 0]
        steps[own], direction[own], size[own] = tried[better], turned[better], length[better]
    return steps
