"""Gradients of many rows in the form in which their inner products are cheapest.

A linear layer's gradient for one row is an outer product ``b a'`` of the gradient at its
output and its input, so that ``<G, G'> = (a . a') (b . b')``: the matrix is never formed.
A factor holds such gradients of many rows for one layer. Whatever its kind, it stands for a
matrix of shape (n_rows, n_weights), the weights of a layer laid out as (n_outputs, n_inputs),
with the bias, if it takes part, as a last input that is always one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_CHUNK = 1 << 24  # floats in an intermediate product
_SIDE = 512  # of a tile of scores that stays in the cache while every layer adds to it


class _Rows:
    """Tensors with one entry a row, and what all rows share."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored, one entry a row."""
        return tuple(value for value in vars(self).values() if isinstance(value, Tensor))

    def with_tensors(self, *tensors: Tensor) -> Self:
        """Replace what is stored."""
        shared = [value for value in vars(self).values() if not isinstance(value, Tensor)]
        return type(self)(*tensors, *shared)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.tensors[0])

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Take some rows."""
        return self.with_tensors(*(tensor[rows] for tensor in self.tensors))


@dataclass(frozen=True)
class Outer(_Rows):
    """Gradients that are outer products, or short sums of them."""

    inputs: Tensor  # (n, n_inputs) or (n, n_positions, n_inputs)
    outputs: Tensor  # (n, n_outputs) or (n, n_positions, n_outputs)


@dataclass(frozen=True)
class Dense(_Rows):
    """Gradients, or any other vectors, written out."""

    values: Tensor  # (n, n_weights)


@dataclass(frozen=True)
class Tokens(_Rows):
    """Gradients of an embedding table, non-zero at the tokens of a row only."""

    indices: Tensor  # (n, n_positions)
    outputs: Tensor  # (n, n_positions, n_dimensions)
    n_embeddings: int


Factor = Outer | Dense | Tokens
Gradients = list[Factor]


def merged(factors: Sequence[Factor]) -> Factor:
    """Add up the gradients that several calls of one layer give."""
    first = factors[0]
    if len(factors) == 1:
        return first
    if all(isinstance(factor, Outer) for factor in factors):
        parts = [[t if t.ndim == 3 else t[:, None] for t in factor.tensors] for factor in factors]
        inputs, outputs = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        return Outer(inputs, outputs)
    if isinstance(first, Tokens) and all(isinstance(factor, Tokens) for factor in factors):
        pairs = zip(*(factor.tensors for factor in factors), strict=True)
        indices, outputs = (torch.cat(tensors, 1) for tensors in pairs)
        return Tokens(indices, outputs, first.n_embeddings)
    return Dense(torch.stack([written_out(factor) for factor in factors]).sum(0))


def folded(factor: Factor, n: int, *, rows_last: bool = False) -> Factor:
    """Add up the gradients of the entries that belong to one row: (n * fold, ...) -> (n, ...)."""
    fold = len(factor) // n
    if fold == 1:
        return factor

    def apart(tensor: Tensor) -> Tensor:
        if rows_last:
            return tensor.unflatten(0, (fold, n)).transpose(0, 1)
        return tensor.unflatten(0, (n, fold))

    if isinstance(factor, Dense):
        return Dense(apart(factor.values).sum(1))
    positions = 2 if isinstance(factor, Outer) and factor.inputs.ndim == 2 else 3
    together = [apart(tensor) for tensor in factor.tensors]
    if positions == 3:
        together = [tensor.flatten(1, 2) for tensor in together]
    return factor.with_tensors(*together)


def take(gradients: Sequence[Factor], rows: slice | Tensor) -> Gradients:
    """Take the same rows of every layer."""
    return [factor[rows] for factor in gradients]


def inner(
    queries: Sequence[Factor], rows: Sequence[Factor], *, out: Tensor | None = None
) -> Tensor:
    """Inner products of two sets of gradients, summed over layers: -> (n_queries, n_rows)."""
    n_queries, n = len(queries[0]), len(rows[0])
    result = queries[0].tensors[-1].new_empty(n_queries, n) if out is None else out
    for first in range(0, n_queries, _SIDE):
        asked = slice(first, first + _SIDE)
        for start in range(0, n, _SIDE):
            part = slice(start, start + _SIDE)
            tile = result[asked, part]
            if out is None:
                tile.zero_()
            for query, row in zip(queries, rows, strict=True):
                _INNER[type(query), type(row)](query[asked], row[part], tile)
    return result


def gram(rows: Sequence[Factor]) -> Tensor:
    """Inner products of gradients with one another: -> (n, n)."""
    n = len(rows[0])
    out = rows[0].tensors[-1].new_zeros(n, n)
    length = max(64, n // 8)
    for start in range(0, n, length):
        part, rest = slice(start, start + length), slice(start, None)
        inner(take(rows, rest), take(rows, part), out=out[rest, part])
        after = slice(start + length, None)
        out[part, after] = out[after, part].T
    return out


def squared_norms(gradients: Sequence[Factor]) -> Tensor:
    """Squared length of every row's gradient: -> (n,)."""
    return torch.stack([paired(factor, factor) for factor in gradients]).sum(0)


def paired(left: Factor, right: Factor) -> Tensor:
    """Inner product of row i of one factor with row i of the other: -> (n,)."""
    if isinstance(left, Outer) and left.inputs.ndim == 2:
        assert isinstance(right, Outer)
        return _row_dot(left.inputs, right.inputs) * _row_dot(left.outputs, right.outputs)
    if isinstance(left, Dense) and isinstance(right, Dense):
        return _row_dot(left.values, right.values)
    assert isinstance(left, Outer | Tokens)
    assert isinstance(right, Outer | Tokens)
    products = left.outputs @ right.outputs.mT
    if isinstance(left, Outer) and isinstance(right, Outer):
        products *= left.inputs @ right.inputs.mT
    elif isinstance(left, Tokens) and isinstance(right, Tokens):
        products *= left.indices[:, :, None] == right.indices[:, None, :]
        products *= (left.indices >= 0)[:, :, None]
    return products.sum((1, 2))


def written_out(factor: Factor) -> Tensor:
    """Gradients as a matrix: -> (n, n_weights)."""
    if isinstance(factor, Dense):
        return factor.values
    if isinstance(factor, Tokens):
        outputs = factor.outputs * (factor.indices >= 0)[:, :, None]
        table = outputs.new_zeros(len(factor), factor.n_embeddings, outputs.shape[-1])
        where = factor.indices.clamp_min(0)[:, :, None].expand_as(outputs)
        return table.scatter_add_(1, where, outputs).flatten(1)
    if factor.inputs.ndim == 2:
        matrices = factor.outputs[:, :, None] * factor.inputs[:, None, :]
    else:
        matrices = factor.outputs.mT @ factor.inputs
    return matrices.flatten(1)


def combine(coefficients: Tensor, factor: Factor) -> Tensor:
    """Weighted sums of one layer's gradients: coefficients (m, n) -> (m, n_weights)."""
    if isinstance(factor, Dense):
        return coefficients @ factor.values
    total = None
    size = max(1, _CHUNK // max(_row_numel(factor), 1))
    for start in range(0, len(factor), size):
        part = factor[start : start + size]
        weights = coefficients[:, start : start + size]
        summed = (
            _combine_outer(weights, part)
            if isinstance(part, Outer)
            else weights @ written_out(part)
        )
        total = summed if total is None else total.add_(summed)
    assert total is not None
    return total


def _combine_outer(weights: Tensor, factor: Outer) -> Tensor:
    inputs, outputs = factor.inputs, factor.outputs
    if inputs.ndim == 3:
        weights = weights.repeat_interleave(inputs.shape[1], 1)
        inputs, outputs = inputs.flatten(0, 1), outputs.flatten(0, 1)
    return torch.stack([(outputs * weight[:, None]).T @ inputs for weight in weights]).flatten(1)


def _inner_outer(query: Outer, row: Outer, out: Tensor) -> None:
    if query.inputs.ndim == 2:
        out.addcmul_(query.inputs @ row.inputs.T, query.outputs @ row.outputs.T)
        return
    positions = query.inputs.shape[1] * row.inputs.shape[1]
    size = max(1, _CHUNK // (positions * max(len(query), 1)))
    for start in range(0, len(row), size):
        part = row[start : start + size]
        products = query.inputs.flatten(0, 1) @ part.inputs.flatten(0, 1).T
        products *= query.outputs.flatten(0, 1) @ part.outputs.flatten(0, 1).T
        blocks = products.view(len(query), -1, len(part), row.inputs.shape[1])
        out[:, start : start + size] += blocks.sum((1, 3))


def _inner_dense_outer(query: Dense, row: Outer, out: Tensor) -> None:
    n_outputs, n_inputs = row.outputs.shape[-1], row.inputs.shape[-1]
    matrices = query.values.view(-1, n_outputs, n_inputs)
    size = max(1, _CHUNK // max(_row_numel(row) * len(row), 1))
    for start in range(0, len(matrices), size):
        part = matrices[start : start + size]
        reached = torch.tensordot(row.inputs, part, dims=([-1], [2]))
        reached *= row.outputs.unsqueeze(-2)
        sums = reached.sum(-1)
        out[start : start + size] += (sums.sum(1) if sums.ndim == 3 else sums).T


def _inner_tokens(query: Tokens, row: Tokens, out: Tensor) -> None:
    positions = query.indices.shape[1] * row.indices.shape[1]
    asked = query.indices.flatten()
    met = asked[torch.isin(asked, row.indices)].unique()
    met = met[met >= 0]
    if not len(met):
        return
    if len(met) < positions:  # fewer tokens than pairs of places: tables of these alone
        size = max(1, _CHUNK // max(len(met) * query.outputs.shape[-1], 1))
        for left, part in zip(_of_tokens(query, met).split(size), out.split(size), strict=True):
            for start in range(0, len(row), size):
                right = _of_tokens(row[start : start + size], met)
                part[:, start : start + size].addmm_(left, right.T)
        return
    size = max(1, _CHUNK // (positions * max(len(query), 1)))
    for start in range(0, len(row), size):
        part = row[start : start + size]
        products = query.outputs.flatten(0, 1) @ part.outputs.flatten(0, 1).T
        seen = part.indices.flatten()
        products *= (asked[:, None] == seen[None]) & (asked >= 0)[:, None]
        blocks = products.view(len(query), -1, len(part), row.indices.shape[1])
        out[:, start : start + size] += blocks.sum((1, 3))


def _of_tokens(factor: Tokens, some: Tensor) -> Tensor:
    """Write out the rows of a table that belong to some tokens (k,), in order: -> (n, k * d)."""
    place = torch.searchsorted(some, factor.indices).clamp_max(len(some) - 1)
    place = torch.where(some[place] == factor.indices, place, -1)
    return written_out(Tokens(place, factor.outputs, len(some)))


def _inner_dense_tokens(query: Dense, row: Tokens, out: Tensor) -> None:
    tables = query.values.view(len(query), -1, row.outputs.shape[-1])
    outputs = row.outputs * (row.indices >= 0)[:, :, None]
    for table, result in zip(tables, out, strict=True):
        result += (table[row.indices.clamp_min(0)] * outputs).sum((1, 2))


_INNER: dict[tuple[type, type], Callable[..., None]] = {
    (Outer, Outer): _inner_outer,
    (Dense, Dense): lambda query, row, out: out.addmm_(query.values, row.values.T),
    (Dense, Outer): _inner_dense_outer,
    (Outer, Dense): lambda query, row, out: _inner_dense_outer(row, query, out.T),
    (Tokens, Tokens): _inner_tokens,
    (Dense, Tokens): _inner_dense_tokens,
}


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("ij,ij->i", left, right)


def _row_numel(factor: Factor) -> int:
    return sum(int(tensor[0].numel()) for tensor in factor.tensors) if len(factor) else 1
