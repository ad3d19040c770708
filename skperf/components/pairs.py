"""What two components do together, beyond what each does alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skperf.components.estimation import Fit, ridge

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairEffects:
    """Second differences of the output."""

    pairs: NDArray[np.intp]  # (P, 2)
    values: Array  # (n_examples, P)
    stderr: Array  # (n_examples, P)
    together: NDArray[np.intp]  # (P,): masks in which both are gone


def pair_effects(
    masks: NDArray[np.bool_], outcomes: Array, fit: Fit, chosen: NDArray[np.intp]
) -> PairEffects:
    """Regress what the linear model leaves on products of gates.

    Shapes: masks (n_masks, n_components), outcomes (n_masks, n_examples), chosen (k,).
    """
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
    return PairEffects(pairs, values, stderr, together)
