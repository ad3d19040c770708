"""From measurements to a linear model for each example, by every method."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from skperf.components.estimation import Fit, mean_correlation, ridge
from skperf.components.passes import Measurements, Question
from skperf.components.priors import (
    Population,
    Prior,
    mixture,
    path_prior,
    pooled_slopes,
    population,
    with_singles,
)

Array = NDArray[np.float64]
_PASSES_FOR_SLOPES = 64
_MASKS_FOR_SLOPES = 256
_LEAST_MASKS = 32
"""Fewer do not better what single ablations show, but add their noise."""


@dataclass(frozen=True)
class Learned:
    """What was learned on the examples of `fit` and holds for any others."""

    population: Population | None = None
    slopes: Array | None = None  # (n_guesses,)
    penalty: float | None = None


def attribute(
    question: Question, measured: Measurements, learned: Learned | None = None
) -> tuple[Fit, Learned]:
    """Fit the linear models."""
    done, alone = measured.done, measured.alone
    if alone is not None and done.masks < min(_LEAST_MASKS, question.n_components):
        fit = exact(alone, measured.baseline)
        if done.masks:
            predicted = alone @ question.masks(range(done.masks)).T
            fit = replace(fit, oob_score=mean_correlation(predicted, measured.outcomes.T))
        return fit, Learned()
    prior, shared = _guesses(measured, learned)
    slopes = None
    if prior is not None:
        slopes = learned.slopes if learned else _slopes(question, measured, prior)
    if not done.masks:
        assert prior is not None
        assert slopes is not None
        return _path_only(question, measured, prior, slopes), Learned(shared, slopes)
    penalty = learned.penalty if learned else None
    outcomes = measured.outcomes
    anchor = measured.baseline if prior is None else None
    masks = question.masks(range(len(outcomes)))
    fit = ridge(masks, outcomes, prior, slopes=slopes, anchor=anchor, penalty=penalty)
    return fit, Learned(shared, slopes, fit.penalty)


def _guesses(
    measured: Measurements, learned: Learned | None
) -> tuple[Prior | None, Population | None]:
    prior, shared = None, None
    if measured.paths is not None:
        shared = learned.population if learned else population(measured.paths)
        assert shared is not None
        prior = path_prior(measured.paths, shared)
    if measured.alone is not None:
        prior = with_singles(prior, measured.alone)
    return prior, shared


def exact(coefficients: Array, baseline: Array) -> Fit:
    """Linear models of falls without noise: (n_examples, n_components), (n_examples,)."""
    intercept = baseline - coefficients.sum(1)
    return Fit(coefficients, intercept, np.zeros(coefficients.shape), 0.0, float("nan"))


def _path_only(question: Question, measured: Measurements, prior: Prior, slopes: Array) -> Fit:
    coefficients = mixture(prior, slopes)
    values = np.concatenate(measured.path_values)
    chosen = _spread(len(values), _PASSES_FOR_SLOPES)
    predicted = _on_paths(question, chosen, [coefficients])[0]
    intercept = (values[chosen] - predicted).mean(0)
    stderr = np.abs(slopes[0]) * np.sqrt(prior.noise)
    return Fit(coefficients, intercept, stderr, 0.0, float("nan"))


def _slopes(question: Question, measured: Measurements, prior: Prior) -> Array:
    observations = []
    if measured.paths is not None:
        values = np.concatenate(measured.path_values)
        chosen = _spread(len(values), _PASSES_FOR_SLOPES)
        observations.append((_on_paths(question, chosen, list(prior.guesses)), values[chosen]))
    outcomes = measured.outcomes[:_MASKS_FOR_SLOPES]
    if len(outcomes) > 2:
        masks = question.masks(range(len(outcomes))).astype(np.float64)
        features = np.stack([masks @ guess.T for guess in prior.guesses])
        observations.append((features, outcomes))
    return pooled_slopes(observations)


def _on_paths(question: Question, numbers: list[int], guesses: list[Array]) -> Array:
    """Predict the outputs of gradient passes by each guess, (n_guesses, n_passes, n)."""
    features = []
    for number in numbers:
        gates, _ = question.gates(number)
        features.append([np.einsum("nj,nj->n", gates, guess) for guess in guesses])
    return np.array(features).transpose(1, 0, 2)


def _spread(count: int, most: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})
