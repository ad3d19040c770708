"""How an adapter takes rounds in and what it gives out: the steps behind its public methods."""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.special import xlogy
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Bunch
from sklearn.utils.validation import check_is_fitted
from torch import nn

from skperf.backbone._modules import ModuleClassifier, from_module
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import fit_estimator
from skperf.backbone._sklearn import check_sample_weight
from skperf.backbone._validation import array_rows as check_rows
from skperf.backbone.progress import track
from skperf.performative import _inputs
from skperf.performative._inputs import PerformativeWarning, aligned_logits, encode
from skperf.performative._rounds import (
    Record,
    add_counts,
    add_round,
    batch_prior,
    measure,
    prior_of,
    settings_of,
)
from skperf.performative.anticipation import Anticipation
from skperf.performative.diagnostics import (
    conditional_shift_p_value,
    cycling,
    extrapolation,
    identifiability,
)
from skperf.performative.label_shift import (
    correct_logits,
    estimate_base_prior,
    fit_calibration,
    probabilities,
    smooth_shares,
    soft_confusion,
)
from skperf.performative.response import LogLinearMap
from skperf.performative.trajectory import Trajectory

FAR = 3.0  # times the largest distance between neighbours on record
HELD_OUT = 5  # every fifth row calibrates an estimator that is fitted here


class Data(NamedTuple):
    """Validated rows of a call; `rounds` is None before any deployment."""

    X: np.ndarray
    y: np.ndarray
    rounds: np.ndarray | None
    deployed: object
    weight: object


def forget(adapter):
    """Drop what an earlier fit had learned."""
    for name in [name for name in vars(adapter) if name.endswith("_")]:
        delattr(adapter, name)


def next_round(adapter):
    """Give the number after the last round seen, 0 at first."""
    trajectory = getattr(adapter, "trajectory_", ())
    return int(trajectory.rounds[-1]) + 1 if len(trajectory) else 0


def begin(adapter, data, *, classes=None):
    """Fit or take the classifier; find classes, base prior, calibration; start the record."""
    X, y, rounds = data.X, data.y, data.rounds
    weight = check_sample_weight(data.weight, X, dtype=np.float64)
    first = np.ones(len(y), bool) if rounds is None else rounds == rounds.min()
    frozen = _inputs.is_frozen(adapter.estimator)
    trained, held_out = _training_rows(np.flatnonzero(first), frozen, adapter.calibration)
    adapter.seed_ = seed_of(adapter.random_state)
    adapter.estimator_ = fit_estimator(
        adapter.estimator,
        X[trained],
        y[trained],
        sample_weight=None if data.weight is None else weight[trained],
        random_state=adapter.seed_,
    )
    if adapter.estimator is None:
        # in double precision a row's scores do not depend on the rows around it
        adapter.estimator_.module_.double()
    adapter.classes_ = _classes_of(adapter.estimator_, y, classes, frozen)
    codes = encode(y, adapter.classes_)
    adapter.calibrator_ = None
    logits = logits_of(adapter, adapter.estimator_, X[first], strict=frozen)
    adapter.base_prior_ = _base_prior(
        adapter, logits, codes[first], weight[first], frozen, codes[trained], weight[trained]
    )
    if adapter.calibration is not None:
        kept = np.isin(np.flatnonzero(first), held_out)
        adapter.calibrator_ = _calibration(adapter, logits[kept], codes[held_out], weight[held_out])
    statistic = _measured(adapter, logits, codes[first], logits.argmax(axis=1), weight[first])
    confusion = None
    if rounds is None:
        proba = probabilities(calibrated(adapter, logits))
        confusion = soft_confusion(proba, codes, weight)
    _start_record(adapter, statistic, confusion)


def _training_rows(rows, frozen, calibration):
    if frozen or calibration is None or len(rows) < 2 * HELD_OUT:
        return rows, rows
    held_out = rows[HELD_OUT - 1 :: HELD_OUT]
    return np.setdiff1d(rows, held_out), held_out


def _classes_of(fitted, y, classes, frozen):
    if frozen:
        return np.asarray(fitted.classes_)
    return np.unique(y if classes is None else np.concatenate([np.asarray(classes), y]))


def _base_prior(adapter, logits, codes, weight, frozen, trained_codes, trained_weight):
    given, classes = adapter.base_prior, adapter.classes_
    if isinstance(given, str) and given == "uniform":
        return np.full(len(classes), 1 / len(classes))
    if not isinstance(given, str):
        return _inputs.check_base_prior(given, classes)
    shares = _inputs.shares_of(trained_codes, trained_weight, classes)
    return estimate_base_prior(logits, codes, weight=weight) if frozen else shares


def _calibration(adapter, logits, codes, weight):
    counts = np.bincount(codes, weight, minlength=len(adapter.classes_))
    offset = np.log(smooth_shares(counts)) - np.log(adapter.base_prior_)
    return fit_calibration(logits, codes, offset, kind=adapter.calibration, weight=weight)


def _start_record(adapter, statistic, confusion=None):
    log_base = np.log(adapter.base_prior_)
    n_classes = len(log_base)
    # refuses maps that there are not, also where no round will ask for one
    settings_of(adapter, seed=adapter.seed_, n_statistics=len(statistic), n_classes=n_classes)
    trajectory = Trajectory.empty(len(statistic), n_classes, lag=adapter.lag)
    watched = adapter.worst_recall_floor is not None
    adapter.record_ = Record(
        Anticipation(log_base, trajectory),
        confusion=np.zeros((n_classes, n_classes)) if confusion is None else confusion,
        memory=(np.zeros((0, n_classes)), np.zeros(0, np.int64)) if watched else None,
    )
    adapter.statistic_ = statistic
    adapter.warned_ = set()
    _publish(adapter)


def learn(adapter, data):
    """Go through the rounds of a call in order; without rounds there is nothing to learn."""
    if data.rounds is None:
        return
    _check_has_estimator(adapter)
    codes = encode(data.y, adapter.classes_)
    weight = check_sample_weight(data.weight, data.X, dtype=np.float64)
    deployed = data.deployed
    if deployed is not None:
        deployed = _inputs.check_deployed(deployed, len(codes), adapter.classes_)
    numbers = np.unique(data.rounds)
    # the whole call is refused before any of it is learned
    _check_later(adapter, numbers[0])
    record = adapter.record_
    for number in track(numbers, description="rounds", verbose=adapter.verbose):
        rows = np.flatnonzero(data.rounds == number)
        predicted = None if deployed is None else deployed[rows]
        part = (data.X[rows], codes[rows], predicted, weight[rows])
        record = _learned(adapter, record, int(number), *part)
    adapter.record_ = record
    _publish(adapter)


def _check_later(adapter, number):
    trajectory = adapter.record_.anticipation.trajectory
    if len(trajectory) and number <= trajectory.rounds[-1]:
        raise ValueError(
            f"round {number} is not later than the last round seen, {trajectory.rounds[-1]}: "
            "rounds are appended in order of time, each once."
        )


def _learned(adapter, record, number, X, codes, predicted, weight):
    logits = calibrated(adapter, logits_of(adapter, adapter.estimator_, X, strict=False))
    in_force = record.anticipation.trajectory.in_force()
    log_prior, _ = prior_of(record, in_force, adapter.worst_recall_floor)
    scores = correct_logits(logits, log_prior, record.log_base)
    if predicted is None:
        predicted = scores.argmax(axis=1)
    statistic = _measured(adapter, scores, codes, predicted, weight)
    settings = settings_of(
        adapter, seed=adapter.seed_, n_statistics=len(statistic), n_classes=len(adapter.classes_)
    )
    return add_round(
        record,
        settings,
        number,
        logits,
        codes,
        statistic,
        log_prior,
        weight=weight,
        objective=adapter.objective,
        hybrid=adapter.transductive == "map_em" and isinstance(adapter.prior_strength, str),
    )


def _measured(adapter, scores, codes, predicted, weight):
    smoothing = adapter.recall_smoothing
    return measure(adapter.statistic, smoothing, codes, predicted, scores, adapter.classes_, weight)


def learn_trajectory(adapter, statistics, label_counts, rounds, classes):
    """Start anew from a record without rows."""
    if adapter.objective == "log_loss":
        raise ValueError("objective='log_loss' needs rows: fit_trajectory has label counts only.")
    is_recall = isinstance(adapter.statistic, str) and adapter.statistic == "recall"
    statistics, counts = _inputs.check_trajectory(statistics, label_counts, is_recall=is_recall)
    n_rounds, n_classes = counts.shape
    numbers = _inputs.check_rounds(np.arange(n_rounds) if rounds is None else rounds, n_rounds)
    adapter.seed_ = seed_of(adapter.random_state)
    adapter.calibrator_ = None
    adapter.classes_ = _trajectory_classes(adapter, classes, n_classes)
    adapter.base_prior_ = _trajectory_base(adapter, counts)
    _start_record(adapter, statistics[0])
    settings = settings_of(
        adapter, seed=adapter.seed_, n_statistics=statistics.shape[1], n_classes=n_classes
    )
    record = adapter.record_
    for number, counted, statistic in zip(numbers, counts, statistics, strict=True):
        record = add_counts(record, settings, int(number), counted, statistic)
    adapter.record_ = record
    _publish(adapter)


def _trajectory_classes(adapter, classes, n_classes):
    estimator = adapter.estimator
    if isinstance(estimator, nn.Module):
        estimator = from_module(estimator, np.arange(n_classes) if classes is None else classes)
    if _inputs.is_frozen(estimator):
        inner = estimator.estimator if isinstance(estimator, FrozenEstimator) else estimator
        adapter.estimator_ = inner if isinstance(inner, ModuleClassifier) else estimator
        classes = inner.classes_
    labels = np.arange(n_classes) if classes is None else np.asarray(classes)
    if len(labels) != n_classes:
        raise ValueError(f"label_counts has {n_classes} columns for {len(labels)} classes.")
    return labels


def _trajectory_base(adapter, counts):
    given = adapter.base_prior
    if isinstance(given, str) and given == "uniform":
        return np.full(counts.shape[1], 1 / counts.shape[1])
    if not isinstance(given, str):
        return _inputs.check_base_prior(given, adapter.classes_)
    absent = counts[0] == 0
    if absent.any():
        _inputs.warn_of_absent(adapter.classes_[absent])
    return smooth_shares(counts[0]) if absent.any() else counts[0] / counts[0].sum()


def warn_of_little(adapter, numbers):
    """Warn of what a record cannot tell: too few rounds, gaps, or a model that never changed."""
    state = adapter.record_.anticipation
    if numbers is not None:
        _inputs.warn_of_gaps(numbers)
    if 0 < state.n_rounds < adapter.min_rounds:
        warnings.warn(
            f"{state.n_rounds} rounds are fewer than min_rounds={adapter.min_rounds}: the adapter "
            "is 'fixed' and nothing is corrected.",
            UserWarning,
            stacklevel=3,
        )
    elif state.n_pairs > 1 and adapter.diagnostics_["rank"] == 0:
        warnings.warn(
            "the statistic was the same in every round, so the response to a change of model is "
            "not identifiable from these deployments: slopes rest on shrinkage alone.",
            PerformativeWarning,
            stacklevel=3,
        )


def _publish(adapter):
    """Spread the record over the fitted attributes."""
    record = adapter.record_
    state = record.anticipation
    trajectory = state.trajectory
    if len(trajectory):
        adapter.statistic_ = trajectory.statistics[-1]
    in_force = trajectory.in_force()
    log_prior, strength = prior_of(record, in_force, adapter.worst_recall_floor)
    nothing = LogLinearMap(state.log_base, np.zeros((len(log_prior), len(adapter.statistic_))))
    contender = state.contenders.get(state.choice.name)
    adapter.trajectory_ = trajectory
    adapter.adapter_name_ = state.choice.name
    adapter.adapter_ = nothing if contender is None else contender.response
    adapter.strength_, adapter.mix_ = strength, state.choice.mix
    adapter.fallback_ = strength == 0.0
    adapter.predicted_prior_ = np.exp(log_prior)
    adapter.n_rounds_ = state.n_rounds
    adapter.prequential_ = _prequential(record.losses)
    adapter.diagnostics_ = _diagnostics(state, adapter.prequential_)


def _prequential(losses):
    names = ("round", "none", "last", "adapter", "oracle", "worst_recall", "tv")
    arrays = {name: np.array([entry[name] for entry in losses]) for name in names}
    mixes = {n: np.array([entry[n] for entry in losses]) for n in ("predicted", "realised")}
    return Bunch(**arrays, **mixes)


def _diagnostics(state, losses):
    trajectory = state.trajectory
    statistics = trajectory.pairs()[0]
    if not len(statistics):
        return {"n_pairs": 0, "rank": 0, "dispersion": state.spread}
    latest = trajectory.in_force()
    recent = slice(-len(statistics), None)
    surprise = xlogy(losses.realised, losses.realised) - losses.realised * np.log(losses.predicted)
    return {
        "n_pairs": state.n_pairs,
        **identifiability(statistics),
        "extrapolation": extrapolation(latest, statistics),
        **cycling(trajectory.counts),
        "residual_kl": float(surprise[recent].sum(axis=1).mean()),
        "conditional_shift_p_value": conditional_shift_p_value(trajectory.counts, trajectory.hits),
        "dispersion": state.spread,
        "scores": {name: float(one.scores.max()) for name, one in state.contenders.items()},
    }


def logits_of(adapter, fitted, X, *, strict=True):
    """Compute scores (n, n_classes) of a fitted classifier in the adapter's class order."""
    return aligned_logits(fitted, X, adapter.classes_, strict=strict)


def calibrated(adapter, logits):
    """Apply the calibration found at the beginning, if any."""
    return logits if adapter.calibrator_ is None else adapter.calibrator_(logits)


def anticipated(adapter, statistic):
    """Give the log mix (n_classes,) or (n, n_classes) that answers statistics."""
    check_is_fitted(adapter, "record_")
    record, floor = adapter.record_, adapter.worst_recall_floor
    if statistic is None:
        return np.log(adapter.predicted_prior_)
    is_recall = isinstance(adapter.statistic, str) and adapter.statistic == "recall"
    is_recall &= len(adapter.statistic_) == len(adapter.classes_)
    values = _inputs.check_statistic(statistic, len(adapter.statistic_), is_recall=is_recall)
    if values.ndim == 2:
        return np.array([anticipated(adapter, one) for one in values])
    log_prior, _ = prior_of(record, values, floor)
    return _held_back(adapter, values, log_prior)


def _held_back(adapter, statistic, log_prior):
    """Blend towards the base mix where the statistic is far from all that was recorded."""
    seen = adapter.trajectory_.statistics
    excess = extrapolation(statistic, seen) / FAR
    if excess <= 1.0 or adapter.fallback_:
        return log_prior
    if "far" not in adapter.warned_:
        adapter.warned_.add("far")
        warnings.warn(
            f"statistic is {FAR * excess:.1f} times as far from the recorded ones as these are "
            "from one another: the anticipated mix is blended towards the base prior.",
            PerformativeWarning,
            stacklevel=5,
        )
    return np.logaddexp(
        log_prior - np.log(excess), np.log(adapter.base_prior_) + np.log1p(-1 / excess)
    )


def corrected(adapter, X, statistic):
    """Compute corrected scores (n, n_classes) of rows."""
    check_is_fitted(adapter, "record_")
    _check_has_estimator(adapter)
    X = check_rows(adapter, X)
    logits = calibrated(adapter, logits_of(adapter, adapter.estimator_, X, strict=False))
    log_prior = anticipated(adapter, statistic)
    if log_prior.ndim != 1:
        raise ValueError("predict takes one statistic of shape (n_statistics,) for all rows.")
    log_base = np.log(adapter.base_prior_)
    if adapter.transductive is not None:
        log_prior = _from_batch(adapter, logits, log_prior)
    return correct_logits(logits, log_prior, log_base)


def _check_has_estimator(adapter):
    if not hasattr(adapter, "estimator_"):
        raise NotFittedError(
            "this adapter was fitted on a record without rows, so its estimator is not fitted: "
            "give fit_trajectory a frozen estimator to go on with."
        )


def _from_batch(adapter, logits, log_prior):
    needed = 10 * logits.shape[1]
    if len(logits) < needed:
        warnings.warn(
            f"a batch of {len(logits)} rows is short for transductive={adapter.transductive!r}: "
            f"below {needed} rows, ten for each class, its label mix is hard to tell.",
            UserWarning,
            stacklevel=4,
        )
    how, worth = adapter.transductive, adapter.prior_strength
    return batch_prior(adapter.record_, logits, log_prior, how=how, strength=worth)


def replayed(adapter, X, y, numbers):
    """Predict probabilities (n, n_classes) round by round, measuring statistics on the way."""
    codes = encode(y, adapter.classes_)
    record, lag = adapter.record_, adapter.lag
    statistics = list(record.anticipation.trajectory.statistics[-lag:])
    proba = np.empty((len(y), len(adapter.classes_)))
    for number in np.unique(numbers):
        rows = numbers == number
        logits = logits_of(adapter, adapter.estimator_, X[rows], strict=False)
        in_force = statistics[-lag] if len(statistics) >= lag else None
        log_prior, _ = prior_of(record, in_force, adapter.worst_recall_floor)
        scores = correct_logits(calibrated(adapter, logits), log_prior, record.log_base)
        proba[rows] = probabilities(scores)
        predicted = scores.argmax(axis=1)
        statistics.append(_measured(adapter, scores, codes[rows], predicted, None))
    return proba
