"""What an adapter has learned: an immutable record that takes rounds in and answers questions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, chdtri

from skperf.performative.anticipation import Anticipation, Settings
from skperf.performative.corrector import Corrector
from skperf.performative.label_shift import (
    Array,
    Codes,
    bbse_prior,
    em_prior,
    probabilities,
    smooth_shares,
)
from skperf.performative.trajectory import measure_by_name

KEPT_ROWS = 4000  # labelled rows that stand for all classes in later questions
WORTHS = (np.inf, 1e4, 1e3, 1e2, 0.0)  # labels; infinity is the anticipation alone
COVERED = 0.9
BATCH_ROWS = 2000  # enough to tell how far estimates from a batch are off
DENIED = 1e-3  # level at which a batch denies what was anticipated
LOSSES = ("none", "last", "adapter", "oracle", "model_free")
MEASURED = (*LOSSES, "accuracy", "accuracy_none", "worst_recall", "tv", "strength")


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

    @property
    def predicted(self) -> Codes:
        """What went out, (n,): the classifier's own predictions where nothing else is told."""
        return self.own if self.deployed is None else self.deployed

    def part(self, rows: NDArray[np.bool_]) -> "Round":
        """Take some rows, weighted by what they are worth."""
        names = ("logits", "own", "codes", "weight", "deployed", "strata")
        told = {name: getattr(self, name) for name in names}
        taken: Any = {name: None if v is None else v[rows] for name, v in told.items()}
        return replace(self, **taken | {"weight": effective(taken["weight"])})


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
    shown: NDArray[np.bool_] | None = None  # (n_classes,) classes the classifier was fitted on

    @property
    def log_base(self) -> Array:
        """Log mix (n_classes,) for which the classifier's scores are right."""
        return self.anticipation.log_base

    @property
    def own_rule_holds(self) -> bool:
        """Whether predictions are those of the classifier's own rule."""
        choice = self.corrector.choice
        return choice.strength == 0.0 and self.corrector.keeps_order(choice.calibration)

    # ---- anticipation

    def prior(
        self, statistic: Array | None = None, covariates: Array | None = None
    ) -> tuple[Array, float]:
        """Anticipate the next round: its log mix (n_classes,), and how strongly it was blended."""
        state = self.anticipation
        if statistic is None and covariates is None:
            return self.applied(state.mixture(state.ahead[1])[0])
        inputs = state.trajectory.coming(covariates)
        if statistic is not None:
            inputs = inputs.at(statistic[None])
        return self.applied(state.log_answer(inputs)[0])

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
        return self.corrector.calibrated(logits) + (log_prior - self.log_base)

    def interval(self, prior: Array, size: float | None = None) -> Array:
        """Find where the realised shares of a round of usual size lie: (..., K) -> (2, ..., K)."""
        size = self.usual_size(50) if size is None else size
        worth = max(0.5, size / (self.anticipation.spread * self.width))
        tails = np.array([(1 - COVERED) / 2, (1 + COVERED) / 2])[(...,) + (None,) * prior.ndim]
        first = np.maximum(worth * prior, 1e-9)
        second = np.maximum(worth * (1 - prior), 1e-9)
        bounds: Array = betaincinv(first, second, tails)
        # shares are counts over the size; far out in a tail the quantile may cross the mean
        bounds = np.stack([np.floor(bounds[0] * size), np.ceil(bounds[1] * size)]) / size
        return np.stack([np.minimum(bounds[0], prior), np.maximum(bounds[1], prior)])

    def usual_size(self, latest: int) -> float:
        """Labels of a round, on average over the latest ones; 0 is all of them."""
        counts = self.anticipation.trajectory.counts[-latest:].sum(axis=1)
        return float(counts[counts > 0].mean()) if (counts > 0).any() else 1.0

    # ---- batches

    def batch_prior(self, logits: Array, log_prior: Array, how: str) -> Array:
        """Refine an anticipated log mix by the unlabelled rows (n, K) it is meant for."""
        scores = self.corrector.calibrated(logits)
        if how == "bbse":
            prior = bbse_prior(probabilities(scores), self.confusion)
            return np.log(np.maximum(prior, 1e-6))
        if how == "em":
            return np.log(np.maximum(em_prior(scores, self.log_base), 1e-12))
        return self.hybrid_prior(scores, log_prior, self._believed(scores, log_prior))

    def hybrid_prior(self, scores: Array, log_prior: Array, worth: float) -> Array:
        """Log mix of calibrated scores (n, K) with the anticipation worth a number of labels."""
        if np.isinf(worth):
            return log_prior
        mean = np.exp(log_prior)
        found = em_prior(scores, self.log_base, mean=mean, strength=worth, tol=1e-5)
        return np.log(np.maximum(found, 1e-12))

    def worth(self) -> float:
        """Labels that the anticipation is worth against a batch."""
        given = self.options.prior_strength
        if not isinstance(given, str):
            return float(given)
        if self.batch_losses is not None:
            return WORTHS[int(self.batch_losses.argmin())]
        # at first the concentration of recent mixes
        size, spread = self.usual_size(0), self.anticipation.spread
        ratio = (size - spread) / max(spread - 1.0, 1e-2)
        return float(np.clip(ratio, 1.0, 10 * size))

    def _believed(self, scores: Array, log_prior: Array) -> float:
        """Worth of the anticipation; less of it where calibrated scores (n, K) deny it."""
        worth = self.worth()
        if not isinstance(self.options.prior_strength, str):
            return worth
        # after a change of the world a batch tells at once what labels tell rounds later
        scores = scores[np.linspace(0, len(scores) - 1, min(len(scores), BATCH_ROWS)).astype(int)]

        ratios = np.exp(scores - scores.max(axis=1, keepdims=True))

        def likelihood(worth: float) -> float:
            mix = np.exp(self.hybrid_prior(scores, log_prior, worth) - self.log_base)
            return float(np.log(ratios @ mix).sum())

        # by how much estimates from batches have been off before is allowed for
        allowed = chdtri(scores.shape[1] - 1, DENIED) * max(1.0, self.batch_width) ** 2
        least = likelihood(0.0) - allowed / 2
        lower = [w for w in WORTHS if 0.0 < w < worth]
        return next((w for w in (worth, *lower) if likelihood(w) >= least), 0.0)

    def batch_interval(self, logits: Array, prior: Array) -> Array:
        """Where the shares of an unlabelled batch (n, K) lie, about an estimate: -> (2, K)."""
        scores = self.corrector.calibrated(logits)
        alone = em_prior(scores, self.log_base, tol=1e-4)
        scores = scores - self.log_base
        ratios = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed = np.maximum(ratios @ prior, 1e-300)
        denied = 2 * np.log((ratios @ alone) / mixed).sum() > len(prior) - 1
        ratios /= mixed[:, None]
        # information of the mixture likelihood on the simplex; small shares need a ridge
        information = ratios.T @ ratios + np.eye(len(prior))
        covariance = np.linalg.inv(information)
        ones = covariance.sum(axis=1)
        covariance -= np.outer(ones, ones) / ones.sum()
        spread = np.sqrt(np.maximum(np.diag(covariance), prior * (1 - prior) / len(logits) ** 2))
        reach = 1.645 * spread * (max(1.0, self.batch_width) if denied else self.batch_width)
        # rows that look unlike what was anticipated may be right: the interval holds both
        ends = np.stack([prior, alone if denied else prior])
        return np.stack([np.maximum(ends.min(0) - reach, 0), np.minimum(ends.max(0) + reach, 1)])

    def measured(
        self,
        codes: Codes,
        predicted: Codes,
        scores: Array,
        weight: Array | None = None,
        strata: Codes | None = None,
    ) -> Array:
        """Compute the statistic (n_statistics,) of predictions (n,) with labels (n,)."""
        name, n_strata = self.options.statistic, 0 if self.strata is None else len(self.strata)
        weight = None if weight is None else effective(weight)
        if isinstance(name, str):
            given = weight, self.options.smoothing, strata, n_strata
            return measure_by_name(name, codes, predicted, scores, *given)
        labels = self.classes[codes], self.classes[predicted]
        found = name(*labels, probabilities(scores), self.classes, weight)
        values = np.asarray(found, dtype=np.float64)
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(
                f"statistic must return finite numbers of shape (n_statistics,), got {values!r}."
            )
        return values

    def statistic_of(self, part: Round, scores: Array) -> Array:
        """Statistic (n_statistics,) of what went out for labelled rows: scores (n, n_classes)."""
        return self.measured(part.codes, part.predicted, scores, part.weight, part.strata)

    def remembered_statistic(self, log_prior: Array) -> Array:
        """Statistic of the model corrected for a log mix, measured on remembered rows."""
        if not len(self.memory.codes):
            return np.full(self.anticipation.trajectory.statistics.shape[1], np.nan)
        scores = self.corrected(self.memory.scores, log_prior)
        return self.measured(
            self.memory.codes, scores.argmax(axis=1), scores, strata=self.memory.strata
        )

    def last_mix(self) -> Array:
        """Log mix (n_classes,) of the last labelled round, the base before any."""
        counts = self.anticipation.trajectory.counts
        seen = np.flatnonzero(counts.sum(axis=1) > 0)
        return np.log(smooth_shares(counts[seen[-1]])) if len(seen) else self.log_base

    def with_base(self, prior: Array, n_rows: int) -> "Record":
        """Take another base mix (n_classes,), found on a number of rows."""
        anticipation = replace(self.anticipation, log_base=np.log(prior))
        return replace(self, anticipation=anticipation, base_rows=n_rows)


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
