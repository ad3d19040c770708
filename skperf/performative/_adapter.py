"""PerformativeAdapter: anticipate the label mix that answers a deployed classifier."""

from dataclasses import replace
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.utils import Bunch, get_tags
from sklearn.utils.validation import check_is_fitted, validate_data

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._nets import seed_of
from skperf.backbone._opening import has_network, source_of
from skperf.backbone._sklearn import (
    DOC_LINK,
    Interval,
    StrOptions,
    check_sample_weight,
    fit_context,
)
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import check_rows
from skperf.backbone.interrupts import undisturbed
from skperf.backbone.parameters import checksum
from skperf.performative import _inputs, _steps, learning
from skperf.performative._inputs import encode
from skperf.performative._options import options_of
from skperf.performative._scores import (
    Opened,
    is_frozen,
    is_network,
    open_candidate,
    warn_of_threshold,
)
from skperf.performative._start import (
    Data,
    begin,
    given_base,
    start_record,
    trajectory_base,
    trajectory_classes,
)
from skperf.performative.equilibrium import rest_point
from skperf.performative.label_shift import probabilities
from skperf.performative.report import (
    DriftReport,
    drift_report,
    full_diagnostics,
    prequential,
    quick_diagnostics,
)
from skperf.performative.trajectory import NAMED


@undisturbed
class PerformativeAdapter(CallbackSupportMixin, ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """Correct a classifier for the change of label mix that its own deployment causes.

    A deployed model changes what it will meet: a benchmark collects more of what it gets
    wrong, a shop shows more of what it gets right. As long as only the shares of the classes
    answer, the next mix can be learned from a few rounds, and is known before its first row
    arrives. Predictions are ``softmax(f(x) + log q - log pi_0)`` with q the anticipated mix. Mixes
    that move for other reasons, seasons, trends, wandering, are anticipated as well; where
    nothing is to be gained nothing is corrected.

    Parameters
    ----------
    estimator : classifier, FrozenEstimator, nn.Module or None, default=None
        Anything with ``predict_proba`` or ``decision_function``; it gets its rows as they are. What
        is frozen, a module or has ``to_module()`` is used as it is; everything else is cloned and
        fitted on the first round (on all rows if `rounds` is None), and measured on rows that
        it did not see: by cross-validation, a network by a fifth that is held out. None means a
        small network.
    adapter : str, list of str or nn.Module class, default="auto"
        Response map: ``"fixed"`` (a constant mix), ``"tied"`` (one slope for all classes),
        ``"curve"`` (one piecewise linear curve), ``"linear"`` (a full matrix), ``"mlp"``, or a
        module class, trained by skorch. A list or ``"auto"``, which is all of them, competes:
        weights follow the likelihood one step ahead. ``"paper"`` is the method released with
        arXiv:2410.04499: its recalls, perceptron, fading and full correction from the second
        round on; the guide says what differs.
    inputs : str or list of str, default="auto"
        What maps read, in competition: ``"statistic"``, ``"previous"`` (the last mix), ``"lags"``
        (earlier mixes and statistics), ``"shares"`` (predicted by the deployed model),
        ``"confusion"`` (its matrix, up to 12 classes) and ``"covariates"``. "auto" means all;
        for one map asked for by name the statistic and the covariates.
    statistic : str or callable, default="recall"
        What the world sees of the model: ``"recall"``, ``"confusion"``, ``"predicted_marginal"``;
        with `strata` also ``"stratum"`` (accuracy of each) and ``"class_stratum"`` (recall of each
        class in each). A callable gets ``(y_true, y_pred, proba, classes, sample_weight)`` and
        returns finite numbers of shape (n_statistics,).
    objective : {"marginal", "log_loss"}, default="marginal"
        Maps are fitted to label counts, or to the labels given the corrected scores, which
        also absorbs a lack of calibration.
    base_prior : {"fit", "uniform"}, array or dict by label, default="fit"
        Mix pi_0 that the estimator was trained for. "fit" finds it on labelled rows; for an
        estimator fitted here it is the mix of its rows unless they deny it, as after
        ``class_weight="balanced"``.
    calibration : {"temperature", "bcts", "none"} or None, default=None
        Scaling of the scores; None uses one where it has lowered the log loss of later rounds.
    strength : float or "auto", default="auto"
        Share of the correction that is applied, on the log scale; 0 is none. "auto" is judged
        by the log loss and the accuracy of corrected rows.
    mix : float or "auto", default="auto"
        Share of the base mix in the maps' answer.
    transductive : {"auto", "em", "bbse", "map_em"} or None, default=None
        Also use the rows given to predict, as one batch: expectation maximisation, confusion
        matrix inversion, or the former with the anticipated mix as its prior, which is
        recommended. "auto" is that wherever a batch holds ten rows for each class.
    worst_recall_floor : float or None, default=None
        Weaken the correction until every class (in every stratum) keeps this recall on the rows
        seen lately.
    lag : int, default=1
        Rounds between a deployment and its answer.
    min_rounds : int, default=3
        Rounds before anything is corrected.
    buffer_size : int or None, default=None
        Most rounds to learn from, the latest; None means 300.
    decay : float or "auto", default="auto"
        Weight of a round against the one after it; "auto" lets several compete.
    l2 : float, default=1.0
        Shrinkage of the response maps.
    recall_smoothing : float, default=2.0
        Pseudo-rows that shrink recalls towards the accuracy.
    prior_strength : float or "auto", default="auto"
        Labels that the anticipation is worth to ``transductive="map_em"``.
    hidden_layer_sizes : tuple of int, default=(256, 256)
        Widths of ``"mlp"``.
    lr : float, default=1e-3
        Learning rate of Adam for ``"mlp"`` and modules.
    max_epochs : int, default=200
        Epochs of their first training.
    weight_decay : float, default=1e-3
        Of that training.
    random_state : int, RandomState or None, default=None
        Seeds networks, folds, permutations and resampling.
    verbose : int, default=0
        1 shows progress over rounds.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels.
    estimator_ : classifier
        The fitted or frozen classifier.
    base_prior_ : ndarray of shape (n_classes,)
        Mix pi_0.
    calibrator_ : Calibration or None
        Temperature and bias in use.
    trajectory_ : Trajectory
        Rounds, statistics, label counts and what else is known of them; the last 1,000.
    statistic_ : ndarray of shape (n_statistics,)
        The last one recorded.
    predicted_prior_ : ndarray of shape (n_classes,)
        Anticipated mix of the next round.
    adapter_ : Answering
        All maps together; ``log_prior(statistics)`` gives their answers unblended.
    adapter_name_ : str
        Kind of the map that leads, "fixed" where nothing is corrected.
    leader_ : str
        The map that leads, with its inputs and its decay.
    strength_ : float
        Of the blend in use.
    mix_ : float
        Of the blend in use.
    fallback_ : bool
        Whether nothing is corrected, for want of rounds or of evidence, or because it had cost
        more than it saved; predictions are then the classifier's own.
    prequential_ : Bunch
        By round, each judged before it was learned from: ``round``; log losses ``none``, ``last``
        (the previous mix), ``adapter``, ``oracle`` (the realised mix), ``model_free`` (maps that
        do not read the model); ``accuracy``, ``accuracy_none``; ``worst_recall``, ``strength``,
        ``tv`` (total variation to the previous mix), and ``predicted``, ``realised`` mixes
        (n_rounds, n_classes). The last 1,000 rounds.
    diagnostics_ : dict
        Cheap diagnostics; `diagnose` adds tests.
    n_rounds_ : int
        Rounds seen.
    n_features_in_ : int
        Columns of X, if it is a table.
    feature_names_in_ : ndarray of str
        Their names, if there are any.

    Examples
    --------
    >>> import numpy as np
    >>> from skperf import PerformativeAdapter
    >>> rng = np.random.default_rng(0)
    >>> recall = rng.uniform(0.3, 1.0, size=(30, 3))
    >>> odds = np.exp(-recall / 0.2)
    >>> counts = np.vstack([[300, 300, 300], 900 * odds[:-1] / odds[:-1].sum(1, keepdims=True)])
    >>> adapter = PerformativeAdapter(adapter="tied").fit_trajectory(recall, counts.round())
    >>> adapter.predict_prior([0.9, 0.5, 0.7]).round(1)
    array([0.1, 0.7, 0.2])
    """

    _doc_link_module = "skperf"
    _doc_link_template = DOC_LINK
    _parameter_constraints: ClassVar[dict] = {
        "estimator": "no_validation",
        "adapter": [
            StrOptions({"auto", "fixed", "tied", "curve", "linear", "mlp", "paper"}),
            list,
            tuple,
            type,
        ],
        "inputs": [str, list, tuple],
        "statistic": [StrOptions(set(NAMED) - {"released"}), callable],
        "objective": [StrOptions({"marginal", "log_loss"})],
        "base_prior": [StrOptions({"fit", "uniform"}), "array-like", dict],
        "calibration": [StrOptions({"temperature", "bcts", "none"}), None],
        "strength": [Interval(Real, 0, 1, closed="both"), StrOptions({"auto"})],
        "mix": [Interval(Real, 0, 1, closed="left"), StrOptions({"auto"})],
        "transductive": [StrOptions({"auto", "em", "bbse", "map_em"}), None],
        "worst_recall_floor": [Interval(Real, 0, 1, closed="both"), None],
        "lag": [Interval(Integral, 1, None, closed="left")],
        "min_rounds": [Interval(Integral, 1, None, closed="left")],
        "buffer_size": [Interval(Integral, 1, None, closed="left"), None],
        "decay": [Interval(Real, 0, 1, closed="right"), StrOptions({"auto"})],
        "l2": [Interval(Real, 0, None, closed="neither")],
        "recall_smoothing": [Interval(Real, 0, None, closed="left")],
        "prior_strength": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
        "hidden_layer_sizes": ["array-like"],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator=None,
        *,
        adapter="auto",
        inputs="auto",
        statistic="recall",
        objective="marginal",
        base_prior="fit",
        calibration=None,
        strength="auto",
        mix="auto",
        transductive=None,
        worst_recall_floor=None,
        lag=1,
        min_rounds=3,
        buffer_size=None,
        decay="auto",
        l2=1.0,
        recall_smoothing=2.0,
        prior_strength="auto",
        hidden_layer_sizes=(256, 256),
        lr=1e-3,
        max_epochs=200,
        weight_decay=1e-3,
        random_state=None,
        verbose=0,
    ):
        self.estimator = estimator
        self.adapter = adapter
        self.inputs = inputs
        self.statistic = statistic
        self.objective = objective
        self.base_prior = base_prior
        self.calibration = calibration
        self.strength = strength
        self.mix = mix
        self.transductive = transductive
        self.worst_recall_floor = worst_recall_floor
        self.lag = lag
        self.min_rounds = min_rounds
        self.buffer_size = buffer_size
        self.decay = decay
        self.l2 = l2
        self.recall_smoothing = recall_smoothing
        self.prior_strength = prior_strength
        self.hidden_layer_sizes = hidden_layer_sizes
        self.lr = lr
        self.max_epochs = max_epochs
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(
        self,
        X,
        y,
        *,
        rounds=None,
        deployed_pred=None,
        sample_weight=None,
        covariates=None,
        strata=None,
    ):
        """Fit the classifier on the first round and learn the response from all of them.

        Rounds are gone through in order, each predicted by what was known before it; these
        predictions count as deployed unless `deployed_pred` tells what was.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows, in any form that the estimator takes.
        y : array-like of shape (n,)
            Labels; None or NaN where one is not known yet.
        rounds : int, str, date or array-like of shape (n,), optional
            Round of every row; their order is time. None means that no model was deployed yet:
            the classifier is fitted on all rows and nothing is corrected.
        deployed_pred : array-like of shape (n,) or (n, n_classes), optional
            Labels or probabilities that the deployed model had predicted.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows, in the classifier's fit and in all counts. A round counts as
            many labels as its weights are worth, ``sum(w)**2 / sum(w**2)``, whatever their scale.
        covariates : array-like of shape (n_rounds, n_covariates), optional
            What is known of each round before it begins, in order: calendar, price.
        strata : array-like of shape (n,), optional
            Group of every row, for the statistics and the floor by group.

        Returns
        -------
        PerformativeAdapter
            Itself.

        Raises
        ------
        ValueError
            If rounds are of another length or have no order, or labels are unknown to a frozen
            estimator.
        """
        with unchanged_on_error(self):
            self._forget()
            if y is None:
                # in scikit-learn's words, whose own checks look for them
                raise ValueError(
                    f"This {type(self).__name__} estimator requires y to be passed, but the "
                    "target y is None."
                )
            if rounds is None:
                _steps.warn_in_a_search()
            passed = (rounds, deployed_pred, sample_weight, covariates, strata)
            data = self._data(X, y, *passed, first=True)
            self._learn(data, self._begin(data))
            _steps.warn_of_little(self.record_, data.rounds)
        return self

    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(
        self,
        X,
        y,
        *,
        rounds=None,
        classes=None,
        deployed_pred=None,
        sample_weight=None,
        covariates=None,
        strata=None,
    ):
        """Append one or more later rounds; broken off, it leaves the adapter as it was.

        A round may come without labels, ``y=None``: the statistic of the model that met it is then
        measured on rows remembered from earlier rounds. Its labels may follow under its own
        number, also bit by bit.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,) or None
            Labels; None or NaN where one is not known yet.
        rounds : int, str, date or array-like of shape (n,), optional
            Later than the rounds seen, or seen without all of their labels. None means one
            round, the next.
        classes : array-like of shape (n_classes,), optional
            All labels there will be; matters at the first call only.
        deployed_pred : array-like of shape (n,) or (n, n_classes), optional
            Labels or probabilities that the deployed model had predicted.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows.
        covariates : array-like of shape (n_rounds, n_covariates), optional
            Of each round of the call in order.
        strata : array-like of shape (n,), optional
            Group of every row.

        Returns
        -------
        PerformativeAdapter
            Itself.

        Raises
        ------
        ValueError
            If a round is not later than the last one seen, or parameters changed since the
            first call.
        """
        with unchanged_on_error(self):
            first = not hasattr(self, "record_")
            if not first:
                self._check_unchanged()
            if rounds is None:
                known = () if first else self.record_.anticipation.trajectory.rounds
                rounds = _inputs.next_number(known[-1] if len(known) else None)
            passed = (rounds, deployed_pred, sample_weight, covariates, strata)
            data = self._data(X, y, *passed, first=first)
            self._learn(data, self._begin(data, classes) if first else None)
        return self

    @fit_context(prefer_skip_nested_validation=False)
    def fit_trajectory(self, statistics, label_counts, *, rounds=None, classes=None):
        """Learn the response from a record of rounds, without raw rows.

        Row i of the counts is explained by row i - 1 of the statistics (i - `lag`) and by the
        counts before it. Counts do not tell the mix that a frozen estimator was trained for: it
        is read off the estimator where it says so, else equal shares are assumed until labelled
        rows come to `partial_fit`. Without an estimator the first counts stand for it.

        Parameters
        ----------
        statistics : array-like of shape (n_rounds, n_statistics)
            Statistic of the model deployed in each round. NaN is imputed for a class without
            labels in that round.
        label_counts : array-like of shape (n_rounds, n_classes)
            Labels seen in each round.
        rounds : array-like of shape (n_rounds,), optional
            Increasing numbers, dates or names of the rounds.
        classes : array-like of shape (n_classes,), optional
            Labels, by default those of a frozen estimator.

        Returns
        -------
        PerformativeAdapter
            Itself. An estimator that is not frozen stays unfitted: `predict_prior` works,
            `predict` does not.
        """
        with unchanged_on_error(self):
            self._forget()
            if self.objective == "log_loss":
                raise ValueError(
                    "objective='log_loss' needs rows: fit_trajectory has label counts only."
                )
            recall = isinstance(self.statistic, str) and self.statistic == "recall"
            fitted, labels = trajectory_classes(self.estimator, classes, label_counts)
            statistics, counts = _inputs.check_trajectory(
                *(_inputs.by_label(given, labels.tolist()) for given in (statistics, label_counts)),
                is_recall=recall,
            )
            n_rounds = len(counts)
            numbers = np.arange(n_rounds) if rounds is None else rounds
            numbers = _inputs.check_rounds(numbers, n_rounds)
            seed, params = seed_of(self.random_state), self.get_params(deep=False)
            base = trajectory_base(params, fitted, labels, counts)
            finds_base = fitted is not None and given_base(params, labels) is None
            options = options_of(params, seed, refines_base=finds_base)
            record = start_record(params, options, labels, base, n_statistics=statistics.shape[1])
            for number, counted, statistic in zip(numbers, counts, statistics, strict=True):
                record = learning.counted_round(record, number, counted, statistic)
            if fitted is not None:
                self.estimator_, self._weights = fitted, _weights_of(fitted)
            self._frozen_params = params
            self._publish(record)
            _steps.warn_of_little(record, None)
        return self

    def replace_estimator(self, estimator, X=None, y=None):
        """Go on with another classifier: the record and the map are kept.

        The world answers what it saw, whichever classifier made it; statistics of the past stay
        true. Base mix, calibration and remembered rows belonged to the old one.

        Parameters
        ----------
        estimator : classifier, FrozenEstimator or nn.Module
            The next one; what is not frozen is cloned and fitted on the rows.
        X : array-like of shape (n, ...), optional
            Labelled rows of any mix: they tell the base mix of a frozen estimator at once. Without
            them the next labelled round does.
        y : array-like of shape (n,), optional
            Their labels.

        Returns
        -------
        PerformativeAdapter
            Itself.
        """
        check_is_fitted(self, "record_")
        if (X is None or y is None) and not is_frozen(estimator):
            raise ValueError(
                f"a {type(estimator).__name__} that is not frozen is fitted on rows: give X and y, "
                "or FrozenEstimator(...) of a fitted one."
            )
        if X is None and is_network(estimator):
            raise ValueError("a network is opened on rows: give X and y.")
        with unchanged_on_error(self):
            self.estimator = estimator
            X = None if X is None else self._rows(X, reset=True)
            params = self.get_params(deep=False)
            self.estimator_, record = _steps.replaced(self.record_, estimator, X, y, params)
            self._frozen_params = params
            self._weights = _weights_of(self.estimator_)
            self._publish(record)
        return self

    def predict(self, X, *, statistic=None):
        """Predict labels, corrected for the anticipated mix.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        statistic : array-like of shape (n_statistics,), optional
            Of the model deployed before; by default the last one recorded.

        Returns
        -------
        ndarray of shape (n,)
            Labels; the classifier's own where nothing is corrected.
        """
        scores, own = self._corrected(X, statistic)
        return self.classes_[scores.argmax(axis=1) if own is None else own()]

    def predict_proba(self, X, *, statistic=None):
        """Predict probabilities.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        statistic : array-like of shape (n_statistics,), optional
            Of the model deployed before; by default the last one recorded.

        Returns
        -------
        ndarray of shape (n, n_classes)
            Probabilities.
        """
        return probabilities(self._corrected(X, statistic)[0])

    def predict_log_proba(self, X, *, statistic=None):
        """Predict log probabilities.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        statistic : array-like of shape (n_statistics,), optional
            Of the model deployed before; by default the last one recorded.

        Returns
        -------
        ndarray of shape (n, n_classes)
            Log probabilities.
        """
        scores = self._corrected(X, statistic)[0]
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

    def decision_function(self, X, *, statistic=None):
        """Give corrected scores ``f + log q - log pi_0``.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        statistic : array-like of shape (n_statistics,), optional
            Of the model deployed before; by default the last one recorded.

        Returns
        -------
        ndarray of shape (n, n_classes) or (n,)
            Scores; with two classes their difference.
        """
        scores = self._corrected(X, statistic)[0]
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def correct(self, X, prior):
        """Predict probabilities at a label mix that is known.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        prior : array-like of shape (n_classes,) or dict by label
            The mix.

        Returns
        -------
        ndarray of shape (n, n_classes)
            Probabilities.
        """
        check_is_fitted(self, "record_")
        mix = _inputs.check_prior(prior, self.classes_)
        logits = self._opened().logits(self._rows(X))
        return probabilities(self.record_.corrected(logits, np.log(np.maximum(mix, 1e-300))))

    def predict_prior(self, statistic=None, *, return_interval=False, covariates=None):
        """Anticipate the label mix of the round after a deployment.

        Parameters
        ----------
        statistic : array-like of shape (n_statistics,) or (n, n_statistics), optional
            Of the deployed model; by default the last one recorded.
        return_interval : bool, default=False
            Whether to add where nine in ten realised shares will lie, from how often such
            intervals have held so far.
        covariates : array-like of shape (n_covariates,), optional
            Of the round to come; by default those of the last one.

        Returns
        -------
        prior : ndarray of shape (n_classes,) or (n, n_classes)
            Shares that predictions are corrected for: between the base mix and what the maps
            expect, as far as `strength_` goes.
        interval : ndarray of shape (2, ...)
            Low and high shares, if asked for.
        """
        check_is_fitted(self, "record_")
        prior = np.exp(_steps.anticipated(self.record_, statistic, covariates, self._said))
        return (prior, self.record_.interval(prior)) if return_interval else prior

    def estimate_prior(self, X, *, return_interval=False):
        """Estimate the label mix of rows without labels, with the anticipated mix as its prior.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        return_interval : bool, default=False
            Whether to add where nine in ten of the batch's shares lie.

        Returns
        -------
        prior : ndarray of shape (n_classes,)
            Shares.
        interval : ndarray of shape (2, n_classes)
            Low and high shares, if asked for.
        """
        check_is_fitted(self, "record_")
        record, logits = self.record_, self._opened().logits(self._rows(X))
        how = "map_em" if record.anticipation.n_pairs else "em"
        prior = np.exp(record.batch_prior(logits, np.log(self.predicted_prior_), how))
        return (prior, record.batch_interval(logits, prior)) if return_interval else prior

    def statistic_of(self, estimator, X, y, sample_weight=None, *, strata=None):
        """Measure the statistic of a fitted classifier on labelled rows.

        Under a pure change of label mix recalls do not depend on the mix, so rows of any mix
        will do; classes with few rows are shrunk towards the accuracy.

        Parameters
        ----------
        estimator : fitted classifier
            The model.
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels.
        sample_weight : array-like of shape (n,), optional
            Weights.
        strata : array-like of shape (n,), optional
            Groups, where the statistic needs them.

        Returns
        -------
        ndarray of shape (n_statistics,)
            Statistic.
        """
        check_is_fitted(self, "record_")
        X, codes = self._labelled(X, y)
        weight = check_sample_weight(sample_weight, codes, dtype=np.float64)
        opened = open_candidate(estimator, X, self.classes_)
        logits = opened.logits(X, strict=True)
        return self.record_.measured(
            codes, opened.own(X, logits), logits, weight, _steps.strata_codes(self.record_, strata)
        )

    def deployed_statistic(self, X, y, *, prior=None, strata=None):
        """Measure the statistic of the model that is deployed now, before its labels arrive.

        For labels that come late: rows labelled long ago tell the recall of the corrected model
        as well as today's would.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows labelled earlier, of any mix.
        y : array-like of shape (n,)
            Their labels.
        prior : array-like of shape (n_classes,), optional
            Mix that the deployed model is corrected for; by default the one anticipated now.
        strata : array-like of shape (n,), optional
            Groups, where the statistic needs them.

        Returns
        -------
        ndarray of shape (n_statistics,)
            Statistic, to be given to `predict` or `predict_prior`.
        """
        check_is_fitted(self, "record_")
        X, codes = self._labelled(X, y)
        mix = self.predicted_prior_ if prior is None else _inputs.check_prior(prior, self.classes_)
        log_prior = np.log(np.maximum(mix, 1e-300))  # a class that cannot come is not predicted
        record, opened = self.record_, self._opened()
        logits = opened.logits(X)
        scores = record.corrected(logits, log_prior)
        untouched = prior is None and record.own_rule_holds
        predicted = opened.own(X, logits) if untouched else scores.argmax(axis=1)
        return record.measured(codes, predicted, scores, strata=_steps.strata_codes(record, strata))

    def replay(self, X, y, *, rounds, strata=None):
        """Predict rounds in order, each by the statistic of the one before; nothing is learned.

        Rounds that lie between the last one seen and the first one given, as ``gap`` of
        `RoundForwardSplit` leaves them, are gone through without labels: their statistics are
        measured on remembered rows, as a user with late labels would.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels.
        rounds : int, str, date or array-like of shape (n,)
            Rounds.
        strata : array-like of shape (n,), optional
            Groups, where the statistic needs them.

        Returns
        -------
        ndarray of shape (n, n_classes)
            Probabilities.
        """
        check_is_fitted(self, "record_")
        X, codes = self._labelled(X, y)
        numbers = _inputs.check_rounds(rounds, len(codes))
        groups = _steps.strata_codes(self.record_, strata)
        return _steps.replayed(self.record_, self._opened(), X, codes, numbers, groups)

    def score(self, X, y, *, rounds=None, sample_weight=None, strata=None):
        """Compute the accuracy; with `rounds` one step ahead in order, without refitting.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels.
        rounds : int, str, date or array-like of shape (n,), optional
            Rounds.
        sample_weight : array-like of shape (n,), optional
            Weights.
        strata : array-like of shape (n,), optional
            Groups, where the statistic needs them.

        Returns
        -------
        float
            Accuracy.
        """
        check_is_fitted(self, "record_")
        if rounds is not None:
            proba = self.replay(X, y, rounds=rounds, strata=strata)
        if rounds is None or self.record_.own_rule_holds:
            predicted = self.predict(X)  # a classifier's own rule need not be its likeliest class
        else:
            predicted = self.classes_[proba.argmax(axis=1)]
        y, known = _inputs.check_labels(y, len(predicted), first=False)
        weight = None if sample_weight is None else np.asarray(sample_weight)[known]
        labels = predicted[known]
        truth = y[known].astype(labels.dtype) if y.dtype == object else y[known]
        return accuracy_score(truth, labels, sample_weight=weight)

    def rank_models(self, candidates, X, y, *, scoring="accuracy", n_bootstrap=200, strata=None):
        """Predict what candidates would score in the round after their deployment.

        Where the record gives no evidence that the mix answers the model, all candidates are
        held against the mix expected whatever is deployed, and a warning says so.

        Parameters
        ----------
        candidates : list of fitted classifiers or dict of them by name
            Each as it would be deployed.
        X : array-like of shape (n, ...)
            Labelled rows of any mix, best with every class well represented.
        y : array-like of shape (n,)
            Labels.
        scoring : {"accuracy", "neg_log_loss"} or callable, default="accuracy"
            A callable takes ``(y_true, y_pred, sample_weight=)``.
        n_bootstrap : int, default=200
            Resamples of rows, rounds and one-step-ahead errors; 0 gives no intervals.
        strata : array-like of shape (n,), optional
            Groups, where the statistic needs them.

        Returns
        -------
        Bunch
            ``order`` (indices, best first), ``predicted``, ``low``, ``high`` (90 % interval),
            ``current`` (score on the rows as they are), ``prior`` (n_candidates, n_classes),
            ``names`` and ``fallback`` (whether the mix was held not to answer).
        """
        check_is_fitted(self, "record_")
        named = _inputs.check_candidates(candidates, scoring, n_bootstrap)
        X, codes = self._labelled(X, y)
        groups = _steps.strata_codes(self.record_, strata)
        return _steps.ranked(self.record_, named, X, codes, scoring, n_bootstrap, groups)

    def stable_point(self, X, y, *, damping=0.1, tol=0.005, max_iter=500, strata=None):
        """Find the label mix at which the corrected model and its answer come to rest.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Labelled rows of any mix.
        y : array-like of shape (n,)
            Labels.
        damping : float, default=0.1
            Share of the way gone in a step.
        tol : float, default=0.005
            Total variation that counts as rest.
        max_iter : int, default=500
            Most steps.
        strata : array-like of shape (n,), optional
            Groups, where the statistic needs them.

        Returns
        -------
        Bunch
            ``prior``, ``statistic``, ``converged``, ``residual``, ``cycle`` (whether full
            correction at every round would flip between two mixes), ``cycle_gap`` (how far they
            are apart), ``worst_recall``, ``accuracy`` and ``n_iter``.
        """
        check_is_fitted(self, "record_")
        if not 0 < damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {damping}.")
        if max_iter < 1:
            raise ValueError(f"max_iter must be 1 or more, got {max_iter}.")
        X, codes = self._labelled(X, y)
        logits = self._opened().logits(X)
        groups, how = _steps.strata_codes(self.record_, strata), (damping, tol, max_iter)
        return Bunch(**rest_point(self.record_, logits, codes, groups, *how))

    def diagnose(self, *, n_permutations=99):
        """Examine the record: what is known, and whether the response is the model's doing.

        Parameters
        ----------
        n_permutations : int, default=99
            Draws of signs for the test whether the mix answers.

        Returns
        -------
        dict
            `diagnostics_` with ``response_p_value`` (small: the mix answers the model, beyond what
            its own past tells), ``conditional_shift_p_value`` (small: the classes themselves look
            different), ``answers`` (whether maps that read the model lead), ``gain_statistic``,
            ``gain_model_free``, ``gain_previous_mix`` (nats a label saved over the base mix, one
            step ahead, by all maps, those that do not read the model, and the last mix),
            ``gain_adapter`` and ``worst_recall``.
        """
        check_is_fitted(self, "record_")
        return full_diagnostics(self.record_, n_permutations)

    @property
    def prequential_(self) -> Bunch:
        """Losses, accuracies and mixes by round."""
        return Bunch(**prequential(self.record_))

    @property
    def diagnostics_(self) -> dict:
        """Diagnostics that cost next to nothing."""
        return quick_diagnostics(self.record_)

    def report(self) -> DriftReport:
        """Say how things stand: mix, recall and answer, in a form to print or draw each morning.

        Returns
        -------
        DriftReport
            ``print`` it, ``plot`` it, or read ``mix``, ``recall`` and ``answer``.
        """
        check_is_fitted(self, "record_")
        return drift_report(self.record_)

    def __sklearn_tags__(self):
        """Take what the estimator takes."""
        tags = super().__sklearn_tags__()
        if not is_network(self.estimator) and hasattr(self.estimator, "__sklearn_tags__"):
            own = get_tags(self.estimator).input_tags
            tags.input_tags = replace(own, pairwise=False)
        return tags

    # ---- the steps behind the public methods

    def _forget(self):
        for name in [name for name in vars(self) if name.endswith("_") and name[0] != "_"]:
            delattr(self, name)

    def _rows(self, X, *, reset=False):
        """Validate rows: a network's here, those of any other classifier by itself."""
        if is_network(self.estimator):
            return check_rows(self, X, reset=reset)
        X = _inputs.check_own_rows(X, type(self).__name__)
        validate_data(self, X, reset=reset, skip_check_array=True)
        return X

    def _labelled(self, X, y):
        """Validate rows with labels that are all known: -> rows, columns (n,)."""
        X = self._rows(X)
        return X, _inputs.check_all_labels(y, self.classes_, _inputs.count_rows(X))

    def _data(self, X, y, rounds, deployed, weight, covariates, strata, *, first):
        """Validate all that a call brings."""
        X = self._rows(X, reset=first or not hasattr(self, "estimator_"))
        n_rows = _inputs.count_rows(X)
        values, known = _inputs.check_labels(y, n_rows, first=first)
        numbers = None if rounds is None else _inputs.check_rounds(rounds, n_rows)
        n_known = None if first else self.record_.anticipation.trajectory.covariates.shape[1]
        n_rounds = 1 if numbers is None else len(np.unique(numbers))
        checked = _inputs.check_covariates(covariates, n_rounds, n_known)
        groups = _inputs.check_by_row(strata, n_rows, "strata")
        deployed = _inputs.check_by_row(deployed, n_rows, "deployed_pred")
        if numbers is not None and weight is not None and not np.asarray(weight).any():
            raise ValueError("sample_weight is 0 for all rows: a round needs rows that count.")
        weights = check_sample_weight(weight, np.zeros(n_rows), dtype=np.float64)
        data = Data(
            X, values, known, numbers, weights, weight is not None, deployed, checked, groups
        )
        return data.counting()

    def _begin(self, data, classes=None):
        seed, params = seed_of(self.random_state), self.get_params(deep=False)
        self.estimator_, record, measured = begin(self.estimator, params, data, seed, classes)
        self._frozen_params, self._weights = params, _weights_of(self.estimator_)
        # before any round the statistic is that of the classifier on its first rows
        strata = _steps.strata_codes(record, data.strata)
        codes, rows = encode(data.y[measured.rows], record.classes), measured.rows
        self.statistic_ = np.full(record.anticipation.trajectory.statistics.shape[1], np.nan)
        if len(codes):
            groups = None if strata is None else strata[rows]
            self.statistic_ = record.measured(
                codes, measured.own, measured.logits, data.weight[rows], groups
            )
        self._publish(record)
        return measured

    def _learn(self, data, measured=None):
        if data.rounds is not None:  # without rounds there is nothing to learn
            self._check_has_estimator()
            if measured is None:
                self._check_weights()
            record = self.record_
            self._publish(_steps.learn(record, self.estimator_, data, measured, self.verbose))
            if not self.record_.own_rule_holds:
                warn_of_threshold(self.estimator_)

    def _check_unchanged(self):
        """Refuse to go on with other parameters than the record was started with."""
        now = self.get_params(deep=False)
        changed = [
            name
            for name, value in self._frozen_params.items()
            if name not in ("verbose", "random_state") and not _inputs.same(now[name], value)
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} changed since the first call: fit anew, or set "
                f"{'them' if len(changed) > 1 else 'it'} back; another classifier goes on with "
                "the record through replace_estimator."
            )

    def _check_weights(self):
        """Refuse a network whose weights moved since the record was started with it."""
        if _weights_of(self.estimator_) != self._weights:
            raise ValueError(
                "the weights of estimator_ have changed since fit: what is recorded belongs to "
                "another model. Give the changed one to replace_estimator, or fit anew."
            )

    def _check_has_estimator(self):
        if not hasattr(self, "estimator_"):
            raise NotFittedError(
                "this adapter was fitted on a record without rows, so its estimator is not "
                "fitted: give fit_trajectory a frozen estimator to go on with."
            )

    def _opened(self):
        check_is_fitted(self, "record_")
        self._check_has_estimator()
        self._check_weights()
        return Opened(self.estimator_, self.record_.classes, self.record_.log_base)

    def _corrected(self, X, statistic):
        """Corrected scores (n, n_classes), and the classifier's own rule where it holds."""
        opened = self._opened()
        X = self._rows(X)
        logits = opened.logits(X)
        log_prior = np.log(self.predicted_prior_)
        if statistic is not None:
            log_prior = _steps.anticipated(self.record_, statistic, None, self._said)
        scores, untouched = _steps.corrected(self.record_, logits, log_prior)
        return scores, (lambda: opened.own(X, logits)) if untouched else None

    def _publish(self, record):
        vars(self).update(_steps.published(record))
        self._said = getattr(self, "_said", set())


def _weights_of(fitted):
    """Digest of the weights of a network inside, None where there is no module."""
    module = source_of(fitted) if has_network(fitted) else None
    return None if module is None else checksum(module)
