"""The first call: fit or take the classifier, measure it honestly, find the mix it is right for."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import chi2
from sklearn.frozen import FrozenEstimator
from torch import nn

from skperf.backbone._modules import ModuleClassifier, from_module
from skperf.performative import _inputs
from skperf.performative._options import corrector_of, first_contenders, options_of, settings_of
from skperf.performative._scores import (
    FEWEST,
    HELD_OUT,
    Opened,
    check_agreement,
    cross_scores,
    fit_classifier,
    innermost,
    is_frozen,
    is_network,
    take,
)
from skperf.performative.anticipation import Anticipation
from skperf.performative.label_shift import (
    estimate_base_prior,
    fit_calibration,
    log_loss,
    probabilities,
    smooth_shares,
)
from skperf.performative.learning import remembering, with_calibrations
from skperf.performative.paper import BASE_PSEUDO_SHARE
from skperf.performative.record import Memory, Options, Record, effective
from skperf.performative.trajectory import Trajectory

SURE = 1e-3  # level at which a fitted classifier's base mix is held to be another than its rows'


@dataclass(frozen=True, eq=False)
class Data:
    """Validated rows of a call; `rounds` is None before any deployment."""

    X: Any
    y: np.ndarray  # (n,)
    known: np.ndarray  # (n,) whether there is a label
    rounds: np.ndarray | None  # (n,)
    weight: np.ndarray  # (n,)
    weighted: bool = False
    deployed: Any = None
    covariates: np.ndarray | None = None  # (n_rounds, n_covariates)
    strata: np.ndarray | None = None  # (n,) of any labels

    def counting(self) -> "Data":
        """Leave out rows of weight zero; a round that has no others is refused."""
        kept = self.weight > 0
        if kept.all():
            return self
        if self.rounds is not None:
            idle = np.setdiff1d(self.rounds, self.rounds[kept])
            if len(idle):
                raise ValueError(
                    f"all rows of round {idle[0]} have weight 0: a round needs rows that count. "
                    "Leave the round out, or weight its rows."
                )
        names = ("y", "known", "rounds", "weight", "deployed", "strata")
        told = {name: getattr(self, name) for name in names}
        parts: Any = {name: None if v is None else v[kept] for name, v in told.items()}
        return replace(self, X=take(self.X, np.flatnonzero(kept)), **parts)


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of the first rows by a classifier that did not see them."""

    rows: np.ndarray  # (m,) of the call
    logits: np.ndarray  # (m, n_classes)
    own: np.ndarray  # (m,)


def taken(
    estimator: Any, params: dict[str, Any], data: Data, seed: int, classes: Any, known: Any = None
) -> tuple[Any, np.ndarray, Measured, np.ndarray]:
    """Fit or take the classifier: it, the labels, its scores and its base mix (n_classes,)."""
    first = np.ones(len(data.y), bool)
    if data.rounds is not None:
        first = data.rounds == np.unique(data.rounds)[0]
    labelled = np.flatnonzero(first & data.known)
    frozen = is_frozen(estimator)
    if not len(labelled) and not frozen:
        raise ValueError("the first round has no labels to fit the estimator on.")
    trained, held_out = _split(labelled, data, frozen, params, is_network(estimator))
    weight = data.weight[trained] if data.weighted else None
    y = data.y[trained]
    if y.dtype == object and len(y) and not isinstance(y[0], str):
        y = y.astype(type(y[0]))
    fitted = fit_classifier(estimator, take(data.X, trained), y, weight, seed)
    if estimator is None:
        # in double precision a row's scores do not depend on the rows around it
        fitted.module_.double()
    labels = _classes_of(fitted, data.y[data.known], classes, frozen) if known is None else known
    codes = _inputs.encode(y, labels)
    given = given_base(params, labels)
    shares = _inputs.shares_of(codes, data.weight[trained], labels, warn=given is None)
    opened = Opened(fitted, labels, np.log(shares if given is None else given))
    rows, found = held_out if len(held_out) else labelled, None
    if not frozen and not is_network(estimator):
        found = cross_scores(estimator, take(data.X, trained), y, weight, opened, seed)
    if found is None:
        part = take(data.X, rows)
        logits = opened.logits(part) if len(rows) else np.zeros((0, len(labels)))
        found = logits, opened.own(part, logits) if len(rows) else np.zeros(0, np.int64)
        if len(rows):
            check_agreement(opened, part, logits)
    measured = Measured(rows, *found)
    if given is None:
        codes, weight = _inputs.encode(data.y[rows], labels), effective(data.weight[rows])
        given = _found_base(measured.logits, codes, weight, None if frozen else shares)
    return fitted, labels, measured, given


def begin(
    estimator: Any, params: dict[str, Any], data: Data, seed: int, classes: Any = None
) -> tuple[Any, Record, Measured]:
    """Fit or take the classifier and start its record."""
    fitted, labels, measured, base = taken(estimator, params, data, seed, classes)
    rows = measured.rows
    codes = _inputs.encode(data.y[rows], labels)
    refines = is_frozen(estimator) and given_base(params, labels) is None
    options = options_of(params, seed, refines_base=refines)
    strata = None if data.strata is None else np.unique(data.strata)
    width = _width(options, labels, measured, codes, data, strata)
    covariates = 0 if data.covariates is None else data.covariates.shape[1]
    record = start_record(params, options, labels, base, width, covariates, strata, len(rows))
    record = replace(record, shown=np.isin(labels, fitted.classes_))
    if data.rounds is None and len(codes):
        record = remembering(record, measured.logits, codes, data.weight[rows])
        record = with_calibrations(record) if all(options.calibrations) else record
    return fitted, record, measured


def start_record(
    params: dict[str, Any],
    options: Options,
    labels: np.ndarray,
    base: np.ndarray,
    n_statistics: int,
    n_covariates: int = 0,
    strata: np.ndarray | None = None,
    base_rows: int = 0,
) -> Record:
    """Start a record that knows the base mix (n_classes,)."""
    n_classes = len(labels)
    # refuses maps that there are not, also where no round will ask for one
    settings = settings_of(params, options.seed, n_statistics, n_classes, n_covariates)
    if "paper" in settings.candidates:
        base = base + BASE_PSEUDO_SHARE  # as released
    trajectory = Trajectory.empty(
        n_statistics, n_classes, n_covariates=n_covariates, lag=params["lag"]
    )
    contenders = first_contenders(params, options.seed, n_statistics, n_classes)
    return Record(
        options=options,
        settings=settings,
        classes=labels,
        anticipation=Anticipation(np.log(base / base.sum()), trajectory, contenders),
        corrector=corrector_of(params, options),
        memory=Memory.empty(n_classes),
        confusion=np.zeros((n_classes, n_classes)),
        strata=strata,
        base_rows=base_rows,
    )


def given_base(params: dict[str, Any], labels: np.ndarray) -> np.ndarray | None:
    """Give the base mix (n_classes,) that is asked for; None where it is to be found."""
    given = params["base_prior"]
    if not isinstance(given, str):
        return _inputs.check_prior(given, labels, "base_prior", positive=True)
    return np.full(len(labels), 1 / len(labels)) if given == "uniform" else None


def trajectory_classes(estimator: Any, classes: Any, counts: Any) -> tuple[Any, np.ndarray]:
    """Give labels of a record without rows, and the classifier where it is frozen, else None."""
    n_classes = (np.shape(counts) or (0,))[-1]
    if isinstance(estimator, nn.Module):
        estimator = from_module(estimator, np.arange(n_classes) if classes is None else classes)
    fitted = None
    if is_frozen(estimator):
        inner = estimator.estimator if isinstance(estimator, FrozenEstimator) else estimator
        fitted = inner if isinstance(inner, ModuleClassifier) else estimator
        if classes is not None and not np.array_equal(classes, inner.classes_):
            raise ValueError(f"classes must be the frozen estimator's: {inner.classes_.tolist()}.")
        classes = inner.classes_
    labels = np.arange(n_classes) if classes is None else np.asarray(classes)
    if len(labels) != n_classes or len(np.unique(labels)) != n_classes:
        told = f"label_counts has {n_classes} columns for the classes {labels.tolist()}"
        raise ValueError(f"{told}: each needs its own.")
    return fitted, labels


def trajectory_base(
    params: dict[str, Any], fitted: Any, labels: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Give the base mix (n_classes,) of a record without rows: counts (n_rounds, n_classes)."""
    given = given_base(params, labels)
    if given is not None:
        return given
    if fitted is not None:
        return _stated_base(fitted, len(labels))
    absent = counts[0] == 0
    if absent.any():
        _inputs.warn_of_absent(labels[absent])
    return smooth_shares(counts[0]) if absent.any() else counts[0] / counts[0].sum()


def _stated_base(fitted: Any, n_classes: int) -> np.ndarray:
    """Find the mix that a frozen classifier says it was trained for, else equal shares."""
    # the first rounds' mix is the world's, not the classifier's; labelled rows will tell
    last = innermost(fitted)
    for name in ("class_prior_", "priors_", "class_count_"):
        stated = np.asarray(getattr(last, name, np.nan), dtype=np.float64)
        if stated.shape == (n_classes,) and (stated > 0).all():
            return np.asarray(stated / stated.sum())
    return np.full(n_classes, 1 / n_classes)


def _split(
    labelled: np.ndarray, data: Data, frozen: bool, params: dict[str, Any], network: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to measure a network on, whose clones would cost too much."""
    asked = data.rounds is not None or params["calibration"] in ("temperature", "bcts")
    if frozen or not network or not asked or len(labelled) < FEWEST:
        return labelled, np.zeros(0, np.int64)
    held_out = labelled[HELD_OUT - 1 :: HELD_OUT]
    trained = np.setdiff1d(labelled, held_out)
    missing = np.setdiff1d(data.y[held_out], data.y[trained])
    return (labelled, held_out[:0]) if len(missing) else (trained, held_out)


def _classes_of(fitted: Any, y: np.ndarray, classes: Any, frozen: bool) -> np.ndarray:
    if frozen:
        return np.asarray(fitted.classes_)
    if classes is None:
        return np.unique(y.astype(type(y[0])) if y.dtype == object else y)
    given = np.unique(np.asarray(classes))
    _inputs.encode(y, given, known_to="classes")
    return given


def _found_base(
    logits: np.ndarray, codes: np.ndarray, weight: np.ndarray, shares: np.ndarray | None
) -> np.ndarray:
    """Find the base mix on rows (n, n_classes); `shares` are those of rows it was fitted on."""
    n_classes = logits.shape[1]
    if not len(codes):
        return np.full(n_classes, 1 / n_classes)
    found = estimate_base_prior(logits, codes, weight=weight)
    if shares is None:
        return found
    # weights of classes and of rows move the mix that a classifier is right for away from its
    # rows' own; without strong evidence, beyond what a temperature explains, that mix is kept
    mix = np.log(np.maximum(np.bincount(codes, weight, n_classes), 1e-12))
    losses = []
    for base in (shares, found):
        offset = mix - np.log(base)
        scores = fit_calibration(logits, codes, offset, weight=weight)(logits) + offset
        losses.append(log_loss(scores, codes, weight))
    sure = 2 * weight.sum() * (losses[0] - losses[1]) > chi2.isf(SURE, n_classes - 1)
    return found if sure else shares


def _width(
    options: Options,
    labels: np.ndarray,
    measured: Measured,
    codes: np.ndarray,
    data: Data,
    strata: np.ndarray | None,
) -> int:
    """Count the entries of the statistic, by measuring it once."""
    if isinstance(options.statistic, str) and "stratum" in options.statistic:
        if strata is None:
            raise ValueError(f"statistic={options.statistic!r} needs strata, one for each row.")
        return len(strata) * (len(labels) if options.statistic == "class_stratum" else 1)
    if isinstance(options.statistic, str) or not len(codes):
        return len(labels) ** (2 if options.statistic == "confusion" else 1)
    weight, predicted = data.weight[measured.rows], measured.logits.argmax(axis=1)
    told = labels[codes], labels[predicted], probabilities(measured.logits)
    return np.size(options.statistic(*told, labels, weight))
