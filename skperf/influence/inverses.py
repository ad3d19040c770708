"""Methods that multiply every query by an inverse, through a solver."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skperf.backbone.rows import Rows
from skperf.influence.captures import recording
from skperf.influence.curvature import dense_curvature, gradient_flow
from skperf.influence.damping import damping_of_each, horizon_time, resolve_damping
from skperf.influence.generalized import (
    choose_by_saliency,
    choose_units,
    generalized_query,
    unit_strengths,
)
from skperf.influence.gradients import Gradients
from skperf.influence.layers import find_layers, from_vectors, to_vectors
from skperf.influence.problem import LOSS_UNIT, Fitted, Problem, random_vector
from skperf.influence.solvers import conjugate_gradient, largest_eigenvalue, neumann
from skperf.influence.tiles import Terms


@dataclass(frozen=True)
class Solved:
    """Queries multiplied by an inverse, through an iterative or dense solver."""

    solve: Callable[[Problem, Tensor], Tensor]  # (m, n_parameters) -> (m, n_parameters)
    matrix: Tensor | None = None  # the dense curvature, where there is one

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Keep the rows."""
        return rows

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Solve for the queries."""
        device = problem.network.device
        right = to_vectors(problem.layers, queries, problem.parameters).to(device)
        with recording(problem.network.module):
            solved = self.solve(problem, right)
        return [*enumerate(from_vectors(problem.layers, solved.cpu(), problem.parameters))]


def _solver(
    problem: Problem, solve: Callable[..., Tensor], report: dict[str, Any], **options: Any
) -> Fitted:
    """Keep gradients, and a solver with its options; fail where no product can be formed."""
    with recording(problem.network.module):
        problem.product(options["curvature"])(random_vector(problem)[None], torch.arange(1))
    lift = Solved(partial(solve, **options))
    return Fitted(problem.train_gradients(), lift, 1 / problem.n_train, LOSS_UNIT, report)


def cg(
    problem: Problem, *, tol: float = 1e-4, max_iter: int = 500, curvature: str = "ggn"
) -> Fitted:
    """Conjugate gradients, all queries of a tile at once."""
    damping = resolve_damping(problem)
    options = {"tol": tol, "max_iter": max_iter, "curvature": curvature, "damping": damping}
    return _solver(problem, _solve_cg, {"damping": damping}, **options)


def _solve_cg(
    problem: Problem, right: Tensor, *, tol: float, max_iter: int, curvature: str, damping: float
) -> Tensor:
    product = problem.product(curvature, damping_of_each(problem, damping).to(right))
    solution = conjugate_gradient(product, right, tol=tol, max_iter=max_iter)
    if not solution.converged:
        warnings.warn(
            "conjugate gradients stopped at a relative residual of "
            f"{float(solution.residual.max()):.1e}: raise max_iter or damping.",
            RuntimeWarning,
            stacklevel=2,
        )
    return solution.values


def lissa(
    problem: Problem,
    *,
    scale: float | None = None,
    n_samples: int | None = None,
    n_repeats: int = 1,
    tol: float = 1e-4,
    max_iter: int = 5000,
    curvature: str = "ggn",
) -> Fitted:
    """Stochastic Neumann series."""
    damping = resolve_damping(problem)
    scale = scale or 1.5 * largest_of(problem, problem.product(curvature)) + damping
    return _solver(
        problem,
        _solve_lissa,
        {"damping": damping, "scale": scale},
        scale=scale,
        n_samples=n_samples or max(256, problem.batch_size),
        n_repeats=n_repeats,
        tol=tol * 0.01,
        max_iter=max_iter,
        curvature=curvature,
        damping=damping,
    )


def _solve_lissa(
    problem: Problem,
    right: Tensor,
    *,
    n_samples: int,
    n_repeats: int,
    curvature: str,
    damping: float,
    **options: Any,
) -> Tensor:
    product = problem.product(curvature, damping_of_each(problem, damping).to(right))
    n, size = problem.n_train, min(problem.n_train, n_samples)

    def one(repeat: int) -> Tensor:
        orders = torch.Generator().manual_seed(problem.settings.seed + repeat)

        def multiply(x: Tensor, step: int) -> Tensor:
            if size == n:
                return product(x)
            return product(x, torch.randint(n, (size,), generator=orders))

        return neumann(multiply, right, **options).values

    # independent draws of the series, whose mean is the estimate
    return torch.stack([one(repeat) for repeat in range(n_repeats)]).mean(0)


def largest_of(problem: Problem, multiply: Callable[[Tensor], Tensor]) -> float:
    """Estimate the largest absolute eigenvalue of a matrix known by its products."""
    with recording(problem.network.module):
        return largest_eigenvalue(multiply, random_vector(problem))


def gif(
    problem: Problem,
    *,
    select: str = "gradient",
    ratio: float = 0.05,
    ridge: float = 1e-3,
    tol: float = 1e-4,
    max_iter: int = 50,
    curvature: str = "hessian",
) -> Fitted:
    """Generalised influence on chosen parameters."""
    chosen = chosen_parameters(problem, problem.X, problem.targets, select, ratio)
    # of the normal equations, whose eigenvalues are squares of the curvature's
    ridge = ridge * largest_of(problem, problem.product(curvature)) ** 2
    report = {"chosen": chosen.numpy(), "damping": 0.0, "ridge": ridge}
    options = {"ridge": ridge, "tol": tol, "max_iter": max_iter, "curvature": curvature}
    return _solver(problem, _solve_gif, report, chosen=chosen, **options)


def _solve_gif(
    problem: Problem, right: Tensor, *, chosen: Tensor, curvature: str, **options: Any
) -> Tensor:
    product = problem.product(curvature)

    # the recurrence loses its orthogonality, and with it the result its digits, in single precision
    def multiply(vectors: Tensor) -> Tensor:
        return product(vectors.to(right.dtype)).double()

    solved = generalized_query(multiply, chosen.to(right.device), right.double(), **options)
    return solved.to(right.dtype)


def chosen_parameters(
    problem: Problem, X: Rows, targets: Tensor, select: str, ratio: float
) -> Tensor:
    """Mark the parameters that a generalised influence may change: X (n, ...), targets (n, ...)."""
    generator = torch.Generator().manual_seed(problem.settings.seed)
    n_parameters = sum(p.numel() for p in problem.parameters.values())
    if ratio >= 1:
        return torch.ones(n_parameters, dtype=torch.bool)
    strengths: dict[str, Tensor] = {}
    # units are told by hooks, which need no factorised gradients
    layers = find_layers(problem.network.module, problem.parameters)
    if select != "sam":
        network, by = problem.network, "gradient" if select == "gradient" else "output"
        few = network.inputs(X[:2048]), targets[:2048].to(network.device)
        with recording(network.module):
            strengths = unit_strengths(network, *few, layers, by)
    if select == "random":
        strengths = {n: torch.rand(len(s), generator=generator) for n, s in strengths.items()}
    if strengths:
        chosen = choose_units(layers, problem.parameters, strengths, ratio, generator)
    else:
        chosen = _by_saliency(problem, X, targets, ratio)
    if not bool(chosen.any()):
        raise ValueError(f"ratio={ratio} chooses not a single parameter; raise it.")
    return chosen


def _by_saliency(problem: Problem, X: Rows, targets: Tensor, ratio: float) -> Tensor:
    size = 4096 // max(1, len(X)) + 256
    gradients = problem.gradients(problem.loss, X[:2048], targets[:2048])
    vectors = to_vectors(problem.layers, gradients, problem.parameters)
    rows = torch.randperm(problem.n_train, generator=torch.Generator().manual_seed(0))[:size]
    own = problem.gradients(problem.loss, problem.X[rows.numpy()], problem.targets[rows])
    curvature = to_vectors(problem.layers, own, problem.parameters).square().mean(0)
    damping = 0.1 * float(curvature.mean()) + 1e-12
    return choose_by_saliency(vectors.mean(0), curvature + damping, ratio)


def exact(problem: Problem, *, curvature: str = "ggn") -> Fitted:
    """Dense curvature in double precision, the reference."""
    with recording(problem.network.module):
        matrix = dense_curvature(problem.product(curvature)).cpu()
    return exact_with_damping(problem, matrix, problem.train_gradients())


def exact_with_damping(problem: Problem, matrix: Tensor, train: Gradients) -> Fitted:
    """Damp a dense curvature: matrix (n_parameters, n_parameters)."""
    settings = problem.settings
    if settings.damping == "flow":
        damping = 1 / horizon_time(settings)
        values, vectors = torch.linalg.eigh(matrix)
        weights = gradient_flow(1 / damping, settings.weight_decay)(values)
        lift = Solved(partial(_multiplied, by=(vectors * weights) @ vectors.T), matrix)
    else:
        damping = resolve_damping(problem)
        factor = _damped_cholesky(matrix, damping_of_each(problem, damping))
        lift = Solved(partial(_solved, cholesky=factor), matrix)
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, {"damping": damping})


def _multiplied(problem: Problem, right: Tensor, *, by: Tensor) -> Tensor:
    return right @ by.to(right)


def _solved(problem: Problem, right: Tensor, *, cholesky: Tensor) -> Tensor:
    return torch.cholesky_solve(right.T, cholesky.to(right)).T


def _damped_cholesky(matrix: Tensor, damping: Tensor) -> Tensor:
    damped = matrix + torch.diag(damping.to(matrix))
    cholesky, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        lowest = float(torch.linalg.eigvalsh(damped)[0])
        raise ValueError(
            f"the damped curvature is indefinite (smallest eigenvalue {lowest:.3g}): raise "
            "damping, or use curvature='ggn', which has no negative eigenvalue."
        )
    factor: Tensor = cholesky
    return factor
