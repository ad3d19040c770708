"""From outcomes to attributions: ridge around a prior, standard errors, honest scores."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skperf.components.priors import Prior, mixture

Array = NDArray[np.float64]
PENALTIES = np.logspace(-4, 6, 41)
_TINY = 1e-12


@dataclass(frozen=True)
class Fit:
    """A linear model of the output for each example."""

    coefficients: Array  # (n_examples, n_components)
    intercept: Array  # (n_examples,)
    stderr: Array  # (n_examples, n_components)
    penalty: float
    oob_score: float


def ridge(
    masks: NDArray[np.generic],
    outcomes: Array,
    prior: Prior | None = None,
    *,
    slopes: Array | None = None,
    anchor: Array | None = None,
    penalty: float | None = None,
) -> Fit:
    """Ridge around a prior, by one eigendecomposition: (m, N), (m, n), anchor (n,)."""
    # `W = sum_g c_g P_g + argmin_D ||Y - V (sum_g c_g P_g + D)||^2 + penalty |D|^2` with |D|^2
    # divided by the variances, with V and Y centred. The penalty comes from the exact
    # leave-one-out errors. The standard errors are the sandwich over masks, which lets every
    # mask have noise of its own, and the noise of the prior.
    V, Y = np.asarray(masks, np.float64), np.asarray(outcomes, np.float64)
    n_masks = len(V)
    if anchor is not None:
        V, Y = np.vstack([V, np.ones(V.shape[1])]), np.vstack([Y, anchor])
    centre, level = V.mean(0), Y.mean(0)
    V, Y = V - centre, Y - level
    mean: Array = np.zeros((Y.shape[1], V.shape[1]))
    noise: Array | float = 0.0
    if prior is not None and slopes is not None:
        mean, noise = mixture(prior, slopes), slopes[0] ** 2 * prior.noise
    variance = np.ones(V.shape[1]) if prior is None else prior.variance
    residual = Y - V @ mean.T
    values, vectors = _spectrum_of(V * np.sqrt(variance))
    spectrum = _Spectrum(values, vectors, vectors.T @ residual, residual)
    penalty = _choose(spectrum, Y, n_masks) if penalty is None else penalty
    left_out = spectrum.left_out(penalty)
    spread = variance[:, None] * (V.T @ vectors) / (values + penalty) @ vectors.T
    coefficients = mean + (spread @ residual).T
    square = (spread[:, :n_masks] ** 2 @ spectrum.noise(penalty)[:n_masks]).T
    unmoved = 1 - np.einsum("jm,mj->j", spread, V)
    return Fit(
        coefficients,
        level - coefficients @ centre,
        np.sqrt(square + unmoved**2 * noise),
        penalty,
        mean_correlation((Y - left_out)[:n_masks].T, Y[:n_masks].T),
    )


def pair_effects(
    masks: NDArray[np.bool_], outcomes: Array, fit: Fit, chosen: NDArray[np.intp]
) -> tuple[NDArray[np.intp], Array, Array, NDArray[np.intp]]:
    """Regress what a linear model leaves of outcomes (m, n) on products of chosen gates (k,)."""
    # -> pairs (P, 2), second differences (n, P), their errors (n, P), masks without both (P,)
    # With gates about their means, v_i - p, products are orthogonal to single gates, so that the
    # residual of the linear model keeps all that pairs explain. The coefficient of a product is
    # f(1,1) - f(0,1) - f(1,0) + f(0,0): what both together cost more than the sum of each.
    i, j = np.triu_indices(len(chosen), 1)
    pairs = np.stack([chosen[i], chosen[j]], 1)
    V = np.asarray(masks, np.float64)
    residual = outcomes - (V @ fit.coefficients.T + fit.intercept)
    centred = V - V.mean(0)
    products = centred[:, pairs[:, 0]] * centred[:, pairs[:, 1]]
    # products are small numbers; in units of their own size the ridge treats pairs alike
    scale = products.std(0)
    known = scale > 0
    values = np.zeros((outcomes.shape[1], len(pairs)))
    stderr = np.full(values.shape, np.inf)
    if known.any():
        second = ridge(products[:, known] / scale[known], residual)
        values[:, known] = -second.coefficients / scale[known]
        stderr[:, known] = second.stderr / scale[known]
    gone = ~np.asarray(masks, bool)
    together = (gone[:, pairs[:, 0]] & gone[:, pairs[:, 1]]).sum(0)
    return pairs, values, stderr, together


def mean_correlation(predicted: Array, actual: Array) -> float:
    """Mean over rows of the Pearson correlation: predicted, actual (n_examples, n_masks)."""
    p = predicted - predicted.mean(1, keepdims=True)
    a = actual - actual.mean(1, keepdims=True)
    power = (p**2).sum(1) * (a**2).sum(1)
    defined = power > 0
    if not defined.any():
        return float("nan")
    return float(((p * a).sum(1)[defined] / np.sqrt(power[defined])).mean())


@dataclass(frozen=True)
class _Spectrum:
    """The kernel of the masks in its own basis, and what is to be explained."""

    values: Array
    vectors: Array
    rotated: Array
    residual: Array

    def left_out(self, penalty: float) -> Array:
        """Leave-one-out residuals, ``e_i / (1 - h_ii)``."""
        share = self.values / (self.values + penalty)
        leverage = (self.vectors**2 * share).sum(1) + 1 / len(self.vectors)
        left: Array = self._misfit(share) / (1 - np.minimum(leverage, 1 - 1e-9))[:, None]
        return left

    def noise(self, penalty: float) -> Array:
        """Variances of the outcomes, ``e_i^2 / sum_k (I - H)_ik^2``, without bias if alike."""
        share = self.values / (self.values + penalty)
        # beside the span of the masks, where there are more of them than gates, I - H is 1
        left = 1 - (self.vectors**2 * (1 - (1 - share) ** 2)).sum(1) - 1 / len(self.vectors)
        noise: Array = self._misfit(share) ** 2 / np.maximum(left, 1e-9)[:, None]
        return noise

    def _misfit(self, share: Array) -> Array:
        misfit: Array = self.residual - self.vectors @ (share[:, None] * self.rotated)
        return misfit


def _choose(spectrum: _Spectrum, Y: Array, n_masks: int) -> float:
    """Average what penalties keep of a correction, by how well they predict masks left out."""
    # The smallest leave-one-out error alone is no guide with few masks: the errors of bold and
    # of cautious penalties are then alike within their noise. All examples count as one, for
    # they share the masks.
    scale = Y[:n_masks].std(0) + _TINY
    unit = float(spectrum.values.sum() / len(Y))
    candidates = PENALTIES * unit + _TINY
    errors = [((spectrum.left_out(c)[:n_masks] / scale) ** 2).mean() for c in candidates]
    evidence = -0.5 * n_masks * np.log(np.array(errors) + _TINY)
    weights = np.exp(evidence - evidence.max())
    kept = float((weights / (1 + PENALTIES)).sum() / weights.sum())
    return unit * (1 / kept - 1) + _TINY


def _spectrum_of(A: Array) -> tuple[Array, Array]:
    """Eigenvalues and vectors of A A' other than zero: (m, n) -> (r,), (m, r)."""
    if len(A) <= A.shape[1]:
        values, vectors = np.linalg.eigh(A @ A.T)
        return np.maximum(values, 0.0), vectors
    values, inner = np.linalg.eigh(A.T @ A)
    known = values > 1e-10 * max(float(values[-1]), _TINY)
    return values[known], A @ inner[:, known] / np.sqrt(values[known])
