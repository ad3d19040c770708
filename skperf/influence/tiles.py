"""Cut work into tiles: gather gradients batch by batch, score block by block, keep the largest."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from numpy.typing import NDArray
from torch import Tensor

from skperf.backbone._workers import spread
from skperf.backbone.files import on_disk
from skperf.backbone.network import Network
from skperf.backbone.progress import track
from skperf.backbone.rows import Rows
from skperf.influence.captures import Recorder, Tape
from skperf.influence.gradients import Factor, Gradients, inner, take
from skperf.influence.output_rows import Cotangents

Through = Callable[[Gradients], Gradients]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def budget_in_bytes(budget: str | float) -> int:
    """Read a memory budget."""
    if not isinstance(budget, str):
        size = float(budget)
    else:
        text = budget.strip().lower().removesuffix("b").strip()
        prefix = text[-1:] if text[-1:] in "kmgt" else ""
        try:
            size = float(text.removesuffix(prefix)) * _UNITS[prefix]
        except ValueError:
            raise ValueError(
                f"memory_budget={budget!r} is not understood; write bytes or '2GB'."
            ) from None
    if not size > 0:
        raise ValueError(f"memory_budget={budget!r} must be positive.")
    return int(size)


class Shelf:
    """Room for gradients: memory, or a folder of nameless files once they exceed a budget."""

    def __init__(self, budget: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.budget = budget
        self.folder = folder
        self.used = 0

    def empty(self, n: int, like: Factor) -> Factor:
        """Make room for gradients of one layer."""
        return like.with_tensors(*(self._tensor(n, tensor) for tensor in like.tensors))

    def _tensor(self, n: int, like: Tensor) -> Tensor:
        size = n * like.shape[1:].numel() * like.element_size()
        kind, shape = torch.empty(0, dtype=like.dtype).numpy().dtype, (n, *like.shape[1:])
        if self.used + size <= self.budget or size == 0:
            self.used += size
            # numpy asks the system for large pages, which are cheaper to touch first
            return torch.from_numpy(np.empty(shape, kind))
        return torch.from_numpy(on_disk(shape, kind, self.folder))


def gather(
    network: Network,
    record: Recorder,
    X: Rows,
    cotangents: Cotangents,
    *,
    examples: Tensor | None = None,
    batch_size: int,
    shelf: Shelf | None = None,
    through: Through = list,
    verbose: int = 0,
) -> Gradients:
    """Pull gradients of rows X (n, ...), keep them mapped by `through`: cotangents (m, ...)."""
    shelf = shelf or Shelf(2**62)
    results: Gradients = []
    n = len(X) if examples is None else len(examples)
    batches = list(_batches(torch.arange(n) if examples is None else examples, batch_size))
    for members, positions in track(batches, description="gradients", verbose=verbose):
        tape = _recorded(network, record, network.inputs(X[_index(members)]))
        for rows in positions.T:
            wanted = (
                cotangents[rows]
                if isinstance(cotangents, Tensor)
                else cotangents(tape.outputs.detach(), rows)
            )
            pulled = through(tape.pull(wanted.to(tape.outputs)))
            if not results:
                results = [shelf.empty(n, factor) for factor in pulled]
            where = _index(rows)
            for room, factor in zip(results, pulled, strict=True):
                for tensor, values in zip(room.tensors, factor.tensors, strict=True):
                    tensor[where] = values.detach().to(tensor.device)
    return results


def _recorded(network: Network, record: Recorder, inputs: Rows) -> Tape:
    if inputs.single and inputs.array.ndim == 4:
        # faster, but the network's own Tensor.view may insist on the usual order
        with suppress(RuntimeError):
            last = {"memory_format": torch.channels_last}
            return record(network, inputs.map(lambda leaf: leaf.contiguous(**last)))
    return record(network, inputs)


def _batches(examples: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Group examples with equally many cotangents, so that no backward pass is wasted."""
    # Where too few have as many to fill much of a batch, they run once for each cotangent.
    order = examples.argsort(stable=True)
    counts = torch.bincount(examples)
    starts = counts.cumsum(0) - counts
    once = torch.ones(len(examples), dtype=torch.bool)
    for count in torch.unique(counts[counts > 1]).tolist():
        members = (counts == count).nonzero()[:, 0]
        if len(members) >= batch_size // 4:
            positions = order[starts[members, None] + torch.arange(count)]
            once[positions] = False
            yield from zip(members.split(batch_size), positions.split(batch_size), strict=True)
    rest = once.nonzero()
    for start in range(0, len(rest), batch_size):
        positions = rest[start : start + batch_size]
        yield examples[positions[:, 0]], positions


def _index(rows: Tensor) -> Any:
    numbers = rows.numpy()
    if bool((np.diff(numbers) == 1).all()):
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


Terms = list[tuple[int, Factor]]


def meet(terms: Terms, rows: Sequence[Factor]) -> Tensor:
    """Inner products of mapped queries with what is stored of rows: -> (n_queries, n_rows)."""
    return inner([query for _, query in terms], [rows[which] for which, _ in terms])


def block(
    terms: Terms, train: Sequence[Factor], scale: float, device: torch.device
) -> NDArray[Any]:
    """Score one tile: -> (n_queries, n_rows)."""
    here = [(i, f.with_tensors(*(t.to(device) for t in f.tensors))) for i, f in terms]
    rows = [f.with_tensors(*(t.to(device) for t in f.tensors)) for f in train]
    return meet(here, rows).mul_(scale).cpu().numpy()


def tile_lengths(n_queries: int, n_train: int, row_bytes: int, budget: int) -> tuple[int, int]:
    """Choose tiles that fit a memory budget."""
    queries = min(n_queries, 1024)
    rows = min(n_train, 4096)
    while queries * row_bytes + rows * row_bytes + 3 * 8 * queries * rows > budget:
        if queries == rows == 1:
            needed = 2 * row_bytes + 24
            raise ValueError(
                f"memory_budget of {budget:,} bytes cannot hold one tile: a single gradient takes "
                f"{row_bytes:,} bytes; the smallest budget that fits is {needed:,} bytes."
            )
        queries, rows = (
            (max(1, queries // 2), rows) if queries >= rows else (queries, max(1, rows // 2))
        )
    return max(queries, 1), max(rows, 1)


def scored_tiles(
    terms: Terms,
    train: Gradients,
    *,
    scale: float,
    length: int,
    device: torch.device,
    n_jobs: int | None = None,
    prefer: str = "threads",
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Score some queries against all training rows, tile by tile: -> scores (n_queries, n_rows)."""
    slices = row_slices(len(train[0]), length, n_jobs)
    tiles = (take(train, rows) for rows in slices)
    common = (terms, scale, device)
    yield from zip(slices, spread(_block, common, tiles, n_jobs=n_jobs, prefer=prefer), strict=True)


def row_slices(n: int, length: int, n_jobs: int | None) -> list[slice]:
    """Cut training rows into tiles, at least one for each worker."""
    length = min(length, -(-n // effective_n_jobs(n_jobs)))
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]


def _block(common: tuple[Terms, float, torch.device], tile: Sequence[Factor]) -> NDArray[Any]:
    terms, scale, device = common
    return block(terms, tile, scale, device)


class Largest:
    """Running top k of every row of a matrix that is seen in column tiles."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.values: NDArray[Any] | None = None
        self.indices: NDArray[Any] | None = None

    def add(self, rows: slice, scores: NDArray[Any]) -> None:
        """Take a tile into account: scores (n, n_columns)."""
        indices = np.broadcast_to(np.arange(rows.start, rows.stop), scores.shape)
        if self.values is not None and self.indices is not None:
            scores = np.concatenate([self.values, scores], 1)
            indices = np.concatenate([self.indices, indices], 1)
        # equal values keep the order of the rows, however they were cut into tiles
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        self.values = np.take_along_axis(scores, order, 1)
        self.indices = np.take_along_axis(indices, order, 1)


def bytes_of_row(gradients: Sequence[Factor]) -> int:
    """Memory of one gradient."""
    tensors = [tensor[:1] for factor in gradients for tensor in factor.tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def only_candidates(
    scores: NDArray[Any], close: NDArray[np.intp], rows: slice, fill: float
) -> NDArray[Any]:
    """Keep the scores (n_queries, n_rows) of each query's candidates in a tile."""
    kept = np.full_like(scores, fill)
    query, which = np.nonzero((close >= rows.start) & (close < rows.stop))
    column = close[query, which] - rows.start
    kept[query, column] = scores[query, column]
    return kept
