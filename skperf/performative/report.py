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
from skperf.performative.record import MEASURED, Record

LATEST = 200  # rounds that diagnostics look back on


def prequential(record: Record) -> dict[str, NDArray[Any]]:
    """Losses, accuracies and mixes by round, as arrays (n_rounds,) and (n_rounds, n_classes)."""
    names = ("round", *MEASURED, "predicted", "realised")
    found = {name: np.array([entry[name] for entry in record.losses]) for name in names}
    mixes = {name: found[name].reshape(-1, len(record.log_base)) for name in names[-2:]}
    return found | mixes


def quick_diagnostics(record: Record) -> dict[str, Any]:
    """Diagnostics that cost next to nothing."""
    state = record.anticipation
    trajectory = state.trajectory.latest(LATEST)
    statistics = trajectory.statistics[: -trajectory.lag]
    statistics = statistics[np.isfinite(statistics).all(axis=1)]
    if not len(statistics):
        return {"n_pairs": 0, "rank": 0, "dispersion": state.spread}
    latest = trajectory.statistics[-trajectory.lag]
    recent = record.losses[-len(statistics) :]
    realised = np.array([one["realised"] for one in recent])
    predicted = np.array([one["predicted"] for one in recent])
    known = np.isfinite(realised).all(axis=1)
    surprise = xlogy(realised, realised) - realised * np.log(predicted)
    far = np.isfinite(latest).all()
    return {
        "n_pairs": state.n_pairs,
        **identifiability(statistics),
        "extrapolation": extrapolation(latest, statistics) if far else np.nan,
        **cycling(trajectory.counts[trajectory.counts.sum(axis=1) > 0]),
        "residual_kl": float(surprise[known].sum(axis=1).mean()) if known.any() else np.nan,
        "conditional_shift_p_value": conditional_shift_p_value(trajectory.counts, trajectory.hits),
        "dispersion": state.spread,
        "scores": {name: float(one.log_weights[0]) for name, one in state.contenders.items()},
    }


def full_diagnostics(record: Record, n_permutations: int) -> dict[str, Any]:
    """All diagnostics, with the test whether the mix answers the model."""
    inputs, counts = record.anticipation.trajectory.pairs()
    told = record.losses[-len(record.anticipation.trajectory) :]
    expected = np.log([one["predicted"] for one in told[: len(counts)]] or np.zeros((0, 1)))
    generator, late = np.random.default_rng(record.options.seed), slice(-LATEST, None)
    gains = {name: float(v.mean()) if len(v) else np.nan for name, v in gains_of(record).items()}
    found = prequential(record)
    saved = found["none"] - found["adapter"]
    return quick_diagnostics(record) | {
        "response_p_value": response_p_value(
            inputs[late], counts[late], expected[late], n_permutations, generator
        ),
        "gain_previous_mix": gains["last"],
        "gain_model_free": gains["model_free"],
        "gain_statistic": gains["all"],
        "gain_adapter": float(np.nanmean(saved)) if np.isfinite(saved).any() else 0.0,
        "answers": answers_the_model(record),
        "worst_recall": found["worst_recall"],
    }


_MIX = ("class", "base", "before", "last", "next")
_MIX_OF = ("label", "base", "before", "last", "anticipated")


def _line(label: Any, *cells: Any) -> str:
    told = [f"{cell:>8}" if isinstance(cell, str) else f"{cell:8.3f}" for cell in cells]
    return f"{str(label)[:12]:>12}" + "".join(told)


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
        lines = [f"round {self.answer['round']}: mix", _line(*_MIX, "low", "high")]
        lines += [_line(*(row[n] for n in _MIX_OF), row["low"], row["high"]) for row in self.mix]
        if self.recall:
            lines += ["recall", _line("class", "before", "last", "z")]
        lines += [_line(*row.values()) for row in self.recall]
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
        at, names = np.arange(len(self.mix)), ("before", "last", "anticipated")
        told = {n: np.array([row[n] for row in self.mix]) for n in (*names, "low", "high")}
        for i, (name, color) in enumerate(zip(names, ("0.75", "C1", "C0"), strict=True)):
            ax.bar(at + 0.27 * (i - 1), told[name], 0.25, label=name, color=color)
        middle = told["anticipated"]
        reach = np.maximum([middle - told["low"], told["high"] - middle], 0)
        ax.errorbar(at + 0.27, middle, reach, fmt="none", ecolor="k", linewidth=1)
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
    shares = earlier / earlier.sum(), counts[last] / counts[last].sum()
    columns = zip(labels, np.exp(record.log_base), *shares, prior, low, high, strict=True)
    mix = [dict(zip((*_MIX_OF, "low", "high"), row, strict=True)) for row in columns]
    recall = []
    if trajectory.statistics.shape[1] == len(labels) and len(before):
        old = trajectory.statistics[before]
        weights = np.maximum(counts[before], 1e-9)
        usual, new = np.average(old, axis=0, weights=weights), trajectory.statistics[last]
        spread = usual * (1 - usual)
        error = np.sqrt(spread / weights.sum(axis=0) + spread / np.maximum(counts[last], 1.0))
        z = (new - usual) / np.maximum(error, 1e-9)
        told = zip(labels, usual, new, z, strict=True)
        recall = [dict(zip(("label", "before", "last", "z"), row, strict=True)) for row in told]
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
        f"{'' if answers else 'no evidence that '}the mix answers the deployed model",
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
