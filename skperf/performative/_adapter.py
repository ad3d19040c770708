"""PerformativeAdapter: anticipate the label mix that answers a deployed classifier."""

from numbers import Integral, Real
from typing import ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._sklearn import DOC_LINK, Interval, StrOptions, fit_context
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import as_array
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.performative import _learning, _outlook
from skperf.performative._inputs import check_rounds
from skperf.performative._rounds import interval_of
from skperf.performative.label_shift import probabilities
from skperf.performative.trajectory import STATISTICS


class PerformativeAdapter(CallbackSupportMixin, ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """Correct a classifier for the change of label mix that its own deployment causes.

    A deployed model changes what it will meet: a benchmark collects more of what it gets
    wrong, a shop shows more of what it gets right. As long as only the shares of the classes
    answer, ``pi_t = M(S_{t-1})`` with S the recall of the model deployed before, the map M can
    be learned from a few rounds, and the next mix is known before its first row arrives.
    Predictions are ``softmax(f(x) + log q - log pi_0)`` with q the anticipated mix.

    Parameters
    ----------
    estimator : classifier, FrozenEstimator, nn.Module or None, default=None
        Anything with ``predict_proba`` or ``decision_function``. What is frozen, a module or
        has ``to_module()`` is used as it is; everything else is cloned and fitted on the first
        round (on all rows if `rounds` is None). None means a small network.
    adapter : str, list of str or nn.Module class, default="auto"
        Response map: ``"fixed"`` (a constant mix), ``"tied"`` (one slope for all classes),
        ``"curve"`` (one piecewise linear curve), ``"linear"`` (a full matrix), ``"mlp"``, or a
        module class, trained by skorch. A list or ``"auto"``, which is all of them, chooses
        by likelihood one step ahead. ``"paper"`` is the method released with arXiv:2410.04499.
    statistic : {"recall", "confusion", "predicted_marginal"} or callable, default="recall"
        What the world sees of the model. A callable gets ``(y_true, y_pred, proba, classes,
        sample_weight)`` and returns finite numbers of shape (n_statistics,).
    objective : {"marginal", "log_loss"}, default="marginal"
        Likelihood of the label counts, or of the labels given the corrected scores, which
        also absorbs a lack of calibration.
    base_prior : {"fit", "uniform"}, array or dict by label, default="fit"
        Mix pi_0 that the estimator was trained for. "fit" means that of the rows it is fitted
        on here; for a frozen one the mix that gives the first rows their largest likelihood.
    calibration : {"temperature", "bcts"} or None, default=None
        Scaling of the scores, on the first rows; an estimator fitted here holds a fifth of its
        rows out for it.
    strength : float or "auto", default="auto"
        Share of the correction that is applied, on the log scale; 0 is none.
    mix : float or "auto", default="auto"
        Share of `base_prior` mixed into the map's answer.
    transductive : {"em", "bbse", "map_em"} or None, default=None
        Also use the rows given to predict, as one batch: expectation maximisation, confusion
        matrix inversion, or the former with the anticipated mix as its prior.
    worst_recall_floor : float or None, default=None
        Weaken the correction until every class keeps this recall on the rows seen last.
    lag : int, default=1
        Rounds between a deployment and its answer, for labels that arrive late.
    min_rounds : int, default=3
        Rounds before anything is corrected.
    buffer_size : int or None, default=None
        Most rounds to learn from, the latest.
    decay : float, default=1.0
        Weight of a round against the one after it.
    l2 : float, default=1.0
        Shrinkage of the response maps.
    recall_smoothing : float, default=2.0
        Pseudo-rows that shrink recalls towards the accuracy.
    prior_strength : float or "auto", default="auto"
        Labels that the anticipation is worth to ``transductive="map_em"``.
    hidden_layer_sizes, lr, max_epochs, batch_size, weight_decay
        Of ``"mlp"`` and its training by Adam.
    random_state : int, RandomState or None, default=None
        Seeds networks, permutations and resampling.
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
        Temperature and bias.
    trajectory_ : Trajectory
        Rounds, statistics and label counts.
    statistic_ : ndarray of shape (n_statistics,)
        The last one recorded.
    predicted_prior_ : ndarray of shape (n_classes,)
        Anticipated mix of the next round.
    adapter_ : object
        Response map in use; ``log_prior(statistics)`` gives its answers unblended.
    adapter_name_ : str
        Its kind.
    strength_, mix_ : float
        Of the blend in use.
    fallback_ : bool
        Whether nothing is corrected, for want of rounds or of evidence.
    prequential_ : Bunch
        By round, each judged before it was learned from: ``round``; log losses ``none``, ``last``
        (the previous mix), ``adapter``, ``oracle`` (the realised mix); ``worst_recall``, ``tv``
        (total variation to the previous mix), and ``predicted``, ``realised`` mixes
        (n_rounds, n_classes).
    diagnostics_ : dict
        Cheap diagnostics; `diagnose` adds tests.
    n_rounds_ : int
        Rounds seen.
    n_features_in_, feature_names_in_
        Columns of X, and their names if it had any.

    Examples
    --------
    >>> import numpy as np
    >>> from skperf import PerformativeAdapter
    >>> rng = np.random.default_rng(0)
    >>> recall = rng.uniform(0.3, 1.0, size=(30, 3))
    >>> odds = np.exp(-recall / 0.2)
    >>> counts = np.vstack([[300, 300, 300], 900 * odds[:-1] / odds[:-1].sum(1, keepdims=True)])
    >>> adapter = PerformativeAdapter().fit_trajectory(recall, counts.round())
    >>> adapter.predict_prior([0.9, 0.5, 0.7]).round(2)
    array([0.09, 0.67, 0.24])
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
        "statistic": [StrOptions(set(STATISTICS)), callable],
        "objective": [StrOptions({"marginal", "log_loss"})],
        "base_prior": [StrOptions({"fit", "uniform"}), "array-like", dict],
        "calibration": [StrOptions({"temperature", "bcts"}), None],
        "strength": [Interval(Real, 0, 1, closed="both"), StrOptions({"auto"})],
        "mix": [Interval(Real, 0, 1, closed="left"), StrOptions({"auto"})],
        "transductive": [StrOptions({"em", "bbse", "map_em"}), None],
        "worst_recall_floor": [Interval(Real, 0, 1, closed="both"), None],
        "lag": [Interval(Integral, 1, None, closed="left")],
        "min_rounds": [Interval(Integral, 1, None, closed="left")],
        "buffer_size": [Interval(Integral, 1, None, closed="left"), None],
        "decay": [Interval(Real, 0, 1, closed="right")],
        "l2": [Interval(Real, 0, None, closed="neither")],
        "recall_smoothing": [Interval(Real, 0, None, closed="left")],
        "prior_strength": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
        "hidden_layer_sizes": ["array-like"],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator=None,
        *,
        adapter="auto",
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
        decay=1.0,
        l2=1.0,
        recall_smoothing=2.0,
        prior_strength="auto",
        hidden_layer_sizes=(256, 256),
        lr=1e-3,
        max_epochs=200,
        batch_size=32,
        weight_decay=1e-3,
        random_state=None,
        verbose=0,
    ):
        self.estimator = estimator
        self.adapter = adapter
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
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X, y, *, rounds=None, deployed_pred=None, sample_weight=None):
        """Fit the classifier on the first round and learn the response from all of them.

        Rounds are gone through in order, each predicted by what was known before it; these
        predictions count as deployed unless `deployed_pred` tells what was.

        Parameters
        ----------
        X, y : array-like
            Rows (n, ...) and labels (n,).
        rounds : int or array-like of int of shape (n,), optional
            Round of every row; their order is time. None means that no model was deployed yet:
            the classifier is fitted on all rows and nothing is corrected.
        deployed_pred : array-like of shape (n,) or (n, n_classes), optional
            Labels or probabilities that the deployed model had predicted.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows, in the classifier's fit and in all counts.

        Returns
        -------
        PerformativeAdapter
            Itself.

        Raises
        ------
        ValueError
            If rounds are no integers or of another length, or labels are unknown to a frozen
            estimator.
        """
        with unchanged_on_error(self):
            _learning.forget(self)
            X, y = check_labelled_rows(self, X, y, reset=True)
            numbers = None if rounds is None else check_rounds(as_array(rounds), len(y))
            data = _learning.Data(X, y, numbers, deployed_pred, sample_weight)
            _learning.begin(self, data)
            _learning.learn(self, data)
            _learning.warn_of_little(self, numbers)
        return self

    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(
        self, X, y, *, rounds=None, classes=None, deployed_pred=None, sample_weight=None
    ):
        """Append one or more later rounds; broken off, it leaves the adapter as it was.

        Parameters
        ----------
        X, y : array-like
            Rows and labels.
        rounds : int or array-like of int of shape (n,), optional
            All later than the rounds seen. None means one round, the next.
        classes : array-like of shape (n_classes,), optional
            All labels there will be; matters at the first call only.
        deployed_pred, sample_weight
            As in `fit`.

        Raises ValueError if a round is not later than the last one seen.
        """
        with unchanged_on_error(self):
            first = not hasattr(self, "record_")
            X, y = check_labelled_rows(self, X, y, reset=not hasattr(self, "estimator_"))
            numbers = _learning.next_round(self) if rounds is None else as_array(rounds)
            data = _learning.Data(X, y, check_rounds(numbers, len(y)), deployed_pred, sample_weight)
            if first:
                _learning.begin(self, data, classes=classes)
            _learning.learn(self, data)
        return self

    @fit_context(prefer_skip_nested_validation=False)
    def fit_trajectory(self, statistics, label_counts, *, rounds=None, classes=None):
        """Learn the response from a record of rounds, without raw rows.

        Row i of the counts is explained by row i - 1 of the statistics (i - `lag`); the first
        counts, which nothing explains, stand for the base mix if `base_prior` is "fit".

        Parameters
        ----------
        statistics : array-like of shape (n_rounds, n_statistics)
            Statistic of the model deployed in each round. NaN is imputed for a class without
            labels in that round.
        label_counts : array-like of shape (n_rounds, n_classes)
            Labels seen in each round.
        rounds, classes : array-like, optional
            Increasing numbers of the rounds; labels, by default those of a frozen estimator.

        Returns
        -------
        PerformativeAdapter
            Itself. An estimator that is not frozen stays unfitted: `predict_prior` works,
            `predict` does not.
        """
        with unchanged_on_error(self):
            _learning.forget(self)
            _learning.learn_trajectory(self, statistics, label_counts, rounds, classes)
            _learning.warn_of_little(self, None)
        return self

    def predict(self, X, *, statistic=None):
        """Predict labels, corrected for the anticipated mix.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        statistic : array-like of shape (n_statistics,), optional
            Of the model deployed before; by default the last one recorded.
        """
        codes = _learning.corrected(self, X, statistic).argmax(axis=1)
        return self.classes_[codes]

    def predict_proba(self, X, *, statistic=None):
        """Predict probabilities (n, n_classes); parameters are those of `predict`."""
        return probabilities(_learning.corrected(self, X, statistic))

    def predict_log_proba(self, X, *, statistic=None):
        """Predict log probabilities (n, n_classes); parameters are those of `predict`."""
        scores = _learning.corrected(self, X, statistic)
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

    def decision_function(self, X, *, statistic=None):
        """Give corrected scores ``f + log q - log pi_0``; with two classes their difference."""
        scores = _learning.corrected(self, X, statistic)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict_prior(self, statistic=None, *, return_interval=False):
        """Anticipate the label mix of the round after a deployment.

        Parameters
        ----------
        statistic : array-like of shape (n_statistics,) or (n, n_statistics), optional
            Of the deployed model; by default the last one recorded.
        return_interval : bool, default=False
            Whether to add where nine in ten realised shares will lie.

        Returns
        -------
        prior : ndarray of shape (n_classes,) or (n, n_classes)
            Shares.
        interval : ndarray of shape (2, ...)
            Low and high shares, if asked for.
        """
        prior = np.exp(_learning.anticipated(self, statistic))
        return (prior, interval_of(self.record_, prior)) if return_interval else prior

    def statistic_of(self, estimator, X, y, sample_weight=None):
        """Measure the statistic (n_statistics,) of a fitted classifier on labelled rows.

        Under a pure change of label mix recalls do not depend on the mix, so rows of any mix
        will do; classes with few rows are shrunk towards the accuracy.
        """
        check_is_fitted(self, "record_")
        return _outlook.statistic_of(self, estimator, X, y, sample_weight)

    def replay(self, X, y, *, rounds):
        """Predict rounds in order, each by the statistic of the one before; nothing is learned.

        Parameters are those of `fit`; returns probabilities (n, n_classes).
        """
        check_is_fitted(self, "record_")
        X, y = check_labelled_rows(self, X, y)
        return _learning.replayed(self, X, y, check_rounds(as_array(rounds), len(y)))

    def score(self, X, y, *, rounds=None, sample_weight=None):
        """Compute the accuracy; with `rounds` one step ahead in order, without refitting."""
        if rounds is None:
            return accuracy_score(as_array(y), self.predict(X), sample_weight=sample_weight)
        predicted = self.classes_[self.replay(X, y, rounds=rounds).argmax(axis=1)]
        return accuracy_score(as_array(y), predicted, sample_weight=sample_weight)

    def rank_models(self, candidates, X, y, *, scoring="accuracy", n_bootstrap=200):
        """Predict what candidates would score in the round after their deployment.

        Parameters
        ----------
        candidates : list of fitted classifiers or dict of them by name
            Each as it would be deployed.
        X, y : array-like
            Labelled rows of any mix, best with every class well represented.
        scoring : {"accuracy", "neg_log_loss"} or callable, default="accuracy"
            A callable takes ``(y_true, y_pred, sample_weight=)``.
        n_bootstrap : int, default=200
            Resamples of rows, rounds and one-step-ahead errors; 0 gives no intervals.

        Returns
        -------
        Bunch
            ``order`` (indices, best first), ``predicted``, ``low``, ``high`` (90 % interval),
            ``current`` (score on the rows as they are), ``prior`` (n_candidates, n_classes) and
            ``names``.
        """
        check_is_fitted(self, "record_")
        return _outlook.rank_models(self, candidates, X, y, scoring, n_bootstrap)

    def stable_point(self, X, y, *, damping=0.1, tol=0.005, max_iter=500):
        """Find the label mix at which the corrected model and its answer come to rest.

        Parameters
        ----------
        X, y : array-like
            Labelled rows of any mix.
        damping, tol, max_iter
            Share of the way gone in a step, total variation that counts as rest, most steps.

        Returns
        -------
        Bunch
            ``prior``, ``statistic``, ``converged``, ``residual``, ``cycle`` (whether full
            correction at every round would flip between two mixes), ``cycle_gap`` (how far they
            are apart), ``worst_recall``, ``accuracy`` and ``n_iter``.
        """
        check_is_fitted(self, "record_")
        return _outlook.stable_point(self, X, y, damping, tol, max_iter)

    def diagnose(self, *, n_permutations=99):
        """Examine the record: what is known, and whether the response is the model's doing.

        Returns a dict: `diagnostics_` with ``response_p_value`` (small: the mix answers the
        model; by permutations of the statistics), ``conditional_shift_p_value`` (small: the
        classes themselves look different), ``gain_statistic``, ``gain_previous_mix``,
        ``gain_nothing``, ``gain_adapter`` (nats a label, one step ahead) and ``worst_recall``.
        """
        check_is_fitted(self, "record_")
        return _outlook.diagnose(self, n_permutations)
