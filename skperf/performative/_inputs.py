"""What users hand to the adapter, checked and encoded."""

import warnings

import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from skperf.backbone._opening import class_logits, fit_estimator, has_network
from skperf.performative.label_shift import smooth_shares

UNKNOWN_CLASS = -20.0  # log probability of a class that the estimator was never shown


class PerformativeWarning(UserWarning):
    """The record of rounds does not carry the answer that was asked of it."""


def check_rounds(rounds, n_rows):
    """Turn round numbers into an integer array of shape (n_rows,); a scalar holds for all rows.

    Shapes: rounds (n_rows,) -> (n_rows,).
    """
    values = np.asarray(rounds)
    if values.ndim == 0:
        values = np.full(n_rows, values)
    if values.shape != (n_rows,):
        raise ValueError(
            f"rounds has {len(values)} entries of shape {values.shape}, but X and y have {n_rows} "
            "rows: give one integer for each row, or one for all."
        )
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rounds must be integers, got {values[0]!r}.") from error
    bad = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.round(numbers)))
    if len(bad):
        raise ValueError(
            f"rounds must be integers; the first that is not: {numbers[bad[0]]} in row {bad[0]}."
        )
    return numbers.astype(np.int64)


def warn_of_gaps(numbers):
    """Warn when rounds in order are not evenly spaced, as a shuffled split leaves them."""
    steps = np.diff(np.unique(numbers))
    uneven = np.flatnonzero(steps > steps.min()) if len(steps) else []
    if len(uneven):
        before = np.unique(numbers)[uneven[0]]
        warnings.warn(
            f"rounds jump from {before} to {before + steps[uneven[0]]}: neighbours in order are "
            "taken for consecutive deployments. A split that goes forward in rounds leaves no "
            "gaps: skperf.model_selection.RoundForwardSplit.",
            PerformativeWarning,
            stacklevel=3,
        )


def encode(y, classes, *, known_to="the estimator"):
    """Find the columns of labels: y (n,), classes (n_classes,) -> (n,)."""
    order = np.argsort(classes)
    unknown = np.setdiff1d(y, classes)
    if len(unknown):
        raise ValueError(
            f"y contains labels unknown to {known_to}: {unknown.tolist()}; it knows "
            f"{np.asarray(classes).tolist()}."
        )
    return order[np.searchsorted(classes, y, sorter=order)].astype(np.int64)


def aligned_logits(fitted, X, classes, *, strict=True):
    """Compute log scores with columns in the order of `classes`, whatever the classifier's own.

    Shapes: X (n, ...), classes (n_classes,) -> (n, n_classes).
    """
    logits = class_logits(fitted, X)
    own = np.asarray(fitted.classes_)
    if np.array_equal(own, classes):
        return logits[:, : len(classes)]
    missing = np.setdiff1d(classes, own)
    if strict and len(missing):
        raise ValueError(
            f"{type(fitted).__name__} does not know the classes {missing.tolist()}: every "
            f"candidate needs all of {np.asarray(classes).tolist()}, in any order."
        )
    known = np.isin(classes, own)
    top = np.logaddexp.reduce(logits, axis=1, keepdims=True)
    aligned = np.repeat(top + UNKNOWN_CLASS, len(classes), axis=1)
    aligned[:, known] = logits[:, encode(classes[known], own)]
    return aligned


def predicted_codes(fitted, X, classes, logits):
    """Predict columns: by the classifier's own rule where it is no network, else the largest."""
    if has_network(fitted) or not hasattr(fitted, "predict"):
        return logits.argmax(axis=1)
    with warnings.catch_warnings():
        # the adapter has held the names against its own; what it passes on is an array
        warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)
        return encode(np.asarray(fitted.predict(X)), classes)


def is_frozen(estimator):
    """Tell whether `fit_estimator` uses an estimator as it is."""
    taken = isinstance(estimator, nn.Module | FrozenEstimator)
    return taken or callable(getattr(estimator, "to_module", None))


def open_candidate(candidate, X):
    """Accept a fitted classifier, a frozen one or a bare module; nothing is trained."""
    if is_frozen(candidate):
        return fit_estimator(candidate, X, None)
    if hasattr(candidate, "fit"):
        check_is_fitted(candidate)
    return candidate


def check_deployed(deployed, n_rows, classes):
    """Turn logged predictions, labels (n,) or probabilities (n, n_classes), into columns."""
    values = np.asarray(deployed)
    if len(values) != n_rows:
        raise ValueError(f"deployed_pred has {len(values)} rows, but X has {n_rows}.")
    if values.ndim == 1:
        return encode(values, classes, known_to="classes_ (in deployed_pred)")
    if values.shape[1] != len(classes):
        raise ValueError(
            f"deployed_pred has {values.shape[1]} columns of probabilities for {len(classes)} "
            "classes."
        )
    return values.argmax(axis=1)


def check_statistic(values, n_statistics, *, is_recall):
    """Validate statistics of shape (n_statistics,) or (n, n_statistics)."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or array.shape[-1] != n_statistics:
        raise ValueError(
            f"statistic has shape {array.shape}, but the recorded ones have {n_statistics} entries."
        )
    if not np.isfinite(array).all():
        raise ValueError("statistic contains NaN or infinity.")
    if is_recall and (array.min() < 0 or array.max() > 1):
        raise ValueError(
            f"statistic must lie in [0, 1], as recalls do; got values from {array.min():.4g} to "
            f"{array.max():.4g}."
        )
    return array


def check_trajectory(statistics, label_counts, *, is_recall):
    """Validate arrays (R, S) and (R, K); impute statistics of classes without rows."""
    statistics = np.array(statistics, dtype=np.float64)
    counts = np.asarray(label_counts, dtype=np.float64)
    if statistics.ndim != 2 or counts.ndim != 2 or len(statistics) != len(counts):
        raise ValueError(
            "statistics must have shape (n_rounds, n_statistics) and label_counts (n_rounds, "
            f"n_classes); got {statistics.shape} and {counts.shape}."
        )
    if not statistics.size or not counts.size:
        raise ValueError(
            f"there is no round, statistic or class: {statistics.shape}, {counts.shape}."
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("label_counts must be finite and not negative.")
    if np.isnan(statistics).any():
        statistics = _imputed(statistics, counts)
    recall = is_recall and statistics.shape[1] == counts.shape[1]
    return check_statistic(statistics, statistics.shape[1], is_recall=recall), counts


def _imputed(statistics, counts):
    holes = np.isnan(statistics)
    if statistics.shape != counts.shape or (counts[holes] > 0).any() or holes.all(axis=1).any():
        raise ValueError(
            "statistics contain NaN; that is allowed only for a class without labels in its round."
        )
    warnings.warn(
        f"{holes.sum()} statistics of classes without labels are NaN and were set to the mean of "
        "their round.",
        UserWarning,
        stacklevel=4,
    )
    return np.where(holes, np.nanmean(statistics, axis=1, keepdims=True), statistics)


def check_base_prior(given, classes):
    """Turn a base prior, an array or a dict by label, into shares of shape (n_classes,)."""
    if isinstance(given, dict):
        labels = classes.tolist()
        if set(given) != set(labels):
            raise ValueError(
                f"base_prior must have the keys {labels}; missing are "
                f"{sorted(set(labels) - set(given), key=str)}, not known "
                f"{sorted(set(given) - set(labels), key=str)}."
            )
        given = [given[label] for label in labels]
    prior = np.asarray(given, dtype=np.float64)
    if prior.shape != (len(classes),):
        raise ValueError(
            f"base_prior has shape {prior.shape}, but there are {len(classes)} classes."
        )
    if not np.isfinite(prior).all() or (prior <= 0).any():
        raise ValueError(f"base_prior must be positive for every class, got {prior.tolist()}.")
    return prior / prior.sum()


def shares_of(codes, weight, classes):
    """Turn labels into a base prior, smoothed with a warning where a class has no rows."""
    absent = np.bincount(codes, minlength=len(classes)) == 0
    counts = np.bincount(codes, weight, minlength=len(classes))
    if absent.any():
        warn_of_absent(classes[absent])
    return counts / counts.sum() if (counts > 0).all() else smooth_shares(counts)


def warn_of_absent(labels):
    """Warn that a base prior had to be smoothed."""
    warnings.warn(
        f"no rows of the classes {labels.tolist()} to read the base prior from: it was smoothed. "
        "Give base_prior if it is known.",
        UserWarning,
        stacklevel=5,
    )
