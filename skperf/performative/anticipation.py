"""Anticipate the next label mix: maps of several inputs and horizons in competition.

Before a round is added to the record, every map says what it expected of it. Weights follow the
likelihood of what then came, and a share of them is dealt out anew at every round (fixed share),
so that a map that was wrong for long can lead again within a few rounds after the world changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skperf.performative.label_shift import Array, Codes, log_softmax, probabilities
from skperf.performative.response import Form, Inputs, ResponseMap, deviance, dispersion, fit_map
from skperf.performative.trajectory import Trajectory

MEMORY = 0.9  # of the running dispersion: about ten rounds
WINDOW = 300  # rounds that a map learns from, where no other buffer is asked for
SHARE = 0.02  # of the weights is dealt out anew in a round
FURTHER_PASSES = 2


@dataclass(frozen=True, eq=False)
class Candidate:
    """How one map is fitted: of a form by likelihood, or by a function of its own."""

    form: Form
    decay: float = 1.0
    fit: Callable[..., ResponseMap] | None = None
    first_pair: int = 1
    growth: float = 1.0
    weigh: bool = True
    kind: str = "tied"

    @property
    def window(self) -> int:
        """Rounds beyond which nothing is left of a round's weight."""
        return WINDOW if self.decay > 0.999 else max(8, int(np.log(0.01) / np.log(self.decay)))

    def due(self, n_pairs: int, fitted_at: int, n_classes: int) -> bool:
        """Tell whether a new round changes the map by enough to fit it again."""
        horizon = min(n_pairs, WINDOW, 1.0 / max(1e-9, 1.0 - self.decay))
        # many classes make a fit dear; thirty rounds or more change little by one
        every = max(1.0, horizon * (0.1 if n_classes > 30 else 0.04))
        return (
            n_pairs >= fitted_at * min(self.growth, 1.25)
            if self.growth > 1.0
            else (n_pairs - fitted_at >= int(every))
        )


@dataclass(frozen=True, eq=False)
class Settings:
    """What stays the same over all rounds."""

    candidates: Mapping[str, Candidate]
    l2: float = 1.0
    buffer_size: int | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled rows of a round, kept for the log-loss objective."""

    scores: Array  # (n, n_classes)
    codes: Codes  # (n,)
    weight: Array  # (n,)


@dataclass(frozen=True, eq=False)
class Contender:
    """A fitted map, its weight among all and among those that do not read the model."""

    response: ResponseMap
    log_weights: Array  # (2,)
    dispersion: float
    fitted_at: int
    reads_model: bool
    kind: str
    cost: float = 0.0


@dataclass(frozen=True, eq=False)
class Anticipation:
    """Everything known after some rounds; `observe` gives the next state and changes nothing."""

    log_base: Array  # (n_classes,)
    trajectory: Trajectory
    contenders: Mapping[str, Contender] = field(default_factory=dict)
    spread: float = 10.0
    n_rounds: int = 0
    n_pairs: int = 0
    rows: tuple[Rows, ...] = ()

    @property
    def leader(self) -> str | None:
        """Name of the map of the largest weight, if any was fitted."""
        weights = {name: one.log_weights[0] for name, one in self.contenders.items()}
        return max(weights, key=lambda name: weights[name]) if weights else None

    def log_answer(self, inputs: Inputs, *, model_free: bool = False) -> Array:
        """Log mix (n, n_classes) expected by all maps together; the base without any."""
        return self.mixture(self.answers(inputs), model_free=model_free)

    @cached_property
    def ahead(self) -> tuple[Inputs, dict[str, Array]]:
        """What is known before the round after the last one, and what each map expects of it."""
        inputs = self.trajectory.coming()
        return inputs, self.answers(inputs)

    def answers(self, inputs: Inputs) -> dict[str, Array]:
        """Log mixes (n, n_classes) expected by each map; NaN where its inputs are not known."""
        return {name: one.response.log_prior(inputs) for name, one in self.contenders.items()}

    def mixture(self, answers: Mapping[str, Array], *, model_free: bool = False) -> Array:
        """Weigh the answers of maps, (n, n_classes) each."""
        reads = {name: one.reads_model for name, one in self.contenders.items()}
        kept = {n: a for n, a in answers.items() if not (model_free and reads[n])}
        if not kept:
            n = max((len(answer) for answer in answers.values()), default=1)
            return np.repeat(self.log_base[None], n, axis=0)
        weights = np.array([self.contenders[name].log_weights[int(model_free)] for name in kept])
        stacked = np.stack(list(kept.values()))  # (n_maps, n, n_classes)
        known: NDArray[np.bool_] = np.asarray(np.isfinite(stacked).all(axis=2))
        scores = np.where(known, weights[:, None], -np.inf)
        none: NDArray[np.bool_] = np.asarray(~known.any(axis=0))
        # scipy's logsumexp spends longer on dispatch than on arrays this small
        scores = scores - np.logaddexp.reduce(np.where(none, 0.0, scores), axis=0)
        mixed: Array = np.logaddexp.reduce(
            np.where(known[..., None], stacked, 0.0) + scores[..., None], axis=0
        )
        mixed[none] = self.log_base
        return mixed


def blend(answer: Array, log_base: Array, strength: float | Array, mix: float | Array) -> Array:
    """Move from the base mix (n_classes,) towards a map's answer (n_classes,)."""
    # `log q = log pi_0 + strength (log((1 - mix) T(S) + mix pi_0) - log pi_0)`, normalised.
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp(answer + np.log1p(-mix), log_base + np.log(mix))
    blended: Array = log_softmax(log_base + strength * (mixed - log_base), axis=-1)
    return blended


def observe(
    state: Anticipation,
    settings: Settings,
    trajectory: Trajectory,
    *,
    at: int = -1,
    rows: Rows | None = None,
    answers: Mapping[str, Array] | None = None,
) -> Anticipation:
    """Score what each map expected of a trajectory's round, (1, n_classes), then refit."""
    at = at % len(trajectory)
    counts = trajectory.counts[at]
    known = state.trajectory.rounds[-1:].tolist() == trajectory.rounds[-1:].tolist()
    state = replace(state, trajectory=trajectory, n_rounds=state.n_rounds + (not known))
    if at < trajectory.lag or counts.sum() == 0:
        return state
    answers = state.answers(trajectory.before(at)) if answers is None else answers
    expected = state.mixture(answers)[0]
    kept = (*state.rows, rows)[-(settings.buffer_size or WINDOW) :] if rows is not None else ()
    state = replace(
        state,
        contenders=_weighed(state, answers, expected, counts, rows),
        spread=_updated_spread(state, expected, counts),
        n_pairs=state.n_pairs + 1,
        rows=kept,
    )
    return replace(state, contenders=_refitted(state, settings))


def _weighed(
    state: Anticipation,
    answers: Mapping[str, Array],
    expected: Array,
    counts: Array,
    rows: Rows | None,
) -> dict[str, Contender]:
    """Move the weights by the likelihood of a round, then deal out a share of them anew."""
    if not answers:
        return {}
    names = list(answers)
    mixes = np.concatenate([answers[name] for name in names])
    # a map that could not answer is judged as all of them together
    mixes = np.where(np.isfinite(mixes).all(axis=1)[:, None], mixes, expected)
    if rows is None:
        gains = mixes @ counts
    else:
        own = mixes[:, rows.codes] + rows.scores[np.arange(len(rows.codes)), rows.codes]
        gains = (own - np.logaddexp.reduce(rows.scores + mixes[:, None], axis=2)) @ rows.weight
    contenders = [state.contenders[name] for name in names]
    gains = (gains - np.array([one.cost for one in contenders])) / state.spread
    weights = np.array([one.log_weights for one in contenders]).T + gains  # (2, n_maps)
    usable: NDArray[np.bool_] = np.asarray(np.isfinite(weights))
    total = np.logaddexp.reduce(weights, axis=1, keepdims=True)
    weights = weights - np.where(np.isfinite(total), total, 0.0)
    anew = np.log(SHARE / np.maximum(usable.sum(axis=1, keepdims=True), 1))
    weights = np.where(usable, np.logaddexp(weights + np.log1p(-SHARE), anew), -np.inf)
    return _with_weights(dict(zip(names, contenders, strict=True)), weights)


def _with_weights(contenders: dict[str, Contender], weights: Array) -> dict[str, Contender]:
    """Give maps their log weights (2, n_maps)."""
    told = zip(contenders.items(), weights.T, strict=True)
    return {name: replace(one, log_weights=each) for (name, one), each in told}


def _updated_spread(state: Anticipation, expected: Array, counts: Array) -> float:
    """Average the surprises so far, then those of about ten rounds."""
    freedom = max(1, len(counts) - 1)
    surprise = float(deviance(expected[None], counts[None])[0]) / freedom
    weight = max(1 - MEMORY, 1.0 / (state.n_pairs + 1.0))
    return max(1.0, (1 - weight) * state.spread + weight * surprise)


def _refitted(state: Anticipation, settings: Settings) -> dict[str, Contender]:
    contenders = dict(state.contenders)
    inputs, counts = state.trajectory.pairs(settings.buffer_size or WINDOW)
    fresh = [name for name in settings.candidates if name not in contenders]
    for name, candidate in settings.candidates.items():
        known = state.contenders.get(name)
        if known is None:
            due = state.n_pairs >= candidate.first_pair
        else:
            due = candidate.due(state.n_pairs, known.fitted_at, len(counts[0]))
        if due:
            contenders[name] = _fitted(state, settings, candidate, known, inputs, counts)
    entered = [name for name in fresh if name in contenders]
    return _with_entrants(contenders, entered)


def _with_entrants(contenders: dict[str, Contender], entered: list[str]) -> dict[str, Contender]:
    """Give maps that enter the weight they would have had among equals."""
    if not entered:
        return contenders
    new = np.array([name in entered for name in contenders])
    free = np.array([not one.reads_model for one in contenders.values()])
    allowed = np.stack([np.ones_like(free), free])  # (2, n_maps)
    weights = np.array([one.log_weights for one in contenders.values()]).T
    n_maps = np.maximum(allowed.sum(axis=1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        old = weights + np.log1p(-(allowed & new).sum(axis=1, keepdims=True) / n_maps)
    moved = np.where(new, -np.log(n_maps), old)
    return _with_weights(contenders, np.where(allowed, moved, -np.inf))


def _fitted(
    state: Anticipation,
    settings: Settings,
    candidate: Candidate,
    known: Contender | None,
    inputs: Inputs,
    counts: Array,
) -> Contender:
    inputs, counts = inputs[-candidate.window :], counts[-candidate.window :]
    excess = known.dispersion if known else 10.0
    ages = candidate.decay ** np.arange(len(counts) - 1, -1, -1)[:, None]
    weights = ages / excess if candidate.weigh else ages
    start: Any = known.response if known else None

    def fit(start: Any) -> ResponseMap:
        targets = weights * _targets(state, start, inputs, counts)
        shared: Any = {"log_base": state.log_base, "l2": settings.l2, "start": start}
        if candidate.fit is not None:
            return candidate.fit(inputs, targets, **shared)
        # a map that was fitted one round ago is a Newton step or two from its next fit
        steps = 100 if start is None or state.n_pairs < 20 else 2
        return fit_map(inputs, targets, form=candidate.form, max_iter=steps, **shared)

    response = fit(start)
    # pseudo-counts depend on the map that they are for
    for _ in range(FURTHER_PASSES if state.rows else 0):
        response = fit(response)
    reads = candidate.form.reads_model
    if known is None:
        cost = candidate.form.cost
        none = np.full(2, -np.inf)
        known = Contender(response, none, excess, 0, reads, candidate.kind, cost)
    factor = 1.0
    if candidate.weigh:
        recent = slice(-max(8, int(2 / max(1e-9, 1 - candidate.decay))), None)
        factor = dispersion(response, inputs[recent], counts[recent])
    return replace(known, response=response, dispersion=factor, fitted_at=state.n_pairs)


def _targets(
    state: Anticipation, response: ResponseMap | None, inputs: Inputs, counts: Array
) -> Array:
    """Give the counts to fit: the labels, or under the log-loss objective their pseudo-counts."""
    # With mass the sum of corrected probabilities, the gradient of the log loss is mass minus
    # counts; counts - mass + total * prior give the label likelihood the same gradient.
    if not state.rows:
        return counts
    kept = state.rows[-len(counts) :]
    start = np.tile(state.log_base, (len(counts), 1))
    log_prior = start if response is None else response.log_prior(inputs)
    log_prior = np.where(np.isfinite(log_prior), log_prior, state.log_base)
    targets = counts.copy()
    for i, (one, q) in enumerate(zip(kept, log_prior[-len(kept) :], strict=True)):
        targets[len(counts) - len(kept) + i] = (
            np.bincount(one.codes, one.weight, minlength=len(q))
            - one.weight @ probabilities(one.scores + q)
            + one.weight.sum() * np.exp(q)
        )
    return targets
