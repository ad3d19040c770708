"""What candidates would score in the round after their deployment."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skperf.performative.anticipation import Anticipation, Settings, blend
from skperf.performative.response import ResponseMap

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

COSTLY = 2000  # free parameters above which a map is refitted for few resamples only


def score_under(prior: Array, scores: Array, codes: Codes) -> float:
    """Mean score of rows reweighted to a label mix: prior (n_classes,), scores (n,), codes (n,)."""
    totals = np.bincount(codes, minlength=len(prior))
    sums = np.bincount(codes, scores, minlength=len(prior))
    present = totals > 0
    return float(prior[present] @ (sums[present] / totals[present]) / prior[present].sum())


def resampled_maps(
    state: Anticipation, settings: Settings, n_bootstrap: int, generator: np.random.Generator
) -> list[ResponseMap]:
    """Refit the map in use to rounds drawn with replacement."""
    contender = state.contenders[state.choice.name]
    candidate = settings.candidates[state.choice.name]
    statistics, counts = state.trajectory.pairs()
    if not candidate.weigh or n_bootstrap == 0:
        return [contender.response]
    costly = state.choice.name == "linear" and statistics.shape[1] * counts.shape[1] > COSTLY
    maps = []
    for _ in range(min(n_bootstrap, 5 if costly else 50)):
        drawn = generator.integers(len(counts), size=len(counts))
        scaled = counts[drawn] / contender.dispersion
        maps.append(
            candidate.fit(statistics[drawn], scaled, log_base=state.log_base, l2=settings.l2)
        )
    return maps


def answer_of(state: Anticipation, response: ResponseMap, statistic: Array) -> Array:
    """Mix (n_classes,) that a map expects, blended as the state blends its own."""
    answer = response.log_prior(statistic[None])[0]
    return np.exp(blend(answer, state.log_base, state.choice.strength, state.choice.mix))


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one candidate would score."""

    value: float
    low: float
    high: float
    prior: Array  # (n_classes,)


def predict_score(
    state: Anticipation,
    maps: list[ResponseMap],
    statistic: Callable[[Codes], Array],
    score: Callable[[Array, Codes], float],
    draws: Codes,
    errors: Array,
    *,
    level: float = 0.9,
) -> Prediction:
    """Predict the score of a candidate in the mix that answers it.

    Shapes: draws (n_bootstrap, n), errors (n_bootstrap, n_classes).
    """
    everything = np.arange(draws.shape[1])
    prior = np.exp(state.log_prior(statistic(everything)))
    value = score(prior, everything)
    resampled = []
    for i, (rows, error) in enumerate(zip(draws, errors, strict=True)):
        mix = answer_of(state, maps[i % len(maps)], statistic(rows)) if maps else prior
        met = np.maximum(mix + error, 1e-12)
        resampled.append(score(met / met.sum(), rows))
    if not resampled:
        return Prediction(value, np.nan, np.nan, prior)
    tails = [(1 - level) / 2, (1 + level) / 2]
    # the usual quantiles of few draws hold less than they say
    low, high = np.quantile(resampled, tails, method="weibull")
    return Prediction(value, min(value, float(low)), max(value, float(high)), prior)
