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
    """Mean score of rows reweighted to a label mix.

    Parameters
    ----------
    prior : ndarray of shape (n_classes,)
        The mix.
    scores : ndarray of shape (n,)
        One for each row.
    codes : ndarray of shape (n,)
        Classes of the rows; classes without rows are left out of the mean.

    Returns
    -------
    float
        ``sum_c prior_c mean(scores of c)`` over the classes present, renormalised.
    """
    totals = np.bincount(codes, minlength=len(prior))
    sums = np.bincount(codes, scores, minlength=len(prior))
    present = totals > 0
    return float(prior[present] @ (sums[present] / totals[present]) / prior[present].sum())


def resampled_maps(
    state: Anticipation, settings: Settings, n_bootstrap: int, generator: np.random.Generator
) -> list[ResponseMap]:
    """Refit the map in use to rounds drawn with replacement.

    Parameters
    ----------
    state : Anticipation
        With a map in use.
    settings : Settings
        Its kinds of maps.
    n_bootstrap : int
        Resamples wanted; costly maps give fewer, neural ones are not refitted.
    generator : numpy.random.Generator
        Draws.

    Returns
    -------
    list of ResponseMap
        At least one.
    """
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
    """What one candidate would score.

    Attributes
    ----------
    value, low, high : float
        Expected score, and its interval from resampled rows, maps and one-step-ahead errors.
    prior : ndarray of shape (n_classes,)
        Label mix it would meet.
    """

    value: float
    low: float
    high: float
    prior: Array


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

    Parameters
    ----------
    state : Anticipation
        What is known of the response.
    maps : list of ResponseMap
        From `resampled_maps`; empty if nothing is known, then the base mix is expected.
    statistic : callable
        Row indices to the candidate's statistic on these rows.
    score : callable
        Label mix and row indices to the candidate's score.
    draws : ndarray of shape (n_bootstrap, n)
        Resampled row indices.
    errors : ndarray of shape (n_bootstrap, n_classes)
        Realised minus anticipated shares of past rounds, resampled.
    level : float
        Of the interval.

    Returns
    -------
    Prediction
        The score, its interval, and the mix.
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
