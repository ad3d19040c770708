"""What candidates would score in the round after their deployment."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from skperf.performative.label_shift import Array, Codes
from skperf.performative.record import Record
from skperf.performative.response import LogLinearMap, ResponseMap, fit_map

COSTLY = 2000  # free parameters above which a map is refitted for few resamples only
RECENT = 50  # rounds that say whether the mix answers the model
ENOUGH = 5
OTHER_MAPS = 0.3  # of the resamples look at a map that does not lead


def score_under(prior: Array, scores: Array, codes: Codes) -> float:
    """Mean score of rows reweighted to a label mix: prior (n_classes,), scores (n,), codes (n,)."""
    totals = np.bincount(codes, minlength=len(prior))
    sums = np.bincount(codes, scores, minlength=len(prior))
    present = totals > 0
    return float(prior[present] @ (sums[present] / totals[present]) / prior[present].sum())


def answers_the_model(record: Record) -> bool:
    """Whether maps that read the model foretell mixes better than any that do not."""
    gains = gains_of(record)
    if len(gains["all"]) < ENOUGH:
        return False
    for other in ("model_free", "last"):
        gained = gains["all"] - gains[other]
        error = gained.std(ddof=1) / np.sqrt(len(gained))
        if gained.mean() <= 2 * error:
            return False
    return True


def gains_of(record: Record) -> dict[str, Array]:
    """Nats a label saved over the base mix in recent rounds, by what was expected of them."""
    known = [one for one in record.losses if np.isfinite(one.get("gain_all", np.nan))][-RECENT:]
    return {
        name: np.array([one[f"gain_{name}"] for one in known])
        for name in ("all", "model_free", "last")
    }


def exogenous_prior(record: Record) -> Array:
    """Mix (n_classes,) expected whatever is deployed."""
    gains, state = gains_of(record), record.anticipation
    if len(gains["last"]) and gains["last"].mean() > gains["model_free"].mean():
        return np.exp(record.last_mix())
    answer: Array = np.exp(state.log_answer(state.trajectory.coming(), model_free=True)[0])
    return answer


def resampled_maps(
    record: Record, n_bootstrap: int, generator: np.random.Generator
) -> list[ResponseMap]:
    """Refit the leading map to rounds drawn with replacement; now and then take another one."""
    state, settings = record.anticipation, record.settings
    reading = {n: c for n, c in state.contenders.items() if c.reads_model}
    coming = state.trajectory.coming()
    statistic = np.nan_to_num(coming.statistics[:, 0], nan=0.5) + 1e-6
    # what reads shares or confusions has no answer to a candidate's statistic alone
    told = coming.at(statistic)
    reading = {n: c for n, c in reading.items() if np.isfinite(c.response.log_prior(told)).all()}
    if not reading or n_bootstrap == 0:
        return []
    leader = max(reading, key=lambda name: reading[name].log_weights[0])
    contender, candidate = reading[leader], settings.candidates[leader]
    others = [c.response for n, c in reading.items() if n != leader and c.kind != "mlp"]
    inputs, counts = state.trajectory.pairs()
    inputs, counts = inputs[-candidate.window :], counts[-candidate.window :]
    ages = candidate.decay ** np.arange(len(counts) - 1, -1, -1)[:, None]
    costly = bool(candidate.form.free) and inputs.statistics.shape[2] * counts.shape[1] > COSTLY
    how: Any = {"form": candidate.form, "log_base": state.log_base, "l2": settings.l2}
    how |= {"max_iter": 10}
    maps: list[ResponseMap] = []
    for _ in range(min(n_bootstrap, 5 if costly else 50)):
        if others and generator.random() < OTHER_MAPS:
            # no past error speaks of a bend beyond what was seen, but maps that differ there do
            maps.append(others[int(generator.integers(len(others)))])
        elif isinstance(contender.response, LogLinearMap):
            drawn = generator.integers(len(counts), size=len(counts))
            scaled = (ages * counts)[drawn] / contender.dispersion
            maps.append(fit_map(inputs[drawn], scaled, start=contender.response, **how))
        else:
            maps.append(contender.response)
    return maps


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model that might be deployed: its statistic and score, as functions of row indices."""

    statistic: Callable[[Codes], Array]
    score: Callable[[Array, Codes], float]


def predict_scores(
    record: Record,
    candidates: list[Candidate],
    codes: Codes,
    n_bootstrap: int,
    generator: np.random.Generator,
    *,
    answers: bool,
) -> list[tuple[float, float, float, Array]]:
    """Score, its interval and the mix that answers, of each candidate, on rows with labels (n,)."""
    everything = np.arange(len(codes))
    draws = _row_draws(codes, n_bootstrap, generator)
    maps = resampled_maps(record, n_bootstrap, generator) if answers else []
    errors = _one_step_errors(record)
    errors = errors[generator.integers(len(errors), size=n_bootstrap)]
    exogenous = None if answers else exogenous_prior(record)
    found = []
    for candidate in candidates:
        prior = exogenous
        if prior is None:
            prior = _met(record, record.anticipation.log_answer, candidate, everything)
        value = candidate.score(prior, everything)
        resampled = []
        for i, (rows, error) in enumerate(zip(draws, errors, strict=True)):
            mix = prior
            if maps:
                answer = maps[i % len(maps)].log_prior
                mix = _met(record, answer, candidate, rows)
                mix = mix if np.isfinite(mix).all() else prior
            met = np.maximum(mix + error, 1e-12)
            resampled.append(candidate.score(met / met.sum(), rows))
        low = high = np.nan
        if resampled:
            # the usual quantiles of few draws hold less than they say
            low, high = np.quantile(resampled, [0.05, 0.95], method="weibull")
            low, high = min(value, low), max(value, high)
        found.append((value, float(low), float(high), prior))
    return found


def _met(record: Record, answer: Callable[..., Array], candidate: Candidate, rows: Codes) -> Array:
    """Mix (n_classes,) that answers a candidate: in full, however much of it would be applied."""
    inputs = record.anticipation.trajectory.coming().at(candidate.statistic(rows)[None])
    mix: Array = np.exp(answer(inputs)[0])
    return mix


def _one_step_errors(record: Record) -> Array:
    """Realised minus expected shares, (n_errors, n_classes), of the rounds to learn from."""
    known = [one["realised"] - one["expected"] for one in record.losses]
    errors = np.reshape(known, (-1, len(record.log_base)))[record.options.min_rounds :]
    errors = errors[np.isfinite(errors).all(axis=1)][-(record.settings.buffer_size or 0) :]
    return errors if len(errors) else np.zeros((1, len(record.log_base)))


def _row_draws(codes: Codes, n_draws: int, generator: np.random.Generator) -> Codes:
    """Resample within the classes, (n_draws, n): recalls are what matters, not the mix."""
    order = np.argsort(codes, kind="stable")
    draws = np.empty((n_draws, len(codes)), dtype=np.int64)
    start = 0
    for size in np.bincount(codes):
        rows = order[start : start + size]
        picked = generator.integers(max(1, size), size=(n_draws, size))
        draws[:, start : start + size] = rows[picked]
        start += size
    return draws
