"""Every influence method as one map of query gradients.

Whatever the method, the score of a query and a training row is a sum of inner products of
the query's gradient, mapped once, with what is stored of the row. A method is therefore fitted
by a function that stores the rows, and holds a map for the queries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skperf.backbone.outputs import log_odds
from skperf.influence.captures import recording
from skperf.influence.curvature import Filtered, RowSpace, gradient_flow
from skperf.influence.damping import (
    horizon_time,
    layer_damping,
    of_each,
    resolve_damping,
    stretch_of_biases,
    stretched,
)
from skperf.influence.gradients import Dense, Factor, Gradients, Outer, inner, take, written_out
from skperf.influence.inverses import Solved, cg, exact, exact_with_damping, gif, lissa
from skperf.influence.kronecker import KroneckerBasis, kronecker_basis, separable
from skperf.influence.layers import from_vectors, to_vectors
from skperf.influence.output_rows import Cotangents, OutputRows
from skperf.influence.problem import (
    DOT_UNIT,
    LOSS_UNIT,
    Fitted,
    Problem,
    curvature_rows,
    random_vector,
    slopes,
    weighted,
)
from skperf.influence.projections import Projection
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
        return list(enumerate(queries))


def gradient_dot(problem: Problem) -> Fitted:
    """Inner products of gradients, TracIn at one checkpoint."""
    return Fitted(problem.train_gradients(), Unchanged(), 1.0, DOT_UNIT)


@dataclass(frozen=True)
class Adam:
    """The state of Adam at a checkpoint, and the step it would take for one row's gradient."""

    mean: Tensor  # (n_parameters,)
    square: Tensor  # (n_parameters,)
    step: int | None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __call__(self, gradients: Tensor) -> Tensor:
        """Precondition: gradients (n, n_parameters) -> (n, n_parameters)."""
        first, second = self.betas
        mean = first * self.mean + (1 - first) * gradients
        square = second * self.square + (1 - second) * gradients.square()
        if self.step is None:  # as LESS is released: without the corrections for the start
            return mean / (square + self.eps).sqrt()
        mean, square = mean / (1 - first**self.step), square / (1 - second**self.step)
        return mean / (square.sqrt() + self.eps)


@dataclass(frozen=True)
class Directions:
    """Gradients of length one, those of training rows after a step of Adam."""

    adam: Adam | None
    normalize: bool

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Precondition and normalise the rows."""
        vectors = to_vectors(problem.layers, rows, problem.parameters)
        return [Dense(self._scaled(vectors if self.adam is None else self.adam(vectors)))]

    def _scaled(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=1, eps=1e-30) if self.normalize else vectors

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Normalise the queries."""
        return [(0, Dense(self._scaled(to_vectors(problem.layers, queries, problem.parameters))))]


def tracin(problem: Problem, *, normalize: bool = False, adam: Adam | None = None) -> Fitted:
    """Inner products or cosines of gradients at one checkpoint."""
    if not normalize and adam is None:
        return gradient_dot(problem)
    lift = Directions(adam, normalize)
    plain = problem.gradients(problem.loss, problem.X, problem.targets)
    return Fitted(lift.store(problem, plain), lift, 1.0, "cosine" if normalize else DOT_UNIT)


# Row-space Gauss-Newton ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RowForm:
    """Gradients, and their products with the curvature's rows."""

    filtered: Filtered
    stretch: float = 1.0  # of biases, in the curvature and all it meets

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Add the products."""
        rows = stretched(problem, rows, self.stretch)
        return [*rows, Dense(inner(rows, self.filtered.curvature.rows))]

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        queries = stretched(problem, queries, self.stretch)
        return [*enumerate(queries), (len(queries), Dense(self.filtered.weights(queries)))]

    def applied(self, problem: Problem, vectors: Sequence[Factor]) -> Gradients:
        """Multiply vectors by the damped inverse: (n, ...) each."""
        found = self.filtered.apply(stretched(problem, vectors, self.stretch))
        return stretched(problem, found, self.stretch)


def train_and_rows(
    problem: Problem, *, kept_trace: float, max_rows: int | None, curvature: str = "ggn"
) -> tuple[Gradients, Gradients, float]:
    """Gradients of the training rows, rows of the curvature, the share of its trace they hold."""
    rows = curvature_rows(problem, kept_trace=kept_trace, max_rows=max_rows, curvature=curvature)
    n = problem.n_train
    everything = problem.gather(
        problem.X, _both(problem, rows), torch.cat([torch.arange(n), rows.examples])
    )
    return take(everything, slice(0, n)), take(everything, slice(n, None)), rows.kept_trace


def _both(problem: Problem, rows: OutputRows) -> Cotangents:
    """Slopes of the training rows, followed by rows of the curvature."""
    n, weights, others = problem.n_train, problem.relative_weights(), rows.cotangents
    if rows.outputs is not None and isinstance(others, Tensor):
        slope = slopes(problem.loss, rows.outputs, problem.targets)
        return torch.cat([slope if weights is None else weighted(slope, weights), others])

    def cotangents(outputs: Tensor, which: Tensor) -> Tensor:
        own = which < n
        found = torch.zeros_like(outputs)
        if bool(own.any()):
            targets = problem.targets[which[own]].to(outputs.device)
            slope = slopes(problem.loss, outputs[own], targets)
            found[own] = slope if weights is None else weighted(slope, weights[which[own]])
        if not bool(own.all()):
            rest = which[~own] - n
            pulled = others[rest] if isinstance(others, Tensor) else others(outputs[~own], rest)
            found[~own] = pulled.to(found)
        return found

    return cotangents


def ggn(
    problem: Problem,
    *,
    kept_trace: float = 0.95,
    max_rows: int | None = 1000,
    curvature: str = "ggn",
) -> Fitted:
    """Row-space Gauss-Newton."""
    train, rows, kept = train_and_rows(
        problem, kept_trace=kept_trace, max_rows=max_rows, curvature=curvature
    )
    stretch = stretch_of_biases(problem)
    space = RowSpace.of(stretched(problem, rows, stretch))
    report = {"kept_trace": kept, "n_rows": len(space.gram)}
    fitted = Fitted(train, Unchanged(), 1.0, LOSS_UNIT, report)
    return with_damping(fitted, space, problem, stretch)


def with_damping(
    fitted: Fitted, curvature: RowSpace, problem: Problem, stretch: float = 1.0
) -> Fitted:
    """Damp a row-space curvature anew, without a pass through the network."""
    settings = problem.settings
    if settings.damping == "flow":
        function = gradient_flow(horizon_time(settings), settings.weight_decay)
        filtered = Filtered.of(curvature, function)
    else:
        filtered = Filtered.damped(curvature, resolve_damping(problem, curvature))
    # the products with the curvature's rows do not depend on the damping
    lift, old = RowForm(filtered, stretch), fitted.train
    stored = old if len(old) > len(curvature.rows) else lift.store(problem, old)
    report = {**fitted.report, "damping": 1 / filtered.at_zero}
    return Fitted(stored, lift, filtered.at_zero / problem.n_train, LOSS_UNIT, report)


# Kronecker-factored ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Kronecker:
    """Gradients in the eigenbasis of each layer, weighted by filtered curvature."""

    bases: list[KroneckerBasis]
    weights: list[tuple[Tensor, Tensor] | Tensor]
    stretch: float = 1.0  # of biases, in the curvature and all it meets

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Rotate the rows."""
        rows = stretched(problem, rows, self.stretch)
        return [basis.rotate(row) for basis, row in zip(self.bases, rows, strict=True)]

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        terms: Terms = []
        queries = stretched(problem, queries, self.stretch)
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


def ekfac(problem: Problem, *, rank: int | None, curvature: str) -> Fitted:
    """Kronecker-factored eigenbasis, exact second moments in it."""
    return _kronecker(problem, rank, curvature, corrected=True)


def kfac(problem: Problem, *, rank: int | None, curvature: str) -> Fitted:
    """Kronecker-factored curvature."""
    return _kronecker(problem, rank, curvature, corrected=False)


def _kronecker(problem: Problem, rank: int | None, curvature: str, *, corrected: bool) -> Fitted:
    if not any(layer.sites for layer in problem.layers):
        raise ValueError(
            "Kronecker-factored curvature needs the factorised gradients of each layer, and none "
            "of these has any; use method='ggn', 'cg' or 'arnoldi'."
        )
    train, rows, kept = train_and_rows(
        problem, kept_trace=0.999, max_rows=None, curvature=curvature
    )
    # factors of very unequal inputs stand less well for the whole
    stretch, bases, dampings = stretch_of_biases(problem, 0.05), [], []
    longer, rows = stretched(problem, train, stretch), stretched(problem, rows, stretch)
    filters: list[tuple[Tensor, Tensor] | Tensor] = []
    for which, (layer, gradients, own) in enumerate(zip(problem.layers, longer, rows, strict=True)):
        shape = layer.matrix_shape
        basis = kronecker_basis(gradients, own, shape, corrected=corrected, weights=problem.shares)
        damping = layer_damping(problem, which, float(basis.values.sum()))
        inverse = 1 / (basis.values + damping)
        if rank is None or not isinstance(gradients, Outer):
            filters.append(inverse)
        else:
            filters.append(separable(basis.values, inverse, tolerance=1e-4, max_rank=rank))
        bases.append(basis)
        dampings.append(damping)
    report = {"kept_trace": kept, "n_rows": len(rows[0]), "damping": dampings}
    lift = Kronecker(bases, filters, stretch)
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


def arnoldi(
    problem: Problem, *, n_components: int = 100, max_iter: int = 200, curvature: str = "ggn"
) -> Fitted:
    """Dominant eigenpairs of the curvature from a Krylov space."""
    damping = resolve_damping(problem)
    with recording(problem.network.module):
        product, start = problem.product(curvature), random_vector(problem)
        longer = of_each(problem, 1.0, stretch_of_biases(problem)).to(start)
        values, vectors = krylov_eigenpairs(
            lambda v: product(v * longer) * longer, start, n_iterations=max_iter
        )
    top = slice(0, n_components)
    values, vectors = values[top].cpu(), (vectors[top] * longer).cpu()
    factors: Gradients = [*from_vectors(problem.layers, vectors, problem.parameters)]
    lift = Embedded(factors, 1 / (values.abs() + damping))
    train = lift.store(problem, problem.train_gradients())
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, {"damping": damping})


@dataclass(frozen=True)
class Projected:
    """Gradients projected at random, times the inverse of the projected kernel."""

    projection: Projection
    inverse: Tensor

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Project the rows."""
        return self.projection(rows)

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        return [(0, Dense(self.projection(queries)[0].tensors[0] @ self.inverse))]


def trak(problem: Problem, *, n_projections: int = 512) -> Fitted:
    """Kernel of randomly projected gradients of the log odds."""
    if problem.loss.kind != "classes" or len(problem.targets.shape) > 1:
        raise ValueError(
            f"method='trak' is about the odds of a label, and the loss is {problem.loss.name}; "
            "use method='ggn' or 'ekfac'."
        )
    layers = [(layer.matrix_shape, layer.n_weights) for layer in problem.layers]
    project = Projection(layers, n_projections, problem.settings.seed)
    # batch by batch: gradients of all rows may be larger than any memory
    features = problem.gradients(log_odds, problem.X, problem.targets, through=project)[0].tensors[
        0
    ]
    kernel = (features * problem.shares[:, None].to(features)).T @ features
    damping = problem.settings.damping
    if isinstance(damping, str):
        damping = max(float(kernel.diagonal().mean()), 1e-8)
    kernel.diagonal().add_(damping)
    inverse = torch.linalg.inv(kernel.double()).to(kernel)
    outputs = problem.outputs()
    doubt = -(1 - outputs.softmax(1).gather(1, problem.targets[:, None].cpu()))
    weights = problem.relative_weights()
    if weights is not None:
        doubt = doubt * weights[:, None].to(doubt)
    train: Gradients = [Dense(features * doubt)]
    report = {"damping": damping, "n_projections": features.shape[1]}
    return Fitted(train, Projected(project, inverse), 1 / problem.n_train, "relative loss", report)


# DataInf --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwappedInverse:
    """DataInf: the mean of inverses in place of the inverse of the mean, tensor by tensor."""

    train: list[Tensor]  # of each tensor (n, n_weights)
    norms: list[Tensor]
    dampings: list[float]
    shares: Tensor

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Lay the rows out tensor by tensor."""
        return [Dense(part) for part in _by_tensor(problem, rows)]

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries."""
        terms: Terms = []
        layers = zip(
            _by_tensor(problem, queries), self.train, self.norms, self.dampings, strict=True
        )
        for i, (query, rows, norms, damping) in enumerate(layers):
            weights = (query @ rows.T) * (self.shares / (damping + norms))
            terms.append((i, Dense((query - weights @ rows) / damping)))
        return terms


def _by_tensor(problem: Problem, rows: Gradients) -> list[Tensor]:
    sizes = [p.numel() for p in problem.parameters.values()]
    vectors = to_vectors(problem.layers, rows, problem.parameters)
    return [part.contiguous() for part in vectors.split(sizes, 1)]


def datainf(problem: Problem) -> Fitted:
    """Swap mean and inverse, tensor by tensor, as DataInf does; close to a gradient product."""
    plain = problem.gradients(problem.loss, problem.X, problem.targets)
    parts = _by_tensor(problem, plain)
    norms = [part.square().sum(1) for part in parts]
    shares = problem.shares.to(norms[0])
    settings = problem.settings
    if settings.damping == "auto" and settings.horizon is None:
        # as released: a tenth of the mean squared entry of the tensor's gradients
        dampings = [
            max(0.1 * float((shares * norm).sum()) / part.shape[1], 1e-30)
            for norm, part in zip(norms, parts, strict=True)
        ]
    else:
        dampings = [resolve_damping(problem)] * len(parts)
    lift = SwappedInverse(parts, norms, dampings, shares)
    weights = problem.relative_weights()
    train: Gradients = [
        Dense(part if weights is None else weighted(part, weights)) for part in parts
    ]
    return Fitted(train, lift, 1 / problem.n_train, LOSS_UNIT, {"damping": dampings})


def redamped(problem: Problem, fitted: Fitted, method: str, options: Mapping[str, Any]) -> Fitted:
    """Fit with another damping, without a pass through the network where the method allows."""
    lift = fitted.lift
    if isinstance(lift, RowForm) and lift.stretch == 1 == stretch_of_biases(problem):
        return with_damping(fitted, lift.filtered.curvature, problem)
    if isinstance(lift, Solved) and lift.matrix is not None:
        return exact_with_damping(problem, lift.matrix, fitted.train)
    return METHODS[method](problem, **options)


METHODS: dict[str, Callable[..., Fitted]] = {
    "gradient_dot": gradient_dot,
    "tracin": tracin,
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
