"""Methods that multiply every query by an inverse, through a solver."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from skperf.backbone.outputs import loss
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
from skperf.influence.layers import from_vectors, to_vectors
from skperf.influence.problem import (
    LOSS_UNIT,
    Fitted,
    Problem,
    plain_terms,
    random_vector,
)
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
    settings = problem.settings
    product = problem.product(damping)
    solution = conjugate_gradient(
        product, right, tol=settings.tol, max_iter=settings.max_iter or 500
    )
    _warn_unconverged("conjugate gradients", solution.converged, float(solution.residual.max()))
    return solution.values


def _solve_lissa(problem: Problem, right: Tensor, damping: float, extra: dict[str, Any]) -> Tensor:
    product = problem.product(damping)
    n, size = problem.n_train, min(problem.n_train, extra["batch_size"])
    orders = torch.Generator().manual_seed(problem.settings.seed)

    def multiply(x: Tensor, step: int) -> Tensor:
        if size == n:
            return product(x)
        return product(x, torch.randint(n, (size,), generator=orders))

    iterations = problem.settings.max_iter or 5000
    solution = neumann(
        multiply, right, scale=extra["scale"], max_iter=iterations, tol=problem.settings.tol * 0.01
    )
    return solution.values


def _solve_gif(problem: Problem, right: Tensor, damping: float, extra: dict[str, Any]) -> Tensor:
    settings, product = problem.settings, problem.product()

    # the recurrence loses its orthogonality, and with it the result its digits, in single precision
    def multiply(vectors: Tensor) -> Tensor:
        return product(vectors.to(right.dtype)).double()

    solved = generalized_query(
        multiply,
        extra["chosen"].to(right.device),
        right.double(),
        ridge=settings.ridge,
        max_iter=settings.max_iter or 50,
        tol=settings.tol,
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
            f"{what} stopped at a relative residual of {residual:.1e}: raise "
            "n_iterations or damping.",
            RuntimeWarning,
            stacklevel=2,
        )


def cg(problem: Problem) -> Fitted:
    """Conjugate gradients, all queries of a tile at once."""
    damping = resolve_damping(problem)
    _check_products(problem)
    train = problem.train_gradients()
    report = {"damping": damping}
    return Fitted(train, Solved("cg", damping), 1 / problem.n_train, LOSS_UNIT, report)


def _check_products(problem: Problem) -> None:
    """Fail at fit, rather than at the first query, where no product can be formed."""
    with recording(problem.network.module):
        problem.product()(random_vector(problem)[None], torch.arange(1))


def lissa(problem: Problem) -> Fitted:
    """Stochastic Neumann series."""
    settings = problem.settings
    damping = resolve_damping(problem)
    scale = settings.scale
    if scale is None:
        start = random_vector(problem)
        with recording(problem.network.module):
            scale = 1.5 * largest_eigenvalue(problem.product(), start) + damping
    extra = {"scale": scale, "batch_size": max(256, problem.batch_size)}
    report = {"damping": damping, "scale": scale}
    train = problem.train_gradients()
    return Fitted(train, Solved("lissa", damping, extra), 1 / problem.n_train, LOSS_UNIT, report)


def gif(problem: Problem) -> Fitted:
    """Generalised influence on chosen parameters."""
    chosen = chosen_parameters(problem, problem.X, problem.codes)
    _check_products(problem)
    report = {"chosen": chosen.numpy(), "damping": 0.0}
    train = problem.train_gradients()
    lift = Solved("gif", 0.0, {"chosen": chosen})
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, report)


def chosen_parameters(problem: Problem, X: NDArray[Any], codes: Tensor) -> Tensor:
    """Mark the parameters that a generalised influence may change: X (n, ...), codes (n,)."""
    settings = problem.settings
    generator = torch.Generator().manual_seed(settings.seed)
    n_parameters = sum(p.numel() for p in problem.parameters.values())
    if settings.ratio >= 1:
        return torch.ones(n_parameters, dtype=torch.bool)
    if settings.select == "sam":
        chosen = _by_saliency(problem, X, codes)
    else:
        chosen = choose_units(
            problem.layers,
            problem.parameters,
            _strengths(problem, X, codes, generator),
            settings.ratio,
            generator,
        )
    if not bool(chosen.any()):
        raise ValueError(f"ratio={settings.ratio} chooses not a single parameter; raise it.")
    return chosen


def _strengths(
    problem: Problem, X: NDArray[Any], codes: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    network, select = problem.network, problem.settings.select
    with recording(network.module):
        strengths = unit_strengths(
            network,
            network.tensor(X[:2048]),
            codes[:2048].to(network.device),
            problem.layers,
            "gradient" if select == "gradient" else "output",
        )
    if select == "random":
        return {name: torch.rand(len(s), generator=generator) for name, s in strengths.items()}
    return strengths


def _by_saliency(problem: Problem, X: NDArray[Any], codes: Tensor) -> Tensor:
    size = 4096 // max(1, len(X)) + 256
    gradients = problem.gradients(loss, X[:2048], codes[:2048])
    vectors = to_vectors(problem.layers, gradients, problem.parameters)
    rows = torch.randperm(problem.n_train, generator=torch.Generator().manual_seed(0))[:size]
    own = problem.gradients(loss, problem.X[rows.numpy()], problem.codes[rows])
    curvature = to_vectors(problem.layers, own, problem.parameters).square().mean(0)
    damping = 0.1 * float(curvature.mean()) + 1e-12
    return choose_by_saliency(vectors.mean(0), curvature + damping, problem.settings.ratio)


def exact(problem: Problem) -> Fitted:
    """Dense curvature in double precision, the reference."""
    with recording(problem.network.module):
        matrix = dense_curvature(problem.product()).cpu()
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
        extra |= {"cholesky": _damped_cholesky(matrix, damping)}
    lift = Solved("exact", damping, extra)
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, {"damping": damping})


def _damped_cholesky(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    cholesky, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        lowest = float(torch.linalg.eigvalsh(damped)[0])
        raise ValueError(
            f"the damped curvature is indefinite (smallest eigenvalue {lowest:.3g}): raise "
            "damping, or use curvature='ggn', which has no negative eigenvalue."
        )
    factor: Tensor = cholesky
    return factor
