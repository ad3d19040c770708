"""Pictures of a trajectory of deployments."""

from itertools import cycle

import numpy as np
from sklearn.utils import Bunch
from sklearn.utils.validation import check_is_fitted

from skperf.backbone.plotting import pyplot
from skperf.performative._inputs import check_rounds, encode

LINES = {
    "none": {"label": "no correction", "color": "0.55"},
    "last": {"label": "last round's mix", "color": "C1"},
    "adapter": {"label": "adapter", "color": "C0", "linewidth": 2},
    "oracle": {"label": "oracle mix", "color": "k", "linestyle": "--", "linewidth": 1},
}


class TrajectoryDisplay:
    """Log loss, label mix and worst recall of a deployed model over its rounds.

    Use :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    losses : dict of str to ndarray of shape (n_rounds,)
        Log losses by name; ``none``, ``last``, ``adapter`` and ``oracle`` have set colours.
    rounds : ndarray of shape (n_rounds,), optional
        Numbers of the rounds.
    predicted : ndarray of shape (n_rounds, n_classes), optional
        Label mixes as anticipated.
    realised : ndarray of shape (n_rounds, n_classes), optional
        Label mixes as they came.
    worst_recall : ndarray of shape (n_rounds,), optional
        Smallest recall of any class.
    classes : array-like of shape (n_classes,), optional
        Labels.

    Attributes
    ----------
    ax_ : matplotlib Axes or ndarray of Axes
        Drawn on.
    figure_ : matplotlib Figure
        It belongs to.
    lines_ : dict of str to matplotlib Line2D
        Of the losses.
    """

    def __init__(
        self, losses, *, rounds=None, predicted=None, realised=None, worst_recall=None, classes=None
    ):
        self.losses = losses
        self.rounds = rounds
        self.predicted = predicted
        self.realised = realised
        self.worst_recall = worst_recall
        self.classes = classes

    @classmethod
    def from_estimator(cls, estimator, X=None, y=None, *, rounds=None, ax=None, **line_kw):
        """Draw what a fitted adapter went through.

        Parameters
        ----------
        estimator : PerformativeAdapter
            Fitted; each round was judged before it was learned from.
        X : array-like of shape (n, ...), optional
            Rows of further rounds, which the adapter has not seen: drawn instead.
        y : array-like of shape (n,), optional
            Their labels.
        rounds : array-like of int of shape (n,), optional
            Their rounds.
        ax : matplotlib Axes or sequence of three, optional
            To draw on.
        **line_kw : dict
            For the lines of the losses.

        Returns
        -------
        TrajectoryDisplay
            Drawn.
        """
        check_is_fitted(estimator, "record_")
        record = estimator.prequential_ if X is None else _further(estimator, X, y, rounds)
        if not len(record["round"]):
            raise ValueError("there are no rounds to draw: the adapter was fitted without any.")
        display = cls(
            {name: record[name] for name in LINES if name in record},
            rounds=record["round"],
            predicted=record.get("predicted"),
            realised=record["realised"],
            worst_recall=record["worst_recall"],
            classes=estimator.classes_,
        )
        return display.plot(ax, **line_kw)

    @classmethod
    def from_predictions(cls, y, proba, *, rounds, classes=None, ax=None, **line_kw):
        """Draw the log losses of any predictions over rounds.

        Parameters
        ----------
        y : array-like of shape (n,)
            Labels.
        proba : dict of str to array-like of shape (n, n_classes)
            Predicted probabilities by name.
        rounds : array-like of int of shape (n,)
            Rounds.
        classes : array-like of shape (n_classes,), optional
            Labels in the order of the columns; by default those of `y`, sorted.
        ax : matplotlib Axes or sequence of three, optional
            To draw on.
        **line_kw : dict
            For the lines.

        Returns
        -------
        TrajectoryDisplay
            Drawn; mixes are those realised, the worst recall is that of the last predictions.
        """
        y = np.asarray(y)
        rounds = check_rounds(rounds, len(y))
        classes = np.unique(y) if classes is None else np.asarray(classes)
        codes = encode(y, classes, known_to="classes")
        arrays = {name: np.asarray(values, dtype=np.float64) for name, values in proba.items()}
        numbers = np.unique(rounds)
        record = _by_round(codes, arrays, rounds, numbers, len(classes))
        display = cls(
            {name: record[name] for name in arrays},
            rounds=numbers,
            realised=record["realised"],
            worst_recall=record["worst_recall"],
            classes=classes,
        )
        return display.plot(ax, **line_kw)

    def plot(self, ax=None, *, title=None, **line_kw):
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of three, optional
            One gets the losses; three get losses, label mixes and worst recall. By default a
            new figure of three.
        title : str, optional
            Above the first picture.
        **line_kw : dict
            For the lines of the losses.

        Returns
        -------
        TrajectoryDisplay
            Itself.
        """
        plt = pyplot()

        if ax is None:
            _, ax = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
        axes = np.atleast_1d(ax)
        self._plot_losses(axes[0], line_kw)
        if len(axes) > 1:
            self._plot_mixes(axes[1])
            self._plot_worst_recall(axes[2])
        axes[-1].set_xlabel("round")
        if title is not None:
            axes[0].set_title(title)
        self.ax_ = ax
        self.figure_ = axes[0].figure
        return self

    def _numbers(self):
        n_rounds = len(next(iter(self.losses.values())))
        return np.arange(n_rounds) if self.rounds is None else self.rounds

    def _plot_losses(self, ax, line_kw):
        self.lines_ = {}
        for name, values in self.losses.items():
            style = LINES.get(name, {"label": name}) | line_kw
            (self.lines_[name],) = ax.plot(self._numbers(), values, **style)
        ax.set_ylabel("log loss")
        ax.legend(fontsize="small")

    def _plot_mixes(self, ax):
        if self.realised is None:
            return
        # the classes that move most; a hundred lines tell nothing
        shown = np.argsort(-np.ptp(self.realised, axis=0))[:4]
        labels = np.arange(self.realised.shape[1]) if self.classes is None else self.classes
        for column, color in zip(sorted(shown), cycle(["C0", "C1", "C2", "C3"]), strict=False):
            ax.plot(
                self._numbers(), self.realised[:, column], color=color, label=f"{labels[column]}"
            )
            if self.predicted is not None:
                ax.plot(self._numbers(), self.predicted[:, column], ".", color=color)
        ax.set_ylabel(
            "label mix\n(dots: anticipated)" if self.predicted is not None else "label mix"
        )
        ax.legend(fontsize="small", ncols=4, title="class" if self.classes is not None else None)

    def _plot_worst_recall(self, ax):
        if self.worst_recall is not None:
            ax.plot(self._numbers(), self.worst_recall, color="C3", label="worst class")
            ax.legend(fontsize="small")
        ax.set_ylabel("worst class recall")
        ax.set_ylim(-0.02, 1.02)


def _further(estimator, X, y, rounds):
    y = np.asarray(y)
    numbers = check_rounds(0 if rounds is None else rounds, len(y))
    codes = encode(y, estimator.classes_)
    proba = {"adapter": estimator.replay(X, y, rounds=numbers)}
    record = _by_round(codes, proba, numbers, np.unique(numbers), len(estimator.classes_))
    return record | {"round": np.unique(numbers)}


def _by_round(codes, proba, rounds, numbers, n_classes):
    """Log losses (n_rounds,) of each prediction, realised mixes, worst recall of the last."""
    record = Bunch(realised=[], worst_recall=[], **{name: [] for name in proba})
    for number in numbers:
        rows = np.flatnonzero(rounds == number)
        counts = np.bincount(codes[rows], minlength=n_classes)
        record["realised"].append(counts / len(rows))
        for name, values in proba.items():
            chosen = np.maximum(values[rows, codes[rows]], np.finfo(np.float64).tiny)
            record[name].append(-np.log(chosen).mean())
        right = values[rows].argmax(axis=1) == codes[rows]
        recalls = np.bincount(codes[rows], right, n_classes)[counts > 0] / counts[counts > 0]
        record["worst_recall"].append(recalls.min())
    return Bunch(**{name: np.array(values) for name, values in record.items()})
