"""Every influence method as one map of query gradients.

Whatever the method, the score of a query and a training row is a sum of inner products of
the query's gradient, mapped once, with what is stored of the row. A method is therefore fitted
by a function that stores the rows, and holds a map for the queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skperf.backbone.outputs import log_odds
from skperf.influence.captures import recording
from skperf.influence.curvature import Filter, RowSpace, Spectrum, filtered_weights, gradient_flow
from skperf.influence.damping import horizon_time, layer_damping, resolve_damping
from skperf.influence.gradients import (
    Dense,
    Factor,
    Gradients,
    Outer,
    combine,
    inner,
    paired,
    scaled,
    take,
    written_out,
)
from skperf.influence.inverses import Solved, cg, exact, exact_with_damping, gif, lissa
from skperf.influence.kronecker import KroneckerBasis, kronecker_basis, separable
from skperf.influence.layers import from_vectors
from skperf.influence.problem import (
    DOT_UNIT,
    LOSS_UNIT,
    Fitted,
    Lift,
    Problem,
    curvature_rows,
    plain_terms,
    random_vector,
)
from skperf.influence.projections import TwoSided, project, projections
from skperf.influence.solvers import arnoldi as krylov_eigenpairs
from skperf.influence.tiles import Terms

# First order ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unchanged:
    """The gradients themselves."""

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Keep the rows."""
        return rows

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        return plain_terms(queries)


def gradient_dot(problem: Problem) -> Fitted:
    """Inner products of gradients, TracIn at one checkpoint."""
    return Fitted(problem.train_gradients(), Unchanged(), 1.0, DOT_UNIT)


# Row-space Gauss-Newton ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Woodbury:
    """Gradients, and their products with the curvature's rows."""

    # `g' (A'A + damping)^-1 h = (g'h - (Ag)' (AA' + damping)^-1 Ah) / damping`.

    curvature: RowSpace
    cholesky: Tensor

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Add the products."""
        return [*rows, Dense(inner(rows, self.curvature.rows))]

    def solve(self, vectors: Sequence[Factor]) -> Gradients:
        """Multiply vectors by the damped inverse, up to a factor."""
        layers = zip(vectors, self.curvature.rows, strict=True)
        weights = self._weights(vectors)
        return [Dense(written_out(v) - combine(weights, row)) for v, row in layers]

    def _weights(self, vectors: Sequence[Factor]) -> Tensor:
        crossed = inner(vectors, self.curvature.rows)
        return torch.cholesky_solve(crossed.T, self.cholesky).T

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        return [*plain_terms(queries), (len(queries), Dense(-self._weights(queries)))]


@dataclass(frozen=True)
class Filtered:
    """Gradients, and their components along eigenvectors, filtered."""

    curvature: RowSpace
    spectrum: Spectrum
    at_zero: float
    weights: Tensor

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Add the components along the eigenvectors."""
        return [*rows, Dense(self._components(rows))]

    def solve(self, vectors: Sequence[Factor]) -> Gradients:
        """Multiply vectors by the filtered curvature."""
        spectrum, rows = self.spectrum, self.curvature.rows
        components = self._components(list(vectors)).double() * self.weights
        weights = (components @ (spectrum.vectors / spectrum.values.sqrt()).T).to(
            rows[0].tensors[0]
        )
        layers = zip(vectors, rows, strict=True)
        return [Dense(written_out(v) * self.at_zero + combine(weights, row)) for v, row in layers]

    def _components(self, rows: Gradients) -> Tensor:
        crossed = inner(rows, self.curvature.rows)
        return self.spectrum.coordinates(crossed).to(crossed)

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        components = self._components(queries) * self.weights.to(self.curvature.gram)
        plain = [scaled(factor, self.at_zero) for factor in queries]
        return [*plain_terms(plain), (len(queries), Dense(components))]


def _train_and_rows(
    problem: Problem, *, kept_trace: float, max_rows: int | None
) -> tuple[Gradients, Gradients, float]:
    rows = curvature_rows(problem, kept_trace=kept_trace, max_rows=max_rows)
    n = problem.n_train
    everything = problem.gather(
        problem.X,
        torch.cat([problem.train_cotangents(rows.logits), rows.cotangents]),
        torch.cat([torch.arange(n), rows.examples]),
    )
    return take(everything, slice(0, n)), take(everything, slice(n, None)), rows.kept_trace


def ggn(problem: Problem) -> Fitted:
    """Row-space Gauss-Newton."""
    settings = problem.settings
    train, rows, kept = _train_and_rows(
        problem, kept_trace=settings.kept_trace, max_rows=settings.max_rows
    )
    curvature = RowSpace.of(rows)
    report = {"kept_trace": kept, "n_rows": len(curvature.gram)}
    return with_damping(Fitted(train, Unchanged(), 1.0, LOSS_UNIT, report), curvature, problem)


def with_damping(fitted: Fitted, curvature: RowSpace, problem: Problem) -> Fitted:
    """Damp a row-space curvature anew, without a pass through the network."""
    settings, n = problem.settings, problem.n_train
    train = fitted.train[: len(curvature.rows)]
    if settings.damping == "flow":
        time = horizon_time(settings)
        return _with_filter(
            fitted, curvature, train, gradient_flow(time, settings.weight_decay), problem
        )
    damping = resolve_damping(problem, curvature)
    lift = Woodbury(curvature, curvature.factor(damping))
    report = {**fitted.report, "damping": damping}
    # the products with the curvature's rows do not depend on the damping
    stored = fitted.train if isinstance(fitted.lift, Woodbury) else lift.store(problem, train)
    return Fitted(stored, lift, 1 / (n * damping), LOSS_UNIT, report)


def _with_filter(
    fitted: Fitted, curvature: RowSpace, train: Gradients, apply: Filter, problem: Problem
) -> Fitted:
    spectrum = Spectrum.of(curvature)
    lift = Filtered(curvature, spectrum, *filtered_weights(spectrum.values, apply))
    report = {**fitted.report, "damping": 1 / lift.at_zero}
    return Fitted(lift.store(problem, train), lift, 1 / problem.n_train, LOSS_UNIT, report)


def plain_weight(lift: Lift) -> float | None:
    """Weight with which the gradients of queries meet those of rows."""
    if isinstance(lift, Filtered):
        return lift.at_zero
    return 1.0 if isinstance(lift, Unchanged | Woodbury) else None


# Kronecker-factored ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Kronecker:
    """Gradients in the eigenbasis of each layer, weighted by filtered curvature."""

    bases: list[KroneckerBasis]
    weights: list[tuple[Tensor, Tensor] | Tensor]

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Rotate the rows."""
        return [basis.rotate(row) for basis, row in zip(self.bases, rows, strict=True)]

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        terms: Terms = []
        for i, (basis, weights, query) in enumerate(
            zip(self.bases, self.weights, queries, strict=True)
        ):
            rotated = basis.rotate(query)
            if isinstance(weights, Tensor):
                terms.append((i, Dense(written_out(rotated) * weights.flatten())))
                continue
            assert isinstance(rotated, Outer)
            terms += [
                (i, Outer(rotated.inputs * v, rotated.outputs * u))
                for u, v in zip(*weights, strict=True)
            ]
        return terms


def ekfac(problem: Problem) -> Fitted:
    """Kronecker-factored eigenbasis, exact second moments in it."""
    return _kronecker(problem, corrected=True)


def kfac(problem: Problem) -> Fitted:
    """Kronecker-factored curvature."""
    return _kronecker(problem, corrected=False)


def _kronecker(problem: Problem, *, corrected: bool) -> Fitted:
    settings = problem.settings
    if not problem.layers:
        raise ValueError(
            "Kronecker-factored curvature needs the factorised gradients of each layer; with "
            "gradients='reference' use method='ggn', 'cg' or 'arnoldi'."
        )
    kept_trace = max(settings.kept_trace, 0.999)
    train, rows, kept = _train_and_rows(problem, kept_trace=kept_trace, max_rows=None)
    bases, dampings = [], []
    filters: list[tuple[Tensor, Tensor] | Tensor] = []
    for which, (layer, gradients, own) in enumerate(zip(problem.layers, train, rows, strict=True)):
        shape = layer.matrix_shape
        basis = kronecker_basis(gradients, own, shape, corrected=corrected, weights=problem.shares)
        damping = layer_damping(problem, which, float(basis.values.sum()))
        inverse = 1 / (basis.values + damping)
        if settings.rank is None or not isinstance(gradients, Outer):
            filters.append(inverse)
        else:
            filters.append(separable(basis.values, inverse, tolerance=1e-4, max_rank=settings.rank))
        bases.append(basis)
        dampings.append(damping)
    report = {"kept_trace": kept, "n_rows": len(rows[0]), "damping": dampings}
    lift = Kronecker(bases, filters)
    return Fitted(lift.store(problem, train), lift, 1 / problem.n_train, LOSS_UNIT, report)


# Embeddings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """Gradients in a few coordinates, each weighted."""

    vectors: Gradients
    weights: Tensor

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Embed the rows."""
        return [Dense(inner(self.vectors, rows).T.contiguous())]

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        return [(0, Dense(inner(self.vectors, queries).T * self.weights))]


def arnoldi(problem: Problem) -> Fitted:
    """Dominant eigenpairs of the curvature from a Krylov space."""
    settings = problem.settings
    damping = resolve_damping(problem)
    with recording(problem.network.module):
        values, vectors = krylov_eigenpairs(
            problem.product(), random_vector(problem), n_iterations=settings.max_iter or 200
        )
    top = slice(0, settings.n_components)
    values, vectors = values[top].cpu(), vectors[top].cpu()
    factors: Gradients = [*from_vectors(problem.layers, vectors, problem.parameters)]
    negative = float((values < 0).double().mean())
    report = {"damping": damping, "negative_share": negative, "n_components": len(values)}
    lift = Embedded(factors, 1 / (values.abs() + damping))
    train = lift.store(problem, problem.train_gradients())
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, report)


@dataclass(frozen=True)
class Projected:
    """Gradients projected at random, times the inverse of the projected kernel."""

    maps: list[TwoSided]
    inverse: Tensor

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Project the rows."""
        return [Dense(project(rows, self.maps))]

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        return [(0, Dense(project(queries, self.maps) @ self.inverse))]


def trak(problem: Problem) -> Fitted:
    """Kernel of randomly projected gradients of the log odds."""
    settings = problem.settings
    odds = problem.gradients(log_odds, problem.X, problem.codes)
    generator = torch.Generator().manual_seed(settings.seed)
    maps = projections(odds, problem.layers, settings.n_projections, generator)
    features = project(odds, maps)
    del odds
    kernel = (features * problem.shares[:, None].to(features)).T @ features
    damping = settings.damping
    if isinstance(damping, str):
        damping = max(0.01 * float(kernel.diagonal().mean()), 1e-8)
    kernel.diagonal().add_(damping)
    inverse = torch.linalg.inv(kernel.double()).to(kernel)
    logits = problem.logits()
    doubt = -(1 - logits.softmax(1).gather(1, problem.codes[:, None]))
    weights = problem.relative_weights()
    if weights is not None:
        doubt = doubt * weights[:, None].to(doubt)
    train: Gradients = [Dense(features * doubt)]
    report = {"damping": damping, "n_projections": features.shape[1]}
    return Fitted(train, Projected(maps, inverse), 1 / problem.n_train, "relative loss", report)


# DataInf --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwappedInverse:
    """DataInf: the mean of inverses in place of the inverse of the mean, layer by layer."""

    train: Gradients
    norms: list[Tensor]
    dampings: list[float]
    shares: Tensor
    squares: Tensor

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Keep the rows."""
        return rows

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        terms: Terms = []
        layers = zip(queries, self.train, self.norms, self.dampings, strict=True)
        for i, (query, rows, norms, damping) in enumerate(layers):
            weights = inner([query], [rows]) * (self.shares / (damping * self.squares + norms))
            terms.append((i, scaled(query, 1 / damping)))
            terms.append((i, Dense(combine(weights, rows) / -damping)))
        return terms


def datainf(problem: Problem) -> Fitted:
    """Swap mean and inverse, layer by layer, as DataInf does; close to a gradient dot product."""
    train = problem.train_gradients()
    norms = [paired(factor, factor) for factor in train]
    # rows are stored times their relative weight, whose square is taken out of their norms
    weights = problem.relative_weights()
    squares = torch.ones_like(problem.shares) if weights is None else weights.square()
    squares = torch.where(squares > 0, squares, 1.0).to(norms[0])
    shares = problem.shares.to(norms[0])
    dampings = [
        layer_damping(problem, which, float((shares * squared / squares).sum()))
        for which, squared in enumerate(norms)
    ]
    lift = SwappedInverse(train, norms, dampings, shares, squares)
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, {"damping": dampings})


def redamped(problem: Problem, fitted: Fitted, method: str) -> Fitted:
    """Fit with another damping, without a pass through the network where the method allows."""
    lift = fitted.lift
    if isinstance(lift, Woodbury | Filtered):
        return with_damping(fitted, lift.curvature, problem)
    if isinstance(lift, Solved) and "matrix" in lift.extra:
        spectrum = lift.extra.get("spectrum")
        return exact_with_damping(problem, lift.extra["matrix"], fitted.train, spectrum)
    return METHODS[method](problem)


METHODS: dict[str, Callable[[Problem], Fitted]] = {
    "gradient_dot": gradient_dot,
    "tracin": gradient_dot,
    "ggn": ggn,
    "ekfac": ekfac,
    "kfac": kfac,
    "cg": cg,
    "lissa": lissa,
    "arnoldi": arnoldi,
    "trak": trak,
    "datainf": datainf,
    "gif": gif,
    "exact": exact,
}
