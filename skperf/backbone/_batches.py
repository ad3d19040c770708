"""Labelled rows for skorch, and batches of them that are slices."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from skorch.dataset import Dataset
from torch import Tensor

from skperf.backbone.rows import Rows


class LabelledRows(Dataset):
    """Rows (n, ...), the labels that people read, and targets (n,) or (targets, weights)."""

    def __init__(
        self, rows: Rows, labels: np.ndarray, targets: Any, convert: Callable[[Rows], Rows]
    ) -> None:
        # rows of a data set stay where they are until their batch comes
        self.stays = rows.indices is not None
        self.rows = rows if self.stays else convert(rows)
        self.convert = convert
        self.targets = targets
        # scorers among the callbacks read these
        super().__init__(rows if self.stays else self.rows.tree, labels, length=len(rows))

    def gather(self, where: Any) -> Any:
        """Give some rows as the module takes them: (b, ...)."""
        rows = self.rows[where]
        return (self.convert(rows) if self.stays else rows).tree

    def __getitem__(self, i: int) -> Any:
        inputs = self.gather(slice(i, i + 1))
        return map_tensors(inputs, 0), map_tensors(self.targets, i)


class TensorBatches:
    """Slices of tensors, in place of a DataLoader that collates row by row."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 128,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> None:
        indices = getattr(dataset, "indices", None)
        self.subset = None if indices is None else torch.as_tensor(np.asarray(indices))
        data = dataset if indices is None else dataset.dataset
        where = slice(None) if self.subset is None else self.subset
        labelled = data if isinstance(data, LabelledRows) else None
        y = data.y if labelled is None else labelled.targets
        # skorch stands a float 0 in for a missing y
        self.y = None if y is None else map_tensors(y, where)
        self.gather: Callable[[Any], Any]
        self.n_rows = len(dataset)
        if drop_last and batch_size > self.n_rows:
            raise ValueError(
                f"iterator drop_last=True leaves no batch: batch_size={batch_size}, but there are "
                f"{self.n_rows} rows."
            )
        if labelled is not None and labelled.stays:
            self.gather = lambda rows: labelled.gather(self._positions(rows))
        else:
            X = map_tensors(data.X if labelled is None else labelled.rows.tree, where)
            self.gather = lambda rows: map_tensors(X, rows)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.drop_last = drop_last
        self.latest: Any = slice(0, 0)

    def __len__(self) -> int:
        if self.drop_last:
            return self.n_rows // self.batch_size
        return -(-self.n_rows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        order = torch.randperm(self.n_rows, generator=self.generator) if self.shuffle else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = min(start + self.batch_size, self.n_rows)
            rows = slice(start, stop) if order is None else order[start:stop]
            self.latest = rows
            y = torch.zeros(1) if self.y is None else map_tensors(self.y, rows)
            yield self.gather(rows), y

    def positions(self) -> Tensor:
        """Which rows of the whole data the latest batch holds: -> (b,)."""
        return self._positions(self.latest)

    def _positions(self, rows: Any) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop)
        return rows if self.subset is None else self.subset[rows]


def map_tensors(values: Any, rows: Any) -> Any:
    """Take rows of a tensor, or of each of several: (n, ...) -> (b, ...)."""
    if isinstance(values, tuple | list):
        return tuple(map_tensors(value, rows) for value in values)
    if isinstance(values, dict):
        return {name: map_tensors(value, rows) for name, value in values.items()}
    return torch.as_tensor(values)[rows]
