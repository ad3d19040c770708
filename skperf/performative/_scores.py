"""Log scores and predictions of any fitted classifier, on rows as they are."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from sklearn import get_config
from sklearn.base import BaseEstimator, clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted, has_fit_parameter
from skorch import NeuralNet
from torch import nn

from skperf.backbone._modules import ModuleClassifier
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import class_logits, fit_estimator, log_probabilities, warn_if_fitted
from skperf.backbone._sklearn import safe_indexing
from skperf.performative._inputs import PerformativeWarning, count_rows, encode

FOLDS = 3
FEWEST = 30  # rows below which nothing is set apart for measuring
HELD_OUT = 5  # every fifth row measures a network that is fitted here
AGREEING = 0.5
LEAST = 1e-13  # probability


def is_frozen(estimator: Any) -> bool:
    """Tell whether an estimator is used as it is."""
    taken = isinstance(estimator, nn.Module | FrozenEstimator)
    return taken or callable(getattr(estimator, "to_module", None))


def is_network(estimator: Any) -> bool:
    """Tell whether an estimator is a torch network, which takes arrays; None is the built-in."""
    if isinstance(estimator, FrozenEstimator):
        return is_network(estimator.estimator)
    networks = isinstance(estimator, nn.Module | NeuralNet | ModuleClassifier)
    return estimator is None or networks or callable(getattr(estimator, "to_module", None))


def innermost(fitted: Any) -> Any:
    """Find the classifier inside frozen estimators, pipelines and searches."""
    if isinstance(fitted, FrozenEstimator):
        return innermost(fitted.estimator)
    if isinstance(fitted, Pipeline):
        return innermost(fitted.steps[-1][1])
    if hasattr(fitted, "best_estimator_"):
        return innermost(fitted.best_estimator_)
    return fitted


def take(X: Any, rows: Any) -> Any:
    """Gather rows (m,) of X, in the form they came in."""
    if isinstance(rows, np.ndarray) and np.array_equal(rows, np.arange(count_rows(X))):
        return X
    known = isinstance(X, np.ndarray) or hasattr(X, "leaves")
    return X[rows] if known else safe_indexing(X, rows)


@dataclass(frozen=True, eq=False)
class Opened:
    """A fitted classifier and the classes its scores are asked for."""

    fitted: Any
    classes: np.ndarray
    log_base: np.ndarray | None = None  # of classes that the classifier was never shown

    def logits(self, X: Any, *, strict: bool = False) -> np.ndarray:
        """Log scores (n, n_classes) in the order of `classes`, whatever the classifier's own."""
        scores = scores_of(self.fitted, X)
        own = np.asarray(self.fitted.classes_)
        check_scores(scores, self.fitted, X)
        if np.array_equal(own, self.classes):
            return scores
        missing, more = np.setdiff1d(self.classes, own), np.setdiff1d(own, self.classes)
        if len(more):
            raise ValueError(
                f"{type(self.fitted).__name__} knows classes that are not on record: "
                f"{more.tolist()} beside {self.classes.tolist()}."
            )
        if strict and len(missing):
            raise ValueError(
                f"{type(self.fitted).__name__} does not know the classes {missing.tolist()}: every "
                f"candidate needs all of {self.classes.tolist()}, in any order."
            )
        known = np.isin(self.classes, own)
        aligned = np.empty((len(scores), len(self.classes)))
        aligned[:, known] = scores[:, encode(self.classes[known], own)]
        # rows tell nothing of a class that was never shown: it keeps its share in every row
        base = np.zeros(len(self.classes)) if self.log_base is None else self.log_base
        rest = np.logaddexp.reduce(aligned[:, known], axis=1, keepdims=True)
        aligned[:, ~known] = rest + base[~known] - np.log(max(np.exp(base[known]).sum(), 1e-300))
        return aligned

    def own(self, X: Any, logits: np.ndarray) -> np.ndarray:
        """Predictions (n,) as columns, by the classifier's own rule."""
        if is_network(self.fitted) or not hasattr(self.fitted, "predict"):
            return logits.argmax(axis=1)
        with _own_names():
            return encode(np.asarray(self.fitted.predict(X)), self.classes)


def open_candidate(candidate: Any, X: Any, classes: np.ndarray) -> Opened:
    """Accept a fitted classifier, a frozen one or a bare module; nothing is trained."""
    if is_frozen(candidate):
        return Opened(fit_estimator(candidate, take(X, slice(0, 1)), None), classes)
    if hasattr(candidate, "fit"):
        check_is_fitted(candidate)
    return Opened(candidate, classes)


def scores_of(fitted: Any, X: Any) -> np.ndarray:
    """Log scores of every class in the classifier's own order: (n, n_own_classes)."""
    last = innermost(fitted)
    with _own_names():
        if is_network(last):
            return class_logits(last, _through_steps(fitted, X))
        exact = isinstance(last, LogisticRegression)  # logits, where probabilities underflow
        if hasattr(fitted, "predict_proba") and not exact:
            # a forest or a naive Bayes that says never is not taken at its word
            return log_probabilities(fitted.predict_proba(X), type(last).__name__, LEAST)
        if hasattr(fitted, "decision_function"):
            scores = np.asarray(fitted.decision_function(X), dtype=np.float64)
            return np.stack([np.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores
    raise TypeError(
        "estimator must have predict_proba or decision_function; "
        f"{type(last).__name__} has neither."
    )


def check_scores(scores: np.ndarray, fitted: Any, X: Any) -> None:
    """Refuse scores (n, k) that are not one a class, such as those of pairs of classes."""
    last, n_rows, n_classes = innermost(fitted), count_rows(X), len(fitted.classes_)
    pairs = n_classes > 2 and getattr(last, "decision_function_shape", None) == "ovo"
    if scores.shape != (n_rows, n_classes) or (pairs and not hasattr(fitted, "predict_proba")):
        raise ValueError(
            f"estimator {type(last).__name__} gives scores of shape {scores.shape}, not one for "
            f"each of {n_classes} classes in each of {n_rows} rows: one-vs-one scores are of "
            "pairs of classes. Set decision_function_shape='ovr', or use CalibratedClassifierCV."
        )
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise ValueError(
            f"{type(last).__name__} gives scores that are not finite, first in row {row}."
        )


def check_agreement(opened: Opened, X: Any, logits: np.ndarray) -> None:
    """Refuse scores (n, n_classes) whose largest is hardly ever what the classifier predicts."""
    if len(opened.classes) < 3:
        return
    agreeing = np.mean(opened.own(X, logits) == logits.argmax(axis=1))
    if agreeing < AGREEING:
        name = type(innermost(opened.fitted)).__name__
        told = f"the largest score of {name} is its prediction in only {agreeing:.0%} of the rows: "
        if not hasattr(opened.fitted, "predict_proba"):
            raise ValueError(told + "its decision_function does not score classes.")
        # a rule of costs may be meant so
        told += "are the columns of predict_proba in the order of classes_?"
        warnings.warn(told, PerformativeWarning, stacklevel=4)


def warn_of_threshold(fitted: Any) -> None:
    """Warn that a threshold of the classifier's own decides no corrected predictions."""
    last = innermost(fitted)
    cut = getattr(last, "best_threshold_", getattr(last, "threshold", None))
    if isinstance(cut, Real) and cut != 0.5:
        warnings.warn(
            f"{type(last).__name__} decides at its own threshold, {cut:.3g}, and corrected "
            "predictions are the likelier class. Set it around the adapter: "
            f"FixedThresholdClassifier(FrozenEstimator(adapter), threshold={cut:.3g}).",
            PerformativeWarning,
            stacklevel=4,
        )


def fit_classifier(estimator: Any, X: Any, y: np.ndarray, weight: Any, seed: int) -> Any:
    """Fit a clone on rows as they are; networks and what is frozen go through the backbone."""
    if is_network(estimator) or is_frozen(estimator) or not isinstance(estimator, BaseEstimator):
        return fit_estimator(estimator, X, y, sample_weight=weight, random_state=seed)
    warn_if_fitted(estimator)
    return fitted_clone(estimator, X, y, weight, seed)


def fitted_clone(estimator: Any, X: Any, y: np.ndarray, weight: Any, seed: int) -> Any:
    """Clone and fit a scikit-learn classifier: X rows, y (n,), weight (n,) or None."""
    fresh = clone(estimator)
    if fresh.get_params(deep=False).get("random_state", 0) is None:
        fresh.set_params(random_state=seed_of(seed))
    if weight is None:
        return fresh.fit(X, y)
    name = "sample_weight"
    if not has_fit_parameter(fresh, name) and not get_config()["enable_metadata_routing"]:
        if not (isinstance(fresh, Pipeline) and has_fit_parameter(fresh.steps[-1][1], name)):
            raise ValueError(f"{type(fresh).__name__}.fit takes no sample_weight.")
        name = f"{fresh.steps[-1][0]}__sample_weight"
    return fresh.fit(X, y, **{name: weight})


def cross_scores(
    estimator: Any, X: Any, y: np.ndarray, weight: Any, opened: Opened, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores (n, n_classes) and own predictions (n,) of rows by clones that did not see them."""
    classes, codes = np.unique(y, return_inverse=True)
    counts = np.bincount(codes)
    if len(y) < FEWEST or len(classes) < 2 or counts.min() < 2:
        return None
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    logits, own = np.empty((len(y), len(opened.classes))), np.empty(len(y), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fit on all rows has said it
        for inside, outside in splits.split(codes, codes):
            part = None if weight is None else weight[inside]
            if part is not None and len(np.unique(y[inside][part > 0])) < len(classes):
                return None
            fitted = fitted_clone(estimator, take(X, inside), y[inside], part, seed)
            clone_ = Opened(fitted, opened.classes, opened.log_base)
            rows = take(X, outside)
            logits[outside] = clone_.logits(rows)
            own[outside] = clone_.own(rows, logits[outside])
    return logits, own


def _through_steps(fitted: Any, X: Any) -> Any:
    """Rows as the last step of a pipeline gets them."""
    if isinstance(fitted, FrozenEstimator):
        return _through_steps(fitted.estimator, X)
    if hasattr(fitted, "best_estimator_"):
        return _through_steps(fitted.best_estimator_, X)
    if isinstance(fitted, Pipeline):
        before = fitted[:-1].transform(X) if len(fitted.steps) > 1 else X
        return _through_steps(fitted.steps[-1][1], before)
    return X


@contextmanager
def _own_names() -> Iterator[None]:
    """Let a classifier not speak of column names, which were held against the adapter's own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*feature names", UserWarning)
        yield
