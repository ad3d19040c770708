"""Run queries through the tiles of a fitted ensemble."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skperf.backbone.files import reserve
from skperf.backbone.losses import Loss
from skperf.backbone.outputs import Output
from skperf.backbone.rows import Rows
from skperf.influence import anew
from skperf.influence.gradients import Gradients, take
from skperf.influence.neighbours import features_of, nearest
from skperf.influence.problem import Fitted, Problem, self_scores, slopes
from skperf.influence.tiles import (
    Largest,
    block,
    bytes_of_row,
    meet,
    only_candidates,
    scored_tiles,
    tile_lengths,
)

Tile = tuple[slice, slice, NDArray[Any]]


@dataclass(frozen=True)
class Member:
    """One network that scores are summed over, open, and what a method keeps of it."""

    problem: Problem
    fit: Fitted
    share: float


@dataclass(frozen=True)
class Candidates:
    """Training rows that are scored, by nearness to the query."""

    k: int
    groups: NDArray[Any] | None = None  # (n,), of each of which k are taken


@dataclass(frozen=True)
class Ensemble:
    """Networks open for one call, and how scores are asked for."""

    members: list[Member]
    output: Loss | Output  # of the queries
    budget: int
    dtype: np.dtype[Any]
    n_jobs: int | None = None
    candidates: Candidates | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)  # features of the training rows

    @property
    def first(self) -> Problem:
        """The first member's problem."""
        return self.members[0].problem

    @property
    def n_scored(self) -> int:
        """How many training rows a query has scores of."""
        if self.candidates is None:
            return self.n_train
        groups = self.candidates.groups
        n_groups = 1 if groups is None else len(np.unique(groups))
        return min(self.n_train, self.candidates.k * n_groups)

    @property
    def n_train(self) -> int:
        """Training rows."""
        return self.first.n_train

    @property
    def about_loss(self) -> bool:
        """Whether what is asked about is a loss, of which less is better."""
        return isinstance(self.output, Loss)

    @cached_property
    def row_bytes(self) -> int:
        """Memory of what all members keep of a row."""
        return sum(bytes_of_row(member.fit.train) for member in self.members)

    def matrix(
        self, X: Rows, targets: Tensor, *, out: Any = None, aggregate: str | None = None
    ) -> Any:
        """Score queries X (n_query, ...) against training rows: -> (n_query, n_train)."""
        shape = (len(X), self.n_train) if aggregate is None else (self.n_train,)
        if out is not None:
            _check_room(out, shape)
        if out is not None and aggregate is not None:
            out[:] = 0
        for queries, rows, scores in self.tiles(X, targets):
            if out is None and scores.shape == shape:
                return scores
            if out is None:
                out = np.zeros(shape, dtype=scores.dtype)
            if aggregate is None:
                out[queries, rows] = scores
            else:
                out[rows] += scores.sum(0) / (len(X) if aggregate == "mean" else 1)
        return out

    def tiles(self, X: Rows, targets: Tensor, fill: float = 0.0) -> Iterator[Tile]:
        """Go through the matrix of scores: X (n_query, ...), targets (n_query, ...)."""
        n_queries, length = tile_lengths(len(X), self.n_train, self.row_bytes, self.budget)
        close = self._close(X)
        for start in range(0, len(X), n_queries):
            queries = slice(start, min(start + n_queries, len(X)))
            tiles = [
                self._member_tiles(member, X[queries], targets[queries], length)
                for member in self.members
            ]
            for parts in zip(*tiles, strict=True):
                rows, scores = parts[0][0], reduce(np.add, [scores for _, scores in parts])
                if close is not None:
                    scores = only_candidates(scores, close[queries], rows, fill)
                yield queries, rows, scores.astype(self.dtype, copy=False)

    def _member_tiles(
        self, member: Member, X: Rows, targets: Tensor, length: int
    ) -> Iterator[tuple[slice, NDArray[Any]]]:
        problem, fit = member.problem, member.fit
        queries = self._asked(X, targets)
        options: dict[str, Any] = {"scale": fit.scale * member.share, "length": length}
        workers: dict[str, Any] = {"n_jobs": self.n_jobs, "prefer": "threads"}
        if anew.worth_it(problem, fit, **workers):
            yield from anew.tiles_anew(problem, fit, queries, **options, **workers)
            return
        terms = fit.lift(problem, queries.factors(problem))
        device = problem.network.device
        yield from scored_tiles(terms, fit.train, device=device, **options, **workers)

    def _asked(self, X: Rows, targets: Tensor) -> anew.Pulled:
        # of every output but a loss more is better, and its fall is what is estimated
        signs = None if self.about_loss else torch.full((len(X),), -1.0)
        return anew.Pulled(self.output, X, targets, signs, [])

    def query_gradients(self, problem: Problem, X: Rows, targets: Tensor) -> Gradients:
        """Gradients of what is estimated to rise when a row is left out."""
        return self._asked(X, targets).factors(problem)

    def top(self, X: Rows, targets: Tensor, k: int, sign: int) -> tuple[Any, Any]:
        """Find the rows of largest influence: -> indices (n_query, k), values (n_query, k)."""
        indices = np.zeros((len(X), k), dtype=np.intp)
        values = np.zeros((len(X), k), dtype=self.dtype)
        best, current = Largest(k), None
        for queries, rows, scores in self.tiles(X, targets, fill=-sign * np.inf):
            if queries != current:
                best, current = Largest(k), queries
            best.add(rows, sign * scores)
            if rows.stop == self.n_train:
                assert best.values is not None
                assert best.indices is not None
                indices[queries], values[queries] = best.indices, sign * best.values
        return indices, values

    def of_others(self, X: Rows, targets: Tensor, rows: Rows, labels: Tensor) -> NDArray[Any]:
        """Score rows that were not trained on: -> (n_query, n_rows)."""
        total = np.zeros((len(X), len(rows)), dtype=self.dtype)
        size, _ = tile_lengths(len(rows), 1, 4 * self.row_bytes, self.budget)
        for member in self.members:
            problem, fit = member.problem, member.fit
            terms = fit.lift(problem, self.query_gradients(problem, X, targets))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                own = problem.gradients(problem.loss, rows[part], labels[part])
                scale = fit.scale * member.share
                stored = fit.lift.store(problem, own)
                total[:, part] += block(terms, stored, scale, problem.network.device)
        return total

    def by_token(self, X: Rows, targets: Tensor, of: str) -> NDArray[Any]:
        """Keep tokens of queries or rows: (n_query, length, n_train) or (.., n_train, length)."""
        total: Any = 0.0
        for member in self.members:
            problem, fit = member.problem, member.fit
            scale, device = fit.scale * member.share, problem.network.device
            if of == "queries":
                apart = _token_gradients(problem, self.output, X, targets)
                terms = fit.lift(problem, apart)
                scores = block(terms, fit.train, scale, device)
                total = total + scores.reshape(len(X), -1, self.n_train)
            else:
                terms = fit.lift(problem, self.query_gradients(problem, X, targets))
                apart = _token_gradients(problem, problem.loss, problem.X, problem.targets)
                weights = problem.relative_weights()
                scores = block(terms, fit.lift.store(problem, apart), scale, device)
                scores = scores.reshape(len(X), self.n_train, -1)
                total = total + (scores if weights is None else scores * weights.numpy()[:, None])
        marked = self.candidates_of(X)
        total = total * (marked[:, None] if of == "queries" else marked[:, :, None])
        return np.asarray(total, dtype=self.dtype)

    def self_influences(self, X: Rows, targets: Tensor) -> NDArray[Any]:
        """Influence of rows on themselves: X (n, ...), targets (n, ...) -> (n,)."""
        total = np.zeros(len(X), dtype=self.dtype)
        for member in self.members:
            problem, fit = member.problem, member.fit
            size, _ = tile_lengths(len(X), 1, 4 * bytes_of_row(fit.train), self.budget)
            for start in range(0, len(X), size):
                part = slice(start, start + size)
                rows = queries = problem.gradients(problem.loss, X[part], targets[part])
                if self.output is not problem.loss:
                    queries = self.query_gradients(problem, X[part], targets[part])
                total[part] += member.share * self_scores(problem, fit, queries, rows).numpy()
        return total

    def losses(self, X: Rows, targets: Tensor) -> NDArray[Any]:
        """Loss of each row under each member: -> (n_members, n)."""
        return np.stack([member.problem.losses(X, targets) for member in self.members])

    def groups(self, X: Rows, targets: Tensor, members: list[NDArray[Any]]) -> NDArray[Any]:
        """Sum the influence of groups of rows: -> (n_query, n_groups)."""
        membership = np.zeros((self.n_train, len(members)), dtype=self.dtype)
        for column, rows in enumerate(members):
            membership[rows, column] = 1
        result = np.zeros((len(X), len(members)), dtype=self.dtype)
        for queries, part, scores in self.tiles(X, targets):
            result[queries] += scores @ membership[part]
        return result

    def scores_of(self, X: Rows, targets: Tensor, rows: Tensor) -> Tensor:
        """Score queries against some training rows: -> (n_query, m)."""
        total = torch.zeros(len(X), len(rows))
        for member in self.members:
            problem, fit = member.problem, member.fit
            terms = fit.lift(problem, self.query_gradients(problem, X, targets))
            scores = meet(terms, take(fit.train, rows))
            total = total + scores * (fit.scale * member.share)
        return total * torch.as_tensor(self.candidates_of(X))[:, rows]

    def candidates_of(self, X: Rows) -> NDArray[Any]:
        """Mark the training rows that are scored: X (n_query, ...) -> (n_query, n_train)."""
        close = self._close(X)
        marked = np.full((len(X), self.n_train), close is None)
        if close is not None:
            np.put_along_axis(marked, close, True, 1)
        return marked

    def _close(self, X: Rows) -> NDArray[np.intp] | None:
        if self.candidates is None:
            return None
        network = self.first.network
        if "features" not in self.seen:
            self.seen["features"] = features_of(network, self.first.X)
        own, asked = self.seen["features"], features_of(network, X)
        return nearest(own, asked, self.candidates.k, groups=self.candidates.groups)


def _check_room(out: Any, shape: tuple[int, ...]) -> None:
    """Refuse what scores can't be written to, before anything is."""
    if not hasattr(out, "shape") or not hasattr(out, "dtype"):
        raise TypeError(f"out must be an array or a memmap, got {type(out).__name__}.")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, expected {shape}.")
    if getattr(out.dtype, "kind", "f") != "f":
        raise ValueError(f"out holds {out.dtype}, which would cut scores off: give floats.")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only: open a memmap with mode 'r+' or 'w+'.")
    if isinstance(out, np.memmap) and out.filename is not None and out.mode != "c":
        with open(out.filename, "rb+") as file:
            reserve(file, os.fstat(file.fileno()).st_size, f"out={out.filename}")


def _token_gradients(
    problem: Problem, output: Loss | Output, X: Rows, targets: Tensor
) -> Gradients:
    """Gradients of each token's part of a row's loss: X (n, ...) -> (n * length, ...)."""
    # the loss of a row is a mean over its tokens, each of which reads outputs of its own
    if targets.ndim < 2 or not isinstance(output, Loss):
        raise ValueError(
            "tokens= needs targets with one entry a token, (n, length), and output='loss'."
        )
    n, length = targets.shape[:2]

    def cotangents(outputs: Tensor, rows: Tensor) -> Tensor:
        examples, places = rows // length, rows % length
        own = slopes(output, outputs, targets[examples].to(outputs.device))
        axis = 1 if own.shape[1] == length else 2
        mask = torch.arange(length) == places[:, None]
        shape = [len(rows), *[length if i == axis else 1 for i in range(1, own.ndim)]]
        return own * mask.to(own).view(shape)

    examples = torch.arange(n).repeat_interleave(length)
    return problem.gather(X, cotangents, examples)
