"""Methods that multiply every query by an inverse, through a solver."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skperf.backbone.rows import Rows
from skperf.influence.captures import recording
from skperf.influence.curvature import dense_curvature, gradient_flow
from skperf.influence.damping import horizon_time, resolve_damping
from skperf.influence.generalized import (
    choose_by_saliency,
    choose_units,
    generalized_query,
    unit_strengths,
)
from skperf.influence.gradients import Gradients
from skperf.influence.layers import Layer, find_layers, from_vectors, to_vectors
from skperf.influence.problem import LOSS_UNIT, Fitted, Problem, plain_terms, random_vector
from skperf.influence.solvers import conjugate_gradient, largest_eigenvalue, neumann
from skperf.influence.tiles import Terms


@dataclass(frozen=True)
class Solved:
    """Queries multiplied by an inverse, through an iterative or dense solver."""

    solver: str
    damping: float
    extra: dict[str, Any] = field(default_factory=dict)

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Keep the rows."""
        return rows

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Solve for the queries."""
        device = problem.network.device
        right = to_vectors(problem.layers, queries, problem.parameters).to(device)
        with recording(problem.network.module):
            solved = _SOLVERS[self.solver](problem, right, self.damping, self.extra)
        return plain_terms([*from_vectors(problem.layers, solved.cpu(), problem.parameters)])


def _solve_cg(problem: Problem, right: Tensor, damping: float, extra: dict[str, Any]) -> Tensor:
    product = problem.product(extra["curvature"], damping)
    solution = conjugate_gradient(product, right, tol=extra["tol"], max_iter=extra["max_iter"])
    _warn_unconverged("conjugate gradients", solution.converged, float(solution.residual.max()))
    return solution.values


def _solve_lissa(problem: Problem, right: Tensor, damping: float, extra: dict[str, Any]) -> Tensor:
    product = problem.product(extra["curvature"], damping)
    n, size = problem.n_train, min(problem.n_train, extra["batch_size"])

    def one(repeat: int) -> Tensor:
        orders = torch.Generator().manual_seed(problem.settings.seed + repeat)

        def multiply(x: Tensor, step: int) -> Tensor:
            if size == n:
                return product(x)
            return product(x, torch.randint(n, (size,), generator=orders))

        return neumann(
            multiply,
            right,
            scale=extra["scale"],
            max_iter=extra["max_iter"],
            tol=extra["tol"] * 0.01,
        ).values

    # independent draws of the series, whose mean is the estimate
    return torch.stack([one(repeat) for repeat in range(extra["n_repeats"])]).mean(0)


def _solve_gif(problem: Problem, right: Tensor, damping: float, extra: dict[str, Any]) -> Tensor:
    product = problem.product(extra["curvature"])

    # the recurrence loses its orthogonality, and with it the result its digits, in single precision
    def multiply(vectors: Tensor) -> Tensor:
        return product(vectors.to(right.dtype)).double()

    solved = generalized_query(
        multiply,
        extra["chosen"].to(right.device),
        right.double(),
        ridge=extra["ridge"],
        max_iter=extra["max_iter"],
        tol=extra["tol"],
    )
    return solved.to(right.dtype)


def _solve_exact(problem: Problem, right: Tensor, damping: float, extra: dict[str, Any]) -> Tensor:
    if "spectrum" in extra:
        vectors = extra["spectrum"][1].to(right.device)
        filtered: Tensor = ((right @ vectors) * extra["weights"].to(right.device)) @ vectors.T
        return filtered
    return torch.cholesky_solve(right.T, extra["cholesky"].to(right.device)).T


_SOLVERS: dict[str, Callable[..., Tensor]] = {
    "cg": _solve_cg,
    "lissa": _solve_lissa,
    "gif": _solve_gif,
    "exact": _solve_exact,
}


def _warn_unconverged(what: str, converged: bool, residual: float) -> None:
    if not converged:
        warnings.warn(
            f"{what} stopped at a relative residual of {residual:.1e}: raise max_iter or damping.",
            RuntimeWarning,
            stacklevel=2,
        )


def cg(
    problem: Problem, *, tol: float = 1e-4, max_iter: int = 500, curvature: str = "ggn"
) -> Fitted:
    """Conjugate gradients, all queries of a tile at once."""
    damping = resolve_damping(problem)
    _check_products(problem, curvature)
    extra = {"tol": tol, "max_iter": max_iter, "curvature": curvature}
    lift = Solved("cg", damping, extra)
    train = problem.train_gradients()
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, {"damping": damping})


def _check_products(problem: Problem, curvature: str) -> None:
    """Fail at fit, rather than at the first query, where no product can be formed."""
    with recording(problem.network.module):
        problem.product(curvature)(random_vector(problem)[None], torch.arange(1))


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
    if scale is None:
        scale = 1.5 * _largest(problem, curvature) + damping
    extra = {
        "scale": scale,
        "batch_size": n_samples or max(256, problem.batch_size),
        "n_repeats": n_repeats,
        "tol": tol,
        "max_iter": max_iter,
        "curvature": curvature,
    }
    lift = Solved("lissa", damping, extra)
    report = {"damping": damping, "scale": scale}
    return Fitted(problem.train_gradients(), lift, 1 / problem.n_train, LOSS_UNIT, report)


def _largest(problem: Problem, curvature: str) -> float:
    with recording(problem.network.module):
        return largest_of(problem, problem.product(curvature))


def largest_of(problem: Problem, multiply: Callable[[Tensor], Tensor]) -> float:
    """Estimate the largest absolute eigenvalue of a matrix known by its products."""
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
    _check_products(problem, curvature)
    extra = {
        "chosen": chosen,
        # of the normal equations, whose eigenvalues are squares of the curvature's
        "ridge": ridge * _largest(problem, curvature) ** 2,
        "tol": tol,
        "max_iter": max_iter,
        "curvature": curvature,
    }
    report = {"chosen": chosen.numpy(), "damping": 0.0, "ridge": extra["ridge"]}
    lift = Solved("gif", 0.0, extra)
    return Fitted(problem.train_gradients(), lift, 1 / problem.n_train, LOSS_UNIT, report)


def chosen_parameters(
    problem: Problem, X: Rows, targets: Tensor, select: str, ratio: float
) -> Tensor:
    """Mark the parameters that a generalised influence may change: X (n, ...), targets (n, ...)."""
    generator = torch.Generator().manual_seed(problem.settings.seed)
    n_parameters = sum(p.numel() for p in problem.parameters.values())
    if ratio >= 1:
        return torch.ones(n_parameters, dtype=torch.bool)
    # units are told by hooks, which need no factorised gradients
    layers = find_layers(problem.network.module, problem.parameters)
    strengths = (
        {} if select == "sam" else _strengths(problem, layers, X, targets, select, generator)
    )
    if strengths:
        chosen = choose_units(layers, problem.parameters, strengths, ratio, generator)
    else:
        chosen = _by_saliency(problem, X, targets, ratio)
    if not bool(chosen.any()):
        raise ValueError(f"ratio={ratio} chooses not a single parameter; raise it.")
    return chosen


def _strengths(
    problem: Problem,
    layers: list[Layer],
    X: Rows,
    targets: Tensor,
    select: str,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    network = problem.network
    with recording(network.module):
        strengths = unit_strengths(
            network,
            network.inputs(X[:2048]),
            targets[:2048].to(network.device),
            layers,
            "gradient" if select == "gradient" else "output",
        )
    if select == "random":
        return {name: torch.rand(len(s), generator=generator) for name, s in strengths.items()}
    return strengths


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


def exact_with_damping(
    problem: Problem,
    matrix: Tensor,
    train: Gradients,
    spectrum: tuple[Tensor, Tensor] | None = None,
) -> Fitted:
    """Damp a dense curvature: matrix (n_parameters, n_parameters)."""
    extra: dict[str, Any] = {"matrix": matrix}
    if problem.settings.damping == "flow":
        values, vectors = torch.linalg.eigh(matrix) if spectrum is None else spectrum
        time = horizon_time(problem.settings)
        weights = gradient_flow(time, problem.settings.weight_decay)(values)
        extra |= {"spectrum": (values, vectors), "weights": weights}
        damping = 1 / time
    else:
        damping = resolve_damping(problem)
        extra |= {"cholesky": _damped_cholesky(matrix, damping_of_each(problem, damping))}
    lift = Solved("exact", damping, extra)
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, {"damping": damping})


def damping_of_each(problem: Problem, damping: float) -> Tensor:
    """Damping of every weight: a known penalty may spare the biases: -> (n_parameters,)."""
    settings, parameters = problem.settings, problem.parameters
    spared = settings.damping == "auto" and settings.ridge and not settings.ridge_on_biases
    wide = torch.float64
    least = damping * 1e-6  # directions that leave every output as it is have no curvature
    return torch.cat(
        [
            torch.full((p.numel(),), least if spared and p.ndim < 2 else damping, dtype=wide)
            for p in parameters.values()
        ]
    )


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
