"""The record of a deployed model: its statistic and the label counts, round by round."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Rounds in order of time; the statistic of a round answers in the counts `lag` rows later."""

    rounds: Codes  # (n_rounds,)
    statistics: Array  # (n_rounds, n_statistics)
    counts: Array  # (n_rounds, n_classes)
    hits: Array  # (n_rounds, n_classes)
    lag: int = 1

    @classmethod
    def empty(cls, n_statistics: int, n_classes: int, *, lag: int = 1) -> "Trajectory":
        """Start a record without rounds."""
        counts = np.zeros((0, n_classes))
        return cls(np.zeros(0, np.int64), np.zeros((0, n_statistics)), counts, counts, lag)

    @classmethod
    def from_arrays(
        cls, statistics: Array, counts: Array, *, rounds: Codes | None = None, lag: int = 1
    ) -> "Trajectory":
        """Build a record from statistics (R, S) and label counts (R, K) of rounds in order."""
        numbers = np.arange(len(counts)) if rounds is None else np.asarray(rounds)
        hits = np.full(counts.shape, np.nan)
        return cls(numbers.astype(np.int64), statistics, counts, hits, lag)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Trajectory":
        """Rebuild a record from what `to_dict` returned, also after a round trip by JSON."""
        arrays = {n: np.asarray(state[n], np.float64) for n in ("statistics", "counts", "hits")}
        return cls(rounds=np.asarray(state["rounds"], np.int64), lag=int(state["lag"]), **arrays)

    def __len__(self) -> int:
        """Count the rounds."""
        return len(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Give plain lists, fit for JSON: the whole state there is, and no raw rows."""
        names = ("rounds", "statistics", "counts", "hits")
        return {name: getattr(self, name).tolist() for name in names} | {"lag": self.lag}

    def append(
        self, number: int, statistic: Array, counts: Array, hits: Array | None = None
    ) -> "Trajectory":
        """Add one round: statistic (n_statistics,), counts (n_classes,), hits (n_classes,)."""
        if len(self) and number <= self.rounds[-1]:
            raise ValueError(
                f"round {number} is not later than the last round seen, {self.rounds[-1]}: "
                "rounds are appended in order of time, each once."
            )
        known = np.full(len(counts), np.nan) if hits is None else hits
        return replace(
            self,
            rounds=np.append(self.rounds, number),
            statistics=np.vstack([self.statistics, statistic]),
            counts=np.vstack([self.counts, counts]),
            hits=np.vstack([self.hits, known]),
        )

    def latest(self, n_rounds: int | None) -> "Trajectory":
        """Keep the last rounds only; None keeps all."""
        if n_rounds is None or len(self) <= n_rounds:
            return self
        kept = {n: getattr(self, n)[-n_rounds:] for n in ("rounds", "statistics", "counts", "hits")}
        return replace(self, **kept)

    def pairs(self) -> tuple[Array, Array]:
        """Give the statistics (R - lag, S) and the counts (R - lag, K) that answered them."""
        n_pairs = max(0, len(self) - self.lag)
        return self.statistics[:n_pairs], self.counts[len(self) - n_pairs :]

    def in_force(self) -> Array | None:
        """Give the statistic that the round after the last one will answer, if it is known."""
        return self.statistics[-self.lag] if len(self) >= self.lag else None


def smoothed_recall(
    y_true: Codes,
    y_pred: Codes,
    proba: Array | None,
    classes: NDArray[Any],
    sample_weight: Array | None = None,
    *,
    smoothing: float = 2.0,
) -> Array:
    """Share of each class that was predicted right, shrunk towards the pooled accuracy.

    Shapes: y_true, y_pred (n,), proba (n, n_classes), classes (n_classes,), sample_weight (n,) ->
    (n_classes,).
    """
    weight = np.ones(len(y_true)) if sample_weight is None else sample_weight
    hits = weight * (y_true == y_pred)
    totals: Array = np.bincount(y_true, weight, minlength=len(classes)).astype(np.float64)
    right: Array = np.bincount(y_true, hits, minlength=len(classes)).astype(np.float64)
    pooled = float(right.sum()) / max(float(totals.sum()), np.finfo(np.float64).tiny)
    return _ratio(right + pooled * smoothing, totals + smoothing, pooled)


def smoothed_confusion(
    y_true: Codes,
    y_pred: Codes,
    proba: Array | None,
    classes: NDArray[Any],
    sample_weight: Array | None = None,
    *,
    smoothing: float = 2.0,
) -> Array:
    """Shares of each class predicted as each other, flattened row by row to (n_classes**2,)."""
    n_classes = len(classes)
    weight = np.ones(len(y_true)) if sample_weight is None else sample_weight
    flat = np.bincount(y_true * n_classes + y_pred, weight, minlength=n_classes**2)
    table: Array = flat.reshape(n_classes, n_classes).astype(np.float64)
    pooled: Array = table.sum(axis=0) / max(float(table.sum()), np.finfo(np.float64).tiny)
    totals = table.sum(axis=1, keepdims=True)
    return _ratio(table + smoothing * pooled, totals + smoothing, pooled).ravel()


def predicted_marginal(
    y_true: Codes,
    y_pred: Codes,
    proba: Array | None,
    classes: NDArray[Any],
    sample_weight: Array | None = None,
    *,
    smoothing: float = 0.0,
) -> Array:
    """Mean predicted probability of each class, which needs no labels."""
    return np.asarray(np.average(np.asarray(proba), axis=0, weights=sample_weight))


def _ratio(part: Array, whole: Array, otherwise: Array | float) -> Array:
    filled = np.where(whole > 0, whole, 1.0)
    return np.where(whole > 0, part / filled, otherwise)


STATISTICS: dict[str, Callable[..., Array]] = {
    "recall": smoothed_recall,
    "confusion": smoothed_confusion,
    "predicted_marginal": predicted_marginal,
}
