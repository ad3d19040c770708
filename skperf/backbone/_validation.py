"""The one door for rows and targets."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import check_array
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d, validate_data
from torch import Tensor
from torch.utils.data import DataLoader

from skperf.backbone._sklearn import BaseSearchCV
from skperf.backbone.rows import Rows, is_hugging_face

_PIECE = 1 << 16
_WIDTHS = ("n_features_in_", "feature_names_in_")


def as_array(values: Any, name: str = "X") -> Any:
    """Turn a torch tensor into an array; pass everything else on, but for what is masked."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        row = int(np.flatnonzero(values.mask.reshape(len(values), -1).any(1))[0])
        raise ValueError(
            f"{name} is a masked array, whose hidden entries (first in row {row}) would be taken "
            f"as they are: fill them in, {name}.filled(...), or leave these rows out."
        )
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    if values.is_floating_point() and values.element_size() < 4:
        values = values.float()  # numpy has no bfloat16
    return values.numpy()


def as_labels(y: Any) -> Any:
    """Turn targets into an array, None stays None: y (n, ...) -> (n, ...)."""
    return None if y is None else np.asarray(as_array(y, "y"))


def check_rows(estimator: Any, X: Any, *, reset: bool = False) -> Rows:
    """Validate rows of any kind, and their width and names if they are a table: X (n, ...)."""
    if isinstance(X, Rows):
        return X
    if has_steps(getattr(estimator, "estimator", None)):
        # the pipeline's own steps validate; names are remembered and compared
        rows = Rows.of(X)
        if hasattr(X, "columns") or (rows.single and len(rows.shape) == 2):
            validate_data(estimator, X, reset=reset, skip_check_array=True)
        elif reset:
            _forget_widths(estimator)
        return rows
    if _is_table(X):
        return Rows(_numbers(validate_data, estimator, as_array(X), reset=reset, allow_nd=True))
    rows = Rows.of(as_array(X))
    if reset:
        _forget_widths(estimator)
    elif hasattr(estimator, "n_features_in_"):
        raise ValueError(
            "X holds several inputs, or rows of more than one axis, but "
            f"{type(estimator).__name__} was fitted on a table of {estimator.n_features_in_} "
            "features."
        )
    if rows.single:
        leaf = rows.tree
        if isinstance(leaf, Tensor):
            leaf = as_array(leaf)
        return Rows(_numbers(check_array, leaf, allow_nd=True, input_name="X"))
    if rows.indices is None:
        names = list(rows.tree) if isinstance(rows.tree, dict) else range(len(rows.tree))
        for name, leaf in zip(names, rows.leaves, strict=True):
            _check_finite(leaf, f"X[{name!r}]")
    if len(rows) == 0:
        raise ValueError(
            f"Found array with 0 sample(s) while a minimum of 1 is required by "
            f"{type(estimator).__name__}."
        )
    return rows


def check_labelled_rows(
    estimator: Any, X: Any, y: Any, *, reset: bool = False
) -> tuple[Rows, np.ndarray]:
    """Validate rows and their class labels: X (n, ...), y (n,)."""
    _need_targets(estimator, X, y)
    rows, labels = check_targets(estimator, X, check_labels(y), reset=reset)
    if reset:  # later labels are held against the classes that fit has seen
        check_classification_targets(labels)
    return rows, labels


def check_labels(y: Any) -> np.ndarray:
    """Validate one label a row: y (n,)."""
    labels: np.ndarray = column_or_1d(as_labels(y), warn=True)
    _check_targets_finite(labels)
    return labels


def check_training(
    *, batch_size: Any, max_epochs: Any, lr: Any, train_split: Any, **functions: Any
) -> None:
    """Refuse settings of a training that can't be meant."""
    if not isinstance(batch_size, int) or (batch_size < 1 and batch_size != -1):
        raise ValueError(f"batch_size must be a positive number or -1, got {batch_size}.")
    if not isinstance(max_epochs, int | np.integer) or max_epochs < 0:
        raise ValueError(f"max_epochs must be a whole number from 0, got {max_epochs!r}.")
    if isinstance(lr, str) or not float(lr) >= 0:
        raise ValueError(f"lr must be a number from 0 on, got {lr!r}.")
    if train_split is not None:
        functions["train_split"] = train_split
    for name, value in functions.items():
        if not callable(value):
            raise TypeError(f"{name} must be a class or a function, got {value!r}.")


def check_targets(
    estimator: Any, X: Any, y: Any, *, reset: bool = False
) -> tuple[Rows, np.ndarray]:
    """Validate rows and targets of any kind: X (n, ...), y (n, ...)."""
    _need_targets(estimator, X, y)
    rows = check_rows(estimator, X, reset=reset)
    targets = as_labels(y)
    if targets.ndim == 0:
        raise ValueError(f"y should be a 1d array, got an array of shape {targets.shape} instead.")
    if targets.ndim == 2 and targets.shape[1] == 1 and targets.dtype.kind != "f":
        targets = column_or_1d(targets, warn=True)
    if targets.ndim > 1 and targets.dtype.kind not in "biuf":
        raise ValueError(f"y of shape {targets.shape} must hold numbers, got {targets.dtype}.")
    _check_targets_finite(targets)
    check_consistent_length(range(len(rows)), targets)
    return rows, targets


def has_steps(estimator: Any) -> bool:
    """Whether an estimator is a pipeline or a search, frozen or not."""
    if isinstance(estimator, FrozenEstimator):
        estimator = estimator.estimator
    return isinstance(estimator, Pipeline | BaseSearchCV)


def _numbers(check: Any, *args: Any, **options: Any) -> Any:
    try:
        return check(*args, **options)
    except ValueError as error:
        if "could not convert string" in str(error):
            raise ValueError(
                f"X holds values that are no numbers ({error}): encode texts and categories "
                "first, for instance in a Pipeline before the network."
            ) from error
        raise


def _is_table(X: Any) -> bool:
    if issparse(X):
        return True
    if isinstance(X, Mapping | str) or (
        isinstance(X, tuple) and any(len(getattr(value, "shape", ())) > 0 for value in X)
    ):
        return False
    if is_hugging_face(X):  # whose shape counts its columns
        return False
    if hasattr(X, "shape") or isinstance(X, list | tuple):
        shape = getattr(X, "shape", None)
        return shape is None or len(shape) <= 2
    # what is neither a data set: in scikit-learn's own words
    return not (hasattr(X, "__getitem__") and hasattr(X, "__len__")) and not hasattr(X, "dataset")


def _forget_widths(estimator: Any) -> None:
    for name in _WIDTHS:
        vars(estimator).pop(name, None)


def _need_targets(estimator: Any, X: Any, y: Any) -> None:
    if y is None:
        if isinstance(X, DataLoader):
            Rows.of(X)  # says what to pass instead
        # in scikit-learn's words, whose own checks look for them
        name = type(estimator).__name__
        raise ValueError(
            f"This {name} estimator requires y to be passed, but the target y is None."
        )


def _check_targets_finite(y: np.ndarray) -> None:
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        row = int((~np.isfinite(y.reshape(len(y), -1))).any(1).nonzero()[0][0])
        raise ValueError(f"Input y contains NaN or infinity, first at row {row}.")
    if y.dtype == object and any(value is None or value != value for value in y.ravel()):
        raise ValueError("Input y contains NaN: every row needs a target.")
    if y.dtype == object and len({isinstance(value, str) for value in y.ravel()}) > 1:
        raise ValueError("y mixes texts with labels of another type: use one type.")


def _check_finite(leaf: Any, name: str) -> None:
    array = np.asarray(as_array(leaf))
    if array.dtype == object:
        array = np.asarray(array.tolist())
    if array.dtype.kind != "f":
        return
    for start in range(0, len(array), _PIECE):
        finite = np.isfinite(array[start : start + _PIECE]).reshape(-1, array[:1].size or 1)
        if not finite.all():
            row = start + int((~finite.all(1)).nonzero()[0][0])
            raise ValueError(f"{name} contains NaN or infinity, first at row {row}.")
