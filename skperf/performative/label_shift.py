"""Correct a classifier for a change of label mix, and estimate that change from a batch.

Under label shift the classes look as before and only their shares move, so Bayes' rule turns
logits ``f`` trained at the mix ``pi_0`` into ``f + log pi - log pi_0`` at the mix ``pi``.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

Array = NDArray[np.float64]
Codes = NDArray[np.int64]
TINY = float(np.finfo(np.float64).tiny)


def smooth_shares(counts: Array) -> Array:
    """Turn label counts of shape (..., n_classes) into shares, none of them 0."""
    filled: Array = counts + 1.0 / counts.shape[-1]
    shares: Array = filled / filled.sum(axis=-1, keepdims=True)
    return shares


def probabilities(logits: Array) -> Array:
    """Compute the softmax of every row, in one buffer."""
    shifted: Array = logits - logits.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def log_softmax(scores: Array, axis: int = -1) -> Array:
    """Normalise log scores; scipy's own spends longer on dispatch than on arrays this small."""
    shifted: Array = scores - scores.max(axis=axis, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return shifted


def log_loss(logits: Array, codes: Codes, weight: Array | None = None) -> float:
    """Mean negative log probability of labels: (n, n_classes), codes (n,), weight (n,) -> ()."""
    losses = -log_softmax(logits, axis=1)[np.arange(len(codes)), codes]
    return float(np.average(losses, weights=weight))


def em_prior(
    logits: Array,
    log_base: Array,
    *,
    mean: Array | None = None,
    strength: float = 0.0,
    max_iter: int = 1000,
    tol: float = 1e-7,
) -> Array:
    """Mix of unlabelled rows by expectation maximisation: logits (n, n_classes) -> (n_classes,)."""
    # The responsibilities of shape (n, n_classes) are never formed: with the fixed matrix `P =
    # softmax(logits) / base` an iteration is the two products `d = P q` and `P' (1 / d)`.
    # classes by rows: both products then run through memory in order
    ratios = np.ascontiguousarray((logits - log_base).T)
    ratios -= ratios.max(axis=0)
    np.exp(ratios, out=ratios)
    expected = np.exp(log_base) if mean is None else np.asarray(mean, dtype=np.float64)
    pseudo, total = strength * expected, len(logits) + strength
    prior: Array = expected / expected.sum()
    for _ in range(max_iter):
        mass = ratios @ (1.0 / np.maximum(prior @ ratios, TINY))
        before, prior = prior, (prior * mass + pseudo) / total
        prior /= prior.sum()
        if np.abs(prior - before).max() <= tol:
            break
    return prior


def soft_confusion(proba: Array, codes: Codes, weight: Array | None = None) -> Array:
    """Sum probabilities (n, n_classes) by true class: -> (n_classes, n_classes)."""
    members = np.zeros((proba.shape[1], len(codes)))
    members[codes, np.arange(len(codes))] = 1.0 if weight is None else weight
    sums: Array = members @ proba
    return sums


def bbse_prior(proba: Array, confusion: Array, *, pseudo_count: float = 1.0) -> Array:
    """Mix of unlabelled rows by inverting a confusion matrix: (n, n_classes) -> (n_classes,)."""
    filled = confusion + pseudo_count * np.eye(len(confusion))
    rates = filled / filled.sum(axis=1, keepdims=True)
    # a heavy extra row makes the non-negative solution sum to one
    system = np.vstack([rates.T, np.full(len(rates), 1e3)])
    solution, _ = nnls(system, np.append(proba.mean(axis=0), 1e3))
    shares: Array = solution / solution.sum()
    return shares


@dataclass(frozen=True, eq=False)
class Calibration:
    """Temperature and bias of logits at the base mix."""

    temperature: float
    bias: Array  # (n_classes,)
    shown: NDArray[np.bool_] | None = None  # (n_classes,) to the classifier; None is all

    def __call__(self, logits: Array) -> Array:
        """Calibrate logits of shape (n, n_classes)."""
        return _scaled(logits, 1.0 / self.temperature, self.bias, self.shown)


def _scaled(logits: Array, factor: float, bias: Array, shown: NDArray[np.bool_] | None) -> Array:
    """Scale and move logits (n, n_classes); rows tell nothing of classes that were not shown."""
    scaled: Array = logits * factor
    scaled += bias
    if shown is not None and not shown.all():
        # such a class keeps one share in every row, which a temperature would bend
        after, before = (np.logaddexp.reduce(x[:, shown], axis=1) for x in (scaled, logits))
        scaled[:, ~shown] = logits[:, ~shown] + bias[~shown] + (after - before)[:, None]
    return scaled


def fit_calibration(
    logits: Array,
    codes: Codes,
    log_offset: Array,
    *,
    kind: Literal["temperature", "bcts"] = "temperature",
    l2: float = 1.0,
    weight: Array | None = None,
    shown: NDArray[np.bool_] | None = None,
) -> Calibration:
    """Temperature, and biases for `bcts`, of scores (n, n_classes) by maximum likelihood."""
    n_classes = logits.shape[1]
    weights = np.ones(len(codes)) if weight is None else weight
    centre = np.zeros(1 + n_classes if kind == "bcts" else 1)
    theta = _most_likely(logits, codes, log_offset, weights, centre, l2, shown)
    bias = theta[1:] - theta[1:].mean() if kind == "bcts" else np.zeros(n_classes)
    return Calibration(float(np.exp(theta[0])), bias, shown)


def _most_likely(
    logits: Array,
    codes: Codes,
    log_offset: Array,
    weights: Array,
    centre: Array,
    l2: float,
    shown: NDArray[np.bool_] | None = None,
    max_iter: int = 15_000,
) -> Array:
    """Log temperature, and biases where `centre` has them, of rows (n, n_classes), held to it."""
    rows, none = np.arange(len(codes)), np.zeros(logits.shape[1])

    def penalised(theta: Array) -> tuple[float, Array]:
        factor = float(np.exp(-theta[0]))
        scaled = _scaled(logits, factor, theta[1:] if len(theta) > 1 else none, shown)
        # one buffer: the residuals, weights times probabilities less those of the labels
        residual = scaled + log_offset
        residual -= residual.max(axis=1, keepdims=True)
        own = residual[rows, codes]
        np.exp(residual, out=residual)
        mass = residual.sum(axis=1)
        residual *= (weights / mass)[:, None]
        residual[rows, codes] -= weights
        if shown is None or shown.all():
            slope = -factor * np.vdot(residual, logits)
        else:  # scores of the others move with the mass of those shown
            apart = residual[:, ~shown].sum(axis=1, keepdims=True)
            residual[:, shown] += apart * probabilities(scaled[:, shown])
            slope = -factor * np.vdot(residual[:, shown], logits[:, shown])
        distance = theta - centre
        gradient = np.append(slope, residual.sum(axis=0))[: len(theta)] + l2 * distance
        loss = weights @ (np.log(mass) - own)
        return loss + 0.5 * l2 * float(distance @ distance), gradient

    options = {"maxiter": max_iter}
    found = minimize(penalised, centre, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x)


def estimate_base_prior(
    logits: Array,
    codes: Codes,
    *,
    l2: float = 5.0,
    weight: Array | None = None,
    max_iter: int = 100,
) -> Array:
    """Find the mix at which scores (n, n_classes) of labels (n,) are right: -> (n_classes,)."""
    # Nobody need know what mix a network was trained on: `softmax(f + log pi - log pi_0)` gives
    # labelled rows of a known mix `pi` their largest likelihood at the true `pi_0`.
    n_classes = logits.shape[1]
    weights = np.ones(len(codes)) if weight is None else weight
    counts: Array = np.bincount(codes, weights, minlength=n_classes).astype(np.float64)
    seen = counts > 0
    among, log_mix = np.cumsum(seen) - 1, np.log(counts[seen] / counts.sum())
    # the mix is a bias with its sign turned, and goes with a temperature
    centre = np.append(0.0, -np.log(smooth_shares(counts))[seen])
    given = logits[:, seen], among[codes], log_mix, weights, centre
    found = np.exp(-_most_likely(*given, l2, max_iter=max_iter)[1:])
    # a class without rows may be as common as any other for all that is known
    prior = np.full(n_classes, found.mean())
    prior[seen] = found
    return prior / prior.sum()
