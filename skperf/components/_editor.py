"""Fit a classifier, attribute it and edit it, in one estimator."""

from numbers import Integral, Real
from typing import ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._edited import EditedClassifier
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import fit_estimator
from skperf.backbone._sklearn import DOC_LINK, Interval, StrOptions, fit_context
from skperf.backbone._validation import array_rows as check_rows
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.components._attributor import ComponentAttributor


class ComponentEditor(CallbackSupportMixin, ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
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
        As in :meth:`ComponentAttributor.edit`.
    max_drop : float, default=0.01
        How far the accuracy on the other rows may fall with ``k="auto"``.
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
        Of the edit.
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
        "n_examples": [Interval(Integral, 2, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        estimator=None,
        attributor=None,
        *,
        target="errors",
        k="auto",
        direction="increase",
        criterion="budgeted",
        max_drop=0.01,
        n_examples=200,
        random_state=None,
    ):
        self.estimator = estimator
        self.attributor = attributor
        self.target = target
        self.k = k
        self.direction = direction
        self.criterion = criterion
        self.max_drop = max_drop
        self.n_examples = n_examples
        self.random_state = random_state

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X, y, groups=None):
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
        self : ComponentEditor
            Fitted.
        """
        X, y = check_labelled_rows(self, X, y, reset=True)
        seed = seed_of(self.random_state)
        self.estimator_ = fit_estimator(self.estimator, X, y, random_state=seed)
        self.classes_ = self.estimator_.classes_
        target = self._target(X, y, self.estimator_.predict(X), groups)
        if not target.any() or self.k == 0:
            self.edited_ = self.estimator_
            self.edit_report_ = {"k": 0, "path": []}
            return self
        rows = _some_of_both(target, self.n_examples, np.random.default_rng(seed))
        base = ComponentAttributor() if self.attributor is None else self.attributor
        attributor = clone(base).set_params(estimator=_as_it_is(self.estimator_))
        if attributor.random_state is None:
            attributor.set_params(random_state=seed)
        self.attributor_ = attributor.fit(X[rows], y[rows])
        others = ~target if not target.all() else target
        self.edited_ = self.attributor_.edit(
            target[rows],
            k=self.k,
            direction=self.direction,
            criterion=self.criterion,
            max_drop=self.max_drop,
            X_val=X[others],
            y_val=y[others],
        )
        self.edit_report_ = self.edited_.edit_report_
        return self

    def predict(self, X):
        """Labels by the edited network.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n,)
            Labels.
        """
        check_is_fitted(self)
        return self.edited_.predict(check_rows(self, X))

    def predict_proba(self, X):
        """Probabilities by the edited network.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n, n_classes)
            Columns in the order of ``classes_``.
        """
        check_is_fitted(self)
        return self.edited_.predict_proba(check_rows(self, X))

    def to_module(self):
        """Give the edited network.

        Returns
        -------
        nn.Module
            Returns logits.
        """
        check_is_fitted(self)
        return self.edited_.to_module()

    def _target(self, X, y, predicted, groups):
        if callable(self.target):
            target = np.asarray(self.target(X, y, predicted, groups))
            if target.dtype != bool or target.shape != (len(y),):
                raise ValueError(
                    f"target must return a boolean mask of shape ({len(y)},), got "
                    f"{target.dtype} of shape {target.shape}."
                )
            return target
        if self.target == "errors":
            return predicted != y
        if groups is None:
            raise ValueError(
                "target='worst_group' needs groups: pass groups= to fit, inside other "
                "estimators after set_fit_request(groups=True)."
            )
        groups = np.asarray(groups)
        names = np.unique(groups)
        accuracy = [(predicted == y)[groups == name].mean() for name in names]
        return groups == names[int(np.argmin(accuracy))]


def _as_it_is(classifier):
    """Wrap a fitted classifier so that it is not fitted again."""
    return classifier if isinstance(classifier, EditedClassifier) else FrozenEstimator(classifier)


def _some_of_both(target, most, rng):
    """Rows to attribute: half of them targets, if there are enough of both."""
    inside, outside = np.flatnonzero(target), np.flatnonzero(~target)
    n_inside = min(len(inside), max(most // 2, most - len(outside)))
    n_outside = min(len(outside), most - n_inside)
    chosen = [
        rng.choice(inside, n_inside, replace=False),
        rng.choice(outside, n_outside, replace=False),
    ]
    return np.sort(np.concatenate(chosen))
