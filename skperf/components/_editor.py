"""Fit a classifier, attribute it and edit it, in one estimator."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._edited import EditedClassifier
from skperf.backbone._modules import OfLogits
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import fit_estimator
from skperf.backbone._sklearn import DOC_LINK, Interval, StrOptions, fit_context
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import check_labelled_rows, check_rows
from skperf.backbone.interrupts import undisturbed
from skperf.backbone.rows import Rows
from skperf.components._attributor import ComponentAttributor


@undisturbed
class ComponentEditor(
    OfLogits, CallbackSupportMixin, ClassifierMixin, MetaEstimatorMixin, BaseEstimator
):
    """A classifier that is edited after it is fitted.

    `fit` fits the estimator, attributes some of the rows and ablates what stands in the way
    of the target, so that grid search can choose how many components to ablate.

    Parameters
    ----------
    estimator : classifier, nn.Module or None, default=None
        As for :class:`ComponentAttributor`.
    attributor : ComponentAttributor or None, default=None
        Its `estimator` is not used; None means the default one.
    target : {"errors", "worst_group"} or callable, default="errors"
        Rows to improve: those predicted wrongly, those of the group with the lowest
        accuracy, or ``target(X, y, predicted, groups) -> boolean mask``.
    k : int or "auto", default="auto"
        How many components to ablate; 0 leaves the network as it is.
    direction : {"increase", "decrease"}, default="increase"
        Raise or lower the targets' output.
    criterion : {"budgeted", "welch"}, default="budgeted"
        As in :meth:`ComponentAttributor.edit`; to raise the worst group, components are chosen by
        true passes alone.
    max_drop : float, default=0.01
        How far the accuracy on the guarded rows may fall with ``k="auto"``.
    max_rounds : int, default=3
        With ``target="worst_group"`` and ``k="auto"`` the edited network is attributed anew, for
        the group that is then the worst, as long as that raises the lowest accuracy.
    n_examples : int, default=200
        Most rows to attribute, half of them targets where there are so many.
    random_state : int, RandomState or None, default=None
        Seed of the choice of rows, and of whatever has no seed of its own.

    Attributes
    ----------
    estimator_ : classifier
        The fitted classifier before the edit.
    attributor_ : ComponentAttributor
        Fitted on the chosen rows.
    edited_ : EditedClassifier
        What predicts.
    edit_report_ : dict
        Of the edit; with groups, ``groups`` has a line for each, before and after.
    classes_ : ndarray of shape (n_classes,)
        Labels.
    n_features_in_ : int
        Number of features, or of channels.
    """

    _doc_link_module = "skperf"
    _doc_link_template = DOC_LINK
    _parameter_constraints: ClassVar = {
        "estimator": "no_validation",
        "attributor": "no_validation",
        "target": [StrOptions({"errors", "worst_group"}), callable],
        "k": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "direction": [StrOptions({"increase", "decrease"})],
        "criterion": [StrOptions({"budgeted", "welch"})],
        "max_drop": [Interval(Real, 0, None, closed="left")],
        "max_rounds": [Interval(Integral, 1, None, closed="left")],
        "n_examples": [Interval(Integral, 2, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        estimator: Any = None,
        attributor: ComponentAttributor | None = None,
        *,
        target: str | Callable[..., Any] = "errors",
        k: int | str = "auto",
        direction: str = "increase",
        criterion: str = "budgeted",
        max_drop: float = 0.01,
        max_rounds: int = 3,
        n_examples: int = 200,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.attributor = attributor
        self.target = target
        self.k = k
        self.direction = direction
        self.criterion = criterion
        self.max_drop = max_drop
        self.max_rounds = max_rounds
        self.n_examples = n_examples
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit, attribute, edit.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels.
        groups : array-like of shape (n,), optional
            Subgroup of every row, for ``target="worst_group"``; by metadata routing inside
            other estimators (``set_fit_request(groups=True)``).

        Returns
        -------
        ComponentEditor
            Fitted.

        Raises
        ------
        ValueError
            If the rows or the target do not fit.
        """
        with unchanged_on_error(self):
            rows, y = check_labelled_rows(self, X, y, reset=True)
            seed = seed_of(self.random_state)
            self.estimator_ = fit_estimator(self.estimator, rows, y, random_state=seed)
            self.classes_ = self.estimator_.classes_
            given = rows.tree if rows.indices is None else rows.dataset
            predicted = self.estimator_.predict(given)
            target = self._target(given, y, predicted, groups)
            self._edit(rows, y, target, groups, seed)
            self.edited_.set_params(estimator=self.estimator_)
            self.edit_report_ = self.edited_.edit_report_
        return self

    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return self.edited_._outputs(check_rows(self, X))

    def _class_axis(self, outputs: Tensor) -> int:
        return self.edited_._class_axis(outputs)

    def to_module(self) -> nn.Module:
        """Give the edited network.

        Returns
        -------
        nn.Module
            Returns logits.
        """
        check_is_fitted(self)
        module: nn.Module = self.edited_.to_module()
        return module

    def _edit(self, rows: Rows, y: np.ndarray, target: np.ndarray, groups: Any, seed: int) -> None:
        by_group = self.target == "worst_group"
        strata = np.asarray(groups) if by_group else target
        chosen = _of_each(strata, self.n_examples, np.random.default_rng(seed))
        base = ComponentAttributor() if self.attributor is None else self.attributor
        frozen = isinstance(self.estimator_, EditedClassifier | FrozenEstimator)
        known = self.estimator_ if frozen else FrozenEstimator(self.estimator_)
        attributor = clone(base).set_params(estimator=known)
        if attributor.random_state is None:
            attributor.set_params(random_state=seed)
        self.attributor_ = attributor.fit(rows[chosen], y[chosen])
        limits: dict[str, Any] = {"k": self.k, "max_drop": self.max_drop}
        if not target.any() or self.k == 0:  # an edit like any other, of nothing
            self.edited_ = attributor.ablate(np.ones(attributor.n_components_))
        elif by_group and self.direction == "increase":
            guard = rows, y, strata
            self.edited_ = attributor._edit_groups(
                strata[chosen], guard, max_rounds=self.max_rounds, **limits
            )
        else:
            others = ~target if not target.all() else target
            self.edited_ = attributor.edit(
                target[chosen],
                direction=self.direction,
                criterion=self.criterion,
                guard=(rows[np.flatnonzero(others)], y[others]),
                **limits,
            )

    def _target(self, X: Any, y: np.ndarray, predicted: np.ndarray, groups: Any) -> np.ndarray:
        if callable(self.target):
            target = np.asarray(self.target(X, y, predicted, groups))
            if target.dtype != bool or target.shape != (len(y),):
                raise ValueError(
                    f"target must return a boolean mask of shape ({len(y)},), got "
                    f"{target.dtype} of shape {target.shape}."
                )
            return target
        if self.target == "errors":
            return np.asarray(predicted != y)
        if groups is None:
            raise ValueError(
                "target='worst_group' needs groups: pass groups= to fit, inside other "
                "estimators after set_fit_request(groups=True)."
            )
        groups = np.asarray(groups)
        if groups.shape != (len(y),):
            raise ValueError(f"groups has shape {groups.shape}; one a row of X, ({len(y)},).")
        names = np.unique(groups)
        accuracy = [(predicted == y)[groups == name].mean() for name in names]
        return np.asarray(groups == names[int(np.argmin(accuracy))])


def _of_each(strata: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Rows to attribute: as many of each stratum, if there are enough."""
    members = [rng.permutation(np.flatnonzero(strata == value)) for value in np.unique(strata)]
    members.sort(key=len)
    chosen: list[np.ndarray] = []
    for position, rows in enumerate(members):
        left = most - sum(len(part) for part in chosen)
        chosen.append(rows[: max(left // (len(members) - position), 0)])
    return np.sort(np.concatenate(chosen))
