"""What a record tells of the rounds so far: diagnostics, and a report to read each morning."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from skperf.performative.diagnostics import (
    conditional_shift_p_value,
    cycling,
    extrapolation,
    identifiability,
    response_p_value,
)
from skperf.performative.ranking import answers_the_model, gains_of
from skperf.performative.record import Record

Array = NDArray[np.float64]

LATEST = 200  # rounds that diagnostics look back on
SHARES = (
    "round",
    "none",
    "last",
    "adapter",
    "oracle",
    "model_free",
    "accuracy",
    "accuracy_none",
    "worst_recall",
    "tv",
    "strength",
)


def prequential(record: Record) -> dict[str, NDArray[Any]]:
    """Losses, accuracies and mixes by round, as arrays (n_rounds,) and (n_rounds, n_classes)."""
    found = {name: np.array([entry[name] for entry in record.losses]) for name in SHARES}
    n_classes = len(record.log_base)
    for name in ("predicted", "realised"):
        mixes = [entry[name] for entry in record.losses]
        found[name] = np.array(mixes).reshape(len(mixes), n_classes)
    return found


def quick_diagnostics(record: Record) -> dict[str, Any]:
    """Diagnostics that cost next to nothing."""
    state = record.anticipation
    trajectory = state.trajectory.latest(LATEST)
    statistics = trajectory.pairs()[0].statistics[:, 0]
    statistics = statistics[np.isfinite(statistics).all(axis=1)]
    if not len(statistics):
        return {"n_pairs": 0, "rank": 0, "dispersion": state.spread}
    latest = trajectory.in_force()
    recent = record.losses[-len(statistics) :]
    realised = np.array([one["realised"] for one in recent])
    predicted = np.array([one["predicted"] for one in recent])
    known = np.isfinite(realised).all(axis=1)
    surprise = xlogy(realised, realised) - realised * np.log(predicted)
    far = latest is not None and bool(np.isfinite(latest).all())
    return {
        "n_pairs": state.n_pairs,
        **identifiability(statistics),
        "extrapolation": extrapolation(np.asarray(latest), statistics) if far else np.nan,
        **cycling(trajectory.counts[trajectory.counts.sum(axis=1) > 0]),
        "residual_kl": float(surprise[known].sum(axis=1).mean()) if known.any() else np.nan,
        "conditional_shift_p_value": conditional_shift_p_value(trajectory.counts, trajectory.hits),
        "dispersion": state.spread,
        "scores": {name: one.log_weight for name, one in state.contenders.items()},
    }


def full_diagnostics(record: Record, n_permutations: int) -> dict[str, Any]:
    """All diagnostics, with the test whether the mix answers the model."""
    inputs, counts = record.anticipation.trajectory.pairs()
    told = record.losses[-len(record.anticipation.trajectory) :]
    expected = np.log([one["predicted"] for one in told[: len(counts)]] or np.zeros((0, 1)))
    generator = np.random.default_rng(record.options.seed)
    gains = {name: float(v.mean()) if len(v) else np.nan for name, v in gains_of(record).items()}
    found = prequential(record)
    saved = found["none"] - found["adapter"]
    return quick_diagnostics(record) | {
        "response_p_value": response_p_value(
            inputs[-LATEST:],
            counts[-LATEST:],
            expected[-LATEST:],
            n_permutations=n_permutations,
            generator=generator,
        ),
        "gain_nothing": 0.0,
        "gain_previous_mix": gains["last"],
        "gain_model_free": gains["model_free"],
        "gain_statistic": gains["all"],
        "gain_adapter": float(np.nanmean(saved)) if np.isfinite(saved).any() else 0.0,
        "answers": answers_the_model(record),
        "worst_recall": found["worst_recall"],
    }


@dataclass(frozen=True, eq=False)
class DriftReport:
    """State of the rounds so far, for a person.

    Parameters
    ----------
    mix : list of dict
        One a class: ``label``, shares ``base``, ``before``, ``last``, ``anticipated``, ``low``,
        ``high``.
    recall : list of dict
        One a class: ``label``, ``before``, ``last`` (of the deployed model) and ``z``, the change
        in standard errors.
    answer : dict
        What leads, how strongly it is applied and what it has saved; ``notes`` are sentences.
    """

    mix: list[dict[str, Any]]
    recall: list[dict[str, Any]]
    answer: dict[str, Any]

    def __str__(self) -> str:
        """Three small tables."""
        lines = [f"round {self.answer['round']}: mix"]
        lines.append(
            f"{'class':>12} {'base':>7} {'before':>7} {'last':>7} {'next':>7}   nine in ten"
        )
        lines += [
            f"{str(row['label'])[:12]:>12} {row['base']:7.3f} {row['before']:7.3f} "
            f"{row['last']:7.3f} {row['anticipated']:7.3f}   {row['low']:.3f} to {row['high']:.3f}"
            for row in self.mix
        ]
        if self.recall:
            lines += ["recall", f"{'class':>12} {'before':>7} {'last':>7} {'z':>7}"]
        lines += [
            f"{str(row['label'])[:12]:>12} {row['before']:7.3f} {row['last']:7.3f} {row['z']:7.1f}"
            for row in self.recall
        ]
        return "\n".join([*lines, "answer", *(f"  {note}" for note in self.answer["notes"])])

    def plot(self, ax: Any = None) -> Any:
        """Draw the mixes, before, last and anticipated with its interval, on a matplotlib Axes.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            To draw on.

        Returns
        -------
        matplotlib Axes
            Drawn on.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        at = np.arange(len(self.mix))
        for i, (name, color) in enumerate(
            (("before", "0.75"), ("last", "C1"), ("anticipated", "C0"))
        ):
            values = np.array([row[name] for row in self.mix])
            ax.bar(at + 0.27 * (i - 1), values, 0.25, label=name, color=color)
        low, high = (np.array([row[name] for row in self.mix]) for name in ("low", "high"))
        reach = [np.maximum(values - low, 0), np.maximum(high - values, 0)]
        ax.errorbar(at + 0.27, values, reach, fmt="none", ecolor="k", linewidth=1)
        ax.set_xticks(at, [str(row["label"]) for row in self.mix])
        ax.set(ylabel="share", title=f"label mix about round {self.answer['round']}")
        ax.legend(fontsize="small")
        return ax


def drift_report(record: Record, n_before: int = 10) -> DriftReport:
    """Compare the last round with some before it and with what is to come."""
    trajectory = record.anticipation.trajectory
    counts = trajectory.counts
    seen = np.flatnonzero(counts.sum(axis=1) > 0)
    if not len(seen):
        raise ValueError("there is no labelled round to report on.")
    last, before = seen[-1], seen[-1 - n_before : -1]
    prior = np.exp(record.prior()[0])
    low, high = record.interval(prior)
    earlier = counts[before].sum(axis=0) if len(before) else counts[last]
    labels = record.classes.tolist()
    columns = {
        "label": labels,
        "base": np.exp(record.log_base),
        "before": earlier / earlier.sum(),
        "last": counts[last] / counts[last].sum(),
        "anticipated": prior,
        "low": low,
        "high": high,
    }
    mix = [{name: values[i] for name, values in columns.items()} for i in range(len(labels))]
    recall = []
    if trajectory.statistics.shape[1] == len(labels) and len(before):
        old = trajectory.statistics[before]
        weights = np.maximum(counts[before], 1e-9)
        usual, new = np.average(old, axis=0, weights=weights), trajectory.statistics[last]
        spread = usual * (1 - usual)
        error = np.sqrt(spread / weights.sum(axis=0) + spread / np.maximum(counts[last], 1.0))
        z = (new - usual) / np.maximum(error, 1e-9)
        recall = [
            {"label": label, "before": usual[i], "last": new[i], "z": z[i]}
            for i, label in enumerate(labels)
        ]
    return DriftReport(mix, recall, _answer(record, int(last)))


def _answer(record: Record, last: int) -> dict[str, Any]:
    state, gains = record.anticipation, gains_of(record)
    choice, leader = record.corrector.choice, state.leader or "nothing yet"
    answers = answers_the_model(record)
    shift = conditional_shift_p_value(
        state.trajectory.counts[-LATEST:], state.trajectory.hits[-LATEST:]
    )
    saved = [one["none"] - one["adapter"] for one in record.losses[-10:]]
    worst = record.losses[-1]["worst_recall"]
    notes = [
        f"the map that leads reads: {leader}; {choice.strength:.0%} of the correction is applied",
        f"it saved {np.nanmean(saved) if np.isfinite(saved).any() else 0.0:.4f} nats a row over "
        "the last ten rounds",
        "the mix answers the deployed model"
        if answers
        else "no evidence that the mix answers the deployed model",
    ]
    if np.isfinite(worst):
        notes.append(f"worst recall of a class in the last round: {worst:.2f}")
    if shift < 0.01:
        notes.append(
            f"the classes themselves look different now (p = {shift:.2g}): recalls measured "
            "before may not hold"
        )
    return {
        "round": state.trajectory.rounds[last],
        "leader": leader,
        "strength": choice.strength,
        "answers": answers,
        "conditional_shift_p_value": shift,
        "gains": {name: float(v.mean()) if len(v) else np.nan for name, v in gains.items()},
        "notes": notes,
    }
