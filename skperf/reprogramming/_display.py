"""Pictures: scores in and out of distribution, the path over alpha, programs, label maps."""

import numpy as np

from skperf.backbone.plotting import pyplot
from skperf.metrics import fpr_at_95_tpr, ood_auroc


class OODScoreDisplay:
    """Scores of rows that belong to the task and of rows that do not.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        1 for rows that belong to the task, 0 for others.
    y_score : array-like of shape (n,)
        Higher is more in-distribution.
    threshold : float, optional
        Drawn as a line.
    name : str, optional
        Of what gave the scores.

    Attributes
    ----------
    auroc : float
        See :func:`skperf.metrics.ood_auroc`.
    fpr95 : float
        See :func:`skperf.metrics.fpr_at_95_tpr`.
    ax_ : matplotlib Axes
        After :meth:`plot`.
    figure_ : matplotlib Figure
        After :meth:`plot`.
    """

    def __init__(self, y_true, y_score, *, threshold=None, name=None):
        self.y_true = np.asarray(y_true)
        self.y_score = np.asarray(y_score)
        self.threshold = threshold
        self.name = name
        self.auroc = ood_auroc(self.y_true, self.y_score)
        self.fpr95 = fpr_at_95_tpr(self.y_true, self.y_score)

    @classmethod
    def from_estimator(cls, estimator, X, y_true, *, ax=None, name=None, **hist_kw):
        """Score rows and draw.

        Parameters
        ----------
        estimator : Reprogrammer
            Fitted.
        X : array-like of shape (n, ...)
            Images, some of which do not belong to the task.
        y_true : array-like of shape (n,)
            1 for those that do, 0 for others.
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            By default that of the estimator.
        **hist_kw : dict
            For ``ax.hist``.

        Returns
        -------
        OODScoreDisplay
            Drawn.
        """
        threshold = getattr(estimator, "ood_threshold_", None)
        name = type(estimator).__name__ if name is None else name
        scores = estimator.score_samples(X)
        return cls(y_true, scores, threshold=threshold, name=name).plot(ax=ax, **hist_kw)

    @classmethod
    def from_predictions(cls, y_true, y_score, *, ax=None, name=None, threshold=None, **hist_kw):
        """Draw given scores.

        Parameters
        ----------
        y_true : array-like of shape (n,)
            1 for rows that belong to the task, 0 for others.
        y_score : array-like of shape (n,)
            Higher is more in-distribution.
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            Of what gave the scores.
        threshold : float, optional
            Drawn as a line.
        **hist_kw : dict
            For ``ax.hist``.

        Returns
        -------
        OODScoreDisplay
            Drawn.
        """
        return cls(y_true, y_score, threshold=threshold, name=name).plot(ax=ax, **hist_kw)

    def plot(self, ax=None, *, name=None, **hist_kw):
        """Draw two histograms.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            In place of the display's own.
        **hist_kw : dict
            For ``ax.hist``.

        Returns
        -------
        OODScoreDisplay
            Itself.
        """
        self.ax_, self.figure_ = _axes(ax)
        bins = np.histogram_bin_edges(self.y_score, 40)
        options = {"bins": bins, "density": True, "alpha": 0.6} | hist_kw
        inside = self.y_true == 1
        self.ax_.hist(self.y_score[inside], label="in distribution", color="C0", **options)
        self.ax_.hist(self.y_score[~inside], label="none of these", color="C1", **options)
        if self.threshold is not None:
            self.ax_.axvline(self.threshold, color="0.2", linestyle=":", label="threshold")
        title = f"AUROC {self.auroc:.3f}, FPR at 95 % TPR {self.fpr95:.3f}"
        name = self.name if name is None else name
        self.ax_.set(xlabel="score", ylabel="density", title=f"{name}: {title}" if name else title)
        self.ax_.legend()
        return self


class AlphaPathDisplay:
    """Accuracy, and maybe rejection, from reprogrammed (0) to zero-shot (1).

    Parameters
    ----------
    alphas : array-like of shape (n_alphas,)
        Mixes.
    accuracy : array-like of shape (n_alphas,)
        At each.
    chosen : float, optional
        Marked.
    auroc : array-like of shape (n_alphas,), optional
        Of rejection.

    Attributes
    ----------
    ax_ : matplotlib Axes
        After :meth:`plot`.
    figure_ : matplotlib Figure
        After :meth:`plot`.
    """

    def __init__(self, alphas, accuracy, *, chosen=None, auroc=None):
        self.alphas = np.asarray(alphas)
        self.accuracy = np.asarray(accuracy)
        self.chosen = chosen
        self.auroc = auroc

    @classmethod
    def from_estimator(cls, estimator, X, y, *, alphas=None, ax=None, **line_kw):
        """Follow the path on labelled rows and draw.

        Parameters
        ----------
        estimator : Reprogrammer
            Fitted, with a zero-shot head.
        X : array-like of shape (n, ...)
            Images.
        y : array-like of shape (n,)
            Labels.
        alphas : sequence of float, optional
            By default 0, 0.1, ..., 1.
        ax : matplotlib Axes, optional
            Where to draw.
        **line_kw : dict
            For ``ax.plot``.

        Returns
        -------
        AlphaPathDisplay
            Drawn.
        """
        path = estimator.alpha_path(X, y) if alphas is None else estimator.alpha_path(X, y, alphas)
        display = cls(path.alphas, path.accuracy, chosen=estimator.alpha_)
        return display.plot(ax=ax, **line_kw)

    @classmethod
    def from_predictions(cls, alphas, accuracy, *, chosen=None, auroc=None, ax=None, **line_kw):
        """Draw a given path.

        Parameters
        ----------
        alphas : array-like of shape (n_alphas,)
            Mixes.
        accuracy : array-like of shape (n_alphas,)
            At each.
        chosen : float, optional
            Marked.
        auroc : array-like of shape (n_alphas,), optional
            Of rejection.
        ax : matplotlib Axes, optional
            Where to draw.
        **line_kw : dict
            For ``ax.plot``.

        Returns
        -------
        AlphaPathDisplay
            Drawn.
        """
        return cls(alphas, accuracy, chosen=chosen, auroc=auroc).plot(ax=ax, **line_kw)

    def plot(self, ax=None, **line_kw):
        """Draw the path.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw.
        **line_kw : dict
            For ``ax.plot``.

        Returns
        -------
        AlphaPathDisplay
            Itself.
        """
        self.ax_, self.figure_ = _axes(ax)
        options = {"marker": "o"} | line_kw
        self.ax_.plot(self.alphas, self.accuracy, label="accuracy", **options)
        if self.auroc is not None:
            self.ax_.plot(self.alphas, self.auroc, label="AUROC of rejection", **options)
        if self.chosen is not None:
            self.ax_.axvline(self.chosen, color="0.2", linestyle=":", label="chosen")
        self.ax_.set(xlabel="alpha (0 = reprogrammed, 1 = zero-shot)", ylabel="share")
        self.ax_.legend()
        return self


class ProgramDisplay:
    """A picture before, the program, and the picture that the encoder sees.

    Parameters
    ----------
    before : ndarray of shape (channels, height, width)
        In [0, 1].
    program : ndarray of shape (channels, height, width)
        What was added.
    after : ndarray of shape (channels, height, width)
        In [0, 1].

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        After :meth:`plot`.
    figure_ : matplotlib Figure
        After :meth:`plot`.
    """

    def __init__(self, before, program, after):
        self.before = np.asarray(before)
        self.program = np.asarray(program)
        self.after = np.asarray(after)

    @classmethod
    def from_estimator(cls, estimator, X, *, axes=None):
        """Draw the program on the first of some images.

        Parameters
        ----------
        estimator : Reprogrammer
            Fitted on images.
        X : array-like of shape (n, ...)
            Images.
        axes : sequence of three matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        ProgramDisplay
            Drawn.
        """
        after = estimator.reprogram(X[:1])[0]
        image = np.asarray(X[0], dtype=float) / (255 if np.asarray(X).dtype == np.uint8 else 1)
        return cls(image, estimator.program_, after).plot(axes)

    def plot(self, axes=None):
        """Draw the three of them.

        Parameters
        ----------
        axes : sequence of three matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        ProgramDisplay
            Itself.
        """
        plt = pyplot()
        if axes is None:
            _, axes = plt.subplots(1, 3, figsize=(7, 2.6))
        parts = (self.before, (self.program + 1) / 2, self.after)
        titles = ("picture", "program (grey = 0)", "what the encoder sees")
        for ax, part, title in zip(axes, parts, titles, strict=True):
            picture = np.moveaxis(np.clip(part, 0, 1), 0, -1)
            ax.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
            ax.set_title(title, fontsize=9)
            ax.axis("off")
        self.axes_, self.figure_ = np.asarray(axes), axes[0].figure
        return self


class LabelMapDisplay:
    """Which of the encoder's own labels stand for which class.

    Parameters
    ----------
    mapping : ndarray of shape (n_source, n_classes)
        Weights.
    classes : sequence of str
        Names of the classes.
    source_names : sequence of str, optional
        Names of the source labels; by default their numbers.
    top : int, default=3
        Source labels shown for each class.

    Attributes
    ----------
    ax_ : matplotlib Axes
        After :meth:`plot`.
    figure_ : matplotlib Figure
        After :meth:`plot`.
    """

    def __init__(self, mapping, classes, *, source_names=None, top=3):
        self.mapping = np.asarray(mapping)
        self.classes = list(classes)
        self.source_names = source_names
        self.top = top

    @classmethod
    def from_estimator(cls, estimator, *, source_names=None, top=3, ax=None):
        """Draw the map of a fitted estimator.

        Parameters
        ----------
        estimator : Reprogrammer
            Fitted, with `head` "mapping".
        source_names : sequence of str, optional
            Names of the encoder's labels.
        top : int, default=3
            Source labels shown for each class.
        ax : matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        LabelMapDisplay
            Drawn.

        Raises
        ------
        ValueError
            If the estimator has no label map.
        """
        if estimator.label_mapping_ is None:
            raise ValueError("the estimator has no label map: its head is not 'mapping'.")
        names = estimator.class_names_
        return cls(estimator.label_mapping_, names, source_names=source_names, top=top).plot(ax)

    def plot(self, ax=None):
        """Draw the weights of the leading source labels.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw.

        Returns
        -------
        LabelMapDisplay
            Itself.
        """
        self.ax_, self.figure_ = _axes(ax)
        leading = np.unique(np.argsort(-self.mapping, axis=0)[: self.top])
        names = [str(s) if self.source_names is None else self.source_names[s] for s in leading]
        image = self.ax_.imshow(self.mapping[leading], cmap="Blues", vmin=0, aspect="auto")
        self.ax_.set_xticks(range(len(self.classes)), self.classes, rotation=90)
        self.ax_.set_yticks(range(len(names)), names)
        self.ax_.set(xlabel="class", ylabel="the encoder's label")
        self.figure_.colorbar(image, ax=self.ax_, label="weight")
        return self


def _axes(ax):
    plt = pyplot()
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    return ax, ax.figure
