"""What a record of rounds can and cannot tell."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import chi2

from skperf.performative.label_shift import log_softmax, smooth_shares
from skperf.performative.response import Fitter, deviance, dispersion, fit_fixed, fit_linear
from skperf.performative.trajectory import Trajectory

Array = NDArray[np.float64]
Codes = NDArray[np.int64]


def identifiability(statistics: Array) -> dict[str, float]:
    """Describe how widely the deployed models' statistics were spread.

    Shapes: statistics (n_rounds, n_statistics).
    """
    centred = statistics - statistics.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    total = float((values**2).sum())
    tolerance = 1e-9 * max(1.0, float(np.abs(statistics).max()))
    effective = total**2 / float((values**4).sum()) if total > tolerance**2 else 0.0
    return {
        "rank": int((values > tolerance).sum()),
        "effective_rank": effective,
        "spread": float(np.sqrt(total / len(statistics))),
    }


def extrapolation(statistic: Array, seen: Array) -> float:
    """Measure how far a statistic lies from the seen ones, against their own distances.

    Shapes: statistic (n_statistics,), seen (n_rounds, n_statistics).
    """
    if len(seen) < 2:
        return 0.0
    among = cdist(seen, seen)
    np.fill_diagonal(among, np.inf)
    reach = max(float(among.min(axis=1).max()), 1e-3)
    return float(cdist(statistic[None], seen).min()) / reach


def total_variation(p: Array, q: Array) -> Array:
    """Half the absolute difference of label mixes, over the last axis."""
    distance: Array = 0.5 * np.abs(p - q).sum(axis=-1)
    return distance


def cycling(counts: Array) -> dict[str, float]:
    """Compare label mixes one and two rounds apart: counts (n_rounds, n_classes)."""
    if len(counts) < 3:
        return {"tv_1": np.nan, "tv_2": np.nan, "cycling_index": 0.0}
    shares = smooth_shares(counts)
    near = float(total_variation(shares[1:], shares[:-1]).mean())
    far = float(total_variation(shares[2:], shares[:-2]).mean())
    return {
        "tv_1": near,
        "tv_2": far,
        "cycling_index": max(0.0, 1.0 - far / near) if near > 0 else 0.0,
    }


def conditional_shift_p_value(counts: Array, hits: Array) -> float:
    """Test whether the uncorrected classifier's recall changes from round to round.

    Shapes: counts (n_rounds, n_classes), hits (n_rounds, n_classes).
    """
    # A fixed rule keeps its recall under a pure change of label mix, so a small value says that
    # the classes themselves look different now.
    known = np.isfinite(hits) & (counts > 0)
    totals = np.where(known, counts, 0.0)
    right = np.where(known, hits, 0.0)
    pooled = right.sum(axis=0) / np.maximum(totals.sum(axis=0), 1.0)
    # expected cells below 5 make the test liberal: such classes and rounds are left out
    enough = (totals * np.minimum(pooled, 1 - pooled) >= 5.0) & known
    freedom = int((enough.sum(axis=0) - 1).clip(min=0).sum())
    if freedom == 0:
        return float("nan")
    kept, right = np.where(enough, totals, 0.0), np.where(enough, right, 0.0)
    rate = right.sum(axis=0) / np.maximum(kept.sum(axis=0), 1.0)
    variance = np.where(enough, kept * rate * (1 - rate), 1.0)
    terms = np.where(enough, (right - kept * rate) ** 2 / np.maximum(variance, 1e-12), 0.0)
    return float(chi2.sf(terms.sum(), freedom))


def response_p_value(
    statistics: Array,
    counts: Array,
    fit: Fitter,
    *,
    log_base: Array,
    n_permutations: int = 99,
    generator: np.random.Generator,
) -> float:
    """Test by permutation whether the label mix answers the deployed model.

    Shapes: statistics (n_pairs, n_statistics), counts (n_pairs, n_classes), log_base (n_classes,).
    """
    # The statistics are dealt out anew over the rounds in blocks, which keeps slow drift and
    # breaks the tie between a deployment and what followed.
    n_pairs = len(counts)
    if n_pairs < 4:
        return float("nan")
    simple = fit_fixed(statistics, counts, log_base=log_base)
    scaled = counts / dispersion(simple, statistics, counts)

    def misfit(order: Codes) -> float:
        response = fit(statistics[order], scaled, log_base=log_base)
        return float(deviance(response.log_prior(statistics[order]), scaled).sum())

    reached = misfit(np.arange(n_pairs))
    length = max(1, round(n_pairs ** (1 / 3)) - 1)
    at_least = 1
    for _ in range(n_permutations):
        at_least += misfit(_block_order(n_pairs, length, generator)) <= reached + 1e-9
    return at_least / (1 + n_permutations)


def one_step_gains(
    trajectory: Trajectory, fit: Fitter, *, log_base: Array, first: int = 3
) -> dict[str, float]:
    """Compare what the statistic, the last mix and nothing tell of the next mix, one step ahead.

    Shapes: log_base (n_classes,).
    """
    statistics, counts = trajectory.pairs()
    before = trajectory.counts[: len(counts)]
    previous = log_softmax(np.log(smooth_shares(before)), axis=1)
    sources = {
        "gain_nothing": (statistics, fit_fixed),
        "gain_previous_mix": (previous, fit_linear),
        "gain_statistic": (statistics, fit),
    }
    if len(counts) <= first:
        return dict.fromkeys(sources, float("nan"))
    return {
        name: _one_step_gain(inputs, counts, kind, log_base, first)
        for name, (inputs, kind) in sources.items()
    }


def _one_step_gain(inputs: Array, counts: Array, fit: Fitter, log_base: Array, first: int) -> float:
    gained, response = 0.0, None
    # refits at a few growing sizes are enough for a comparison
    due = set(np.unique(np.geomspace(first, len(counts), 20).astype(int)))
    for t in range(first, len(counts)):
        if response is None or t in due:
            simple = fit_fixed(inputs[:t], counts[:t], log_base=log_base)
            scaled = counts[:t] / dispersion(simple, inputs[:t], counts[:t])
            response = fit(inputs[:t], scaled, log_base=log_base)
        gained += float(counts[t] @ (response.log_prior(inputs[t][None])[0] - log_base))
    return gained / max(1.0, float(counts[first:].sum()))


def _block_order(n: int, length: int, generator: np.random.Generator) -> Codes:
    shift = int(generator.integers(n))
    blocks = np.array_split(np.roll(np.arange(n), shift), max(1, n // length))
    order = generator.permutation(len(blocks))
    return np.concatenate([blocks[i] for i in order])
