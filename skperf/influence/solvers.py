"""Solve ``(C + damping) x = g`` for many right-hand sides at once, the matrix known by products.

Vectors are rows throughout: ``multiply`` takes and returns tensors of shape (m, n_parameters).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Solution:
    """Answers of an iterative solver."""

    values: Tensor  # (m, n_parameters)
    residual: Tensor  # (m,)
    n_iterations: int
    converged: bool


def conjugate_gradient(
    multiply: Multiply, right: Tensor, *, tol: float = 1e-4, max_iter: int = 200
) -> Solution:
    """Conjugate gradients for a positive definite matrix: right (m, n_parameters)."""
    x = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    squared = residual.square().sum(1)
    goal = tol**2 * squared
    iterations = 0
    while iterations < max_iter and bool((squared > goal).any()):
        active = squared > goal
        product = multiply(direction)
        curvature = (direction * product).sum(1)
        if bool((curvature[active] <= 0).any()):
            raise ValueError(
                "the damped curvature is indefinite: conjugate gradients met a direction of "
                "curvature <= 0. Raise damping, or use curvature='ggn', which has none."
            )
        step = torch.where(active, squared / curvature, 0.0)[:, None]
        x += step * direction
        residual -= step * product
        before, squared = squared, residual.square().sum(1)
        ratio = torch.where(active, squared / before.clamp_min(_TINY), 0.0)
        direction = residual + ratio[:, None] * direction
        iterations += 1
    relative = _relative(residual, right)
    return Solution(x, relative, iterations, bool((squared <= goal).all()))


def neumann(
    multiply: Callable[[Tensor, int], Tensor],
    right: Tensor,
    *,
    scale: float,
    max_iter: int = 1000,
    tol: float = 1e-4,
) -> Solution:
    """Sum the stochastic Neumann series of LiSSA: right (m, n_parameters)."""
    # Iterates `x <- g + x - (C_batch + damping) x / scale` and returns `x / scale`.
    x = right.clone()
    first = right.norm(dim=1).clamp_min(_TINY)
    best = torch.inf
    change = torch.full_like(first, torch.inf)
    active = torch.ones_like(first, dtype=torch.bool)
    iterations = 0
    for iterations in range(1, max_iter + 1):
        step = right - multiply(x, iterations) / scale
        step = step * active[:, None]
        x = x + step
        change = step.norm(dim=1) / x.norm(dim=1).clamp_min(_TINY)
        size = float((step.norm(dim=1) / first).max())
        if not size < 1e3 * min(best, 1e6):
            raise ValueError(
                f"the Neumann series diverges after {iterations} terms (scale={scale:.3g}): raise "
                "scale above the largest curvature, or use method='cg'."
            )
        best = min(best, size)
        active = active & (change > tol)
        if not bool(active.any()):
            break
    return Solution(x / scale, change, iterations, not bool(active.any()))


def largest_eigenvalue(multiply: Multiply, start: Tensor, *, n_iterations: int = 20) -> float:
    """Estimate the largest absolute eigenvalue by power iteration: start (n_parameters,)."""
    vector = start[None] / start.norm()
    size = 0.0
    for _ in range(n_iterations):
        product = multiply(vector)
        size = float(product.norm())
        if size == 0:
            return 0.0
        vector = product / size
    return size


def arnoldi(multiply: Multiply, start: Tensor, *, n_iterations: int) -> tuple[Tensor, Tensor]:
    """Dominant eigenpairs of a Krylov space: start (n_parameters,) -> (k,), (k, n_parameters)."""
    n_iterations = min(n_iterations, len(start))
    basis = start.new_zeros(n_iterations, len(start))
    projected = start.new_zeros(n_iterations, n_iterations)
    basis[0] = start / start.norm()
    used = n_iterations
    for i in range(n_iterations):
        product = multiply(basis[i : i + 1])[0]
        size = product.norm()
        for _ in range(2):
            overlap = basis[: i + 1] @ product
            projected[: i + 1, i] += overlap
            product = product - overlap @ basis[: i + 1]
        if i + 1 == n_iterations:
            break
        rest = product.norm()
        if rest <= 1e-6 * size:
            used = i + 1
            break
        basis[i + 1] = product / rest
        projected[i + 1, i] = rest
    core = projected[:used, :used]
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    order = values.abs().argsort(descending=True)
    return values[order], rotation[:, order].T @ basis[:used]


def lsmr(
    multiply: Multiply,
    adjoint: Multiply,
    right: Tensor,
    *,
    ridge: float = 0.0,
    max_iter: int = 50,
    tol: float = 1e-6,
) -> Solution:
    """Damped least squares ``min |A x - b|^2 + ridge |x|^2`` by LSMR: right (m, n_rows)."""
    damp = ridge**0.5
    u, beta = _unit(right)
    v, alpha = _unit(adjoint(u))
    zetabar, alphabar = alpha * beta, alpha.clone()
    rho, rhobar, cbar = torch.ones_like(alpha), torch.ones_like(alpha), torch.ones_like(alpha)
    sbar = torch.zeros_like(alpha)
    h, hbar, x = v.clone(), torch.zeros_like(v), torch.zeros_like(v)
    first = zetabar.abs().clamp_min(_TINY)
    iterations = 0
    while iterations < max_iter and bool((zetabar.abs() > tol * first).any()):
        # each right-hand side stops by itself, so that it does not matter which ones go together
        active = zetabar.abs() > tol * first
        u, beta = _unit(multiply(v) - alpha[:, None] * u)
        v, alpha = _unit(adjoint(u) - beta[:, None] * v)
        alphahat = (alphabar.square() + damp**2).sqrt()
        rho_before, rho = rho, (alphahat.square() + beta.square()).sqrt()
        c, s = _ratio(alphahat, rho), _ratio(beta, rho)
        theta, alphabar = s * alpha, c * alpha
        rhobar_before = rhobar
        thetabar, lifted = sbar * rho, cbar * rho
        rhobar = (lifted.square() + theta.square()).sqrt()
        cbar, sbar = _ratio(lifted, rhobar), _ratio(theta, rhobar)
        zeta, zetabar = cbar * zetabar, -sbar * zetabar
        hbar = h - _ratio(thetabar * rho, rho_before * rhobar_before)[:, None] * hbar
        x = x + (active * _ratio(zeta, rho * rhobar))[:, None] * hbar
        h = v - _ratio(theta, rho)[:, None] * h
        iterations += 1
    residual = _relative(multiply(x) - right, right)
    return Solution(x, residual, iterations, bool((zetabar.abs() <= tol * first).all()))


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    size = vectors.norm(dim=1)
    return vectors / size.clamp_min(torch.finfo(vectors.dtype).tiny)[:, None], size


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    safe = torch.where(below != 0, below, torch.ones_like(below))
    return torch.where(below != 0, above / safe, torch.zeros_like(above))


def _relative(residual: Tensor, right: Tensor) -> Tensor:
    tiny = torch.finfo(right.dtype).tiny
    relative: Tensor = residual.norm(dim=1) / right.norm(dim=1).clamp_min(tiny)
    return relative
