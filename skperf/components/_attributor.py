"""Attribute the outputs of a trained network to its parts."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.lib.recfunctions import append_fields
from sklearn.base import BaseEstimator, MetaEstimatorMixin, TransformerMixin
from sklearn.utils import Bunch
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._edited import EditedClassifier, edited
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import check_told, fit_estimator, open_network
from skperf.backbone._sklearn import (
    DOC_LINK,
    Interval,
    StrOptions,
    check_feature_names_in,
    fit_context,
)
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import (
    as_labels,
    check_labelled_rows,
    check_rows,
    check_targets,
)
from skperf.backbone.interrupts import undisturbed
from skperf.backbone.network import Network
from skperf.backbone.parameters import checksum
from skperf.backbone.rows import Rows
from skperf.components._ablation import Ablation
from skperf.components._saving import PairsBunch, write_attributions
from skperf.components._study import (
    DEFAULT_FRACTION,
    Settings,
    Study,
    checked_masks,
    predicted_targets,
    same,
    study_of,
    table_of,
)
from skperf.components.edits import Guarded, Search, Wish, edit, raise_worst, rows_of, wish_of
from skperf.components.estimation import pair_effects
from skperf.components.gates import Asked
from skperf.components.lasting import make_lasting
from skperf.components.measures import Measure, checked_output
from skperf.metrics import counterfactual_correlation


@undisturbed
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
        ``"key_value_groups"``, ``"experts"``, ``"layers"``, globs of module names, a list of
        these, of `Component` or of `Place`, or a function of the module. ``"auto"``: where
        there is attention its heads, experts and feed-forward neurons; else filters, else
        neurons.
    ablation : str, float, callable or Ablation, default="zero"
        ``"zero"`` zeroes weight rows, biases and batch normalisation stay; ``"zero_output"``
        makes the output zero; ``"mean"`` puts its mean over the examples, ``"resample"``
        its value on another example; a float scales the rows; a function of the layer's
        output returns what stands in for it. `Ablation` says more: positions, donors, means
        of classes.
    output : str or callable, default="margin"
        ``"margin"``, ``"log_odds"``, ``"logit"``, ``"proba"`` of the label, ``"loss"`` that the
        network was trained on, ``"value"`` of a network with one output, or a function of the
        outputs, of (outputs, y) or of (outputs, y, X) that returns one number a row, (n,), or
        several, (n, t).
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
        Let `fit` on the same rows, with the same parameters, add passes up to `budget`.
    random_state : int, RandomState or None, default=None
        Seed of all draws; the seed of a mask depends on it and the mask's number alone.
    n_jobs : int or None, default=None
        Workers of joblib; the result does not depend on it.
    verbose : int, default=0
        Shows progress above 0.

    Attributes
    ----------
    attributions_ : ndarray of shape (n_examples, n_components) or (n_examples, t, n_components)
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
    verified_ : float
        Largest difference, on random masks and row counts, between gating the network and
        zeroing weights of a copy, one mask at a time.
    path_ : {"gates", "plain"}
        How masks are run; "plain" where the difference is more than rounding.
    coverage_ : dict
        ``kinds`` (number of components of each), ``share`` of the parameters in what they act
        on, ``left_out`` (modules), ``attention_not_recognised``, ``fused_parameters``.
    n_features_in_ : int
        Number of features, or of channels.
    regressor_ : estimator
        Only with a regressor of one's own.
    """

    _study: Study
    attributions_: np.ndarray
    _doc_link_module = "skperf"
    _doc_link_template = DOC_LINK
    _parameter_constraints: ClassVar = {
        "estimator": "no_validation",
        "components": "no_validation",
        "regressor": "no_validation",
        "ablation": [
            StrOptions({"zero", "zero_output", "mean", "resample"}),
            Real,
            callable,
            Ablation,
        ],
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
        estimator: Any = None,
        *,
        components: Any = "auto",
        ablation: Any = "zero",
        output: str | Callable[..., torch.Tensor] = "margin",
        fraction: float = DEFAULT_FRACTION,
        method: str = "auto",
        budget: int = 512,
        regressor: Any = "ridge",
        tol: float | None = None,
        warm_start: bool = False,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:
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
    def fit(self, X: Any, y: Any = None) -> Self:
        """Attribute the outputs of some examples.

        Parameters
        ----------
        X : array-like of shape (n_examples, ...), dict, tuple or Dataset
            Rows; also what a classifier that is no network yet is fitted on.
        y : array-like of shape (n_examples, ...), optional
            Labels or targets that the output refers to; not needed by an output that reads none.

        Returns
        -------
        ComponentAttributor
            Fitted.

        Raises
        ------
        ValueError
            If an option, the rows or the targets do not fit the network.
        """
        with unchanged_on_error(self):
            checked_output(self.output)
            rows, y = self._checked(X, y, reset=True)
            goes_on = self.warm_start and hasattr(self, "_study")
            goes_on = goes_on and self._study.is_about(rows, y) and not self._changed()
            if goes_on:
                self._study = replace(self._study, settings=self._settings())
            else:
                self._begin(rows, y)
        missing = self.budget - self._study.cost + 1 if goes_on else self.budget
        if missing > 1 or not goes_on:
            self._spend(missing)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "attributions_")

    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Add another `budget` of passes on the same examples.

        Parameters
        ----------
        X : array-like of shape (n_examples, ...)
            The rows given to `fit`; the first call is a fit.
        y : array-like of shape (n_examples, ...), optional
            Their targets.

        Returns
        -------
        ComponentAttributor
            Fitted.

        Raises
        ------
        ValueError
            If the rows are not those of `fit`, or parameters have changed.
        """
        if not hasattr(self, "_study"):
            return self.fit(X, y)
        rows, y = self._checked(X, y)
        if not self._study.is_about(rows, y):
            raise ValueError(
                "partial_fit adds passes on the examples given to fit; these rows or labels "
                "are others. Call fit for new examples, or attribute(X, y) to keep the model."
            )
        if changed := self._changed():
            raise ValueError(
                f"{', '.join(changed)} changed since fit: passes made before and after do not "
                "add up. Call fit to start anew."
            )
        self._study = replace(self._study, settings=self._settings())
        self._spend(self.budget + 1)
        return self

    def transform(self, X: Any) -> np.ndarray:
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
        return self._coefficients(X, None)

    def attribute(self, X: Any, y: Any = None) -> np.ndarray:
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
        return self._coefficients(X, y)

    def predict_counterfactual(self, masks: Any, X: Any = None, y: Any = None) -> np.ndarray:
        """Estimate outputs under ablations, without running the network on them.

        Parameters
        ----------
        masks : array-like of shape (m, n_components) or (n_components,)
            1 = kept, 0 = ablated.
        X : array-like of shape (n, ...), optional
            Other rows than those of `fit`; they are attributed first.
        y : array-like of shape (n, ...), optional
            Their targets; by default the predicted ones.

        Returns
        -------
        ndarray of shape (n, m)
            Outputs.
        """
        check_is_fitted(self)
        masks = checked_masks(masks, self.n_components_)
        study = self._study
        if X is None:
            if study.regressor is not None:
                outcomes = np.asarray(study.regressor.predict(masks)).reshape(len(masks), -1)
                return study.shaped(outcomes.T)
            return np.asarray(self.attributions_ @ masks.T + self.intercept_[..., None])
        rows, y = self._others(X, y)
        fit = study.about_others(self._network(), rows, y)
        return study.shaped(fit.coefficients @ masks.T + fit.intercept[:, None], len(rows))

    def counterfactual(self, masks: Any, X: Any = None, y: Any = None) -> np.ndarray:
        """Compute outputs under ablations by running the network.

        Parameters
        ----------
        masks : array-like of shape (m, n_components) or (n_components,)
            1 = kept, 0 = ablated.
        X : array-like of shape (n, ...), optional
            Other rows than those of `fit`.
        y : array-like of shape (n, ...), optional
            Their targets; by default the predicted ones.

        Returns
        -------
        ndarray of shape (n, m)
            Outputs.
        """
        check_is_fitted(self)
        return self._outcomes(checked_masks(masks, self.n_components_), X, y)

    def score(
        self, X: Any = None, y: Any = None, *, n_masks: int = 100, fraction: float | None = None
    ) -> float:
        """Correlation of predicted and true outputs under fresh random ablations.

        The truth comes from the plain path: weights zeroed, one mask at a time.

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
        masks = self._study.fresh_masks(n_masks, fraction).astype(float)
        if X is not None and y is not None:
            rows, targets = self._checked(X, y)
            if self._study.is_about(rows, targets):
                X = y = None
        predicted = self.predict_counterfactual(masks, X, y).reshape(-1, n_masks)
        actual = self._outcomes(masks, X, y, plain=True).reshape(-1, n_masks)
        if constant := int((np.ptp(actual, axis=1) == 0).sum()):
            warnings.warn(
                f"the outputs of {constant} of {len(actual)} examples are constant under these "
                "ablations; their correlation is not defined and counts as 0.",
                UserWarning,
                stacklevel=2,
            )
        return float(counterfactual_correlation(predicted, actual))

    def top_components(
        self, k: int = 10, *, examples: Any = None, lowest: bool = False
    ) -> np.recarray:
        """Name the components an output depends on most.

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
            Fields index, module, kind, unit and attribution; strongest first.
        """
        check_is_fitted(self)
        self._check_k(k)
        rows = rows_of(examples, len(self.attributions_), "examples")
        mean = self.attributions_[rows].reshape(-1, self.n_components_).mean(0)
        order = np.argsort(mean if lowest else -mean, kind="stable")[:k]
        found: np.recarray = append_fields(
            self.components_[order], "attribution", mean[order], usemask=False, asrecarray=True
        )
        return found

    def interactions(self, k: int = 10) -> Bunch:
        """Estimate what pairs of the strongest components do together, from masks already drawn.

        Parameters
        ----------
        k : int, default=10
            How many of the strongest components (in mean absolute attribution) are paired.

        Returns
        -------
        Bunch
            ``pairs`` (P, 2), indices of components; ``values`` (n_examples, P), by how much more
            the output falls when both go than the two falls together; ``stderr`` of the same
            shape; ``together`` (P,), in how many masks both are gone.

        Raises
        ------
        ValueError
            If no masks were drawn, or their outcomes are no longer kept.
        """
        check_is_fitted(self)
        self._check_k(k)
        study = self._study
        outcomes = study.known.outcomes
        if len(outcomes) < 8 or study.fit is None:
            raise ValueError(
                f"interactions need outcomes of random masks, and fit has drawn {len(outcomes)}: "
                "use method='regression' or 'auto', with a larger budget."
            )
        strength = np.abs(study.fit.coefficients).mean(0)
        strongest = np.sort(np.argsort(-strength, kind="stable")[:k])
        masks = study.masks(range(len(outcomes)))
        pairs, values, stderr, together = pair_effects(masks, outcomes, study.fit, strongest)
        values, stderr = study.shaped(values), study.shaped(stderr)
        return PairsBunch(pairs=pairs, values=values, stderr=stderr, together=together)

    def ablate(self, mask: Any) -> EditedClassifier:
        """Make a classifier with some components gone.

        Ablated weights are zero, and stay so when the copy is trained on.

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
        mask = checked_masks(mask, self.n_components_)
        if len(mask) != 1:
            raise ValueError(f"ablate takes one mask, got {len(mask)}.")
        return self._edited(mask[0], {"k": int((mask[0] == 0).sum()), "path": []})

    def edit(
        self,
        target: Any,
        reference: Any = None,
        *,
        k: int | str = "auto",
        direction: str = "increase",
        criterion: str = "budgeted",
        guard: Any = None,
        max_drop: float = 0.01,
    ) -> EditedClassifier:
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
            Gain over loss, or the released t statistic alone. With ``k="auto"`` the former also
            tries the latter's order, and then goes on by true passes of single components.
        guard : tuple, optional
            Rows (X, y), or (X, y, groups), on which the accuracy, with groups that of the worst
            of them, may fall by `max_drop`; where outputs are no classes the mean output
            counts. By default the reference.
        max_drop : float, default=0.01
            How far that may fall.

        Returns
        -------
        EditedClassifier
            Its ``edit_report_`` holds ``k``, the ablated ``components``, the ``path`` of
            outcomes over k, and with groups a line for each.
        """
        check_is_fitted(self)
        if k != "auto":
            self._check_k(k)
        study, network = self._study, self._network()
        wish = wish_of(
            target,
            reference,
            len(study.rows),
            direction=direction,
            criterion=criterion,
            k=k,
            max_drop=max_drop,
        )
        question = study.question(network)
        guarded = self._guarded(guard, network)
        search = Search(question.circuit, study.measure, question.asked, wish, guarded)
        report = edit(search, study.row_fit())
        return self._edited(search.mask, report)

    def _edit_groups(
        self, groups: np.ndarray, guard: Any, *, max_rounds: int, k: int | str, max_drop: float
    ) -> EditedClassifier:
        """Raise the worst group of guarded rows (X, y, groups): groups (n_examples,) of fit."""
        network = self._network()
        study, guarded = self._study, self._guarded(guard, network)
        assert guarded is not None
        margins = Measure("margin", network.loss)
        most = self.n_components_ if k == "auto" else int(k)
        nobody = np.arange(0)
        wish = Wish(nobody, nobody, max_drop=max_drop, worst_group=True)
        question = study.question(network)
        search = Search(question.circuit, margins, question.asked, wish, guarded)
        for turn in range(max_rounds if k == "auto" else max(most, 1)):
            if turn:  # attributions move with what is gone
                study, broken_off = (
                    study.around(search.mask).begun(network).spent(network, self.budget)
                )
                if broken_off is not None:
                    raise broken_off
            outputs = study.known.baseline.reshape(len(study.rows), -1).mean(1)
            forced = k != "auto"
            found = raise_worst(search, study.row_fit(), outputs, groups, most, forced=forced)
            if not found or search.k >= most:
                break
        return self._edited(search.mask, search.report())

    def save_attributions(self, path: Any) -> None:
        """Write attributions with the names of components, without the network.

        Parameters
        ----------
        path : str or Path
            A file ``.npz``, or ``.parquet`` (needs pandas and pyarrow); :func:`load_attributions`
            reads both.
        """
        check_is_fitted(self)
        write_attributions(
            path,
            self.components_,
            attributions=self.attributions_,
            intercept=self.intercept_,
            stderr=self.stderr_,
            baseline_output=self.baseline_output_,
            names=self.get_feature_names_out().astype(str),
        )

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the components.

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
        check_feature_names_in(self, input_features, generate_names=False)
        return np.array([c.name for c in self._study.wiring.components], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.one_d_labels = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _network(self) -> Network:
        network = open_network(self.estimator_)
        if checksum(network.module) != self._study.weights:
            raise ValueError(
                "the weights of the network are not those that fit has seen: attributions of one "
                "go with no outputs of the other. Call fit again."
            )
        return network

    def _checked(self, X: Any, y: Any, *, reset: bool = False) -> tuple[Rows, Any]:
        """Rows, and targets of the kind that the output reads."""
        if y is None and (self.output == "value" or callable(self.output)):
            return check_rows(self, X, reset=reset), None
        by_class = isinstance(self.output, str) and self.output not in ("loss", "value")
        if by_class and len(getattr(y, "shape", ())) > 2:
            raise ValueError(
                f"output={self.output!r} is of one label a row, and y has shape {y.shape}: use "
                "'loss', or a function of (outputs, y) that returns one number a row or several."
            )
        labels = as_labels(y) if by_class else None
        if labels is not None and type_of_target(labels, input_name="y") == "continuous":
            raise ValueError(
                f"output={self.output!r} is of one label a row, and y holds numbers (Unknown label "
                "type: continuous): use 'value', 'loss', or a function of (outputs, y)."
            )
        if by_class or self.estimator is None:
            return check_labelled_rows(self, X, y, reset=reset)
        return check_targets(self, X, y, reset=reset)

    def _settings(self) -> Settings:
        return Settings(
            self.output, self.method, self.regressor, self.tol, self.n_jobs, self.verbose
        )

    def _question_params(self) -> dict[str, Any]:
        """Parameters that measurements depend on; the rest may change between them."""
        free = ("budget", "tol", "n_jobs", "verbose", "warm_start")
        params = self.get_params(deep=False)
        if isinstance(self.ablation, Ablation):
            params |= {"ablation": None, **self.ablation.get_params()}
        return {name: value for name, value in params.items() if name not in free}

    def _changed(self) -> list[str]:
        """Name what measurements depend on and is not as `fit` has seen it."""
        now, then = self._question_params(), self._asked_with
        changed = [name for name in now if name not in then or not same(now[name], then[name])]
        if checksum(open_network(self.estimator_).module) != self._study.weights:
            changed.append("the weights of the network")
        return changed

    def _begin(self, rows: Rows, y: Any) -> None:
        self.estimator_ = fit_estimator(self.estimator, rows, y, random_state=self.random_state)
        if hasattr(self, "attributions_"):
            del self.attributions_
        network = open_network(self.estimator_)
        if self.output == "loss":
            check_told(self.estimator_, None)
        if network.classes is not None:
            self.classes_ = network.classes
            if self.output in ("margin", "log_odds") and network.n_classes < 2:
                raise ValueError(
                    f"output={self.output!r} needs two classes or more; the estimator knows 1 "
                    "class."
                )
        self._asked_with = self._question_params()
        study = self._study = study_of(
            network,
            rows,
            y,
            components=self.components,
            ablation=self.ablation,
            fraction=self.fraction,
            seed=seed_of(self.random_state),
            settings=self._settings(),
        ).begun(network)
        self.n_components_ = study.n_components
        self.fraction_ = study.fraction
        self.components_ = table_of(study.wiring.components)
        self.verified_ = study.verified
        self.path_ = "plain" if study.wiring.plain else "gates"
        self.coverage_ = dict(study.coverage)

    def _spend(self, budget: int) -> None:
        """Add passes; what an interrupted run has learned is kept."""
        study, broken_off = self._study.spent(self._network(), budget)
        self._study = study
        if study.fit is not None:
            self.attributions_ = study.shaped(study.fit.coefficients)
            self.intercept_ = study.shaped(study.fit.intercept)
            self.stderr_ = study.shaped(study.fit.stderr)
            self.oob_score_ = study.fit.oob_score
            self.penalty_ = study.fit.penalty
            self.baseline_output_ = study.shaped(study.known.baseline)
            self.n_forward_equivalents_ = study.cost
            if study.regressor is not None:
                self.regressor_ = study.regressor
        if broken_off is not None:
            raise broken_off

    def _others(self, X: Any, y: Any) -> tuple[Rows, Any]:
        """Other rows, at predicted targets where there are none."""
        if y is not None:
            return self._checked(X, y)
        rows = check_rows(self, X)
        y = predicted_targets(self._network(), self._study.measure, rows)
        if y is not None and self._study.y is not None and y.ndim != np.ndim(self._study.y):
            raise ValueError(
                f"the network predicts labels of shape {tuple(y.shape)}, where fit was given some "
                f"of shape {np.shape(self._study.y)}: pass y."
            )
        return rows, y

    def _coefficients(self, X: Any, y: Any) -> np.ndarray:
        rows, y = self._others(X, y)
        fit = self._study.about_others(self._network(), rows, y)
        return self._study.shaped(fit.coefficients, len(rows))

    def _outcomes(self, masks: np.ndarray, X: Any, y: Any, *, plain: bool = False) -> np.ndarray:
        rows, y = (None, None) if X is None else self._others(X, y)
        question = self._study.question(self._network(), rows, y, plain=plain)
        return self._study.shaped(question.outcomes(masks).T, question.n_rows)

    def _guarded(self, guard: Any, network: Network) -> Guarded | None:
        if guard is None:
            return None
        if not isinstance(guard, tuple) or len(guard) not in (2, 3):
            raise ValueError(
                f"guard must be a pair (X, y), or (X, y, groups); got {type(guard).__name__}."
            )
        rows, y = self._checked(*guard[:2])
        groups = np.asarray(guard[2]) if len(guard) == 3 else None
        if groups is not None and groups.shape != (len(rows),):
            raise ValueError(
                f"guard has groups of shape {groups.shape} for {len(rows)} rows; one a row."
            )
        asked: Asked = self._study.question(network, rows, y).asked
        return Guarded(asked, groups)

    def _check_k(self, k: Any) -> None:
        if not isinstance(k, Integral) or not 0 <= int(k) <= self.n_components_:
            raise ValueError(
                f"k={k!r} must be a whole number from 0 to {self.n_components_}, the number of "
                "components."
            )

    def _edited(self, mask: np.ndarray, report: dict[str, Any]) -> EditedClassifier:
        study, network = self._study, self._network()
        if study.rule.per in ("class", "row"):
            raise ValueError(
                f"ablation per={study.rule.per!r} goes by the label or number of a row, which a "
                "lasting edit does not know; use per='all' or 'position'."
            )
        changed = network.copy()
        make_lasting(changed.module, study.first_circuit(network), torch.as_tensor(mask))
        ablated = np.flatnonzero(mask == 0)
        names = [study.wiring.components[position].name for position in ablated]
        report = {**report, "components": names, "mask": np.asarray(mask, bool)}
        return edited(
            self.estimator_,
            changed,
            report,
            width=getattr(self, "n_features_in_", None),
            names=getattr(self, "feature_names_in_", None),
        )
