"""Rows of any kind: one array, several inputs side by side, or a data set that stays on disk."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

Where = slice | NDArray[Any] | Tensor | Sequence[int]
_PIECE = 1024


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that are sliced, gathered and moved together, whatever they are made of."""

    tree: Any  # a leaf, a tuple of leaves or a dict of leaves; each leaf (n, ...)
    dataset: Any = None  # a map-style data set, in place of the tree
    indices: NDArray[np.intp] | None = None  # (n,), the items of it

    @classmethod
    def of(cls, X: Any) -> "Rows":
        """Take rows in any form: X (n, ...)."""
        if isinstance(X, Rows):
            return X
        if isinstance(X, DataLoader):
            raise TypeError(
                "X is a DataLoader, whose batches have an order of their own: pass the rows "
                "themselves, X=loader.dataset, or arrays; batch_size says how many go at once."
            )
        if isinstance(X, IterableDataset):
            raise TypeError(
                "X is an IterableDataset, whose rows can't be looked up by number; pass a "
                "map-style Dataset (with __len__ and __getitem__) or arrays."
            )
        if isinstance(X, Mapping):
            if any(is_hugging_face(value) for value in X.values()):
                raise TypeError(f"X holds several data sets, {sorted(X)}: pass one, X['train'].")
            rows = cls({str(name): _leaf(value, f"X[{name!r}]") for name, value in X.items()})
        elif isinstance(X, tuple) and X and all(_is_array(value) for value in X):
            rows = cls(tuple(_leaf(value, f"X[{i}]") for i, value in enumerate(X)))
        elif hasattr(X, "X") and hasattr(X, "y") and hasattr(X, "__getitem__"):
            return cls.of(X.X)  # skorch's own Dataset
        elif _is_dataset(X):
            return cls(None, X, np.arange(len(X)))
        else:
            return cls(_leaf(X, "X"))
        lengths = {len(leaf) for leaf in rows.leaves}
        if len(lengths) != 1:
            raise ValueError(
                f"X holds several inputs of different lengths, {sorted(lengths)}; every input "
                "must have one entry for each row."
            )
        return rows

    def __len__(self) -> int:
        return len(self.leaves[0]) if self.indices is None else len(self.indices)

    def __getitem__(self, where: Where) -> "Rows":
        if isinstance(where, Tensor) and self.indices is not None:
            where = where.cpu().numpy()
        if not isinstance(where, slice):
            where = where if isinstance(where, Tensor) else np.asarray(where)
            if where.dtype in (bool, torch.bool):
                where = (
                    where.nonzero()[0] if isinstance(where, np.ndarray) else where.nonzero()[:, 0]
                )
        if self.indices is not None:
            return Rows(None, self.dataset, self.indices[where])
        return self.map(lambda leaf: _gathered(leaf, where))

    @property
    def leaves(self) -> list[Any]:
        """Inputs one by one, each (n, ...)."""
        if self.indices is not None:
            return self.load().leaves
        if isinstance(self.tree, dict):
            return list(self.tree.values())
        return list(self.tree) if isinstance(self.tree, tuple) else [self.tree]

    @property
    def single(self) -> bool:
        """Whether there is one input only."""
        return self.indices is None and not isinstance(self.tree, dict | tuple)

    @property
    def array(self) -> Any:
        """The only input (n, ...)."""
        rows = self.load()
        if not rows.single:
            named = sorted(rows.tree) if isinstance(rows.tree, dict) else len(rows.tree)
            raise TypeError(f"X holds several inputs ({named}), where one array is needed.")
        return rows.tree

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first input, (n, ...)."""
        first = self[:1].leaves[0]
        return (len(self), *np.shape(first)[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows once loaded."""
        one: int = sum(leaf.nbytes for leaf in self[:1].leaves if hasattr(leaf, "nbytes"))
        return one * len(self)

    def map(self, function: Callable[[Any], Any]) -> "Rows":
        """Apply a function to every input: (n, ...) -> (m, ...)."""
        tree = self.tree if self.indices is None else self.load().tree
        if isinstance(tree, dict):
            return Rows({name: function(leaf) for name, leaf in tree.items()})
        if isinstance(tree, tuple):
            return Rows(tuple(function(leaf) for leaf in tree))
        return Rows(function(tree))

    def load(self) -> "Rows":
        """Bring the items of a data set to memory: (n, ...)."""
        if self.indices is None:
            return self
        wanted = [int(i) for i in self.indices]
        if is_hugging_face(self.dataset):  # gives a dict of columns at once
            columns = self.dataset[wanted]
            if not hasattr(columns, "keys"):  # a table of Arrow or polars
                columns = self.dataset.with_format("numpy")[wanted]
            names = [
                name for name in columns if name not in _TARGETS and not _is_text(columns[name])
            ]
            return Rows.of({name: columns[name] for name in names})
        many = getattr(self.dataset, "__getitems__", None)
        items = many(wanted) if many is not None else [self.dataset[i] for i in wanted]
        return _collated([_inputs_of(item) for item in items])

    def repeat(self, times: int) -> "Rows":
        """Stack the whole batch so many times: tensors (n, ...) -> (times * n, ...)."""
        if times == 1:
            return self
        return self.map(lambda leaf: leaf.repeat(times, *[1] * (leaf.ndim - 1)))

    @staticmethod
    def cat(parts: Sequence["Rows"]) -> "Rows":
        """Put rows of one kind behind one another: each (n_i, ...) -> (sum n_i, ...)."""
        loaded = [part.load() for part in parts]
        spec = _pytree.tree_structure(loaded[0].tree)
        columns = zip(*(part.leaves for part in loaded), strict=True)
        leaves = [
            torch.cat(column) if isinstance(column[0], Tensor) else np.concatenate(column)
            for column in columns
        ]
        return Rows(_pytree.tree_unflatten(leaves, spec))

    def key(self) -> str:
        """Digest of the contents; of the identity of a data set that stays where it is."""
        digest = hashlib.sha256()
        if self.indices is not None:
            digest.update(f"{id(self.dataset)}".encode() + self.indices.tobytes())
            return digest.hexdigest()
        names = sorted(self.tree) if isinstance(self.tree, dict) else ()
        digest.update(repr(names).encode())
        for leaf in self.leaves:
            array = leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else np.asarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            for start in range(0, len(array), _PIECE):
                piece = np.ascontiguousarray(array[start : start + _PIECE])
                digest.update(piece.tobytes() if piece.dtype != object else repr(piece).encode())
        return digest.hexdigest()


def call(function: Callable[..., Any], tree: Any) -> Any:
    """Pass on inputs as a module takes them: one, several in order, or several by name."""
    if isinstance(tree, dict):
        return function(**tree)
    return function(*tree) if isinstance(tree, tuple) else function(tree)


_TARGETS = ("label", "labels", "target", "targets", "idx", "__index_level_0__")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "__getitem__") and len(value.shape) > 0


def is_hugging_face(X: Any) -> bool:
    """Whether X is a data set of the library `datasets`."""
    return hasattr(X, "column_names") and hasattr(X, "with_format") and hasattr(X, "__getitem__")


def _is_text(column: Any) -> bool:
    """Whether a column (n,) holds texts, which no network takes."""
    return isinstance(next(iter(column), None), str)


def _is_dataset(X: Any) -> bool:
    if is_hugging_face(X):
        return True
    # a column of a Hugging Face data set is a Sequence: a list that is read when asked
    if _is_array(X) or (isinstance(X, Sequence) and not isinstance(X, Dataset)):
        return False
    return hasattr(X, "__getitem__") and hasattr(X, "__len__")


def _leaf(value: Any, name: str) -> Any:
    """Take one input: an array, a tensor, a table or a list of rows (n, ...)."""
    if np.ma.is_masked(value):
        raise ValueError(f"{name} is a masked array: fill its hidden entries in first.")
    if isinstance(value, Tensor):
        value = value.detach()
    elif not _is_array(value) or isinstance(value, np.ndarray):
        try:
            value = np.asarray(list(value) if isinstance(value, Sequence) else value)
        except ValueError as error:
            raise ValueError(
                f"{name} holds rows of different lengths; pad them to one length, and pass the "
                "attention mask beside them: X={'input_ids': ..., 'attention_mask': ...}."
            ) from error
    if issparse(value):
        raise TypeError(f"{name} is sparse, where a network takes dense rows: {name}.toarray().")
    if len(value.shape) == 0:
        raise ValueError(f"{name} must hold one entry for each row, got a single value.")
    return value


def _gathered(leaf: Any, where: Any) -> Any:
    if hasattr(leaf, "iloc"):
        return leaf.iloc[where]
    if isinstance(leaf, Tensor):
        return leaf[
            torch.as_tensor(where, device=leaf.device) if not isinstance(where, slice) else where
        ]
    if isinstance(where, Tensor):
        where = where.cpu().numpy()
    return leaf[where]


def _inputs_of(item: Any) -> Any:
    """Leave the target out of an item of a data set, and make arrays of lists of numbers."""
    if isinstance(item, Mapping):
        return {name: _listed(value) for name, value in item.items() if name not in _TARGETS}
    if isinstance(item, list) and np.ndim(item[0] if item else 0) == 0:
        return _listed(item)  # one row of numbers, no pair of inputs and target
    if not isinstance(item, tuple | list) or len(item) < 2:
        return _listed(item[0]) if isinstance(item, tuple | list) else item
    # torch's own convention: the target comes last; a single number is no input of a network
    inputs = item[:-1] if np.ndim(item[-1]) == 0 else item
    if isinstance(inputs[0], Mapping):
        return _inputs_of(inputs[0])
    return tuple(map(_listed, inputs)) if len(inputs) > 1 else _listed(inputs[0])


def _listed(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list) else value


def _collated(items: list[Any]) -> Rows:
    try:
        tree = default_collate(items)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the items of the data set do not fit together into a batch: {error}. Every item "
            "must give its inputs in one shape; pad texts to one length."
        ) from error
    return Rows(tuple(tree) if isinstance(tree, list) else tree)


def _flatten(rows: Rows) -> tuple[list[Any], Any]:
    loaded = rows.load()
    names = tuple(loaded.tree) if isinstance(loaded.tree, dict) else isinstance(loaded.tree, tuple)
    return loaded.leaves, names


def _unflatten(leaves: Any, names: Any) -> Rows:
    leaves = list(leaves)
    if isinstance(names, tuple):
        return Rows(dict(zip(names, leaves, strict=True)))
    return Rows(tuple(leaves) if names else leaves[0])


# so that torch.func.vmap maps over the rows of every input
_pytree.register_pytree_node(Rows, _flatten, _unflatten, serialized_type_name="skperf.Rows")
