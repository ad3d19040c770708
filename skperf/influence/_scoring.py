"""Run the queries of a fitted scorer through its tiles."""

from functools import reduce

import numpy as np
import torch
from sklearn.utils import Bunch

from skperf.backbone.outputs import resolve_output
from skperf.influence import anew
from skperf.influence._constraints import TARGETS
from skperf.influence._members import linearised, networks_of
from skperf.influence.neighbours import features_of, nearest
from skperf.influence.problem import self_scores
from skperf.influence.tiles import (
    budget_in_bytes,
    bytes_of_row,
    only_candidates,
    scored_tiles,
    tile_lengths,
)


class TopRows(Bunch):
    """Rows of largest influence: a Bunch whose ``values`` are not the dictionary's."""

    @property
    def values(self):
        """Influence of the rows."""
        return self["values"]


def score_dtype(scorer):
    """Say in which type scores are given."""
    tensors = [tensor for factor in scorer.fits_[0].train for tensor in factor.tensors]
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return np.float64 if double else np.float32


def open_members(scorer):
    """Open the members of a fitted scorer."""
    return [
        (problem, fitted, weight)
        for (problem, weight), fitted in zip(linearised(scorer), scorer.fits_, strict=True)
    ]


def influence_matrix(scorer, X, y, *, out=None, aggregate=None):
    """Estimate the influence of every training row on every query.

    Shapes: X (n_query, ...), y (n_query,), out (n_query, n_train) -> (n_query, n_train) or
    (n_train,).
    """
    if aggregate not in (None, "sum", "mean"):
        raise ValueError(f"aggregate must be None, 'sum' or 'mean', got {aggregate!r}.")
    shape = (len(X), len(scorer.X_)) if aggregate is None else (len(scorer.X_),)
    if out is not None and out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, expected {shape}.")
    if out is not None and aggregate is not None:
        out[:] = 0
    for queries, rows, scores in tiles_of(scorer, X, y):
        if out is None and scores.shape == shape:
            return scores
        if out is None:
            out = np.zeros(shape, dtype=scores.dtype)
        if aggregate is None:
            out[queries, rows] = scores
        else:
            out[rows] += scores.sum(0) / (len(X) if aggregate == "mean" else 1)
    return out


def tiles_of(scorer, X, y, fill=0.0):
    """Go through the matrix of scores.

    Shapes: X (n_query, ...), y (n_query,) -> scores (n_queries, n_rows).
    """
    members = open_members(scorer)
    output = resolve_output(scorer.target, argument="target", allowed=TARGETS)
    row_bytes = sum(bytes_of_row(fitted.train) for _, fitted, _ in members)
    budget = budget_in_bytes(scorer.memory_budget)
    n_queries, length = tile_lengths(len(X), len(scorer.X_), row_bytes, budget)
    close = _candidates(scorer, X)
    for start in range(0, len(X), n_queries):
        queries = slice(start, min(start + n_queries, len(X)))
        tiles = [
            _member_tiles(scorer, member, output, X[queries], y[queries], length)
            for member in members
        ]
        for parts in zip(*tiles, strict=True):
            rows, scores = parts[0][0], reduce(np.add, [scores for _, scores in parts])
            if close is not None:
                scores = only_candidates(scores, close[queries], rows, fill)
            yield queries, rows, scores


def _member_tiles(scorer, member, output, X, y, length):
    problem, fitted, weight = member
    queries = _queries(scorer, problem, output, X, y)
    options = {"scale": fitted.scale * weight, "length": length}
    workers = {"n_jobs": scorer.n_jobs, "prefer": "threads"}
    if anew.worth_it(problem, fitted, **workers):
        yield from anew.tiles_anew(problem, fitted, queries, **options, **workers)
        return
    terms = fitted.lift(problem, queries.factors(problem))
    device = problem.network.device
    yield from scored_tiles(terms, fitted.train, device=device, **options, **workers)


def query_gradients(scorer, problem, output, X, y):
    """Gradients of what is estimated to rise when a row is left out.

    Shapes: X (n_query, ...), y (n_query,).
    """
    return _queries(scorer, problem, output, X, y).factors(problem)


def _queries(scorer, problem, output, X, y):
    codes = problem.network.codes(y).cpu()
    # of every other target more is better, and its fall is what is estimated
    signs = None if scorer.target == "loss" else torch.full((len(X),), -1.0)
    return anew.Pulled(output, X, codes, signs, [])


def _candidates(scorer, X):
    if scorer.candidates is None:
        return None
    network = networks_of(scorer)[0][0]
    if "_features" not in vars(scorer):
        scorer._features = features_of(network, scorer.X_)
    return nearest(scorer._features, features_of(network, X), scorer.candidates)


def self_influences(scorer, X, y):
    """Influence of rows on themselves: X (n, ...), y (n,) -> (n,)."""
    output = resolve_output(scorer.target, argument="target", allowed=TARGETS)
    own = resolve_output("loss")
    total = np.zeros(len(X), dtype=score_dtype(scorer))
    for problem, fitted, weight in open_members(scorer):
        size, _ = tile_lengths(
            len(X), 1, 4 * bytes_of_row(fitted.train), budget_in_bytes(scorer.memory_budget)
        )
        for start in range(0, len(X), size):
            part = slice(start, start + size)
            codes = problem.network.codes(y[part]).cpu()
            rows = problem.gradients(own, X[part], codes)
            queries = rows
            if scorer.target != "loss":
                queries = query_gradients(scorer, problem, output, X[part], y[part])
            total[part] += weight * self_scores(problem, fitted, queries, rows).numpy()
    return total
