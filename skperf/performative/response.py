"""Maps from the statistic of a deployed model to the label mix that answers it.

The maps are log-linear in features of the statistic, ``log pi(S) = log pi_0 + a + Z(S) b`` up to
a constant, and are fitted by penalised multinomial likelihood, so that each label seen counts
once. They differ in the features alone: none (``fixed``), one slope or one curve shared by all
classes (``tied``, ``curve``), a full matrix (``linear``), each shrunk towards a simpler one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import xlogy

from skperf.performative.label_shift import log_softmax

Array = NDArray[np.float64]

SLOPE_SHARE = 0.1  # a slope of 10 costs as much as an offset of 3
CURVE_KNOTS = 5


class ResponseMap(Protocol):
    """Whatever answers statistics with label mixes."""

    def log_prior(self, statistics: Array) -> Array:
        """Log label mix, of shape (n, n_classes), answering statistics (n, n_statistics)."""
        ...


@dataclass(frozen=True, eq=False)
class LogLinearMap:
    """Response map ``log pi(S) = offset + weights S`` up to a constant."""

    offset: Array  # (n_classes,)
    weights: Array  # (n_classes, n_statistics)

    def log_prior(self, statistics: Array) -> Array:
        """Log label mix answering each statistic, of shape (n, n_classes)."""
        scores: Array = log_softmax(self.offset + statistics @ self.weights.T, axis=1)
        return scores


@dataclass(frozen=True, eq=False)
class CurveMap:
    """Response map ``log pi_c(S) = offset_c + g(S_c - mean(S))``, one curve for all classes."""

    offset: Array  # (n_classes,)
    knots: Array  # (n_knots,)
    coefficients: Array  # (1 + n_knots,)

    def log_prior(self, statistics: Array) -> Array:
        """Log label mix answering each statistic, of shape (n, n_classes)."""
        curve = _hinges(statistics, self.knots) @ self.coefficients
        scores: Array = log_softmax(self.offset + curve, axis=1)
        return scores


def fit_fixed(
    statistics: Array, counts: Array, *, log_base: Array, l2: float = 1.0, start: Any = None
) -> LogLinearMap:
    """Fit the map that ignores the statistic: one label mix for all rounds.

    Shapes: statistics (n_rounds, n_statistics), counts (n_rounds, n_classes), log_base
    (n_classes,).
    """
    offset, _ = _fit_shared(np.zeros((*counts.shape, 0)), counts, log_base, l2)
    return LogLinearMap(offset, np.zeros((len(log_base), statistics.shape[1])))


def fit_tied(
    statistics: Array, counts: Array, *, log_base: Array, l2: float = 1.0, start: Any = None
) -> LogLinearMap:
    """Fit ``log pi_c(S) = a_c + b S_c``: one slope for all classes."""
    # Parameters are those of `fit_fixed`; the statistic holds one entry for every class.
    _one_entry_a_class(statistics, counts)
    offset, slope = _fit_shared(statistics[..., None], counts, log_base, l2)
    return LogLinearMap(offset, slope[0] * np.eye(len(log_base)))


def fit_curve(
    statistics: Array, counts: Array, *, log_base: Array, l2: float = 1.0, start: Any = None
) -> CurveMap:
    """Fit ``log pi_c(S) = a_c + g(S_c - mean(S))``: one piecewise linear curve for all classes."""
    # Parameters are those of `fit_fixed`; the statistic holds one entry for every class.
    _one_entry_a_class(statistics, counts)
    levels = np.linspace(0.0, 1.0, CURVE_KNOTS + 2)[1:-1]
    knots = np.unique(np.quantile(_centred(statistics), levels))
    offset, coefficients = _fit_shared(_hinges(statistics, knots), counts, log_base, l2)
    return CurveMap(offset, knots, coefficients)


def fit_linear(
    statistics: Array, counts: Array, *, log_base: Array, l2: float = 1.0, start: Any = None
) -> LogLinearMap:
    """Fit ``log pi(S) = a + W S``, with W shrunk towards that of the tied map."""
    # Parameters are those of `fit_fixed`; a statistic that does not hold one entry for every
    # class is shrunk towards no response instead.
    n_classes, n_statistics = counts.shape[1], statistics.shape[1]
    simpler = fit_tied if n_classes == n_statistics else fit_fixed
    anchor = simpler(statistics, counts, log_base=log_base, l2=l2)
    scores = anchor.offset + statistics @ anchor.weights.T
    centre = statistics.mean(axis=0)
    # the constant column lets one matrix hold the offsets too
    inputs = np.column_stack([np.ones(len(statistics)), statistics - centre])
    totals = counts.sum(axis=1, keepdims=True)

    def penalised(flat: Array) -> tuple[float, Array]:
        change = flat.reshape(n_classes, -1)
        log_prior = log_softmax(scores + inputs @ change.T, axis=1)
        residual = totals * np.exp(log_prior) - counts
        value = -np.sum(counts * log_prior) + 0.5 * l2 * flat @ flat
        return float(value), (residual.T @ inputs + l2 * change).ravel()

    first = np.zeros(n_classes * (1 + n_statistics))
    if isinstance(start, LogLinearMap):
        weights = start.weights - anchor.weights
        first = np.column_stack([start.offset + weights @ centre - anchor.offset, weights]).ravel()
        first[:: 1 + n_statistics] -= first[:: 1 + n_statistics].mean()
    change = minimize(
        penalised, first, jac=True, method="L-BFGS-B", options={"maxiter": 300, "ftol": 1e-8}
    ).x.reshape(n_classes, -1)
    offset = anchor.offset + change[:, 0] - change[:, 1:] @ centre
    return LogLinearMap(offset, anchor.weights + change[:, 1:])


Fitter = Callable[..., ResponseMap]
FITTERS: dict[str, Fitter] = {
    "fixed": fit_fixed,
    "tied": fit_tied,
    "curve": fit_curve,
    "linear": fit_linear,
}
SHARED = ("tied", "curve")  # these need one entry of the statistic for every class


def dispersion(
    response: ResponseMap, statistics: Array, counts: Array, *, guess: float = 10.0
) -> float:
    """Estimate how much more label counts vary than draws from the map's mixes would.

    Shapes: statistics (n_rounds, n_statistics), counts (n_rounds, n_classes).
    """
    # Rounds differ for reasons that no map knows, so a thousand labels of one round are worth
    # fewer independent ones. Counts divided by this factor give honest likelihoods.
    freedom = max(1, counts.shape[1] - 1)
    total = deviance(response.log_prior(statistics), counts).sum()
    return max(1.0, float((total + 2 * guess * freedom) / ((len(counts) + 2) * freedom)))


def deviance(log_prior: Array, counts: Array) -> Array:
    """Twice the log likelihood lost against the realised mix, of shape (n_rounds,)."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    lost: Array = 2.0 * (xlogy(counts, counts / totals) - counts * log_prior).sum(axis=1)
    return lost


def _fit_shared(features: Array, counts: Array, log_base: Array, l2: float) -> tuple[Array, Array]:
    """Fit offsets (K,) and shared coefficients (J,) of features (R, K, J) by Newton's method."""
    n_classes, n_features = features.shape[1:]
    penalty = l2 * np.repeat([1.0, SLOPE_SHARE], [n_classes, n_features])
    theta = np.zeros(n_classes + n_features)
    value, log_prior = _penalised(theta, features, counts, log_base, penalty)
    for _ in range(100):
        gradient, hessian = _derivatives(log_prior, features, counts)
        gradient += penalty * theta
        step = np.linalg.solve(hessian + np.diag(penalty), gradient)
        decrease = gradient @ step
        if decrease < 1e-9 + 1e-14 * abs(value):
            break
        scale = 1.0
        while True:
            trial = theta - scale * step
            reached, log_prior = _penalised(trial, features, counts, log_base, penalty)
            if reached <= value - 1e-4 * scale * decrease or scale < 1e-6:
                break
            scale /= 2
        theta, value = trial, reached
    return log_base + theta[:n_classes], theta[n_classes:]


def _penalised(
    theta: Array, features: Array, counts: Array, log_base: Array, penalty: Array
) -> tuple[float, Array]:
    n_classes = len(log_base)
    scores = log_base + theta[:n_classes] + features @ theta[n_classes:]
    log_prior = log_softmax(scores, axis=1)
    return float(-np.sum(counts * log_prior) + 0.5 * penalty @ theta**2), log_prior


def _derivatives(log_prior: Array, features: Array, counts: Array) -> tuple[Array, Array]:
    prior = np.exp(log_prior)  # (R, K)
    mass = counts.sum(axis=1, keepdims=True) * prior
    residual = mass - counts
    slopes = np.einsum("rkj,rk->j", features, residual)
    centred = features - np.einsum("rk,rkj->rj", prior, features)[:, None]  # (R, K, J)
    cross = np.einsum("rk,rkj->kj", mass, centred)
    corner = np.einsum("rk,rki,rkj->ij", mass, centred, centred)
    hessian = np.block([[np.diag(mass.sum(axis=0)) - mass.T @ prior, cross], [cross.T, corner]])
    return np.append(residual.sum(axis=0), slopes), hessian


def _hinges(statistics: Array, knots: Array) -> Array:
    centred = _centred(statistics)[..., None]
    return np.concatenate([centred, np.maximum(centred - knots, 0.0)], axis=-1)


def _centred(statistics: Array) -> Array:
    centred: Array = statistics - statistics.mean(axis=1, keepdims=True)
    return centred


def _one_entry_a_class(statistics: Array, counts: Array) -> None:
    if statistics.shape[1] != counts.shape[1]:
        raise ValueError(
            f"a slope shared by {counts.shape[1]} classes needs a statistic with one entry a "
            f"class, not {statistics.shape[1]} entries: use adapter='linear' or 'mlp'."
        )
