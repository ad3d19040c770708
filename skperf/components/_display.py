"""Pictures of components and of edits."""

import numpy as np

from skperf.backbone.plotting import pyplot

_RAISES, _LOWERS = "#3a6ea5", "#b5473c"


class ComponentDisplay:
    """Attributions laid out by layer and unit.

    Parameters
    ----------
    attributions : ndarray of shape (n_components,)
        Of an example, or the mean over a group.
    components : recarray of shape (n_components,)
        As ``ComponentAttributor.components_``.
    name : str, optional
        Title.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        The figure.
    image_ : matplotlib QuadMesh
        One row a layer, one cell a unit.
    """

    def __init__(self, attributions, components, *, name=None):
        self.attributions = attributions
        self.components = components
        self.name = name

    @classmethod
    def from_estimator(cls, estimator, X=None, y=None, *, examples=None, ax=None, name=None):
        """Draw the mean attributions of some examples.

        Parameters
        ----------
        estimator : ComponentAttributor
            Fitted.
        X : array-like, optional
            Other rows than those of `fit`.
        y : array-like, optional
            Their labels.
        examples : array-like, optional
            Which rows; by default all.
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            Title.

        Returns
        -------
        ComponentDisplay
            Drawn.
        """
        attributions = estimator.attributions_ if X is None else estimator.attribute(X, y)
        rows = slice(None) if examples is None else np.atleast_1d(examples)
        mean = attributions[rows].reshape(-1, estimator.n_components_).mean(0)
        return cls(mean, estimator.components_, name=name).plot(ax=ax)

    @classmethod
    def from_predictions(cls, attributions, components, *, ax=None, name=None):
        """Draw attributions that are at hand.

        Parameters
        ----------
        attributions : ndarray of shape (n_components,)
            One number a component.
        components : recarray of shape (n_components,)
            Their names.
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            Title.

        Returns
        -------
        ComponentDisplay
            Drawn.
        """
        return cls(np.asarray(attributions), components, name=name).plot(ax=ax)

    def plot(self, ax=None, *, name=None, **mesh_kw):
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            Title.
        **mesh_kw
            Passed to `pcolormesh`.

        Returns
        -------
        ComponentDisplay
            Itself.
        """
        plt = pyplot()

        kinds = [(c["module"], c["kind"]) for c in self.components]  # a module may have several
        modules = [module for module, _ in dict.fromkeys(kinds)]
        rows = {kind: position for position, kind in enumerate(dict.fromkeys(kinds))}
        table = np.full((len(modules), int(self.components["unit"].max()) + 1), np.nan)
        places = [rows[kind] for kind in kinds]
        table[places, self.components["unit"]] = self.attributions
        if ax is None:
            _, ax = plt.subplots(figsize=(7, 0.6 + 0.28 * len(modules)))
        limit = float(np.nanmax(np.abs(table))) or 1.0
        options = {"cmap": "RdBu", "vmin": -limit, "vmax": limit, **mesh_kw}
        self.image_ = ax.pcolormesh(table, **options)
        ax.set(xlabel="unit", yticks=np.arange(len(modules)) + 0.5, title=name or self.name or "")
        ax.set_yticklabels(modules)
        ax.invert_yaxis()
        ax.figure.colorbar(self.image_, ax=ax, label="fall of the output if ablated")
        self.ax_, self.figure_ = ax, ax.figure
        return self


class EditPathDisplay:
    """Outcomes of an edit against the number of ablated components.

    Parameters
    ----------
    path : list of dict
        ``edit_report_["path"]``.
    k : int, optional
        The number chosen.
    name : str, optional
        Title.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Accuracies.
    figure_ : matplotlib Figure
        The figure.
    lines_ : list of matplotlib Line2D
        Target, then reference.
    """

    def __init__(self, path, *, k=None, name=None):
        self.path = path
        self.k = k
        self.name = name

    @classmethod
    def from_estimator(cls, estimator, *, ax=None, name=None):
        """Draw the path of an edited classifier.

        Parameters
        ----------
        estimator : EditedClassifier
            What ``ComponentAttributor.edit`` returned, or a fitted `ComponentEditor`.
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            Title.

        Returns
        -------
        EditPathDisplay
            Drawn.
        """
        edited = getattr(estimator, "edited_", estimator)
        report = edited.edit_report_
        return cls(report["path"], k=report["k"], name=name).plot(ax=ax)

    @classmethod
    def from_predictions(cls, path, *, k=None, ax=None, name=None):
        """Draw a path that is at hand.

        Parameters
        ----------
        path : list of dict
            With ``k``, ``target_accuracy`` and ``reference_accuracy`` or their outputs.
        k : int, optional
            The number chosen.
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            Title.

        Returns
        -------
        EditPathDisplay
            Drawn.
        """
        return cls(path, k=k, name=name).plot(ax=ax)

    def plot(self, ax=None, *, name=None, quantity="accuracy", **line_kw):
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw.
        name : str, optional
            Title.
        quantity : {"accuracy", "output"}, default="accuracy"
            What to draw.
        **line_kw
            Passed to `plot`.

        Returns
        -------
        EditPathDisplay
            Itself.
        """
        plt = pyplot()

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 3))
        self.lines_ = []
        for group, colour in (("target", _LOWERS), ("reference", _RAISES)):
            steps = [step for step in self.path if f"{group}_{quantity}" in step]
            values = [step[f"{group}_{quantity}"] for step in steps]
            options = {"marker": ".", "color": colour, "label": group, **line_kw}
            self.lines_ += ax.plot([step["k"] for step in steps], values, **options)
        if self.k is not None:
            ax.axvline(self.k, color="0.6", linestyle=":", label=f"k = {self.k}")
        ax.set(xlabel="ablated components", ylabel=quantity, title=name or self.name or "")
        ax.legend()
        self.ax_, self.figure_ = ax, ax.figure
        return self
