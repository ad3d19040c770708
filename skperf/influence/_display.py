"""Pictures of influence."""

import textwrap

import numpy as np
import torch
from sklearn.utils import Bunch

from skperf.backbone.plotting import pyplot
from skperf.influence._rows import TopRows
from skperf.influence.horizon import curve

_HELPFUL, _HARMFUL = "#3a6ea5", "#b5473c"


class InfluenceDisplay:
    """A query beside the training rows that helped and hurt it most.

    Parameters
    ----------
    queries : ndarray of shape (n_query, ...)
        Images, texts or rows of features.
    labels : ndarray of shape (n_query,)
        Labels of the queries.
    rows : ndarray of shape (n_train, ...)
        Training rows, in the same form.
    row_labels : ndarray of shape (n_train,)
        Their labels.
    proponents : Bunch
        As :meth:`InfluenceScorer.top_k` returns them.
    opponents : Bunch
        Likewise.
    class_names : mapping or sequence, optional
        Words for labels.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        One a picture.
    figure_ : matplotlib Figure
        The figure.
    """

    def __init__(
        self, queries, labels, rows, row_labels, proponents, opponents, *, class_names=None
    ):
        self.queries = queries
        self.labels = labels
        self.rows = rows
        self.row_labels = row_labels
        self.proponents = proponents
        self.opponents = opponents
        self.class_names = class_names

    @classmethod
    def from_estimator(
        cls, estimator, X, y, *, k=4, shown=None, shown_train=None, class_names=None, figure=None
    ):
        """Score queries and draw them.

        Parameters
        ----------
        estimator : InfluenceScorer
            Fitted.
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query,)
            Their labels.
        k : int, default=4
            Proponents and opponents of each.
        shown : sequence, optional
            What to show in place of the queries, such as texts.
        shown_train : sequence, optional
            What to show in place of the training rows.
        class_names : mapping or sequence, optional
            Words for labels.
        figure : matplotlib Figure, optional
            Where to draw.

        Returns
        -------
        InfluenceDisplay
            Drawn.
        """
        proponents = estimator.top_k(X, y, k, kind="proponents")
        opponents = estimator.top_k(X, y, k, kind="opponents")
        display = cls(
            np.asarray(X) if shown is None else shown,
            np.asarray(y),
            estimator.X_.array if shown_train is None else shown_train,
            estimator.y_,
            proponents,
            opponents,
            class_names=class_names,
        )
        return display.plot(figure=figure)

    @classmethod
    def from_predictions(
        cls, influence, X, y, X_train, y_train, *, k=4, class_names=None, figure=None
    ):
        """Draw from a matrix of scores.

        Parameters
        ----------
        influence : ndarray of shape (n_query, n_train)
            Scores.
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query,)
            Their labels.
        X_train : array-like of shape (n_train, ...)
            Training rows.
        y_train : array-like of shape (n_train,)
            Their labels.
        k : int, default=4
            Proponents and opponents of each.
        class_names : mapping or sequence, optional
            Words for labels.
        figure : matplotlib Figure, optional
            Where to draw.

        Returns
        -------
        InfluenceDisplay
            Drawn.
        """
        influence, pairs = np.asarray(influence), []
        for sign in (1, -1):
            indices = np.argsort(-sign * influence, axis=1, kind="stable")[:, :k]
            values = np.take_along_axis(influence, indices, 1)
            pairs.append(TopRows(indices=indices, values=values))
        display = cls(
            X, np.asarray(y), X_train, np.asarray(y_train), *pairs, class_names=class_names
        )
        return display.plot(figure=figure)

    def plot(self, ax=None, *, figure=None):
        """Draw one line of pictures for each query.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Its place is divided among the pictures.
        figure : matplotlib Figure, optional
            Where to draw; a new one by default.

        Returns
        -------
        InfluenceDisplay
            Itself.
        """
        plt = pyplot()
        k = self.proponents.indices.shape[1]
        n, width = len(self.labels), 2 * k + 1
        if ax is not None:
            ax.set_axis_off()
            figure = ax.figure
            grid = ax.get_subplotspec().subgridspec(n, width)
            axes = grid.subplots(squeeze=False)
        else:
            figure = figure or plt.figure(figsize=(1.5 * width, 1.9 * n), layout="constrained")
            axes = figure.subplots(n, width, squeeze=False)
        for i, line in enumerate(axes):
            _draw(line[0], self.queries[i], f"query: {self._name(self.labels[i])}", "black")
            for j in range(k):
                self._row(line[1 + j], self.proponents, i, j, _HELPFUL)
                self._row(line[1 + k + j], self.opponents, i, j, _HARMFUL)
        self.axes_, self.figure_ = axes, figure
        return self

    def _row(self, ax, top, i, j, colour):
        row = top.indices[i, j]
        title = f"{self._name(self.row_labels[row])}\n{top.values[i, j]:+.2g}"
        _draw(ax, self.rows[row], title, colour)

    def _name(self, label):
        return label if self.class_names is None else self.class_names[label]


def _draw(ax, example, title, colour):
    ax.set_title(title, fontsize=8, color=colour)
    ax.set_axis_off()
    if isinstance(example, str):
        text = textwrap.fill(textwrap.shorten(example, 120, placeholder=" ..."), 24)
        ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=7)
        return
    image = _as_image(np.asarray(example.cpu() if isinstance(example, torch.Tensor) else example))
    if image is None:
        values = np.asarray(example).ravel()
        ax.bar(np.arange(len(values)), values, color=colour)
    else:
        ax.imshow(image, cmap="gray_r" if image.ndim == 2 else None)


def _as_image(values):
    if values.ndim == 3 and values.shape[0] in (1, 3):
        values = values[0] if values.shape[0] == 1 else values.transpose(1, 2, 0)
    if values.ndim in (2, 3):
        return values
    side = round(values.size**0.5)
    square = values.ndim == 1 and side > 3 and side**2 == values.size
    return values.reshape(side, side) if square else None


class FadingDisplay:
    """How the agreement of predicted and actual effects falls with further training.

    Parameters
    ----------
    curves : mapping of str to Bunch
        Results of :meth:`InfluenceScorer.fading`, by name.
    least : float, default=0.8
        Correlation that still counts as usable.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        Its figure.
    lines_ : list of matplotlib artists
        One a curve.
    """

    def __init__(self, curves, *, least=0.8):
        self.curves = curves
        self.least = least

    @classmethod
    def from_estimator(cls, estimator, X, y, *, name=None, ax=None, **fading):
        """Train on, compare and draw.

        Parameters
        ----------
        estimator : InfluenceScorer or mapping of str to InfluenceScorer
            Fitted.
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query,)
            Their labels.
        name : str, optional
            Of a single curve.
        ax : matplotlib Axes, optional
            Where to draw.
        **fading : dict
            Passed to :meth:`InfluenceScorer.fading`.

        Returns
        -------
        FadingDisplay
            Drawn.
        """
        several = isinstance(estimator, dict)
        scorers = estimator if several else {name or estimator.method_: estimator}
        curves = {key: scorer.fading(X, y, **fading) for key, scorer in scorers.items()}
        return cls(curves).plot(ax)

    @classmethod
    def from_predictions(cls, steps, predicted, actual, *, name="influence", ax=None):
        """Draw from predicted and actual effects.

        Parameters
        ----------
        steps : sequence of int
            Ascending.
        predicted : ndarray of shape (n_steps, n_query, n_train)
            Effects as foretold.
        actual : ndarray of shape (n_steps, n_query, n_train)
            Effects as they were.
        name : str, default="influence"
            Of the curve.
        ax : matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        FadingDisplay
            Drawn.
        """
        figures = curve(steps, torch.as_tensor(predicted), torch.as_tensor(actual), 0.8)
        return cls({name: Bunch(**figures)}).plot(ax)

    def plot(self, ax=None, *, name=None, **line_kw):
        """Draw correlation against steps.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            In place of a single curve's own.
        **line_kw : dict
            Passed to ``Axes.plot``.

        Returns
        -------
        FadingDisplay
            Itself.
        """
        plt = pyplot()
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        self.lines_ = []
        for key, found in self.curves.items():
            label = name if name and len(self.curves) == 1 else key
            label = f"{label} (usable to {found.usable_horizon})"
            options = {"marker": "o", "markersize": 4, "label": label, **line_kw}
            self.lines_ += ax.plot(found.steps, found.pearson, **options)
        ax.axhline(self.least, color="0.6", linewidth=1, linestyle=":")
        ax.set(
            xscale="log", xlabel="further training steps", ylabel="correlation with actual effect"
        )
        ax.legend(frameon=False, fontsize=8)
        self.ax_, self.figure_ = ax, ax.figure
        return self
