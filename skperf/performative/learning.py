"""How a record learns: rounds with rows, rounds of counts, labels that come late."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skperf.performative.anticipation import Rows, observe
from skperf.performative.diagnostics import conditional_shift_p_value, total_variation
from skperf.performative.label_shift import (
    Array,
    Calibration,
    Codes,
    estimate_base_prior,
    fit_calibration,
    log_loss,
    probabilities,
    smooth_shares,
    soft_confusion,
)
from skperf.performative.record import (
    BATCH_ROWS,
    COVERED,
    MEASURED,
    WORTHS,
    Memory,
    Record,
    Round,
    counted,
    effective,
    worst_share,
)
from skperf.performative.trajectory import (
    KEPT_ROUNDS,
    Trajectory,
    centred_log,
    merged,
    smoothed_confusion,
)

ROWS_A_ROUND = 256  # kept for the log-loss objective
BATCH_MEMORY = 0.8  # about five rounds
REFINED_AT = (2, 4, 8, 16)  # labelled rounds at which the base mix is found anew
STEP = 0.5  # of an interval's width after a miss
MOVING, MOVING_IN = 1e-3, 30  # level and latest rounds at which classes are held to move


class Expected(NamedTuple):
    """What was expected of a round: answers of all maps and of those that don't read the model."""

    answer: Array  # (n_classes,)
    free: Array  # (n_classes,)
    log_prior: Array  # (n_classes,) as applied
    strength: float
    answers: Mapping[str, Array] | None = None  # (1, n_classes) of each map


def learned(record: Record, data: Round) -> Record:
    """Take in one round; rows without a label tell the predicted shares and the mix."""
    state, n_classes = record.anticipation, len(record.log_base)
    expected = _expected(record, data.covariates)
    log_prior, labelled = expected.log_prior, data.codes >= 0
    honest = labelled if data.honest is None else labelled & data.honest
    honest = honest if honest.any() else labelled
    scores = record.corrected(data.logits, log_prior)
    if data.deployed is None:
        predicted = data.own if record.own_rule_holds else scores.argmax(axis=1)
        data = replace(data, deployed=predicted)
    counts = counted(data.codes[labelled], effective(data.weight[labelled]), n_classes)
    part, mix, hits, rows = data.part(honest), None, None, None
    if len(part.codes):
        statistic = record.statistic_of(part, scores[honest])
        if len(part.codes) == labelled.sum():
            hits = counted(part.codes, (part.own == part.codes) * part.weight, n_classes)
        entry = _entry(record, data.number, expected, part) | {"realised": counts / counts.sum()}
        record = _judged(record, part, expected)
        if record.options.objective == "log_loss":
            rows = _kept_rows(record, part)
    else:
        entry = _entry(record, data.number, expected)
        mix = len(data.logits) * np.exp(record.batch_prior(data.logits, log_prior, "map_em"))
        mix = centred_log(mix)
        # under label shift remembered rows tell what the labels of this round would
        statistic = record.remembered_statistic(log_prior)
        if record.options.statistic == "predicted_marginal":
            statistic = probabilities(scores).mean(axis=0)
    trajectory = state.trajectory.append(
        data.number,
        statistic,
        counts,
        hits,
        mix=mix,
        shares=counted(data.predicted, data.weight, n_classes) / data.weight.sum(),
        confusion=_confused(record, part),
        covariates=data.covariates,
        unlabelled=float((~labelled).sum()),
    )
    return _settled(_with_labels(_observed(record, trajectory, entry, expected, rows), part))


def counted_round(record: Record, number: Any, counts: Array, statistic: Array) -> Record:
    """Learn from a round without rows: its label counts and its statistic."""
    trajectory = record.anticipation.trajectory
    expected = _expected(record)
    shares = counts / max(counts.sum(), 1e-300)
    entry = _entry(record, number, expected, shares=shares)
    if record.anticipation.n_pairs and counts.sum() > 0:
        corrector = record.corrector.judged_by_shares(counts, expected.answer, record.log_base)
        width = _stepped_by(record, expected.log_prior, counts)
        record = replace(record, corrector=corrector, width=width)
    trajectory = trajectory.append(number, statistic, counts)
    return _settled(_observed(record, trajectory, entry, expected))


def labelled_later(record: Record, data: Round) -> Record:
    """Learn from labels of a round that was taken in without them: codes (n,), all known."""
    state, n_classes = record.anticipation, len(record.log_base)
    i = int(np.flatnonzero(state.trajectory.rounds == data.number)[0])
    at = next(j for j, one in enumerate(record.losses) if one["round"] == data.number)
    told, log_prior = record.losses[at], np.log(record.losses[at]["predicted"])
    scores = record.corrected(data.logits, log_prior)
    if data.deployed is None:
        untouched = told["strength"] == 0.0 and record.own_rule_holds
        data = replace(data, deployed=data.own if untouched else scores.argmax(axis=1))
    data = data.part(np.ones(len(data.codes), bool))
    seen, new = state.trajectory.counts[i], counted(data.codes, data.weight, n_classes)
    before, statistic = seen.sum(), record.statistic_of(data, scores)
    confusion, smoothing = _confused(record, data), record.options.smoothing
    if before and record.options.statistic in ("recall", "confusion"):
        statistic = merged(state.trajectory.statistics[i], seen, statistic, new, smoothing)
    elif before:
        part = new.sum() / (new.sum() + before)
        statistic = part * statistic + (1 - part) * state.trajectory.statistics[i]
    if before and confusion is not None:
        confusion = merged(state.trajectory.confusions[i], seen, confusion, new, smoothing)
    hits = counted(data.codes, (data.own == data.codes) * data.weight, n_classes)
    trajectory = state.trajectory.labelled_later(i, statistic, new, hits, len(scores), confusion)
    anticipation = replace(state, trajectory=trajectory)
    if not before and i >= trajectory.lag:
        # maps have not seen these labels: they are judged as they would have been in time
        answers = state.answers(trajectory.before(i))
        answer, free = (state.mixture(answers, model_free=free)[0] for free in (False, True))
        expected = Expected(answer, free, log_prior, told["strength"])
        entry = _entry(record, data.number, expected, data)
        record = _judged(record, data, expected)
        losses = (*record.losses[:at], entry, *record.losses[at + 1 :])
        record = replace(record, losses=losses)
        anticipation = observe(state, record.settings, trajectory, at=i)
    return _settled(_with_labels(replace(record, anticipation=anticipation), data))


def _expected(record: Record, covariates: Array | None = None) -> Expected:
    state = record.anticipation
    answers = state.ahead[1]
    if covariates is not None:
        answers = state.answers(state.trajectory.coming(covariates))
    answer, free = (state.mixture(answers, model_free=free)[0] for free in (False, True))
    return Expected(answer, free, *record.applied(answer), answers)


def _observed(
    record: Record,
    trajectory: Trajectory,
    entry: dict[str, Any],
    expected: Expected,
    rows: Rows | None = None,
) -> Record:
    """Add a round to the record and let the maps learn from it."""
    limit = record.settings.buffer_size
    trajectory = trajectory.latest(None if limit is None else limit + trajectory.lag)
    anticipation = observe(
        record.anticipation, record.settings, trajectory, rows=rows, answers=expected.answers
    )
    losses = (*record.losses[-(KEPT_ROUNDS - 1) :], entry)
    return replace(record, losses=losses, anticipation=anticipation)


def _entry(
    record: Record,
    number: Any,
    expected: Expected,
    part: Round | None = None,
    shares: Array | None = None,
) -> dict[str, Any]:
    """Losses of a round, of its rows or else of its shares; NaN where its labels are not known."""
    predicted, unknown = np.exp(expected.log_prior), np.full(len(record.log_base), np.nan)
    entry = {"round": number} | dict.fromkeys(MEASURED, np.nan)
    entry |= {"strength": expected.strength, "predicted": predicted, "realised": unknown}
    entry["expected"] = np.exp(expected.answer)
    if part is not None:
        counts = counted(part.codes, part.weight, len(predicted))
        shares = counts / counts.sum()
    if shares is None:
        return entry
    last = record.last_mix()
    mixes = {
        "none": record.log_base,
        "last": last,
        "adapter": expected.log_prior,
        "oracle": np.log(np.maximum(shares, 1e-12)),
        "model_free": record.corrector.log_prior(expected.free, record.log_base),
    }
    entry |= {"tv": float(total_variation(shares, np.exp(last))) if record.losses else 0.0}
    # nats a label saved over the base mix by what was expected of a round
    gains = {"gain_all": expected.answer, "gain_model_free": expected.free, "gain_last": last}
    entry |= {name: float(shares @ (mix - record.log_base)) for name, mix in gains.items()}
    entry["realised"] = shares
    if part is None:
        return entry | {name: -float(shares @ mix) for name, mix in mixes.items()}
    codes, weight = part.codes, part.weight
    plain, scores = part.logits, record.corrector.calibrated(part.logits)
    predicted = part.own
    if not record.own_rule_holds:
        predicted = record.corrected(part.logits, expected.log_prior).argmax(axis=1)
    for name, mix in mixes.items():
        each = scores if name in ("adapter", "model_free") else plain
        entry[name] = log_loss(each + (mix - record.log_base), codes, weight)
    return entry | {
        "accuracy": float(np.average(predicted == codes, weights=weight)),
        "accuracy_none": float(np.average(part.own == codes, weights=weight)),
        "worst_recall": worst_share(codes, predicted == codes),
    }


def _judged(record: Record, part: Round, expected: Expected) -> Record:
    """Hold what was anticipated and applied against the labels of the round."""
    codes, weight, log_prior = part.codes, part.weight, expected.log_prior
    n_classes = len(record.log_base)
    if record.anticipation.n_pairs:
        corrector = record.corrector.judged(
            part.logits, codes, weight, expected.answer, record.log_base, part.own == codes
        )
        width = _stepped_by(record, log_prior, counted(codes, weight, n_classes))
        record = replace(record, corrector=corrector, width=width)
    how = record.options
    if how.transductive in ("map_em", "auto") and isinstance(how.prior_strength, str):
        scores, before = record.corrector.calibrated(part.logits), record.batch_losses
        mixes = [record.hybrid_prior(scores, log_prior, worth) for worth in WORTHS]
        found = np.array([log_loss(scores - record.log_base + m, codes, weight) for m in mixes])
        if before is not None:
            found = BATCH_MEMORY * before + (1 - BATCH_MEMORY) * found
        record = replace(record, batch_losses=found)
    if len(codes) >= 10 * n_classes:
        rows = np.linspace(0, len(codes) - 1, min(len(codes), BATCH_ROWS)).astype(int)
        mix = np.exp(record.batch_prior(part.logits[rows], log_prior, "map_em"))
        low, high = record.batch_interval(part.logits[rows], mix)
        there = smooth_shares(counted(codes[rows], np.ones(len(rows)), n_classes))
        width = _stepped(record.batch_width, (there < low) | (there > high))
        record = replace(record, batch_width=width)
    return record


def _stepped_by(record: Record, log_prior: Array, counts: Array) -> float:
    shares = counts / counts.sum()
    low, high = record.interval(np.exp(log_prior), counts.sum())
    return _stepped(record.width, (shares < low) | (shares > high))


def _confused(record: Record, part: Round) -> Array | None:
    if not len(part.codes) or not record.anticipation.trajectory.confusions.shape[1]:
        return None
    n_classes, smoothing = len(record.classes), record.options.smoothing
    return smoothed_confusion(part.codes, part.predicted, n_classes, part.weight, smoothing)


def _with_labels(record: Record, part: Round) -> Record:
    """Remember labelled rows, and find base mix and calibrations anew when it is time."""
    if not len(part.codes):
        return record
    n_known = len(np.unique(record.memory.codes))
    record = remembering(record, part.logits, part.codes, part.weight, part.strata)
    n_rounds = record.anticipation.n_rounds
    new = len(np.unique(record.memory.codes)) > n_known
    more = n_rounds in REFINED_AT and len(record.memory.codes) > 1.5 * record.base_rows
    refined = record.options.refines_base and (more or (new and n_rounds > 1))
    if refined:
        found = estimate_base_prior(record.memory.scores, record.memory.codes)
        record = record.with_base(found, len(record.memory.codes))
    # biases are relative to the base mix: a new one asks for new ones
    due = refined or n_rounds >= 1.3 * record.calibrated_at
    if due and any(record.options.calibrations):
        record = with_calibrations(replace(record, calibrated_at=n_rounds))
    return record


def remembering(
    record: Record, logits: Array, codes: Codes, weight: Array, strata: Codes | None = None
) -> Record:
    """Know labelled rows (n, n_classes), also before any round."""
    proba = probabilities(record.corrector.calibrated(logits))
    return replace(
        record,
        memory=record.memory.with_rows(logits, codes, strata),
        confusion=record.confusion + soft_confusion(proba, codes, weight),
    )


def replaced(record: Record, rows: tuple[Array, Codes] | None, base: Array | None) -> Record:
    """Go on with another classifier, known by rows (n, n_classes), (n,): only the map stays."""
    state = record.anticipation
    hits = np.full(state.trajectory.hits.shape, np.nan)
    trajectory = replace(state.trajectory, hits=hits)
    corrector, n = record.corrector, len(record.corrector.calibrators)
    # strengths keep their record, calibrations and accuracies were the old classifier's
    told: Any = {k: np.repeat(getattr(corrector, k)[:1], n, axis=0) for k in ("slow", "fast")}
    told |= {k: replace(getattr(corrector, k), calibration=0) for k in ("choice", "proposed")}
    told |= dict.fromkeys(("right", "noise"), np.zeros_like(corrector.slow))
    told |= dict.fromkeys(("own_right", "proposed_right"), 0.0)
    corrector = replace(corrector, calibrators=(None,) * n, **told)
    record = replace(
        record,
        anticipation=replace(state, trajectory=trajectory),
        corrector=corrector,
        memory=Memory.empty(len(record.log_base)),
        confusion=np.zeros_like(record.confusion),
        batch_losses=None,
        batch_width=1.0,
        calibrated_at=0,
        base_rows=0,
    )
    if rows is not None:
        record = remembering(record, *rows, np.ones(len(rows[1])))
    return record if base is None else record.with_base(base, len(record.memory.codes))


def with_calibrations(record: Record) -> Record:
    """Fit the calibrations of the options on remembered rows."""
    logits, codes = record.memory.scores, record.memory.codes
    counts = np.bincount(codes, minlength=len(record.log_base)).astype(float)
    offset = np.log(smooth_shares(counts)) - record.log_base
    found: list[Calibration | None] = [
        None
        if kind is None
        else fit_calibration(logits, codes, offset, kind=kind, shown=record.shown)
        for kind in record.options.calibrations
    ]
    return replace(record, corrector=replace(record.corrector, calibrators=tuple(found)))


def _settled(record: Record) -> Record:
    state, latest = record.anticipation, slice(-MOVING_IN, None)
    trajectory = state.trajectory
    p_value = conditional_shift_p_value(trajectory.counts[latest], trajectory.hits[latest])
    chosen = record.corrector.chosen(state.n_rounds, record.options.min_rounds, p_value < MOVING)
    return replace(record, corrector=chosen)


def _stepped(width: float, missed: NDArray[np.bool_]) -> float:
    """Widen an interval after more misses than it may have, else narrow it."""
    # online conformal inference: whatever the world does, the share of misses tends to 1 - COVERED
    moved = width * np.exp(STEP * (float(missed.mean()) - (1 - COVERED)))
    return float(np.clip(moved, 0.05, 1e4))


def _kept_rows(record: Record, part: Round) -> Rows:
    n = len(part.codes)
    kept = np.linspace(0, n - 1, min(n, ROWS_A_ROUND)).astype(int)
    scores = record.corrector.calibrated(part.logits[kept]) - record.log_base
    weight = part.weight[kept] * part.weight.sum() / part.weight[kept].sum()
    return Rows(scores, part.codes[kept], weight)
