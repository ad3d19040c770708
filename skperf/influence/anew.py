"""Tiles whose gradients are computed where they are scored, for workers that share no memory.

A gradient of a convolutional network takes a hundred times the memory of its row. Sending rows
and computing their gradients again costs a pass; sending gradients costs far longer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from skperf.backbone._workers import leaves_the_process, spread
from skperf.backbone.losses import Loss
from skperf.backbone.outputs import Output
from skperf.backbone.rows import Rows
from skperf.influence.gradients import Gradients, take
from skperf.influence.methods import RowForm, Unchanged
from skperf.influence.problem import Fitted, Problem
from skperf.influence.tiles import block, bytes_of_row, row_slices

DEARER = 32  # times the bytes of a row from which on its gradient is not sent


@dataclass(frozen=True)
class Pulled:
    """Rows, what to differentiate of them, and what is known of them besides."""

    output: Loss | Output
    X: Rows  # (n, ...)
    targets: Tensor  # (n, ...)
    weights: Tensor | None  # (n,)
    others: Gradients

    def __getitem__(self, rows: slice) -> "Pulled":
        """Take some rows."""
        weights = None if self.weights is None else self.weights[rows]
        others = take(self.others, rows)
        return Pulled(self.output, self.X[rows], self.targets[rows], weights, others)

    def factors(self, problem: Problem) -> Gradients:
        """Compute the gradients, followed by the other factors."""
        return [*problem.gradients(self.output, self.X, self.targets, self.weights), *self.others]


def worth_it(problem: Problem, fitted: Fitted, n_jobs: int | None, prefer: str) -> bool:
    """Say whether workers should compute gradients anew."""
    size = bytes_of_row(fitted.train[: len(problem.layers)])
    large = size > DEARER * problem.X.nbytes / max(problem.n_train, 1)
    return (
        large
        and leaves_the_process(n_jobs, prefer)
        and isinstance(fitted.lift, Unchanged | RowForm)
        and getattr(fitted.lift, "stretch", 1.0) == 1
    )


def tiles_anew(
    problem: Problem,
    fitted: Fitted,
    queries: Pulled,
    *,
    scale: float,
    length: int,
    n_jobs: int | None,
    prefer: str,
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Score some queries against all training rows, tile by tile: -> scores (n_queries, n_rows)."""
    kept = fitted.train[len(problem.layers) :]
    train = Pulled(problem.loss, problem.X, problem.targets, problem.relative_weights(), kept)
    if kept:
        terms = fitted.lift(problem, queries.factors(problem))
        queries = replace(queries, others=[factor for _, factor in terms[len(problem.layers) :]])
    without_rows = replace(
        problem,
        parameters={},
        X=problem.X[:0],
        targets=problem.targets[:0],
        shares=problem.shares[:0],
    )
    slices = row_slices(problem.n_train, length, n_jobs)
    results = spread(
        _tile,
        (without_rows, queries, scale),
        (train[rows] for rows in slices),
        n_jobs=n_jobs,
        prefer=prefer,
    )
    yield from zip(slices, results, strict=True)


def _tile(common: tuple[Problem, Pulled, float], rows: Pulled) -> NDArray[Any]:
    problem, queries, scale = common
    terms = list(enumerate(queries.factors(problem)))
    return block(terms, rows.factors(problem), scale, problem.network.device)
