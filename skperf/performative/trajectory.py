"""The record of a deployed model: its statistic and the label counts, round by round."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skperf.performative.label_shift import TINY, Array, Codes, probabilities, smooth_shares
from skperf.performative.response import Inputs

KEPT_ROUNDS = 1000  # of the record; older rounds tell nothing of the next one
N_LAGS = 3
MOST_CONFUSED = 12  # classes up to which whole confusion matrices are recorded
BY_CLASS = ("counts", "hits", "mixes", "shares")
ARRAYS = ("statistics", *BY_CLASS, "confusions", "covariates", "unlabelled")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Rounds by time; a statistic answers in counts `lag` rows later; NaN is what is not known."""

    rounds: NDArray[Any]  # (n_rounds,)
    statistics: Array  # (n_rounds, n_statistics)
    counts: Array  # (n_rounds, n_classes)
    hits: Array  # (n_rounds, n_classes) of the uncorrected classifier
    mixes: Array  # (n_rounds, n_classes)
    shares: Array  # (n_rounds, n_classes) predicted by the deployed model
    confusions: Array  # (n_rounds, n_classes**2 or 0) of the deployed model
    covariates: Array  # (n_rounds, n_covariates)
    unlabelled: Array  # (n_rounds,) rows whose labels may still come
    lag: int = 1

    @classmethod
    def empty(
        cls, n_statistics: int, n_classes: int, *, n_covariates: int = 0, lag: int = 1
    ) -> "Trajectory":
        """Start a record without rounds."""
        n_cells = n_classes**2 if n_classes <= MOST_CONFUSED else 0
        by_class = (np.zeros((0, n_classes)),) * 4
        widths = (np.zeros((0, n_cells)), np.zeros((0, n_covariates)), np.zeros(0))
        none = np.zeros((0, n_statistics))
        return cls(np.zeros(0, np.int64), none, *by_class, *widths, lag)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Trajectory":
        """Rebuild a record from what `to_dict` returned, also after a round trip by JSON."""
        # the width makes up for rows of no entries, which JSON drops
        arrays: Any = {
            name: np.asarray(state[name], np.float64).reshape(len(state["rounds"]), *width)
            for name, width in state["widths"].items()
        }
        return cls(np.asarray(state["rounds"], dtype=state["dtype"]), **arrays, lag=state["lag"])

    def to_dict(self) -> dict[str, Any]:
        """Give plain lists, fit for JSON: the whole state there is, and no raw rows."""
        plain = {"M": str, "m": np.int64}.get(self.rounds.dtype.kind, self.rounds.dtype)
        state: dict[str, Any] = {"dtype": self.rounds.dtype.str, "lag": self.lag}
        state |= {"rounds": self.rounds.astype(plain).tolist()}
        state |= {"widths": {name: getattr(self, name).shape[1:] for name in ARRAYS}}
        return state | {name: getattr(self, name).tolist() for name in ARRAYS}

    def __len__(self) -> int:
        """Count the rounds."""
        return len(self.rounds)

    def append(
        self,
        number: Any,
        statistic: Array,
        counts: Array,
        hits: Array | None = None,
        *,
        mix: Array | None = None,
        shares: Array | None = None,
        confusion: Array | None = None,
        covariates: Array | None = None,
        unlabelled: float = 0.0,
    ) -> "Trajectory":
        """Add one round: statistic (n_statistics,), counts, hits, mix, shares (n_classes,)."""
        if len(self) and number <= self.rounds[-1]:
            raise ValueError(
                f"round {number} is not later than the last round seen, {self.rounds[-1]}: "
                "rounds are appended in order of time, each once."
            )
        unknown = np.full(len(counts), np.nan)
        no_table = np.full(self.confusions.shape[1], np.nan)
        if mix is None:
            mix = centred_log(counts) if counts.sum() > 0 else unknown
        row = {
            "statistics": statistic,
            "counts": counts,
            "hits": unknown if hits is None else hits,
            "mixes": mix,
            "shares": unknown if shares is None else shares,
            "confusions": no_table if confusion is None else confusion,
            "covariates": np.zeros(0) if covariates is None else covariates,
            "unlabelled": unlabelled,
        }
        grown: Any = {
            name: np.concatenate([getattr(self, name), [values]])[-KEPT_ROUNDS:]
            for name, values in row.items()
        }
        rounds = np.concatenate([self.rounds, [number]]) if len(self) else np.array([number])
        return replace(self, rounds=rounds[-KEPT_ROUNDS:], **grown)

    def labelled_later(
        self,
        i: int,
        statistic: Array,
        counts: Array,
        hits: Array,
        n_labels: float,
        confusion: Array | None = None,
    ) -> "Trajectory":
        """Add labels (n_classes,) to the i-th round and replace its statistic."""
        arrays = {name: getattr(self, name).copy() for name in ARRAYS}
        arrays["statistics"][i] = statistic
        if confusion is not None:
            arrays["confusions"][i] = confusion
        arrays["counts"][i] += counts
        arrays["hits"][i] = np.nan_to_num(arrays["hits"][i]) + hits
        arrays["mixes"][i] = centred_log(arrays["counts"][i])
        arrays["unlabelled"][i] = max(0.0, arrays["unlabelled"][i] - n_labels)
        return replace(self, **arrays)

    def latest(self, n_rounds: int | None) -> "Trajectory":
        """Keep the last rounds only; None keeps all."""
        if n_rounds is None or len(self) <= n_rounds:
            return self
        kept: Any = {name: getattr(self, name)[-n_rounds:] for name in ("rounds", *ARRAYS)}
        return replace(self, **kept)

    def pairs(self, latest: int = KEPT_ROUNDS) -> tuple[Inputs, Array]:
        """Give what was known before the latest rounds but the first, and their counts (R, K)."""
        first = max(min(self.lag, len(self)), len(self) - latest)
        return self._inputs(np.arange(first, len(self))), self.counts[first:]

    def before(self, row: int) -> Inputs:
        """Give what was known before one of the rounds."""
        return self._inputs(np.array([row]))

    def coming(self, covariates: Array | None = None) -> Inputs:
        """Give what is known before the round after the last one."""
        return self._inputs(np.array([len(self)]), covariates)

    def _inputs(self, rows: Codes, covariates: Array | None = None) -> Inputs:
        def lagged(values: Array, first: int, n: int) -> Array:
            parts = []
            for lag in range(first, first + n):
                found = np.full((len(rows), values.shape[1]), np.nan)
                there = (rows >= lag) & (rows - lag < len(values))
                found[there] = values[rows[there] - lag]
                parts.append(found)
            return np.stack(parts, axis=1)

        known = self.covariates
        if len(rows) and rows[-1] >= len(known) and known.shape[1]:
            if covariates is None:
                covariates = known[-1] if len(known) else np.full(known.shape[1], np.nan)
            known = np.concatenate([known, [covariates]])
        now = known[rows] if known.shape[1] else np.zeros((len(rows), 0))
        return Inputs(
            lagged(self.statistics, self.lag, 2),
            lagged(self.mixes, 1, N_LAGS),
            lagged(self.shares, self.lag, 1)[:, 0],
            lagged(self.confusions, self.lag, 1)[:, 0],
            now,
        )


def centred_log(counts: Array) -> Array:
    """Log shares of label counts (n_classes,), smoothed and centred."""
    logs = np.log(smooth_shares(counts))
    centred: Array = logs - logs.mean()
    return centred


def measure_by_name(
    name: str,
    codes: Codes,
    predicted: Codes,
    scores: Array,
    weight: Array | None = None,
    smoothing: float = 2.0,
    strata: Codes | None = None,
    n_strata: int = 0,
) -> Array:
    """Measure a statistic of predictions: codes, predicted (n,), scores (n, K), strata (n,)."""
    n_classes, right = scores.shape[1], codes == predicted
    if name == "predicted_marginal":
        return np.asarray(np.average(probabilities(scores), axis=0, weights=weight))
    if name == "confusion":
        return smoothed_confusion(codes, predicted, n_classes, weight, smoothing)
    if name == "released":
        # plain recalls; a class without rows gets the mean of those above zero
        recall = smoothed_shares(codes, right, n_classes, weight, 0.0)
        absent = np.bincount(codes, minlength=n_classes) == 0
        positive = recall[(recall > 0) & ~absent]
        return np.where(absent, positive.mean() if len(positive) else 0.0, recall)
    if name == "recall":
        return smoothed_shares(codes, right, n_classes, weight, smoothing)
    if strata is None:
        raise ValueError(f"statistic={name!r} needs strata, one for each row.")
    if name == "stratum":
        return smoothed_shares(strata, right, n_strata, weight, smoothing)
    return smoothed_shares(
        codes * n_strata + strata, right, n_classes * n_strata, weight, smoothing
    )


NAMED = ("recall", "confusion", "predicted_marginal", "stratum", "class_stratum", "released")


def smoothed_shares(
    cells: Codes, right: NDArray[Any], n_cells: int, weight: Array | None, smoothing: float = 2.0
) -> Array:
    """Share of right rows (n,) in each cell, shrunk towards that of all: -> (n_cells,)."""
    weight = np.ones(len(cells)) if weight is None else weight
    totals, hits = (np.bincount(cells, w, minlength=n_cells) for w in (weight, weight * right))
    return _shrunk(hits[:, None], totals, smoothing)


def smoothed_confusion(
    codes: Codes, predicted: Codes, n_classes: int, weight: Array | None, smoothing: float = 2.0
) -> Array:
    """Shares of each class predicted as each other, flattened row by row to (n_classes**2,)."""
    flat = np.bincount(codes * n_classes + predicted, weight, minlength=n_classes**2)
    table = flat.reshape(n_classes, n_classes).astype(np.float64)
    return _shrunk(table, table.sum(axis=1), smoothing)


def merged(old: Array, seen: Array, new: Array, counts: Array, smoothing: float) -> Array:
    """Statistic by class (K * m,) of all rows, from those of two parts: seen, counts (K,)."""
    hits = np.zeros((len(counts), 1))
    for statistic, n in ((old, seen), (new, counts)):
        whole = statistic.reshape(len(n), -1) * (n + smoothing)[:, None]
        hits = hits + whole - smoothing * whole.sum(axis=0) / (n.sum() + len(n) * smoothing)
    return _shrunk(hits, seen + counts, smoothing)


def _shrunk(sums: NDArray[Any], totals: NDArray[Any], smoothing: float) -> Array:
    """Smooth shares (n_cells * m,) of sums (n_cells, m) in totals (n_cells,) by those of all."""
    pooled = sums.sum(axis=0) / max(float(totals.sum()), TINY)
    whole = totals[:, None] + smoothing
    part = np.asarray(sums + smoothing * pooled, dtype=np.float64)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), pooled).ravel()
