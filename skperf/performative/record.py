"""What an adapter has learned: an immutable record that takes rounds in and answers questions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from skperf.performative.anticipation import Anticipation, Rows, Settings, observe
from skperf.performative.corrector import Corrector
from skperf.performative.label_shift import (
    Calibration,
    bbse_prior,
    correct_logits,
    em_prior,
    estimate_base_prior,
    fit_calibration,
    log_loss,
    probabilities,
    smooth_shares,
    soft_confusion,
)
from skperf.performative.trajectory import (
    KEPT_ROUNDS,
    STATISTICS,
    Trajectory,
    centred_log,
    smoothed_confusion,
)

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

ROWS_A_ROUND = 256  # kept for the log-loss objective
KEPT_ROWS = 4000  # labelled rows that stand for all classes in later questions
WORTHS = (np.inf, 1e4, 1e3, 1e2, 0.0)  # labels; infinity is the anticipation alone
BATCH_MEMORY = 0.8  # about five rounds
BATCH_ROWS = 2000  # enough to tell how far estimates from a batch are off
REFINED_AT = (2, 4, 8, 16)  # labelled rounds at which the base mix is found anew
COVERED = 0.9
STEP = 0.5  # of an interval's width after a miss
LOSSES = ("none", "last", "adapter", "oracle", "model_free")


@dataclass(frozen=True, eq=False)
class Options:
    """Settings of an adapter, as they were when it was fitted."""

    statistic: str | Callable[..., Any] = "recall"
    smoothing: float = 2.0
    objective: str = "marginal"
    min_rounds: int = 3
    transductive: str | None = None
    prior_strength: float | str = "auto"
    floor: float | None = None
    calibrations: tuple[Literal["temperature", "bcts"] | None, ...] = (None,)
    refines_base: bool = False
    seed: int = 0

    @property
    def is_hybrid(self) -> bool:
        """Whether the worth of anticipations against batches is to be found."""
        return self.transductive in ("map_em", "auto") and isinstance(self.prior_strength, str)


@dataclass(frozen=True, eq=False)
class Round:
    """Rows of one round as they reach the record."""

    number: Any
    logits: Array  # (n, n_classes) of the classifier, uncorrected
    own: Codes  # (n,) predictions by the classifier's own rule
    codes: Codes  # (n,), -1 where there is no label
    weight: Array  # (n,)
    deployed: Codes | None = None  # (n,)
    honest: NDArray[np.bool_] | None = None  # (n,) rows that the classifier was not fitted on
    covariates: Array | None = None  # (n_covariates,)
    strata: Codes | None = None  # (n,)


@dataclass(frozen=True, eq=False)
class Memory:
    """Labelled rows of recent rounds, equally many of each class as far as there are."""

    logits: NDArray[np.float32]  # (n, n_classes)
    codes: Codes  # (n,)
    strata: Codes  # (n,)

    @classmethod
    def empty(cls, n_classes: int) -> "Memory":
        """Remember nothing yet."""
        none = np.zeros(0, np.int64)
        return cls(np.zeros((0, n_classes), np.float32), none, none)

    @property
    def scores(self) -> Array:
        """The logits in double precision."""
        return self.logits.astype(np.float64)

    def with_rows(self, logits: Array, codes: Codes, strata: Codes | None = None) -> "Memory":
        """Add rows, forgetting the oldest of classes that have enough."""
        n_classes = logits.shape[1]
        scores = np.concatenate([self.logits, logits.astype(np.float32)])
        codes = np.concatenate([self.codes, codes])
        new = np.zeros(len(logits), np.int64) if strata is None else strata
        strata = np.concatenate([self.strata, new])
        each = max(20, KEPT_ROWS // n_classes) if n_classes <= 200 else 4
        latest = [np.flatnonzero(codes == c)[-each:] for c in range(n_classes)]
        kept = np.sort(np.concatenate(latest))
        return Memory(scores[kept], codes[kept], strata[kept])


@dataclass(frozen=True, eq=False)
class Record:
    """State of a fitted adapter; methods that learn return the next one."""

    options: Options
    settings: Settings
    classes: NDArray[Any]
    anticipation: Anticipation
    corrector: Corrector
    memory: Memory
    confusion: Array  # (n_classes, n_classes)
    losses: tuple[dict[str, Any], ...] = ()
    batch_losses: Array | None = None  # (n_worths,)
    width: float = 1.0  # of intervals, against what dispersion alone would give
    batch_width: float = 1.0
    strata: NDArray[Any] | None = None
    calibrated_at: int = 0
    base_rows: int = 0  # that the base mix was found on

    @property
    def log_base(self) -> Array:
        """Log mix (n_classes,) for which the classifier's scores are right."""
        return self.anticipation.log_base

    @property
    def nothing_is_corrected(self) -> bool:
        """Whether scores go out as the classifier gives them."""
        choice = self.corrector.choice
        return choice.strength == 0.0 and self.corrector.calibrators[choice.calibration] is None

    # ---- anticipation

    def prior(
        self, statistic: Array | None = None, covariates: Array | None = None
    ) -> tuple[Array, float]:
        """Anticipate the log mix of the next round, and the strength it was blended with.

        Shapes: statistic (n_statistics,), covariates (n_covariates,) -> (n_classes,).
        """
        inputs = self.anticipation.trajectory.coming(covariates)
        if statistic is not None:
            inputs = inputs.at(statistic[None])
        return self.applied(self.anticipation.log_answer(inputs)[0])

    def applied(self, answer: Array) -> tuple[Array, float]:
        """Blend an answer (n_classes,), weakened where it would drown a class."""
        chosen, floor = self.corrector.choice.strength, self.options.floor
        if chosen == 0.0:
            return self.log_base, 0.0
        if floor is None or not len(self.memory.codes):
            return self.corrector.log_prior(answer, self.log_base), chosen
        options = chosen * np.array([1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.1, 0.0])
        priors = [self.corrector.log_prior(answer, self.log_base, s) for s in options]
        worst = [self._worst_recall(prior) for prior in priors]
        enough = np.flatnonzero(np.array(worst) >= floor)
        best = int(enough[0]) if len(enough) else int(np.argmax(worst))
        return priors[best], float(options[best])

    def _worst_recall(self, log_prior: Array) -> float:
        right = self.corrected(self.memory.scores, log_prior).argmax(axis=1) == self.memory.codes
        groups = self.memory.codes
        if self.strata is not None:
            groups = groups * len(self.strata) + self.memory.strata
        return worst_share(groups, right)

    def corrected(self, logits: Array, log_prior: Array) -> Array:
        """Scores (n, n_classes) calibrated and moved to a log mix (n_classes,)."""
        scores = self.corrector.calibrated(logits)
        return correct_logits(scores, log_prior, self.log_base)

    def interval(self, prior: Array, size: float | None = None) -> Array:
        """Find where the realised shares of a round of usual size lie: (..., K) -> (2, ..., K)."""
        state = self.anticipation
        if size is None:
            counts = state.trajectory.counts.sum(axis=1)[-50:]
            size = float(counts[counts > 0].mean()) if (counts > 0).any() else 1.0
        worth = max(0.5, size / (state.spread * self.width))
        tails = np.array([(1 - COVERED) / 2, (1 + COVERED) / 2])[(...,) + (None,) * prior.ndim]
        first = np.maximum(worth * prior, 1e-9)
        second = np.maximum(worth * (1 - prior), 1e-9)
        bounds: Array = beta.ppf(tails, first, second)
        # far out in a tail the quantile may cross the mean
        return np.stack([np.minimum(bounds[0], prior), np.maximum(bounds[1], prior)])

    # ---- batches

    def batch_prior(self, logits: Array, log_prior: Array, how: str) -> Array:
        """Refine an anticipated log mix by the unlabelled rows (n, K) it is meant for."""
        scores = self.corrector.calibrated(logits)
        if how == "bbse":
            prior = bbse_prior(probabilities(scores), self.confusion)
            return np.log(np.maximum(prior, 1e-6))
        if how == "em":
            return np.log(np.maximum(em_prior(scores, self.log_base).prior, 1e-12))
        return self._hybrid_prior(scores, log_prior, self.worth())

    def _hybrid_prior(self, scores: Array, log_prior: Array, worth: float) -> Array:
        if np.isinf(worth):
            return log_prior
        mean = np.exp(log_prior)
        found = em_prior(scores, self.log_base, mean=mean, strength=worth, tol=1e-5)
        return np.log(np.maximum(found.prior, 1e-12))

    def worth(self) -> float:
        """Labels that the anticipation is worth against a batch."""
        given = self.options.prior_strength
        if not isinstance(given, str):
            return float(given)
        if self.batch_losses is not None:
            return WORTHS[int(self.batch_losses.argmin())]
        # at first the concentration of recent mixes
        state = self.anticipation
        counts = state.trajectory.counts.sum(axis=1)
        size = float(counts[counts > 0].mean()) if (counts > 0).any() else 1.0
        ratio = (size - state.spread) / max(state.spread - 1.0, 1e-2)
        return float(np.clip(ratio, 1.0, 10 * size))

    def batch_interval(self, logits: Array, prior: Array, width: float | None = None) -> Array:
        """Where the shares of an unlabelled batch (n, K) lie, about an estimate: -> (2, K)."""
        scores = self.corrector.calibrated(logits) - self.log_base
        ratios = np.exp(scores - scores.max(axis=1, keepdims=True))
        ratios /= np.maximum(ratios @ prior, 1e-300)[:, None]
        # information of the mixture likelihood on the simplex; small shares need a ridge
        information = ratios.T @ ratios + np.eye(len(prior))
        covariance = np.linalg.inv(information)
        ones = covariance.sum(axis=1)
        covariance -= np.outer(ones, ones) / ones.sum()
        spread = np.sqrt(np.maximum(np.diag(covariance), prior * (1 - prior) / len(logits) ** 2))
        reach = 1.645 * (self.batch_width if width is None else width) * spread
        return np.stack([np.maximum(prior - reach, 0.0), np.minimum(prior + reach, 1.0)])

    # ---- learning

    def measured(
        self,
        codes: Codes,
        predicted: Codes,
        scores: Array,
        weight: Array | None = None,
        strata: Codes | None = None,
    ) -> Array:
        """Compute the statistic (n_statistics,) of predictions (n,) with labels (n,)."""
        return measure(
            self.options,
            codes,
            predicted,
            scores,
            self.classes,
            weight,
            strata,
            0 if self.strata is None else len(self.strata),
        )

    def remembered_statistic(self, log_prior: Array) -> Array:
        """Statistic of the model corrected for a log mix, measured on remembered rows."""
        if not len(self.memory.codes):
            return np.full(self.anticipation.trajectory.statistics.shape[1], np.nan)
        scores = self.corrected(self.memory.scores, log_prior)
        return self.measured(
            self.memory.codes, scores.argmax(axis=1), scores, strata=self.memory.strata
        )

    def learned(self, data: Round) -> "Record":
        """Take in one round; rows without a label tell the predicted shares and the mix."""
        state, n_classes = self.anticipation, len(self.log_base)
        labelled = data.codes >= 0
        honest = labelled if data.honest is None else labelled & data.honest
        honest = honest if honest.any() else labelled
        answers = state.answers(state.trajectory.coming(data.covariates))
        answer = state.mixture(answers)[0]
        log_prior, strength = self.applied(answer)
        scores = self.corrected(data.logits, log_prior)
        predicted = data.deployed
        if predicted is None:
            predicted = data.own if self.nothing_is_corrected else scores.argmax(axis=1)
        codes, weight = data.codes[honest], effective(data.weight[honest])
        logits, own, strata = data.logits[honest], data.own[honest], _part(data.strata, honest)
        counts = counted(data.codes[labelled], effective(data.weight[labelled]), n_classes)
        mix = hits = None
        if len(codes):
            part = predicted[honest]
            statistic = self.measured(codes, part, scores[honest], weight, strata)
            if len(codes) == labelled.sum():
                hits = counted(codes, (own == codes) * weight, n_classes)
        else:
            mix = self._estimated_mix(data, log_prior)
            # under label shift remembered rows tell what the labels of this round would
            statistic = self.remembered_statistic(log_prior)
            if self.options.statistic == "predicted_marginal":
                statistic = probabilities(scores).mean(axis=0)
        trajectory = state.trajectory.append(
            data.number,
            statistic,
            counts,
            hits,
            mix=mix,
            shares=np.bincount(predicted, data.weight, minlength=n_classes) / data.weight.sum(),
            confusion=self._confused(codes, predicted[honest], weight),
            covariates=data.covariates,
            unlabelled=float((~labelled).sum()),
        )
        record = replace(self, losses=_latest(self.losses, _unknown(data.number, log_prior)))
        kept = None
        if len(codes):
            free = state.mixture(answers, model_free=True)[0]
            record = self._judged(logits, codes, weight, answer, log_prior, own, free)
            entry = record.losses[-1] | {"round": data.number, "strength": strength}
            entry |= {"realised": counts / counts.sum()}
            record = replace(record, losses=(*record.losses[:-1], entry))
            if self.options.objective == "log_loss":
                kept = _kept_rows(self.corrector.calibrated(logits) - self.log_base, codes, weight)
        trajectory = self._bounded(trajectory)
        record = replace(record, anticipation=observe(state, self.settings, trajectory, rows=kept))
        return record._with_labels(logits, codes, weight, strata)._settled()

    def _bounded(self, trajectory: Trajectory) -> Trajectory:
        limit = self.settings.buffer_size
        return trajectory.latest(None if limit is None else limit + trajectory.lag)

    def _judged(
        self,
        logits: Array,
        codes: Codes,
        weight: Array,
        answer: Array,
        log_prior: Array,
        own: Codes,
        free: Array,
    ) -> "Record":
        """Hold what was anticipated and applied against the labels of the round."""
        state, n_classes = self.anticipation, len(self.log_base)
        counts = np.bincount(codes, weight, minlength=n_classes)
        shares = counts / counts.sum()
        corrector = self.corrector
        if state.n_pairs:
            right = float(np.average(own == codes, weights=weight))
            corrector = corrector.judged(logits, codes, weight, answer, self.log_base, right)
        losses = self._losses(logits, codes, weight, log_prior, own, answer, free)
        batch_losses, batch_width = self.batch_losses, self.batch_width
        scores = self.corrector.calibrated(logits)
        if self.options.is_hybrid:
            mixes = [self._hybrid_prior(scores, log_prior, worth) for worth in WORTHS]
            found = np.array([log_loss(scores - self.log_base + m, codes, weight) for m in mixes])
            before = self.batch_losses
            batch_losses = (
                found if before is None else BATCH_MEMORY * before + (1 - BATCH_MEMORY) * found
            )
        if len(codes) >= 10 * n_classes:
            part = np.linspace(0, len(codes) - 1, min(len(codes), BATCH_ROWS)).astype(int)
            mix = np.exp(self.batch_prior(logits[part], log_prior, "map_em"))
            low, high = self.batch_interval(logits[part], mix)
            there = smooth_shares(np.bincount(codes[part], minlength=n_classes).astype(float))
            batch_width = _stepped(self.batch_width, (there < low) | (there > high))
        width = self.width
        if state.n_pairs:
            low, high = self.interval(np.exp(log_prior), counts.sum())
            width = _stepped(self.width, (shares < low) | (shares > high))
        return replace(
            self,
            corrector=corrector,
            losses=_latest(self.losses, losses),
            batch_losses=batch_losses,
            batch_width=batch_width,
            width=width,
        )

    def _losses(
        self,
        logits: Array,
        codes: Codes,
        weight: Array,
        log_prior: Array,
        own: Codes,
        answer: Array,
        free: Array,
    ) -> dict[str, Any]:
        """Log losses and accuracies of a round's rows, before they are learned from."""
        counts = np.bincount(codes, weight, minlength=len(self.log_base))
        shares, last = counts / counts.sum(), self.last_mix()
        scores = logits - self.log_base
        corrected = self.corrected(logits, log_prior)
        free_prior = self.corrector.log_prior(free, self.log_base)
        values = {
            "none": log_loss(logits, codes, weight),
            "last": log_loss(scores + last, codes, weight),
            "adapter": log_loss(corrected, codes, weight),
            "oracle": log_loss(scores + np.log(np.maximum(shares, 1e-12)), codes, weight),
            "model_free": log_loss(self.corrected(logits, free_prior), codes, weight),
        }
        predicted = own if self.nothing_is_corrected else corrected.argmax(axis=1)
        values |= self._gains(shares, answer, free)
        return values | {
            "accuracy": float(np.average(predicted == codes, weights=weight)),
            "accuracy_none": float(np.average(own == codes, weights=weight)),
            "worst_recall": worst_share(codes, predicted == codes),
            "tv": float(0.5 * np.abs(shares - np.exp(last)).sum()) if self.losses else 0.0,
            "predicted": np.exp(log_prior),
            "realised": shares,
        }

    def _gains(self, shares: Array, answer: Array, free: Array) -> dict[str, float]:
        """Nats a label saved over the base mix by what was expected of a round."""
        mixes = {"gain_all": answer, "gain_model_free": free, "gain_last": self.last_mix()}
        return {name: float(shares @ (mix - self.log_base)) for name, mix in mixes.items()}

    def _confused(self, codes: Codes, predicted: Codes, weight: Array) -> Array | None:
        if not len(codes) or not self.anticipation.trajectory.confusions.shape[1]:
            return None
        smoothing = self.options.smoothing
        return smoothed_confusion(codes, predicted, None, self.classes, weight, smoothing=smoothing)

    def last_mix(self) -> Array:
        """Log mix (n_classes,) of the last labelled round, the base before any."""
        counts = self.anticipation.trajectory.counts
        seen = np.flatnonzero(counts.sum(axis=1) > 0)
        return np.log(smooth_shares(counts[seen[-1]])) if len(seen) else self.log_base

    def _estimated_mix(self, data: Round, log_prior: Array) -> Array:
        return centred_log(
            len(data.logits) * np.exp(self.batch_prior(data.logits, log_prior, "map_em"))
        )

    def _with_labels(
        self, logits: Array, codes: Codes, weight: Array, strata: Codes | None
    ) -> "Record":
        """Remember labelled rows, and find base mix and calibrations anew when it is time."""
        if not len(codes):
            return self
        kept = weight > 0
        proba = probabilities(self.corrector.calibrated(logits))
        record = replace(
            self,
            memory=self.memory.with_rows(logits[kept], codes[kept], _part(strata, kept)),
            confusion=self.confusion + soft_confusion(proba, codes, weight),
        )
        n_rounds = record.anticipation.n_rounds
        new = len(np.unique(record.memory.codes)) > len(np.unique(self.memory.codes))
        more = n_rounds in REFINED_AT and len(record.memory.codes) > 1.5 * self.base_rows
        if self.options.refines_base and (more or (new and n_rounds > 1)):
            record = record.with_base(record.found_base(), len(record.memory.codes))
        if n_rounds >= 1.3 * self.calibrated_at and any(self.options.calibrations):
            record = replace(record, calibrated_at=n_rounds)._with_calibrations()
        return record

    def remembering(self, logits: Array, codes: Codes, weight: Array) -> "Record":
        """Know labelled rows (n, n_classes) before any round; fit a calibration asked for."""
        kept = weight > 0
        record = replace(
            self,
            memory=self.memory.with_rows(logits[kept], codes[kept]),
            confusion=soft_confusion(probabilities(logits), codes, weight),
        )
        return record._with_calibrations() if all(self.options.calibrations) else record

    def found_base(self) -> Array:
        """Find the base mix (n_classes,) under which remembered rows are likeliest."""
        return estimate_base_prior(self.memory.scores, self.memory.codes)

    def with_base(self, prior: Array, n_rows: int) -> "Record":
        """Take another base mix (n_classes,), found on a number of rows."""
        anticipation = replace(self.anticipation, log_base=np.log(prior))
        return replace(self, anticipation=anticipation, base_rows=n_rows)

    def replaced(self, memory: Memory, base: Array | None) -> "Record":
        """Go on with another classifier: the map stays, what its scores told goes."""
        state = self.anticipation
        hits = np.full(state.trajectory.hits.shape, np.nan)
        trajectory = replace(state.trajectory, hits=hits)
        zeros = np.zeros_like(self.corrector.slow)
        # strengths keep their record, calibrations and accuracies were the old classifier's
        slow, fast = (
            np.repeat(a[:1], len(zeros), axis=0) for a in (self.corrector.slow, self.corrector.fast)
        )
        corrector = replace(
            self.corrector,
            calibrators=(None,) * len(self.corrector.calibrators),
            slow=slow,
            fast=fast,
            right=zeros,
            noise=zeros,
            own_right=0.0,
            choice=replace(self.corrector.choice, calibration=0),
        )
        record = replace(
            self,
            anticipation=replace(state, trajectory=trajectory),
            corrector=corrector,
            memory=memory,
            confusion=np.zeros_like(self.confusion),
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

    def _with_calibrations(self) -> "Record":
        logits, codes = self.memory.scores, self.memory.codes
        counts = np.bincount(codes, minlength=len(self.log_base)).astype(float)
        offset = np.log(smooth_shares(counts)) - self.log_base
        found: list[Calibration | None] = [
            None if kind is None else fit_calibration(logits, codes, offset, kind=kind)
            for kind in self.options.calibrations
        ]
        return replace(self, corrector=replace(self.corrector, calibrators=tuple(found)))

    def _settled(self) -> "Record":
        rounds = self.anticipation.n_rounds
        return replace(self, corrector=self.corrector.chosen(rounds, self.options.min_rounds))

    def counted(self, number: Any, counts: Array, statistic: Array) -> "Record":
        """Learn from a round without rows: its label counts and its statistic."""
        state = self.anticipation
        answers = state.answers(state.trajectory.coming())
        answer = state.mixture(answers)[0]
        free = state.mixture(answers, model_free=True)[0]
        log_prior, strength = self.applied(answer)
        shares = counts / max(counts.sum(), 1e-300)
        mixes = {
            "none": self.log_base,
            "last": self.last_mix(),
            "adapter": log_prior,
            "oracle": np.log(np.maximum(shares, 1e-12)),
            "model_free": self.corrector.log_prior(free, self.log_base),
        }
        losses = {name: -float(shares @ mix) for name, mix in mixes.items()}
        last = np.exp(mixes["last"])
        losses |= _unknown(number, log_prior, known=losses)
        losses |= {"realised": shares, "strength": strength} | self._gains(shares, answer, free)
        losses["tv"] = float(0.5 * np.abs(shares - last).sum()) if self.losses else 0.0
        corrector, width = self.corrector, self.width
        if state.n_pairs and counts.sum() > 0:
            corrector = corrector.judged_by_shares(counts, answer, self.log_base)
            low, high = self.interval(np.exp(log_prior), counts.sum())
            width = _stepped(width, (shares < low) | (shares > high))
        trajectory = state.trajectory.append(number, statistic, counts)
        trajectory = self._bounded(trajectory)
        record = replace(
            self,
            corrector=corrector,
            width=width,
            losses=_latest(self.losses, losses),
            anticipation=observe(state, self.settings, trajectory),
        )
        return record._settled()

    def labelled_later(self, data: Round) -> "Record":
        """Learn from labels of a round that was taken in without them: codes (n,), all known."""
        state, n_classes = self.anticipation, len(self.log_base)
        i = int(np.flatnonzero(state.trajectory.rounds == data.number)[0])
        at = next(j for j, one in enumerate(self.losses) if one["round"] == data.number)
        log_prior, weight = np.log(self.losses[at]["predicted"]), effective(data.weight)
        scores = self.corrected(data.logits, log_prior)
        predicted = scores.argmax(axis=1) if data.deployed is None else data.deployed
        before = state.trajectory.counts[i].sum()
        statistic = self.measured(data.codes, predicted, scores, weight, data.strata)
        if before:
            part = weight.sum() / (weight.sum() + before)
            statistic = part * statistic + (1 - part) * state.trajectory.statistics[i]
        trajectory = state.trajectory.labelled_later(
            i,
            statistic,
            counted(data.codes, weight, n_classes),
            counted(data.codes, (data.own == data.codes) * weight, n_classes),
            len(data.codes),
        )
        record = self
        if not before and i >= trajectory.lag:
            # maps have not seen these labels: they are judged as they would have been in time
            answers = state.answers(trajectory.before(i))
            answer = state.mixture(answers)[0]
            free = state.mixture(answers, model_free=True)[0]
            record = self._judged(
                data.logits, data.codes, weight, answer, log_prior, data.own, free
            )
            entry = self.losses[at] | record.losses[-1]
            losses = (*self.losses[:at], entry, *self.losses[at + 1 :])
            record = replace(record, losses=losses)
            anticipation = observe(state, self.settings, trajectory, at=i)
        else:
            anticipation = replace(state, trajectory=trajectory)
        record = replace(record, anticipation=anticipation)
        return record._with_labels(data.logits, data.codes, weight, data.strata)._settled()


def measure(
    options: Options,
    codes: Codes,
    predicted: Codes,
    scores: Array,
    classes: NDArray[Any],
    weight: Array | None = None,
    strata: Codes | None = None,
    n_strata: int = 0,
) -> Array:
    """Compute a statistic (n_statistics,) by name or by a callable that takes labels."""
    statistic = options.statistic
    if isinstance(statistic, str):
        proba = probabilities(scores) if statistic == "predicted_marginal" else None
        groups = (
            {}
            if strata is None or "stratum" not in statistic
            else {"strata": strata, "n_strata": n_strata}
        )
        return STATISTICS[statistic](
            codes, predicted, proba, classes, weight, smoothing=options.smoothing, **groups
        )
    proba = probabilities(scores)
    values = np.asarray(
        statistic(classes[codes], classes[predicted], proba, classes, weight), dtype=np.float64
    )
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"statistic must return finite numbers of shape (n_statistics,), got {values!r}."
        )
    return values


def effective(weight: Array) -> Array:
    """Scale weights (n,) so that they sum to the number of rows that they are worth."""
    total = float(weight.sum())
    return weight * total / float(weight @ weight) if total > 0 else weight


def counted(codes: Codes, weight: Array, n_classes: int) -> Array:
    """Sum weights (n,) by class, (n_classes,)."""
    sums: Array = np.bincount(codes, weight, minlength=n_classes).astype(np.float64)
    return sums


def worst_share(groups: Codes, right: NDArray[np.bool_]) -> float:
    """Smallest share of right rows in any group that has rows."""
    rows = np.bincount(groups)
    hits = np.bincount(groups, right)
    return float((hits[rows > 0] / rows[rows > 0]).min())


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
