"""What a record of rounds can and cannot tell."""

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import chi2

from skperf.performative.label_shift import Array, smooth_shares
from skperf.performative.response import Inputs


def identifiability(statistics: Array) -> dict[str, float]:
    """Say how widely statistics (n_rounds, n_statistics) of deployed models were spread."""
    centred = statistics - statistics.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    total = float((values**2).sum())
    tolerance = 1e-9 * max(1.0, float(np.abs(statistics).max()))
    effective = total**2 / float((values**4).sum()) if total > tolerance**2 else 0.0
    rank, spread = int((values > tolerance).sum()), float(np.sqrt(total / len(statistics)))
    return {"rank": rank, "effective_rank": effective, "spread": spread}


def extrapolation(statistic: Array, seen: Array) -> float:
    """Distance of a statistic (k,) from seen ones (n_rounds, k), against their own distances."""
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
    index = max(0.0, 1.0 - far / near) if near > 0 else 0.0
    return {"tv_1": near, "tv_2": far, "cycling_index": index}


def conditional_shift_p_value(counts: Array, hits: Array) -> float:
    """Test whether raw recalls, hits over counts (n_rounds, n_classes), change by round."""
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
    inputs: Inputs,
    counts: Array,
    expected: Array,
    n_permutations: int,
    generator: np.random.Generator,
) -> float:
    """Test by signs drawn anew whether counts (R, K) answer statistics beyond their own past."""
    # Mixes and statistics may both wander without one answering the other, and both are noisier
    # where a class is rare. Changes of log mixes and of statistics are regressed on the mixes of
    # the two rounds before and on the change of the log mix `expected` (R, K) that the deployed
    # model was corrected for, which moves its recall. What is left of the mixes is news: where no
    # statistic foretells it, its sign is a coin's, whatever its size in a round.
    change = np.diff(expected, axis=0, prepend=expected[:1])
    known = np.isfinite(inputs.mixes[:, :2]).all(axis=(1, 2)) & (counts.sum(axis=1) > 0)
    known &= np.isfinite(inputs.statistics[:, :2]).all(axis=(1, 2))
    known[:1] = False
    inputs, counts, change = inputs[known], counts[known], change[known]
    n_pairs, n_classes = counts.shape
    if n_pairs < 6:
        return float("nan")
    past = [inputs.mixes[:, 0], inputs.mixes[:, 1], change]
    null = np.stack([_centred(one).ravel() for one in past], axis=1)
    news = _centred(np.log(smooth_shares(counts)) - inputs.mixes[:, 0])
    news = _without(null, news.ravel()).reshape(n_pairs, n_classes)
    told = inputs.statistics[:, 0] - inputs.statistics[:, 1]
    if told.shape[1] == n_classes:
        told = _without(null, _centred(told).ravel()).reshape(n_pairs, n_classes)
        terms = (told * news).sum(axis=1)[:, None]
    else:
        # a round's news on an orthogonal basis of what the statistics may tell
        basis = np.linalg.qr(told - told.mean(axis=0))[0][:, : max(1, n_pairs // 4)]
        terms = (basis[:, :, None] * news[:, None]).reshape(n_pairs, -1)
    signs = generator.choice([-1.0, 1.0], (n_permutations, n_pairs))
    found = (terms.sum(axis=0) ** 2).sum() * (1 - 1e-9)
    at_least = 1 + int((((signs @ terms) ** 2).sum(axis=1) >= found).sum())
    return at_least / (1 + n_permutations)


def _centred(values: Array) -> Array:
    """Take the level of every round and the mean over time from log mixes (R, K)."""
    rounds = values - values.mean(axis=1, keepdims=True)
    left: Array = rounds - rounds.mean(axis=0)
    return left


def _without(null: Array, values: Array) -> Array:
    """Residuals (n, ...) of a regression on the columns of the null (n, p)."""
    solution = np.linalg.lstsq(null, values, rcond=None)[0]
    left: Array = values - null @ solution
    return left
