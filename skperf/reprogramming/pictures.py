"""Pictures of any kind, brought to tensors batch by batch: what is bytes stays bytes till then."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PIECE = 256


@dataclass(frozen=True)
class PictureForm:
    """How arrays are to be read."""

    channels: str = "first"
    low: float = 0.0
    high: float = 1.0
    image_shape: tuple[int, ...] | None = None
    any_rows: bool = False  # numbers of any range, no pictures


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures or flat rows; indexing gives those of some rows, and copies nothing it need not."""

    source: Any  # an array (n, channels, height, width) or (n, n_features), a list, a data set
    form: PictureForm
    rows: NDArray[np.intp] | None = None  # of the source

    @classmethod
    def of(cls, X: Any, form: PictureForm) -> "Pictures":
        """Read and check: X (n, ...)."""
        if form.any_rows:
            rows = np.asarray(X, dtype=np.float64)
            if form.image_shape is not None:
                rows = rows.reshape(len(rows), *_row_shape(rows[0].size, form.image_shape, True))
            if not np.isfinite(rows).all():
                raise ValueError("X contains NaN or infinity; give rows without.")
            return cls(rows, form)
        X = list(X) if hasattr(X, "iloc") else X  # a column of pictures
        if not isinstance(X, np.ndarray) or (X.dtype == object and X.ndim == 1):
            return cls(list(X) if isinstance(X, np.ndarray) else X, form)
        if X.ndim == 2:
            X = X.reshape(len(X), *_row_shape(X.shape[1], form.image_shape))
            # (height, width, channels), as such rows are laid out
            last = form.channels == "last" and X.shape[1] not in (1, 3) and X.shape[3] in (1, 3)
            X = np.moveaxis(X, -1, 1) if last else X
        elif X.ndim == 4:
            X = X if form.channels == "first" else np.moveaxis(X, -1, 1)
        else:
            raise ValueError(
                f"X has {X.ndim} dimensions; expected images (n, channels, height, width), a list "
                "of pictures, or flat rows (n, n_features) with image_shape."
            )
        _check_channels(X.shape[1], X.shape)
        _check_values(X, form)
        return cls(X, form)

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def __getitem__(self, rows: NDArray[np.intp]) -> "Pictures":
        return Pictures(self.source, self.form, rows if self.rows is None else self.rows[rows])

    def tensors(self, rows: Sequence[int] | NDArray[np.intp] | Tensor) -> list[Tensor]:
        """Read some: -> pieces of one size each, (m, channels, height, width) in [0, 1]."""
        rows = np.asarray(rows)
        rows = rows if self.rows is None else self.rows[rows]
        if isinstance(self.source, np.ndarray):
            return [_in_range(self.source[rows], self.form)]
        return [_picture(self.source[int(row)], self.form)[None] for row in rows]

    def placed(self, rows: Any, place: Callable[[Tensor], Tensor]) -> Tensor:
        """Read some and bring them to one size: -> (m, channels, height, width)."""
        pieces = [place(piece) for piece in self.tensors(rows)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def batches(self, size: int, place: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Read all, batch by batch."""
        for start in range(0, len(self), size):
            yield self.placed(np.arange(start, min(start + size, len(self))), place)


def is_table(X: Any) -> bool:
    """Whether rows are numbers in a table, which scikit-learn validates, and no pictures."""
    if isinstance(X, list | tuple):
        return not len(X) or not _is_picture(X[0])
    if hasattr(X, "iloc") and X.ndim == 1 and len(X):
        return not _is_picture(X.iloc[0])
    if hasattr(X, "iloc") or hasattr(X, "toarray"):
        return True
    if isinstance(X, np.ndarray) and X.dtype == object:
        return not (X.ndim == 1 and len(X) and _is_picture(X[0]))
    if hasattr(X, "ndim"):
        return int(X.ndim) < 3
    return not (hasattr(X, "__getitem__") and hasattr(X, "__len__"))


def refuse_uneven(X: Any) -> None:
    """Refuse rows of several lengths, tables of pictures, and names of files in their place."""
    if hasattr(X, "iloc") and X.ndim == 2 and len(X):
        first = X.iloc[0]
        column = next((name for name in X.columns if hasattr(first[name], "getbands")), None)
        if column is not None:
            raise ValueError(f"X is a table with pictures in a column: pass X[{column!r}] alone.")
    listed = isinstance(X, list | tuple) or str(getattr(X, "dtype", "")) == "object"
    if not (listed and getattr(X, "ndim", 1) == 1 and len(X)):
        return
    rows = list(X)
    if isinstance(rows[0], str | bytes | Path):
        raise ValueError(
            f"X holds a {type(rows[0]).__name__} where a picture is expected; open files first, "
            "as PIL.Image.open does, or give a data set that opens them."
        )
    lengths = sorted({np.shape(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"X holds rows of different shapes, {lengths[0]} and {lengths[-1]} among them; cut or "
            "pad them to one."
        )


def is_array(X: Any) -> bool:
    """Whether rows are one array of more than two dimensions."""
    return hasattr(X, "ndim") and hasattr(X, "shape") and str(getattr(X, "dtype", "")) != "object"


def _is_picture(value: Any) -> bool:
    return hasattr(value, "getbands") or (hasattr(value, "ndim") and value.ndim in (2, 3))


def _picture(item: Any, form: PictureForm) -> Tensor:
    """One picture of a list or data set, which may come with its label: -> (channels, h, w)."""
    if isinstance(item, Mapping):
        item = next((value for value in item.values() if _is_picture(value)), None)
    elif isinstance(item, tuple | list):
        item = item[0]
    if hasattr(item, "getbands"):  # PIL
        if item.mode[0] in "IF":  # which PIL cuts off at 255
            raise ValueError(
                f"X holds a picture of mode {item.mode!r}, of more than 8 bits; convert it to 8 "
                "bits, or give an array of floats in [0, 1]."
            )
        grey = item.mode in ("L", "1")
        array = np.asarray(item.convert("L" if grey else "RGB"))
        array = array[None] if grey else np.moveaxis(array, -1, 0)
        return _in_range(array, form)
    if not _is_picture(item):
        raise ValueError(
            f"X holds a {type(item).__name__} where a picture is expected: a PIL image or an "
            "array of two or three dimensions."
        )
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
    if array.ndim == 2:
        array = array[None]
    elif form.channels == "last":
        array = np.moveaxis(array, -1, 0)
    _check_channels(array.shape[0], array.shape)
    _check_values(array[None], form)
    return _in_range(array, form)


def _in_range(array: NDArray[Any], form: PictureForm) -> Tensor:
    if form.any_rows:
        return torch.from_numpy(np.array(array, dtype=np.float64))
    if array.dtype == np.uint8:
        return torch.from_numpy(np.array(array)).float() / 255
    images = torch.from_numpy(np.array(array, dtype=np.float32))
    if (form.low, form.high) == (0, 1):
        return images
    return ((images - form.low) / (form.high - form.low)).clamp(0, 1)


def _check_channels(n_channels: int, shape: tuple[int, ...]) -> None:
    if n_channels not in (1, 3):
        raise ValueError(
            f"X has {n_channels} channels, expected 1 or 3 (shape {tuple(shape)}); for images "
            "(n, height, width, channels) set channels='last'."
        )


def _check_values(X: NDArray[Any], form: PictureForm) -> None:
    if X.dtype == np.uint8:
        return
    pieces = [X[start : start + _PIECE] for start in range(0, len(X), _PIECE)]
    try:
        smallest = float(min(piece.min() for piece in pieces))
        largest = float(max(piece.max() for piece in pieces))
    except (TypeError, ValueError) as error:
        raise ValueError(f"X holds values that are no numbers: {error}.") from error
    if not np.isfinite([smallest, largest]).all():
        kind = "NaN" if np.isnan([smallest, largest]).any() else "infinity"
        raise ValueError(f"X contains {kind}; give pictures without.")
    slack = 1e-4 * (form.high - form.low)
    if smallest < form.low - slack or largest > form.high + slack:
        raise ValueError(
            f"X holds values from {smallest:.4g} to {largest:.4g}; expected floats in "
            f"[{form.low:g}, {form.high:g}] or uint8. Already normalised? Give the images as they "
            "were: the encoder's normalisation is done inside (or set input_range)."
        )


def _row_shape(
    n_features: int, image_shape: tuple[int, ...] | None, any_rows: bool = False
) -> tuple[int, ...]:
    if image_shape is None:
        raise ValueError(
            f"X holds flat rows of {n_features} values; say image_shape, such as (1, 28, 28)."
        )
    shape = tuple(int(side) for side in image_shape)
    shape = (1, *shape) if len(shape) == 2 and not any_rows else shape
    if len(shape) != (2 if any_rows else 3) or np.prod(shape) != n_features:
        raise ValueError(
            f"image_shape={tuple(image_shape)} does not make {n_features} values, the length "
            "of the rows of X."
        )
    return shape
