"""Attribute the outputs of a trained network to its parts."""

import warnings
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator, MetaEstimatorMixin, TransformerMixin, clone
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._edited import EditedClassifier
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import fit_estimator, open_network
from skperf.backbone._sklearn import Interval, StrOptions, fit_context
from skperf.backbone._validation import check_labelled_rows, check_rows
from skperf.backbone.outputs import resolve_output
from skperf.components._edit import edit_network, rows_of
from skperf.components.designs import Plan, bernoulli_masks, plan_budget
from skperf.components.estimation import Fit
from skperf.components.gates import Circuit
from skperf.components.passes import (
    Measurements,
    Question,
    cost_of,
    intact_gradients,
    measure_baseline,
    spend,
)
from skperf.components.recipes import Learned, attribute, first_order
from skperf.components.units import Component, find_components
from skperf.metrics import counterfactual_correlation

_DEFAULT_FRACTION = 0.05


class ComponentAttributor(TransformerMixin, MetaEstimatorMixin, BaseEstimator):
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
        them on true ablations (``"auto"``).
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

    _parameter_constraints = {
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
        fraction=_DEFAULT_FRACTION,
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
        X, y = check_labelled_rows(self, X, y, reset=True)
        if self.warm_start and self._same_rows(X, y):
            spent = cost_of(self._measured.done)
            if self.budget > spent:
                self._add(self.budget - spent + 1)
            return self
        self.estimator_ = fit_estimator(self.estimator, X, y, random_state=self.random_state)
        self._begin(X, y)
        self._add(self.budget)
        return self

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
        if not hasattr(self, "_measured"):
            return self.fit(X, y)
        X, y = check_labelled_rows(self, X, y)
        if not self._same_rows(X, y):
            raise ValueError(
                "partial_fit adds passes on the examples given to fit; these rows or labels "
                "are others. Call fit for new examples, or attribute(X, y) to keep the model."
            )
        self._add(self.budget + 1)
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
        X = check_rows(self, X)
        return self._attribute(X, self._predicted_codes(X)).coefficients

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
        X, y = check_labelled_rows(self, X, y)
        return self._attribute(X, self._network().codes(y)).coefficients

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
        masks = self._check_masks(masks)
        if X is None:
            if hasattr(self, "regressor_"):
                return np.asarray(self.regressor_.predict(masks)).reshape(len(masks), -1).T
            return self.attributions_ @ masks.T + self.intercept_[:, None]
        fit = self._attribute(*self._rows_and_codes(X, y))
        return fit.coefficients @ masks.T + fit.intercept[:, None]

    def counterfactual(self, masks, X=None, y=None):
        """True outputs under ablations.

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
        masks = self._check_masks(masks)
        X, codes = (self._X, self._codes) if X is None else self._rows_and_codes(X, y)
        return self._question(X, codes).outcomes(masks).T

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
        masks = bernoulli_masks(
            self._seed, range(n_masks), self.n_components_, fraction, fresh=True
        )
        if X is not None and y is not None:
            rows, labels = check_labelled_rows(self, X, y)
            if self._same_rows(rows, labels):
                X = y = None
        predicted = self.predict_counterfactual(masks, X, y)
        return counterfactual_correlation(predicted, self.counterfactual(masks, X, y))

    def top_components(self, k=10, *, examples=None, lowest=False):
        """The components an output depends on most.

        Parameters
        ----------
        k : int, default=10
            How many.
        examples : array-like, optional
            Indices of, or a boolean mask over, the rows of `fit`; the mean over them counts.
            By default all.
        lowest : bool, default=False
            Instead those whose ablation raises the output most.

        Returns
        -------
        recarray of shape (k,)
            index, module, kind, unit and attribution, strongest first.
        """
        check_is_fitted(self)
        self._check_k(k)
        rows = rows_of(examples, len(self.attributions_), "examples")
        mean = self.attributions_[rows].mean(0)
        order = np.argsort(mean if lowest else -mean, kind="stable")[:k]
        names = [*self.components_.dtype.names, "attribution"]
        columns = [self.components_[order][name] for name in self.components_.dtype.names]
        return np.rec.fromarrays([*columns, mean[order]], names=",".join(names))

    def ablate(self, mask):
        """A classifier with some components gone.

        Parameters
        ----------
        mask : array-like of shape (n_components,)
            1 = kept, 0 = ablated.

        Returns
        -------
        EditedClassifier
            The original is left as it is.
        """
        check_is_fitted(self)
        mask = self._check_masks(mask)
        if len(mask) != 1:
            raise ValueError(f"ablate takes one mask, got {len(mask)}.")
        return self._edited(mask[0], {"k": int((mask[0] == 0).sum()), "path": []})

    def edit(
        self,
        target,
        reference=None,
        *,
        k="auto",
        direction="increase",
        criterion="budgeted",
        X_val=None,
        y_val=None,
        max_drop=0.01,
    ):
        """Ablate what stands in the way of some examples and matters little to others.

        Parameters
        ----------
        target : array-like
            Indices of, or a boolean mask over, the rows of `fit` to change.
        reference : array-like, optional
            Rows to spare; by default all others.
        k : int or "auto", default="auto"
            How many components to ablate; "auto" tries numbers by true passes and keeps the
            one best for the targets.
        direction : {"increase", "decrease"}, default="increase"
            Raise or lower the targets' output.
        criterion : {"budgeted", "welch"}, default="budgeted"
            Gain over loss, or the released t statistic.
        X_val, y_val : array-like, optional
            Rows on which the accuracy is guarded; by default the reference.
        max_drop : float, default=0.01
            How far that accuracy may fall.

        Returns
        -------
        EditedClassifier
            Its ``edit_report_`` holds ``k``, the ablated ``components`` and the ``path`` of
            outcomes over k.
        """
        check_is_fitted(self)
        if k != "auto":
            self._check_k(k)
        guard = None
        if X_val is not None:
            X_val, y_val = check_labelled_rows(self, X_val, y_val)
            guard = self._question(X_val, self._network().codes(y_val))
        mask, report = edit_network(
            self._question(self._X, self._codes),
            self.attributions_,
            self.stderr_,
            target,
            reference,
            k=k,
            direction=direction,
            criterion=criterion,
            guard=guard,
            max_drop=max_drop,
        )
        return self._edited(mask, report)

    def get_feature_names_out(self, input_features=None):
        """Names of the components.

        Parameters
        ----------
        input_features : array-like of str, optional
            Not used.

        Returns
        -------
        ndarray of str
            Such as ``layer1.0.conv2[7]``.
        """
        check_is_fitted(self)
        return np.array([component.name for component in self._records()], dtype=object)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.one_d_labels = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    @property
    def _n_features_out(self):
        return self.n_components_

    def _begin(self, X, y):
        network = self._network()
        self.classes_ = network.classes
        if self.output in ("margin", "log_odds") and network.n_classes < 2:
            raise ValueError(f"output={self.output!r} needs two classes or more; the estimator knows 1 class.")
        resolve_output(self.output)
        codes = network.codes(y)
        self._seed = seed_of(self.random_state)
        components = find_components(network.module, self.components)
        self.n_components_ = len(components)
        self.fraction_ = self._checked_fraction(len(components))
        self.components_ = np.rec.fromarrays(
            [
                np.arange(len(components)),
                np.array([c.module for c in components]),
                np.array([c.kind for c in components]),
                np.array([c.unit for c in components]),
            ],
            names="index,module,kind,unit",
        )
        self._X, self._y, self._codes = X, y, codes.cpu()
        question = self._question(X, codes)
        self.baseline_output_ = measure_baseline(question)
        self._warn_if_stochastic(question)
        self._differentiable = self._can_differentiate(question)
        self._measured = Measurements(self.baseline_output_, len(components))

    def _add(self, budget):
        """Spend, and draw conclusions from whatever was done, also when interrupted."""
        question = self._question(self._X, self._codes)
        if self.method == "gradient":
            gradients = intact_gradients(question)
            self._conclude(first_order(gradients, self.baseline_output_), Learned(), cost=4)
            return
        plan = self._plan(budget)
        stop = self._stop(question) if self.tol is not None else None
        options = {"n_jobs": self.n_jobs, "verbose": self.verbose, "stop": stop}
        try:
            spend(question, self._measured, plan, sums=self.regressor == "ridge", **options)
        except KeyboardInterrupt:
            done = self._measured.done
            whole = not plan.singles or done.singles == plan.singles
            if whole and (done.gradients or done.masks >= 2):
                self._analyse(question)
            raise
        self._analyse(question)

    def _plan(self, budget):
        own = not isinstance(self.regressor, str)
        if not own and self.regressor != "ridge":
            raise ValueError(f"regressor={self.regressor!r} must be 'ridge' or a regressor.")
        if own and self.method not in ("auto", "regression"):
            raise ValueError(f"method={self.method!r} fits no regression; leave out the regressor.")
        if self.method == "path_gradient" and not self._differentiable:
            raise ValueError(
                "method='path_gradient' needs gradients, and the output of this network does "
                "not depend on its activations differentiably; use 'regression' or 'loo'."
            )
        if self.method == "loo" and self._measured.done.singles:
            return Plan()
        method = "regression" if own else self.method
        return plan_budget(
            method, budget, self.n_components_, differentiable=self._differentiable
        )

    def _analyse(self, question):
        measured = self._measured
        if isinstance(self.regressor, str):
            fit, learned = attribute(question, measured)
        else:
            masks = bernoulli_masks(
                self._seed, range(measured.done.masks), self.n_components_, self.fraction_
            )
            self.regressor_ = clone(self.regressor).fit(masks.astype(float), measured.outcomes)
            fit, learned = _from_regressor(self.regressor_, self.n_components_), Learned()
        self._conclude(fit, learned, cost=cost_of(measured.done))

    def _conclude(self, fit, learned, *, cost):
        self.attributions_ = fit.coefficients
        self.intercept_ = fit.intercept
        self.stderr_ = fit.stderr
        self.oob_score_ = fit.oob_score
        self.penalty_ = fit.penalty
        self.n_forward_equivalents_ = cost
        self._learned = learned

    def _stop(self, question):
        scores = []

        def enough():
            fit, _ = attribute(question, self._measured)
            scores.append(fit.oob_score)
            return len(scores) > 2 and scores[-1] - scores[-2] < self.tol

        return enough

    def _attribute(self, X, codes):
        """The linear models of other examples, each by itself."""
        question = self._question(X, codes, alike=True)
        baseline = measure_baseline(question)
        if self.method == "gradient":
            return first_order(intact_gradients(question), baseline)
        measured = Measurements(baseline, self.n_components_)
        sums = self._measured.moments is not None
        spend(question, measured, self._measured.done, sums=sums, n_jobs=self.n_jobs)
        if hasattr(self, "regressor_"):
            masks = bernoulli_masks(
                self._seed, range(measured.done.masks), self.n_components_, self.fraction_
            )
            regressor = clone(self.regressor).fit(masks.astype(float), measured.outcomes)
            return _from_regressor(regressor, self.n_components_)
        return attribute(question, measured, self._learned)[0]

    def _question(self, X, codes, *, alike=False):
        network = self._network()
        inputs = network.tensor(X)
        circuit = Circuit(
            network, self._records(), self._examples(network), ablation=self.ablation
        )
        output = resolve_output(self.output)
        codes = codes.to(network.device)
        return Question(circuit, inputs, codes, output, self._seed, self.fraction_, alike)

    def _examples(self, network):
        return network.tensor(self._X[:256])

    def _records(self):
        return [Component(str(c.module), str(c.kind), int(c.unit)) for c in self.components_]

    def _network(self):
        return open_network(self.estimator_)

    def _predicted_codes(self, X):
        return self._network().logits(X).argmax(1)

    def _rows_and_codes(self, X, y):
        if y is None:
            X = check_rows(self, X)
            return X, self._predicted_codes(X)
        X, y = check_labelled_rows(self, X, y)
        return X, self._network().codes(y)

    def _same_rows(self, X, y):
        known = hasattr(self, "_measured")
        return known and np.array_equal(self._X, X) and np.array_equal(self._y, y)

    def _checked_fraction(self, n_components):
        fraction = float(self.fraction)
        if fraction * n_components >= 1:
            return fraction
        if fraction == _DEFAULT_FRACTION:
            return 1 / max(n_components, 2)
        raise ValueError(
            f"fraction={fraction} of {n_components} components is less than one: most masks "
            f"would ablate nothing. Use at least {1 / n_components:.3g}."
        )

    def _check_masks(self, masks):
        masks = np.atleast_2d(np.asarray(masks))
        if masks.dtype.kind not in "bifu" or not np.isfinite(masks.astype(float)).all():
            raise TypeError(f"masks must hold numbers or booleans, got {masks.dtype}.")
        if masks.ndim != 2 or masks.shape[1] != self.n_components_:
            raise ValueError(
                f"masks have shape {masks.shape}, expected (m, {self.n_components_}): one entry "
                "for each component, 1 = kept, 0 = ablated."
            )
        if masks.min(initial=0) < 0 or masks.max(initial=0) > 1:
            raise ValueError("masks must lie between 0 (ablated) and 1 (kept).")
        return masks.astype(np.float64)

    def _check_k(self, k):
        if not isinstance(k, Integral) or not 0 <= k <= self.n_components_:
            raise ValueError(
                f"k={k!r} must be a whole number from 0 to {self.n_components_}, the number of "
                "components."
            )

    def _edited(self, mask, report):
        network = self._network()
        question = self._question(self._X[:2], self._codes[:2])
        module = question.circuit.edited_module(network.module, torch.as_tensor(mask))
        changed = type(network)(module, network.classes, network.batch_size, network.readout)
        ablated = np.flatnonzero(np.asarray(mask) == 0)
        report = {**report, "components": [self._records()[j].name for j in ablated]}
        report["mask"] = np.asarray(mask, bool)
        return EditedClassifier(
            self.estimator_,
            changed.to_module(),
            network.classes,
            report,
            batch_size=network.batch_size,
        )

    def _warn_if_stochastic(self, question):
        rows = slice(0, 8)
        part = Question(
            question.circuit,
            question.inputs[rows],
            question.codes[rows],
            question.output,
            question.seed,
            question.fraction,
        )
        first, second = measure_baseline(part), measure_baseline(part)
        if not np.array_equal(first, second):
            warnings.warn(
                "the network gives different outputs on two equal passes in evaluation mode; "
                "attributions will carry that noise.",
                UserWarning,
                stacklevel=4,
            )

    def _can_differentiate(self, question):
        one = Question(
            question.circuit,
            question.inputs[:1],
            question.codes[:1],
            question.output,
            question.seed,
            question.fraction,
        )
        try:
            gradients = intact_gradients(one)
        except RuntimeError:
            return False
        return bool(np.isfinite(gradients).all())


def _from_regressor(regressor, n_components):
    """Attributions of any fitted multi-output regressor of outputs on masks."""
    masks = np.vstack([np.ones(n_components), 1 - np.eye(n_components)])
    predicted = np.asarray(regressor.predict(masks)).reshape(len(masks), -1)
    coefficients = (predicted[:1] - predicted[1:]).T
    intercept = predicted[0] - coefficients.sum(1)
    unknown = np.full(coefficients.shape, np.nan)
    return Fit(coefficients, intercept, unknown, float("nan"), float("nan"))
