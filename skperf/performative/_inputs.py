"""What users hand to the adapter, checked and encoded."""

import calendar
import datetime
import re
import warnings

import numpy as np
from scipy.sparse import issparse
from sklearn.utils import assert_all_finite, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from skperf.backbone._validation import as_array
from skperf.performative.label_shift import smooth_shares

ROUNDED = 0.005  # what shares may miss of 1
YEAR_LAST = re.compile(r"^(.*?\d{1,2}.*\D)((?:19|20)\d\d)$")
DAY_FIRST = re.compile(r"^\d{1,2}\D\d{1,2}\D(?:19|20)\d\d\b")
NAMES = (calendar.month_name, calendar.month_abbr, calendar.day_name, calendar.day_abbr)
CALENDAR = re.compile(
    rf"(?<![a-z])({'|'.join(n for names in NAMES for n in names if n)})(?![a-z])", re.I
)


class PerformativeWarning(UserWarning):
    """The record of rounds does not carry the answer that was asked of it."""


def count_rows(X):
    """Count rows in any form."""
    return len(X) if hasattr(X, "leaves") or not getattr(X, "shape", ()) else X.shape[0]


def check_own_rows(X, name):
    """Check that rows are rows; all else is left to the classifier that gets them as they are."""
    X = as_array(X)
    # bare columns of pandas can't be sliced by scikit-learn
    bare = not hasattr(X, "iloc") and not isinstance(getattr(X, "dtype", np.dtype(int)), np.dtype)
    if hasattr(X, "__array__") and (bare or not hasattr(X, "shape")):
        X = np.asarray(X)
    if issparse(X) and X.format not in ("csr", "csc", "lil", "dok"):
        X = X.tocsr()  # the others can't be sliced
    if not hasattr(X, "shape") and not hasattr(X, "__len__"):
        raise ValueError(f"X must hold rows, got a {type(X).__name__}.")
    if isinstance(X, np.ndarray) and X.ndim < 2 and X.dtype.kind in "biufc":
        raise ValueError(
            f"Expected 2D array, got {X.ndim}D array instead. Reshape your data: reshape(-1, 1) if "
            "there is one feature, reshape(1, -1) if there is one row."
        )
    if count_rows(X) == 0:
        raise ValueError(
            f"Found array with 0 sample(s) while a minimum of 1 is required by {name}."
        )
    return X


def check_rounds(rounds, n_rows):
    """Turn rounds (numbers, dates, strings in order) into an array (n_rows,); one does for all."""
    dtype = getattr(rounds, "dtype", None)
    if getattr(dtype, "ordered", False):  # pandas categories in an order of their own
        codes = np.asarray(getattr(rounds, "cat", rounds).codes)
        rounds = np.where(codes < 0, np.nan, codes)
    if hasattr(rounds, "to_timestamp") and not hasattr(rounds, "index"):
        rounds = rounds.to_timestamp()  # pandas periods, one or an index of them
    values = np.asarray(rounds)
    if values.ndim == 0:
        values = np.full(n_rows, values)
    if values.shape != (n_rows,):
        raise ValueError(
            f"rounds has {len(values)} entries of shape {values.shape}, but X and y have {n_rows} "
            "rows: give one for each row, or one for all."
        )
    missing = np.array([_is_missing(value) for value in values.tolist()], bool)
    if missing.any():
        row = int(np.flatnonzero(missing)[0])
        raise ValueError(f"rounds has a missing value in row {row}: every row needs a round.")
    if values.dtype == object:
        values = _typed(values)
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    if values.dtype.kind in "mM":
        return values
    if values.dtype.kind in "UT":
        _check_order(np.unique(values.astype(str)).tolist())
        return values.astype(str)
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError):
        numbers = np.full(n_rows, np.nan)
    bad = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.round(numbers)))
    if len(bad):
        raise ValueError(
            f"rounds must be integers, dates or strings; the first that is not: "
            f"{values.tolist()[bad[0]]!r} in row {bad[0]}."
        )
    return numbers.astype(np.int64)


def _check_order(names):
    """Refuse names of rounds, sorted as strings, whose order in time is another or not known."""
    # "r10" comes before "r9", and "Q1 2025" before "Q4 2024"
    keys = [YEAR_LAST.sub(r"\2 \1", name) for name in names]
    by_number = [re.sub(r"\d+", lambda found: found[0].zfill(20), key) for key in keys]
    named = {found[0].lower() for name in names for found in CALENDAR.finditer(name)}
    days = len(names) > 1 and any(DAY_FIRST.search(name) for name in names)
    if by_number != sorted(by_number) or len(named) > 1 or days:
        raise ValueError(
            f"rounds are strings whose order is not that of their numbers or of time: {names[:3]}"
            "...; put the year first, fill numbers up with zeros, or give integers or dates."
        )


def _typed(values):
    """Give objects (n,) of one kind an array of that kind."""
    kinds = {type(value) for value in values}
    if all(issubclass(kind, str) for kind in kinds):
        return values.astype(str)
    if all(hasattr(kind, "to_timestamp") for kind in kinds):  # pandas periods
        return np.array([np.datetime64(value.to_timestamp()) for value in values])
    if all(issubclass(kind, datetime.date | np.datetime64) for kind in kinds):
        zoned = [getattr(value, "tzinfo", None) is not None for value in values]
        if any(zoned):  # one clock for all zones
            if not all(zoned):
                raise ValueError("rounds mix times with and without a zone, which have no order.")
            values = [value.astimezone(datetime.UTC).replace(tzinfo=None) for value in values]
        return np.array([np.datetime64(value) for value in values])
    if len(kinds) > 1 and any(issubclass(kind, str) for kind in kinds):
        raise ValueError(
            f"rounds mix {sorted(kind.__name__ for kind in kinds)}, which have no order."
        )
    return values


def _is_missing(value):
    # pandas' NA has no truth of its own
    return value is None or type(value).__name__ == "NAType" or value != value


def next_number(last):
    """Give the number of the round after the last one, 0 at first."""
    if last is None:
        return 0
    if np.asarray(last).dtype.kind not in "iu":
        raise ValueError(f"rounds are needed: what comes after {last} is not known.")
    return int(last) + 1


def warn_of_gaps(numbers):
    """Warn when numbered rounds are not evenly spaced, as a shuffled split leaves them."""
    if numbers.dtype.kind != "i":
        return  # months and names have no even steps
    distinct = np.unique(numbers)
    year, month = np.divmod(distinct, 100)
    if ((year > 1900) & (year < 2200) & (month > 0) & (month < 13)).all():
        distinct = 12 * year + month  # such as 202412, one before 202501
    steps = np.diff(distinct)
    uneven = np.flatnonzero(steps > steps.min()) if len(steps) else []
    if len(uneven):
        before = np.unique(numbers)[uneven[0]]
        warnings.warn(
            f"rounds jump from {before} to {np.unique(numbers)[uneven[0] + 1]}: neighbours in "
            "order are taken for consecutive deployments. A split that goes forward in rounds "
            "leaves no gaps: skperf.model_selection.RoundForwardSplit.",
            PerformativeWarning,
            stacklevel=3,
        )


def check_labels(y, n_rows, *, first):
    """Turn labels into an array (n_rows,) and a mask of those that are known."""
    if y is None:
        return np.zeros(n_rows, dtype=object), np.zeros(n_rows, bool)
    values = column_or_1d(np.asarray(as_array(y, "y")), warn=True)
    if len(values) != n_rows:
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: [{n_rows}, {len(values)}]"
        )
    known = np.ones(len(values), bool)
    if values.dtype == object:
        known = np.array([not _is_missing(value) for value in values], bool)
    elif values.dtype.kind == "f":
        known = ~np.isnan(values)
        assert_all_finite(values[known], input_name="y")
    if first and known.any():  # later labels are held against the classes known by then
        kept = values[known]
        check_classification_targets(kept.astype(type(kept[0])) if kept.dtype == object else kept)
    return values, known


def check_all_labels(y, classes, n_rows):
    """Turn labels that are all known into columns (n,)."""
    values, known = check_labels(y, n_rows, first=False)
    if not known.all():
        raise ValueError("y holds rows without a label: they tell nothing here, leave them out.")
    return encode(values, classes)


def check_covariates(covariates, n_rounds, n_known):
    """Turn covariates into rows, one a round: (n_rounds, n_covariates)."""
    if covariates is None:
        if n_known:
            raise ValueError(
                f"covariates of {n_known} columns were given before: every round needs them."
            )
        return None
    try:
        values = np.array(as_array(covariates, "covariates"), object, ndmin=1).astype(float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"covariates must be numbers, one row a round: {error}.") from error
    values = values.reshape(1, -1) if values.ndim == 1 and n_rounds == 1 else values
    values = values[:, None] if values.ndim == 1 else values
    if values.shape[0] != n_rounds or (n_known is not None and values.shape[1] != n_known):
        raise ValueError(
            f"covariates have shape {values.shape}: one row is needed for each of {n_rounds} "
            f"rounds in order{'' if n_known is None else f', of {n_known} columns as before'}."
        )
    if not np.isfinite(values).all():
        raise ValueError("covariates contain NaN or infinity.")
    return values


def encode(y, classes, *, known_to="the estimator", name="y"):
    """Find the columns of labels: y (n,), classes (n_classes,) -> (n,)."""
    order = np.argsort(classes)
    unknown = np.setdiff1d(y, classes)
    if len(unknown):
        raise ValueError(
            f"{name} contains labels unknown to {known_to}: {unknown.tolist()}; it knows "
            f"{np.asarray(classes).tolist()}."
        )
    return order[np.searchsorted(classes, y, sorter=order)].astype(np.int64)


def deployed_codes(values, classes):
    """Turn logged predictions, labels (n,) or probabilities (n, n_classes), into columns."""
    if values.ndim == 1:
        return encode(values, classes, known_to="classes_", name="deployed_pred")
    if values.shape[1] != len(classes):
        raise ValueError(
            f"deployed_pred has {values.shape[1]} columns of probabilities for {len(classes)} "
            "classes."
        )
    return values.argmax(axis=1)


def check_by_row(values, n_rows, name):
    """Turn what is given for every row into an array (n_rows, ...)."""
    if values is None:
        return None
    names = list(getattr(values, "columns", ()))
    values = np.asarray(as_array(values))
    if name == "deployed_pred" and len(names) > 1 and names != list(range(len(names))):
        check_by_row(values, n_rows, name)
        values = np.asarray(names)[values.argmax(axis=1)]  # probabilities under their labels
    if values.shape[:1] != (n_rows,):
        raise ValueError(f"{name} has {values.shape} entries, but X has {n_rows} rows.")
    values = values[:, 0] if values.shape[1:] == (1,) else values
    if name == "strata" and values.ndim > 1:
        raise ValueError(
            f"strata has shape {values.shape}, but each row is in one group: join the columns."
        )
    is_missing = np.vectorize(_is_missing, otypes=[bool])
    missing = is_missing(values) if values.dtype == object else values != values
    if missing.any():
        row = int(np.argwhere(missing)[0][0])
        raise ValueError(f"{name} has a missing value in row {row}: every row needs its own.")
    return values


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


def by_label(frame, labels):
    """Put the columns of a table, named by labels in any order, into the order of labels."""
    names = list(getattr(frame, "columns", ()))
    if names != labels and len(names) == len(labels) and set(names) == set(labels):
        return frame[labels]
    return frame


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
    if (counts % 1).any() and np.allclose(counts.sum(axis=1), 1, atol=ROUNDED):
        raise ValueError(
            "label_counts hold shares, each round's sum to 1: how far they can be trusted depends "
            "on how many labels there were. Multiply them by the number of labels of each round."
        )
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


def missing_rounds(seen, first):
    """Count the rounds between those seen and the first one that is given."""
    if len(seen) < 2 or seen.dtype.kind != "i":
        return 0
    step = max(1, int(np.diff(seen[-10:]).min()))
    return len(range(int(seen[-1]) + step, int(first), step))


def check_later(trajectory, numbers, n_labels):
    """Refuse rounds not later than all seen, but for labels they lack: -> where those are."""
    if not len(trajectory):
        return set()
    last, late = trajectory.rounds[-1], set()
    if numbers.dtype.kind != trajectory.rounds.dtype.kind:
        raise ValueError(
            f"rounds of type {numbers.dtype} can't follow round {last!r} of another type."
        )
    for i, number in enumerate(numbers):
        if number > last:
            continue
        at = np.flatnonzero(trajectory.rounds == number)
        if not len(at) or trajectory.unlabelled[at[0]] == 0:
            raise ValueError(
                f"round {number} is not later than the last round seen, {last}, and has all its "
                "labels: rounds are appended in order of time, each once."
            )
        if n_labels[i] > trajectory.unlabelled[at[0]]:
            raise ValueError(
                f"round {number} waits for {trajectory.unlabelled[at[0]]:.0f} labels, but "
                f"{n_labels[i]} came: give each label once."
            )
        late.add(i)
    return late


def check_candidates(candidates, scoring, n_bootstrap):
    """Check what is to be ranked: candidates by name."""
    if not (callable(scoring) or scoring in ("accuracy", "neg_log_loss")):
        raise ValueError(
            f"scoring must be 'accuracy', 'neg_log_loss' or a callable, got {scoring!r}."
        )
    if n_bootstrap < 0:
        raise ValueError(f"n_bootstrap must be 0 or more, got {n_bootstrap}.")
    if not isinstance(candidates, dict | list | tuple) or not candidates:
        raise ValueError(
            "candidates must be a list of fitted classifiers or a dict of them by name, with one "
            f"or more; got {candidates!r}."
        )
    return candidates if isinstance(candidates, dict) else dict(enumerate(candidates))


def same(one, other):
    """Tell whether two values of a parameter are the same."""
    try:
        return one is other or bool(np.all(one == other))
    except Exception:  # whatever has an equality of its own
        return False


def check_prior(given, classes, name="prior", *, positive=False):
    """Turn a mix, an array or a dict by label, into shares of shape (n_classes,)."""
    if hasattr(given, "to_dict") and set(given.index) == set(classes.tolist()):
        given = given.to_dict()  # a Series by label
    if isinstance(given, dict):
        labels = classes.tolist()
        unknown = sorted(set(given) - set(labels), key=str)
        missing = sorted(set(labels) - set(given), key=str) if positive else []
        if unknown or missing:
            raise ValueError(
                f"{name} has keys of {labels}; missing are {missing}, not known {unknown}."
            )
        given = [given.get(label, 0.0) for label in labels]
    try:
        prior = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number for every class, got {given!r}.") from error
    if prior.shape != (len(classes),):
        raise ValueError(f"{name} has shape {prior.shape}, but there are {len(classes)} classes.")
    least = "positive for every class" if positive else "shares, none negative"
    if not np.isfinite(prior).all() or prior.min() < 0 or (positive and prior.min() == 0):
        raise ValueError(f"{name} must be {least}, got {prior.tolist()}.")
    if not positive and abs(prior.sum() - 1) > ROUNDED:  # a base mix may be told by counts
        raise ValueError(
            f"{name} must sum to 1, got {prior.tolist()} with sum {prior.sum():.4g}: divide by it."
        )
    return prior / prior.sum()


def shares_of(codes, weight, classes, *, warn=True):
    """Turn labels into a base prior, smoothed with a warning where a class has no rows."""
    counts = np.bincount(codes, weight, minlength=len(classes))
    absent = np.bincount(codes, minlength=len(classes)) == 0
    if warn and absent.any() and len(codes):
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
