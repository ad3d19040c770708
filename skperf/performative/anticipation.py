"""Anticipate the next label mix: several response maps, judged one step ahead.

Before a round is added to the record, every map says what it expected; the cumulative
likelihood of what then came picks map, strength and mix. Strength 0, which means no correction,
is always among the choices, so a world that does not answer the model costs next to nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from skperf.performative.label_shift import log_loss, log_softmax, probabilities
from skperf.performative.response import Fitter, ResponseMap, deviance, dispersion
from skperf.performative.trajectory import Trajectory

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

STRENGTHS = np.array([0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
MIXES = np.array([0.0, 0.01, 0.03, 0.1, 0.25, 0.5])
MEMORY = 0.9  # of the running dispersion: about ten rounds
FURTHER_PASSES = 2


@dataclass(frozen=True, eq=False)
class Candidate:
    """How one kind of map is fitted."""

    fit: Fitter
    first_pair: int = 1
    growth: float = 1.0
    weigh: bool = True


@dataclass(frozen=True, eq=False)
class Settings:
    """What stays the same over all rounds."""

    candidates: Mapping[str, Candidate]
    strengths: Array = field(default_factory=STRENGTHS.copy)
    mixes: Array = field(default_factory=MIXES.copy)
    l2: float = 1.0
    decay: float = 1.0
    buffer_size: int | None = None
    min_rounds: int = 3


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled rows of a round, kept for the log-loss objective."""

    scores: Array  # (n, n_classes)
    codes: Codes  # (n,)
    weight: Array  # (n,)


@dataclass(frozen=True, eq=False)
class Contender:
    """A fitted map and its record."""

    response: ResponseMap
    scores: Array  # (n_strengths, n_mixes)
    dispersion: float
    fitted_at: int


@dataclass(frozen=True, eq=False)
class Choice:
    """The map in use: its name, and the strength and mix of `blend`."""

    name: str
    strength: float
    mix: float


@dataclass(frozen=True, eq=False)
class Anticipation:
    """Everything known after some rounds; `observe` gives the next state and changes nothing."""

    log_base: Array  # (n_classes,)
    trajectory: Trajectory
    contenders: Mapping[str, Contender] = field(default_factory=dict)
    choice: Choice = Choice("fixed", 0.0, 0.0)
    spread: float = 10.0
    n_rounds: int = 0
    n_pairs: int = 0
    rows: tuple[Rows, ...] = ()

    def log_prior(self, statistic: Array | None, *, strength: float | None = None) -> Array:
        """Anticipate the log mix (n_classes,) that answers a statistic; the base without one.

        Shapes: statistic (n_statistics,).
        """
        chosen = self.choice
        strength = chosen.strength if strength is None else strength
        if statistic is None or strength == 0.0 or chosen.name not in self.contenders:
            return self.log_base
        answer = self.contenders[chosen.name].response.log_prior(statistic[None])[0]
        return blend(answer, self.log_base, strength, chosen.mix)


def blend(answer: Array, log_base: Array, strength: float | Array, mix: float | Array) -> Array:
    """Move from the base mix towards a map's answer.

    Shapes: answer (n_classes,), log_base (n_classes,) -> (..., n_classes).
    """
    # `log q = log pi_0 + strength (log((1 - mix) T(S) + mix pi_0) - log pi_0)`, normalised.
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp(answer + np.log1p(-mix), log_base + np.log(mix))
    blended: Array = log_softmax(log_base + strength * (mixed - log_base), axis=-1)
    return blended


def observe(
    state: Anticipation,
    settings: Settings,
    number: int,
    statistic: Array,
    counts: Array,
    *,
    hits: Array | None = None,
    rows: Rows | None = None,
) -> Anticipation:
    """Add a round: score what each map expected of it, then learn from it.

    Shapes: statistic (n_statistics,), counts (n_classes,), hits (n_classes,).
    """
    before = state.trajectory.in_force()
    limit = settings.buffer_size
    trajectory = state.trajectory.append(number, statistic, counts, hits)
    trajectory = trajectory.latest(None if limit is None else limit + trajectory.lag)
    state = replace(state, trajectory=trajectory, n_rounds=state.n_rounds + 1)
    if before is None:
        return state
    contenders = {
        name: replace(one, scores=settings.decay * one.scores + gains)
        for name, one in state.contenders.items()
        for gains in [_gains(one, state.log_base, settings, before, counts, rows)]
    }
    kept = (*state.rows, rows)[-limit if limit else None :] if rows is not None else ()
    state = replace(
        state,
        contenders=contenders,
        spread=_updated_spread(state, before, counts),
        n_pairs=state.n_pairs + 1,
        rows=kept,
    )
    state = replace(state, contenders=_refitted(state, settings))
    return replace(state, choice=_chosen(state, settings))


def _gains(
    contender: Contender,
    log_base: Array,
    settings: Settings,
    statistic: Array,
    counts: Array,
    rows: Rows | None,
) -> Array:
    """Log likelihood of a round for every strength and mix, (n_strengths, n_mixes)."""
    answer = contender.response.log_prior(statistic[None])[0]
    expected = blend(
        answer, log_base, settings.strengths[:, None, None], settings.mixes[None, :, None]
    )
    if rows is None:
        return np.asarray(expected @ counts)
    losses = [
        log_loss(rows.scores + q, rows.codes, rows.weight)
        for q in expected.reshape(-1, len(log_base))
    ]
    likelihoods: Array = -rows.weight.sum() * np.reshape(losses, expected.shape[:2])
    return likelihoods


def _updated_spread(state: Anticipation, statistic: Array, counts: Array) -> float:
    """Average the surprises so far, then those of about ten rounds."""
    freedom = max(1, len(counts) - 1)
    surprise = float(deviance(state.log_prior(statistic)[None], counts[None])[0]) / freedom
    weight = max(1 - MEMORY, 1.0 / (state.n_pairs + 1.0))
    return (1 - weight) * state.spread + weight * surprise


def _refitted(state: Anticipation, settings: Settings) -> dict[str, Contender]:
    contenders = dict(state.contenders)
    for name, candidate in settings.candidates.items():
        known = state.contenders.get(name)
        due = candidate.first_pair if known is None else known.fitted_at * candidate.growth
        if state.n_pairs >= due:
            contenders[name] = _fitted(state, settings, candidate, known)
    return contenders


def _fitted(
    state: Anticipation, settings: Settings, candidate: Candidate, known: Contender | None
) -> Contender:
    statistics, counts = state.trajectory.pairs()
    excess = known.dispersion if known else 10.0
    ages = settings.decay ** np.arange(len(counts) - 1, -1, -1)[:, None]
    weights = ages / excess if candidate.weigh else ages

    def fit(start: ResponseMap | None) -> ResponseMap:
        targets = weights * _targets(state, start, statistics, counts)
        return candidate.fit(
            statistics, targets, log_base=state.log_base, l2=settings.l2, start=start
        )

    response = fit(known.response if known else None)
    # pseudo-counts depend on the map that they are for
    for _ in range(FURTHER_PASSES if state.rows else 0):
        response = fit(response)
    if known is None:
        known = Contender(response, _opening_scores(state, settings), excess, 0)
    factor = dispersion(response, statistics, counts) if candidate.weigh else 1.0
    return replace(known, response=response, dispersion=factor, fitted_at=state.n_pairs)


def _targets(
    state: Anticipation, response: ResponseMap | None, statistics: Array, counts: Array
) -> Array:
    """Give the counts to fit: the labels, or under the log-loss objective their pseudo-counts."""
    # With mass the sum of corrected probabilities, the gradient of the log loss is mass minus
    # counts; counts - mass + total * prior give the label likelihood the same gradient.
    if not state.rows:
        return counts
    start = np.tile(state.log_base, (len(counts), 1))
    log_prior = start if response is None else response.log_prior(statistics)
    return np.array(
        [
            np.bincount(one.codes, one.weight, minlength=len(q))
            - one.weight @ probabilities(one.scores + q)
            + one.weight.sum() * np.exp(q)
            for one, q in zip(state.rows, log_prior, strict=True)
        ]
    )


def _opening_scores(state: Anticipation, settings: Settings) -> Array:
    """Start a late contender level with the best so far, so that it is judged from now on."""
    best = max((one.scores.max() for one in state.contenders.values()), default=0.0)
    return np.full((len(settings.strengths), len(settings.mixes)), best)


def _chosen(state: Anticipation, settings: Settings) -> Choice:
    nothing = Choice("fixed", 0.0, 0.0)
    if state.n_rounds < settings.min_rounds or not state.contenders:
        return nothing
    name, best = max(state.contenders.items(), key=lambda item: item[1].scores.max())
    row, column = np.unravel_index(int(best.scores.argmax()), best.scores.shape)
    return Choice(name, float(settings.strengths[row]), float(settings.mixes[column]))
