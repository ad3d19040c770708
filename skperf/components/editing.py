"""Choose components whose ablation raises or lowers some outputs and spares others."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Order = NDArray[np.intp]


def welch_order(target: Array, reference: Array | None, *, increase: bool) -> Order:
    """Rank by Welch's t statistic: target (n_t, N), reference (n_r, N) -> (N,)."""
    # `t_j = (mean_T a_j - mean_R a_j) / sqrt(var_T(a_j) / |T| + var_R(a_j) / |R|)`; lowest first
    # to raise the targets' outputs, highest first to lower them.
    if reference is None or not len(reference):
        reference = np.zeros((1, target.shape[1]))
    difference = target.mean(0) - reference.mean(0)
    variance = target.var(0) / len(target) + reference.var(0) / len(reference)
    positive = variance[variance > 0]
    floor = float(np.sqrt(np.median(positive))) if len(positive) else 1.0
    error = np.where(variance > 0, np.sqrt(variance), floor)
    score = difference / np.where(error > 0, error, 1.0)
    return np.argsort(score if increase else -score, kind="stable")


def budgeted_order(
    target: Array, reference: Array | None, *, increase: bool, target_error: Array | None = None
) -> Order:
    """Rank by gain for the targets over harm to the references: (n_t, N), (n_r, N) -> (N,)."""
    # A linear model makes the choice a knapsack: gain in the targets' mean output over the mean
    # fall of the references' outputs. Falls and rises of different references do not cancel,
    # `harm_j = mean_R max(a_j, 0)`: it is the single example that is lost. Gains below their own
    # standard error come last.
    gain = -target.mean(0) if increase else target.mean(0)
    if target_error is not None:
        noise = np.sqrt((target_error**2).sum(0)) / len(target)
        gain = np.sign(gain) * np.maximum(np.abs(gain) - noise, 0.0)
    harm = np.zeros(len(gain)) if reference is None else np.maximum(reference, 0.0).mean(0)
    ratio = gain / np.maximum(harm, 0.2 * harm.mean() + 1e-12)
    return np.lexsort((-gain, -ratio, gain <= 0))


ORDERS = {"welch": welch_order, "budgeted": budgeted_order}


def grid_of_k(n_components: int, most: int | None = None) -> list[int]:
    """Numbers of components to try, growing by about a third."""
    last = min(most or max(1, n_components // 2), n_components)
    grid, k = [0], 1
    while k < last:
        grid.append(k)
        k = max(k + 1, round(k * 1.35))
    return [*grid, last]
