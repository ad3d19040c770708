"""Attribute the outputs of a trained network to its parts."""

import warnings
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import fit_estimator, open_network
from skperf.backbone._sklearn import DOC_LINK, Interval, StrOptions, fit_context
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import array_rows as check_rows
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.backbone.outputs import resolve_output
from skperf.components._actions import ablate, edit, top_components
from skperf.components._study import DEFAULT_FRACTION, Study, checked_fraction, checked_masks
from skperf.components.units import find_components
from skperf.metrics import counterfactual_correlation


class ComponentAttributor(
    CallbackSupportMixin, TransformerMixin, MetaEstimatorMixin, BaseEstimator
):
    """Attribute the outputs of a network to its filters, neurons, heads or layers.

    ``attributions_[i, j]`` estimates how much the output of example i falls when component
    j is ablated, averaged over random ablations of a `fraction` of the others. The linear
    model behind it also predicts the output under any set of ablations, and says which
    components to cut out for an edit.

    Parameters
    ----------
    estimator : classifier, nn.Module or None, default=None
        A skorch net or scikit-learn classifier is cloned and fitted; ``FrozenEstimator(...)``,
        a module and an edited classifier are used as they are; None means a small network.
    components : str, list or callable, default="auto"
        ``"conv_filters"``, ``"neurons"``, ``"mlp_neurons"``, ``"attention_heads"``,
        ``"layers"``, globs of module names, a list of these or of `Component`, or a function
        of the module. ``"auto"``: heads, else filters, else neurons.
    ablation : {"zero", "zero_output", "mean", "resample"}, float or callable, default="zero"
        ``"zero"`` zeroes weight rows, biases and batch normalisation stay; ``"zero_output"``
        makes the output zero; ``"mean"`` puts its mean over the examples, ``"resample"``
        its value on another example; a float scales the rows; a function of the layer's
        output returns what stands in for it.
    output : str or callable, default="margin"
        ``"margin"``, ``"log_odds"``, ``"logit"``, ``"loss"``, ``"proba"`` of the label, or
        ``output(logits, codes) -> (n,)``.
    fraction : float, default=0.05
        Probability with which a random mask ablates a component. For networks of fewer than
        20 components the default is raised to one component a mask.
    method : {"auto", "regression", "path_gradient", "loo", "gradient"}, default="auto"
        Random masks and ridge; gradients along the paths of the gates; every component
        alone; one gradient at the intact network; or gradients first, then ridge around
        them on true ablations (``"auto"``; where a mask ablates ten components or fewer and
        the budget pays for it, every component alone before anything else).
    budget : int, default=512
        Passes over the examples, in forward-equivalents (a backward pass counts two).
        ``"loo"`` always takes one for each component.
    regressor : "ridge" or estimator, default="ridge"
        Any multi-output regressor of scikit-learn; it gets masks and outputs alone, so that
        all of the budget goes to masks.
    tol : float or None, default=None
        Stop adding masks when the out-of-bag score has risen by less.
    warm_start : bool, default=False
        Let `fit` on the same rows add passes up to `budget`.
    random_state : int, RandomState or None, default=None
        Seed of all draws; the seed of a mask depends on it and the mask's number alone.
    n_jobs : int or None, default=None
        Workers of joblib; the result does not depend on it.
    verbose : int, default=0
        Shows progress above 0.

    Attributes
    ----------
    attributions_ : ndarray of shape (n_examples, n_components)
        Fall of the output on ablation.
    intercept_ : ndarray of shape (n_examples,)
        Of the linear models: everything ablated.
    stderr_ : ndarray of shape (n_examples, n_components)
        Standard errors over repeated draws; zero for methods that draw nothing.
    components_ : recarray of shape (n_components,)
        index, module, kind, unit.
    baseline_output_ : ndarray of shape (n_examples,)
        Outputs of the intact network.
    oob_score_ : float
        Mean correlation of outputs with predictions that did not use them; NaN without masks.
    n_forward_equivalents_ : int
        What was spent.
    penalty_ : float
        Of the ridge; 0 without masks.
    fraction_ : float
        The fraction used.
    estimator_ : classifier
        The fitted classifier.
    classes_ : ndarray of shape (n_classes,)
        Its labels.
    n_components_ : int
        Number of components.
    n_features_in_ : int
        Number of features, or of channels.
    regressor_ : estimator
        Only with a regressor of one's own.
    """

    _doc_link_module = "skperf"
    _doc_link_template = DOC_LINK
    _parameter_constraints: ClassVar = {
        "estimator": "no_validation",
        "components": "no_validation",
        "regressor": "no_validation",
        "ablation": [StrOptions({"zero", "zero_output", "mean", "resample"}), Real, callable],
        "output": [str, callable],
        "fraction": [Interval(Real, 0, 1, closed="neither")],
        "method": [StrOptions({"auto", "regression", "path_gradient", "loo", "gradient"})],
        "budget": [Interval(Integral, 1, None, closed="left")],
        "tol": [None, Interval(Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "n_jobs": [None, Integral],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator=None,
        *,
        components="auto",
        ablation="zero",
        output="margin",
        fraction=DEFAULT_FRACTION,
        method="auto",
        budget=512,
        regressor="ridge",
        tol=None,
        warm_start=False,
        random_state=None,
        n_jobs=None,
        verbose=0,
    ):
        self.estimator = estimator
        self.components = components
        self.ablation = ablation
        self.output = output
        self.fraction = fraction
        self.method = method
        self.budget = budget
        self.regressor = regressor
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X, y):
        """Attribute the outputs of some examples.

        Parameters
        ----------
        X : array-like of shape (n_examples, ...)
            Rows; also what a classifier that is no network yet is fitted on.
        y : array-like of shape (n_examples,)
            Labels the output refers to.

        Returns
        -------
        self : ComponentAttributor
            Fitted.
        """
        with unchanged_on_error(self):
            X, y = check_labelled_rows(self, X, y, reset=True)
            goes_on = self.warm_start and hasattr(self, "_study") and self._study.is_about(X, y)
            if not goes_on:
                self._begin(X, y)
        missing = self.budget - self._study.cost + 1 if goes_on else self.budget
        if missing > 1 or not goes_on:
            self._spend(missing)
        return self

    def __sklearn_is_fitted__(self):
        return hasattr(self, "attributions_")

    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(self, X, y):
        """Add another `budget` of passes on the same examples.

        Parameters
        ----------
        X : array-like of shape (n_examples, ...)
            The rows given to `fit`; the first call is a fit.
        y : array-like of shape (n_examples,)
            Their labels.

        Returns
        -------
        self : ComponentAttributor
            Fitted.

        Raises
        ------
        ValueError
            If the rows are not those of `fit`.
        """
        if not hasattr(self, "_study"):
            return self.fit(X, y)
        X, y = check_labelled_rows(self, X, y)
        if not self._study.is_about(X, y):
            raise ValueError(
                "partial_fit adds passes on the examples given to fit; these rows or labels "
                "are others. Call fit for new examples, or attribute(X, y) to keep the model."
            )
        self._spend(self.budget + 1)
        return self

    def transform(self, X):
        """Attribute other examples at their predicted labels.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n, n_components)
            Attributions, by the passes that `fit` used.
        """
        check_is_fitted(self)
        return self._model_of(X, None).coefficients

    def attribute(self, X, y):
        """Attribute other examples at given labels.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels.

        Returns
        -------
        ndarray of shape (n, n_components)
            Attributions.
        """
        check_is_fitted(self)
        return self._model_of(X, y).coefficients

    def predict_counterfactual(self, masks, X=None, y=None):
        """Estimate outputs under ablations, without running the network on them.

        Parameters
        ----------
        masks : array-like of shape (m, n_components) or (n_components,)
            1 = kept, 0 = ablated.
        X : array-like of shape (n, ...), optional
            Other rows than those of `fit`; they are attributed first.
        y : array-like of shape (n,), optional
            Their labels; by default the predicted ones.

        Returns
        -------
        ndarray of shape (n, m)
            Outputs.
        """
        check_is_fitted(self)
        masks = checked_masks(masks, self.n_components_)
        if X is None:
            if hasattr(self, "regressor_"):
                return np.asarray(self.regressor_.predict(masks)).reshape(len(masks), -1).T
            return self.attributions_ @ masks.T + self.intercept_[:, None]
        fit = self._model_of(X, y)
        return fit.coefficients @ masks.T + fit.intercept[:, None]

    def counterfactual(self, masks, X=None, y=None):
        """Compute true outputs under ablations.

        Parameters
        ----------
        masks : array-like of shape (m, n_components) or (n_components,)
            1 = kept, 0 = ablated.
        X : array-like of shape (n, ...), optional
            Other rows than those of `fit`.
        y : array-like of shape (n,), optional
            Their labels; by default the predicted ones.

        Returns
        -------
        ndarray of shape (n, m)
            Outputs.
        """
        check_is_fitted(self)
        masks = checked_masks(masks, self.n_components_)
        network = self._network()
        codes = None
        if X is not None:
            X, codes = self._rows_and_codes(network, X, y)
        return self._study.question(network, X, codes).outcomes(masks).T

    def score(self, X=None, y=None, *, n_masks=100, fraction=None):
        """Correlation of predicted and true outputs under fresh random ablations.

        Parameters
        ----------
        X : array-like of shape (n, ...), optional
            Rows; by default those of `fit`.
        y : array-like of shape (n,), optional
            Their labels; by default the predicted ones.
        n_masks : int, default=100
            Number of fresh masks.
        fraction : float, optional
            Share they ablate; by default that of `fit`.

        Returns
        -------
        float
            Mean over examples of the Pearson correlation over masks.
        """
        check_is_fitted(self)
        fraction = self.fraction_ if fraction is None else fraction
        if not 0 < fraction < 1:
            raise ValueError(f"fraction={fraction} must lie between 0 and 1.")
        masks = self._study.fresh_masks(n_masks, fraction)
        if X is not None and y is not None:
            rows, labels = check_labelled_rows(self, X, y)
            if self._study.is_about(rows, labels):
                X = y = None
        predicted = self.predict_counterfactual(masks, X, y)
        actual = self.counterfactual(masks, X, y)
        constant = int((np.ptp(actual, axis=1) == 0).sum())
        if constant:
            warnings.warn(
                f"the outputs of {constant} of {len(actual)} examples are constant under these "
                "ablations; their correlation is not defined and counts as 0.",
                UserWarning,
                stacklevel=2,
            )
        return counterfactual_correlation(predicted, actual)

    top_components = top_components
    ablate = ablate
    edit = edit

    def get_feature_names_out(self, input_features=None):
        """Names of the components.

        Parameters
        ----------
        input_features : array-like of str, optional
            Checked against the features of `fit` and not used.

        Returns
        -------
        ndarray of str
            Such as ``layer1.0.conv2[7]``.
        """
        check_is_fitted(self)
        known = getattr(self, "feature_names_in_", None)
        if input_features is not None:
            if known is not None and not np.array_equal(known, input_features):
                raise ValueError("input_features is not equal to feature_names_in_")
            if len(input_features) != self.n_features_in_:
                raise ValueError(
                    "input_features should have length equal to number of features "
                    f"({self.n_features_in_}), got {len(input_features)}"
                )
        return np.array([component.name for component in self._study.components], dtype=object)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.one_d_labels = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    @property
    def _n_features_out(self):
        return self.n_components_

    def _network(self):
        return open_network(self.estimator_)

    def _begin(self, X, y):
        self.estimator_ = fit_estimator(self.estimator, X, y, random_state=self.random_state)
        vars(self).pop("attributions_", None)
        network = self._network()
        self.classes_ = network.classes
        if self.output in ("margin", "log_odds") and network.n_classes < 2:
            raise ValueError(
                f"output={self.output!r} needs two classes or more; the estimator knows 1 class."
            )
        resolve_output(self.output)
        components = find_components(network.module, self.components)
        own = ("estimator", "components", "random_state")
        settings = {k: v for k, v in self.get_params(deep=False).items() if k not in own}
        self._study = Study(
            X,
            y,
            network.codes(y).cpu(),
            components,
            settings,
            seed_of(self.random_state),
            checked_fraction(self.fraction, len(components)),
        )
        self._study.begin(network)
        self.n_components_ = len(components)
        self.fraction_ = self._study.fraction
        self.components_ = np.rec.fromarrays(
            [
                np.arange(len(components)),
                np.array([component.module for component in components]),
                np.array([component.kind for component in components]),
                np.array([component.unit for component in components]),
            ],
            names="index,module,kind,unit",
        )

    def _spend(self, budget):
        """Add passes; what an interrupted run has learned is kept."""
        study = self._study
        try:
            study.add(self._network(), budget)
        finally:
            if study.fit is not None:
                self.attributions_ = study.fit.coefficients
                self.intercept_ = study.fit.intercept
                self.stderr_ = study.fit.stderr
                self.oob_score_ = study.fit.oob_score
                self.penalty_ = study.fit.penalty
                self.baseline_output_ = study.measured.baseline
                self.n_forward_equivalents_ = study.cost
                if study.regressor is not None:
                    self.regressor_ = study.regressor

    def _model_of(self, X, y):
        """Linear models of other rows, at predicted labels where there are none."""
        network = self._network()
        X, codes = self._rows_and_codes(network, X, y)
        return self._study.about_others(network, X, codes)

    def _rows_and_codes(self, network, X, y):
        if y is None:
            X = check_rows(self, X)
            return X, network.logits(X).argmax(1)
        X, y = check_labelled_rows(self, X, y)
        return X, network.codes(y)
