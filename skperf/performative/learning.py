"""How a record learns: rounds with rows, rounds of counts, labels that come late."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skperf.performative.anticipation import Rows, observe
from skperf.performative.label_shift import (
    Calibration,
    fit_calibration,
    log_loss,
    probabilities,
    smooth_shares,
    soft_confusion,
)
from skperf.performative.record import (
    COVERED,
    WORTHS,
    Memory,
    Record,
    Round,
    counted,
    effective,
    worst_share,
)
from skperf.performative.trajectory import KEPT_ROUNDS, Trajectory, centred_log, smoothed_confusion

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

ROWS_A_ROUND = 256  # kept for the log-loss objective
BATCH_MEMORY = 0.8  # about five rounds
BATCH_ROWS = 2000  # enough to tell how far estimates from a batch are off
REFINED_AT = (2, 4, 8, 16)  # labelled rounds at which the base mix is found anew
STEP = 0.5  # of an interval's width after a miss
LOSSES = ("none", "last", "adapter", "oracle", "model_free")


def learned(record: Record, data: Round) -> Record:
    """Take in one round; rows without a label tell the predicted shares and the mix."""
    state, n_classes = record.anticipation, len(record.log_base)
    labelled = data.codes >= 0
    honest = labelled if data.honest is None else labelled & data.honest
    honest = honest if honest.any() else labelled
    answers = state.answers(state.trajectory.coming(data.covariates))
    answer = state.mixture(answers)[0]
    log_prior, strength = record.applied(answer)
    scores = record.corrected(data.logits, log_prior)
    predicted = data.deployed
    if predicted is None:
        predicted = data.own if record.nothing_is_corrected else scores.argmax(axis=1)
    codes, weight = data.codes[honest], effective(data.weight[honest])
    logits, own, strata = data.logits[honest], data.own[honest], _part(data.strata, honest)
    counts = counted(data.codes[labelled], effective(data.weight[labelled]), n_classes)
    mix = hits = None
    if len(codes):
        part = predicted[honest]
        statistic = record.measured(codes, part, scores[honest], weight, strata)
        if len(codes) == labelled.sum():
            hits = counted(codes, (own == codes) * weight, n_classes)
    else:
        mix = _estimated_mix(record, data, log_prior)
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
        shares=np.bincount(predicted, data.weight, minlength=n_classes) / data.weight.sum(),
        confusion=_confused(record, codes, predicted[honest], weight),
        covariates=data.covariates,
        unlabelled=float((~labelled).sum()),
    )
    kept = None
    if not len(codes):
        record = replace(record, losses=_latest(record.losses, _unknown(data.number, log_prior)))
    else:
        free = state.mixture(answers, model_free=True)[0]
        record = _judged(record, logits, codes, weight, answer, log_prior, own, free)
        entry = record.losses[-1] | {"round": data.number, "strength": strength}
        entry |= {"realised": counts / counts.sum()}
        record = replace(record, losses=(*record.losses[:-1], entry))
        if record.options.objective == "log_loss":
            kept = _kept_rows(record.corrector.calibrated(logits) - record.log_base, codes, weight)
    trajectory = _bounded(record, trajectory)
    record = replace(record, anticipation=observe(state, record.settings, trajectory, rows=kept))
    return _settled(_with_labels(record, logits, codes, weight, strata))


def _bounded(record: Record, trajectory: Trajectory) -> Trajectory:
    limit = record.settings.buffer_size
    return trajectory.latest(None if limit is None else limit + trajectory.lag)


def _judged(
    record: Record,
    logits: Array,
    codes: Codes,
    weight: Array,
    answer: Array,
    log_prior: Array,
    own: Codes,
    free: Array,
) -> Record:
    """Hold what was anticipated and applied against the labels of the round."""
    state, n_classes = record.anticipation, len(record.log_base)
    counts = np.bincount(codes, weight, minlength=n_classes)
    shares = counts / counts.sum()
    corrector = record.corrector
    if state.n_pairs:
        right = float(np.average(own == codes, weights=weight))
        corrector = corrector.judged(logits, codes, weight, answer, record.log_base, right)
    losses = _losses(record, logits, codes, weight, log_prior, own, answer, free)
    batch_losses, batch_width = record.batch_losses, record.batch_width
    scores = record.corrector.calibrated(logits)
    if record.options.is_hybrid:
        mixes = [record.hybrid_prior(scores, log_prior, worth) for worth in WORTHS]
        found = np.array([log_loss(scores - record.log_base + m, codes, weight) for m in mixes])
        before = record.batch_losses
        batch_losses = (
            found if before is None else BATCH_MEMORY * before + (1 - BATCH_MEMORY) * found
        )
    if len(codes) >= 10 * n_classes:
        part = np.linspace(0, len(codes) - 1, min(len(codes), BATCH_ROWS)).astype(int)
        mix = np.exp(record.batch_prior(logits[part], log_prior, "map_em"))
        low, high = record.batch_interval(logits[part], mix)
        there = smooth_shares(np.bincount(codes[part], minlength=n_classes).astype(float))
        batch_width = _stepped(record.batch_width, (there < low) | (there > high))
    width = record.width
    if state.n_pairs:
        low, high = record.interval(np.exp(log_prior), counts.sum())
        width = _stepped(record.width, (shares < low) | (shares > high))
    return replace(
        record,
        corrector=corrector,
        losses=_latest(record.losses, losses),
        batch_losses=batch_losses,
        batch_width=batch_width,
        width=width,
    )


def _losses(
    record: Record,
    logits: Array,
    codes: Codes,
    weight: Array,
    log_prior: Array,
    own: Codes,
    answer: Array,
    free: Array,
) -> dict[str, Any]:
    """Log losses and accuracies of a round's rows, before they are learned from."""
    counts = np.bincount(codes, weight, minlength=len(record.log_base))
    shares, last = counts / counts.sum(), record.last_mix()
    scores = logits - record.log_base
    corrected = record.corrected(logits, log_prior)
    free_prior = record.corrector.log_prior(free, record.log_base)
    values = {
        "none": log_loss(logits, codes, weight),
        "last": log_loss(scores + last, codes, weight),
        "adapter": log_loss(corrected, codes, weight),
        "oracle": log_loss(scores + np.log(np.maximum(shares, 1e-12)), codes, weight),
        "model_free": log_loss(record.corrected(logits, free_prior), codes, weight),
    }
    predicted = own if record.nothing_is_corrected else corrected.argmax(axis=1)
    values |= _gains(record, shares, answer, free)
    return values | {
        "accuracy": float(np.average(predicted == codes, weights=weight)),
        "accuracy_none": float(np.average(own == codes, weights=weight)),
        "worst_recall": worst_share(codes, predicted == codes),
        "tv": float(0.5 * np.abs(shares - np.exp(last)).sum()) if record.losses else 0.0,
        "predicted": np.exp(log_prior),
        "realised": shares,
    }


def _gains(record: Record, shares: Array, answer: Array, free: Array) -> dict[str, float]:
    """Nats a label saved over the base mix by what was expected of a round."""
    mixes = {"gain_all": answer, "gain_model_free": free, "gain_last": record.last_mix()}
    return {name: float(shares @ (mix - record.log_base)) for name, mix in mixes.items()}


def _confused(record: Record, codes: Codes, predicted: Codes, weight: Array) -> Array | None:
    if not len(codes) or not record.anticipation.trajectory.confusions.shape[1]:
        return None
    smoothing = record.options.smoothing
    return smoothed_confusion(codes, predicted, len(record.classes), weight, smoothing)


def _estimated_mix(record: Record, data: Round, log_prior: Array) -> Array:
    return centred_log(
        len(data.logits) * np.exp(record.batch_prior(data.logits, log_prior, "map_em"))
    )


def _with_labels(
    record: Record, logits: Array, codes: Codes, weight: Array, strata: Codes | None
) -> Record:
    """Remember labelled rows, and find base mix and calibrations anew when it is time."""
    if not len(codes):
        return record
    n_known = len(np.unique(record.memory.codes))
    kept = weight > 0
    proba = probabilities(record.corrector.calibrated(logits))
    record = replace(
        record,
        memory=record.memory.with_rows(logits[kept], codes[kept], _part(strata, kept)),
        confusion=record.confusion + soft_confusion(proba, codes, weight),
    )
    n_rounds = record.anticipation.n_rounds
    new = len(np.unique(record.memory.codes)) > n_known
    more = n_rounds in REFINED_AT and len(record.memory.codes) > 1.5 * record.base_rows
    refined = record.options.refines_base and (more or (new and n_rounds > 1))
    if refined:
        record = record.with_base(record.found_base(), len(record.memory.codes))
    # biases are relative to the base mix: a new one asks for new ones
    due = refined or n_rounds >= 1.3 * record.calibrated_at
    if due and any(record.options.calibrations):
        record = _with_calibrations(replace(record, calibrated_at=n_rounds))
    return record


def remembering(record: Record, logits: Array, codes: Codes, weight: Array) -> Record:
    """Know labelled rows (n, n_classes) before any round; fit a calibration asked for."""
    kept = weight > 0
    record = replace(
        record,
        memory=record.memory.with_rows(logits[kept], codes[kept]),
        confusion=soft_confusion(probabilities(logits), codes, weight),
    )
    return _with_calibrations(record) if all(record.options.calibrations) else record


def replaced(record: Record, memory: Memory, base: Array | None) -> Record:
    """Go on with another classifier: the map stays, what its scores told goes."""
    state = record.anticipation
    hits = np.full(state.trajectory.hits.shape, np.nan)
    trajectory = replace(state.trajectory, hits=hits)
    zeros = np.zeros_like(record.corrector.slow)
    # strengths keep their record, calibrations and accuracies were the old classifier's
    slow, fast = (
        np.repeat(a[:1], len(zeros), axis=0) for a in (record.corrector.slow, record.corrector.fast)
    )
    corrector = replace(
        record.corrector,
        calibrators=(None,) * len(record.corrector.calibrators),
        slow=slow,
        fast=fast,
        right=zeros,
        noise=zeros,
        own_right=0.0,
        choice=replace(record.corrector.choice, calibration=0),
    )
    record = replace(
        record,
        anticipation=replace(state, trajectory=trajectory),
        corrector=corrector,
        memory=memory,
        confusion=np.zeros_like(record.confusion),
        batch_losses=None,
        batch_width=1.0,
        calibrated_at=0,
        base_rows=len(memory.codes) if base is not None else 0,
    )
    if len(memory.codes):
        logits, ones = memory.scores, np.ones(len(memory.codes))
        confusion = soft_confusion(probabilities(logits), memory.codes, ones)
        record = replace(record, confusion=confusion)
    return record if base is None else record.with_base(base, len(memory.codes))


def _with_calibrations(record: Record) -> Record:
    logits, codes = record.memory.scores, record.memory.codes
    counts = np.bincount(codes, minlength=len(record.log_base)).astype(float)
    offset = np.log(smooth_shares(counts)) - record.log_base
    found: list[Calibration | None] = [
        None if kind is None else fit_calibration(logits, codes, offset, kind=kind)
        for kind in record.options.calibrations
    ]
    return replace(record, corrector=replace(record.corrector, calibrators=tuple(found)))


def _settled(record: Record) -> Record:
    rounds = record.anticipation.n_rounds
    return replace(record, corrector=record.corrector.chosen(rounds, record.options.min_rounds))


def counted_round(record: Record, number: Any, counts: Array, statistic: Array) -> Record:
    """Learn from a round without rows: its label counts and its statistic."""
    state = record.anticipation
    answers = state.answers(state.trajectory.coming())
    answer = state.mixture(answers)[0]
    free = state.mixture(answers, model_free=True)[0]
    log_prior, strength = record.applied(answer)
    shares = counts / max(counts.sum(), 1e-300)
    mixes = {
        "none": record.log_base,
        "last": record.last_mix(),
        "adapter": log_prior,
        "oracle": np.log(np.maximum(shares, 1e-12)),
        "model_free": record.corrector.log_prior(free, record.log_base),
    }
    losses = {name: -float(shares @ mix) for name, mix in mixes.items()}
    last = np.exp(mixes["last"])
    losses |= _unknown(number, log_prior, known=losses)
    losses |= {"realised": shares, "strength": strength} | _gains(record, shares, answer, free)
    losses["tv"] = float(0.5 * np.abs(shares - last).sum()) if record.losses else 0.0
    corrector, width = record.corrector, record.width
    if state.n_pairs and counts.sum() > 0:
        corrector = corrector.judged_by_shares(counts, answer, record.log_base)
        low, high = record.interval(np.exp(log_prior), counts.sum())
        width = _stepped(width, (shares < low) | (shares > high))
    trajectory = state.trajectory.append(number, statistic, counts)
    trajectory = _bounded(record, trajectory)
    record = replace(
        record,
        corrector=corrector,
        width=width,
        losses=_latest(record.losses, losses),
        anticipation=observe(state, record.settings, trajectory),
    )
    return _settled(record)


def labelled_later(record: Record, data: Round) -> Record:
    """Learn from labels of a round that was taken in without them: codes (n,), all known."""
    state, n_classes = record.anticipation, len(record.log_base)
    i = int(np.flatnonzero(state.trajectory.rounds == data.number)[0])
    at = next(j for j, one in enumerate(record.losses) if one["round"] == data.number)
    log_prior, weight = np.log(record.losses[at]["predicted"]), effective(data.weight)
    scores = record.corrected(data.logits, log_prior)
    predicted = scores.argmax(axis=1) if data.deployed is None else data.deployed
    before = state.trajectory.counts[i].sum()
    statistic = record.measured(data.codes, predicted, scores, weight, data.strata)
    if before:
        part = weight.sum() / (weight.sum() + before)
        statistic = part * statistic + (1 - part) * state.trajectory.statistics[i]
    trajectory = state.trajectory.labelled_later(
        i,
        statistic,
        counted(data.codes, weight, n_classes),
        counted(data.codes, (data.own == data.codes) * weight, n_classes),
        len(data.codes),
        None if before else _confused(record, data.codes, predicted, weight),
    )
    told = record.losses
    if not before and i >= trajectory.lag:
        # maps have not seen these labels: they are judged as they would have been in time
        answers = state.answers(trajectory.before(i))
        answer = state.mixture(answers)[0]
        free = state.mixture(answers, model_free=True)[0]
        record = _judged(record, data.logits, data.codes, weight, answer, log_prior, data.own, free)
        entry = told[at] | record.losses[-1]
        record = replace(record, losses=(*told[:at], entry, *told[at + 1 :]))
        anticipation = observe(state, record.settings, trajectory, at=i)
    else:
        anticipation = replace(state, trajectory=trajectory)
    record = replace(record, anticipation=anticipation)
    return _settled(_with_labels(record, data.logits, data.codes, weight, data.strata))


def _part(values: Codes | None, rows: NDArray[np.bool_]) -> Codes | None:
    return None if values is None else values[rows]


def _stepped(width: float, missed: NDArray[np.bool_]) -> float:
    """Widen an interval after more misses than it may have, else narrow it."""
    # online conformal inference: whatever the world does, the share of misses tends to 1 - COVERED
    moved = width * np.exp(STEP * (float(missed.mean()) - (1 - COVERED)))
    return float(np.clip(moved, 0.05, 1e4))


def _latest(
    losses: tuple[dict[str, Any], ...], entry: dict[str, Any]
) -> tuple[dict[str, Any], ...]:
    return (*losses[-(KEPT_ROUNDS - 1) :], entry)


def _unknown(number: Any, log_prior: Array, known: dict[str, Any] | None = None) -> dict[str, Any]:
    names: tuple[str, ...] = ("accuracy", "accuracy_none", "worst_recall", "tv", "strength")
    if known is None:
        names = (*names, *LOSSES)
    mixes = {"predicted": np.exp(log_prior), "realised": np.full(len(log_prior), np.nan)}
    return {"round": number} | dict.fromkeys(names, np.nan) | mixes


def _kept_rows(scores: Array, codes: Codes, weight: Array) -> Rows:
    kept = np.flatnonzero(weight > 0)
    kept = kept[np.linspace(0, len(kept) - 1, min(len(kept), ROWS_A_ROUND)).astype(int)]
    return Rows(scores[kept], codes[kept], weight[kept] * weight.sum() / weight[kept].sum())
