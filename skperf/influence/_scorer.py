"""Which training rows made a prediction: the estimator."""

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._opening import open_network
from skperf.backbone._sklearn import DOC_LINK, check_sample_weight, fit_context
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import array_rows as check_rows
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.influence._actions import remove, repair
from skperf.influence._constraints import CONSTRAINTS
from skperf.influence._members import (
    fitted_members,
    half_way,
    linearised,
    named_settings,
    networks_of,
    open_problem,
)
from skperf.influence._rows import detect_mislabels, group_influence, loo_effect, losses
from skperf.influence._scoring import (
    TopRows,
    influence_matrix,
    score_dtype,
    self_influences,
    tiles_of,
)
from skperf.influence._trust import fading, score
from skperf.influence.methods import METHODS, redamped
from skperf.influence.tiles import Largest, budget_in_bytes


class InfluenceScorer(
    CallbackSupportMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator
):
    """Score how much every training row contributed to a network's answers.

    ``influence(X, y)[i, j]`` estimates how much the loss on query i would rise if training
    row j were left out of the mean loss: positive rows helped (proponents), negative ones
    hurt (opponents). Curvature methods estimate the rise itself,
    ``g_i' (C + damping)^-1 g_j / n_train``; first-order methods give inner products of
    gradients (see `unit_`).

    Parameters
    ----------
    estimator : classifier, nn.Module, list of these, or None, default=None
        A torch network in any form: an unfitted classifier is cloned and fitted; a fitted one
        in ``FrozenEstimator``, a module, or whatever has ``to_module()`` is used as it is and
        never changed. A list is an ensemble: the scores of its members are averaged, and
        fitted members are used as they are. None means a small built-in network.
    method : str, default="auto"
        ``"ggn"`` row-space Gauss-Newton; ``"ekfac"``, ``"kfac"`` Kronecker-factored;
        ``"exact"`` dense, in double precision; ``"cg"``, ``"lissa"``, ``"arnoldi"`` iterative;
        ``"datainf"``; ``"trak"``; ``"gif"`` generalised influence on few parameters;
        ``"gradient_dot"``; ``"tracin"`` over `checkpoints`. ``"auto"`` is exact for a single
        linear layer of at most 5,000 weights, else ``"ggn"``.
    parameters : str or list of str, default="all"
        ``"all"``, ``"last"`` (the last layer) or globs of parameter names.
    target : {"loss", "log_odds", "logit", "margin", "proba"} or callable, default="loss"
        What is influenced. A function of (logits, codes) returns one number a row, larger
        for better; whatever the target, positive means proponent.
    curvature : {"ggn", "hessian", "empirical"}, default="ggn"
        Gauss-Newton with the exact expectation over labels; the Hessian (``"cg"``,
        ``"lissa"``, ``"arnoldi"``, ``"gif"``, ``"exact"``); or the second moment of the
        training gradients (``"ggn"``, ``"ekfac"``, ``"kfac"``).
    damping : float, "auto", "horizon" or "flow", default="auto"
        Added to the eigenvalues of the mean loss's curvature. ``"auto"``: the weight decay that
        pulls half as hard again as the mean gradient is uncertain; ``"horizon"``:
        ``1 / (learning_rate * horizon)``; ``"flow"``, of ``"ggn"`` and ``"exact"``: instead the
        filter of `horizon` further gradient steps, at the weights that half of them lead to.
    horizon : int, optional
        Number of further training steps whose effect is predicted; ties ``damping="auto"``
        to it.
    learning_rate : float, optional
        Of those steps; by default the estimator's own. For ``"tracin"``, the weight of every
        checkpoint.
    kept_trace : float, default=0.95
        As many curvature rows are taken as the largest would need for this share of the
        trace at the logits: the largest, and a sample that stands for the rest.
    max_rows : int or None, default=1000
        Most curvature rows of ``"ggn"``.
    rank : int or None, default=8
        Most terms of the separable EKFAC score; None for the exact one.
    n_components : int, default=100
        Eigenpairs that ``"arnoldi"`` keeps.
    n_projections : int, default=512
        Coordinates of ``"trak"``.
    checkpoints : list of state dicts, modules or estimators, optional
        For ``"tracin"``: stages of the same network.
    select : {"gradient", "output", "sam", "random"}, default="gradient"
        How ``"gif"`` and :meth:`remove` choose parameters: units of largest mean output
        gradient or mean pre-activation, or weights of largest gradient^2 / curvature.
    ratio : float, default=0.05
        Share of the parameters they may change.
    ridge : float, default=0.001
        Penalty in their least-squares problem.
    n_iterations : int, optional
        Most iterations of the iterative methods; each has its own default.
    tol : float, default=0.0001
        Their relative tolerance.
    lissa_scale : float, optional
        Divisor of the Neumann series; estimated by default.
    candidates : int, optional
        Score only this many nearest training rows of each query, in the features before the
        last layer; all others get 0.
    gradients : {"factorised", "reference"}, default="factorised"
        ``"reference"`` differentiates row by row with ``torch.func``: slower, any network.
    batch_size : int, optional
        Rows differentiated at once; never changes a result.
    memory_budget : str or float, default="2GB"
        What gradients of the training rows, and one tile of scores, may take. Gradients
        beyond it go to temporary files.
    storage : str or path, optional
        Folder of those files.
    random_state : int, RandomState or None, default=None
        Seeds training, random projections and starting vectors.
    n_jobs : int, optional
        Tiles scored at once, through joblib.
    verbose : int, default=0
        Show progress.

    Attributes
    ----------
    estimator_ : classifier
        The fitted classifier; of an ensemble, the first.
    estimators_ : list of classifiers
        All members.
    classes_ : ndarray of shape (n_classes,)
        Labels.
    method_ : str
        The method in use.
    ahead_ : list of dict of str to Tensor, or None
        Of every member, the weights half-way along the horizon, for ``damping="flow"``.
    unit_ : str
        ``"loss"``, ``"relative loss"`` or ``"squared gradient"``.
    damping_ : float or list of float
        What was added to the curvature's eigenvalues, of every layer for Kronecker factors.
    kept_trace_ : float
        Share of the curvature's trace at the logits that these rows hold by themselves.
    coverage_ : float
        Share of the network's parameters taken into account.
    self_influence_ : ndarray of shape (n_train,)
        Influence of every training row on itself.
    loss_ : ndarray of shape (n_train,)
        Loss of every training row, the baseline for :meth:`detect_mislabels`.
    n_features_in_ : int
        Columns of the rows seen in fit.

    References
    ----------
    Schioppa, Filippova, Titov, Zablotskaia, "Theoretical and Practical Perspectives on what
    Influence Functions Do" (2023); Grosse et al., "Studying Large Language Model
    Generalization with Influence Functions" (2023); Lyu, Jang, Ryu, Yang, arXiv 2312.05586.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skperf import InfluenceScorer
    >>> X, y = load_iris(return_X_y=True)
    >>> scorer = InfluenceScorer(random_state=0).fit(X, y)
    >>> scorer.influence(X[:2], y[:2]).shape
    (2, 150)
    """

    _doc_link_module = "skperf"
    _doc_link_template = DOC_LINK
    _parameter_constraints = CONSTRAINTS

    def __init__(
        self,
        estimator=None,
        *,
        method="auto",
        parameters="all",
        target="loss",
        curvature="ggn",
        damping="auto",
        horizon=None,
        learning_rate=None,
        kept_trace=0.95,
        max_rows=1000,
        rank=8,
        n_components=100,
        n_projections=512,
        checkpoints=None,
        select="gradient",
        ratio=0.05,
        ridge=1e-3,
        n_iterations=None,
        tol=1e-4,
        lissa_scale=None,
        candidates=None,
        gradients="factorised",
        batch_size=None,
        memory_budget="2GB",
        storage=None,
        random_state=None,
        n_jobs=None,
        verbose=0,
    ):
        self.estimator = estimator
        self.method = method
        self.parameters = parameters
        self.target = target
        self.curvature = curvature
        self.damping = damping
        self.horizon = horizon
        self.learning_rate = learning_rate
        self.kept_trace = kept_trace
        self.max_rows = max_rows
        self.rank = rank
        self.n_components = n_components
        self.n_projections = n_projections
        self.checkpoints = checkpoints
        self.select = select
        self.ratio = ratio
        self.ridge = ridge
        self.n_iterations = n_iterations
        self.tol = tol
        self.lissa_scale = lissa_scale
        self.candidates = candidates
        self.gradients = gradients
        self.batch_size = batch_size
        self.memory_budget = memory_budget
        self.storage = storage
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X, y, sample_weight=None):
        """Remember what is needed of the training rows.

        Parameters
        ----------
        X : array-like of shape (n_train, ...)
            Training rows.
        y : array-like of shape (n_train,)
            Their labels.
        sample_weight : array-like of shape (n_train,), optional
            Weights of the rows in the mean loss.

        Returns
        -------
        InfluenceScorer
            Itself.
        """
        with unchanged_on_error(self):
            X, y = check_labelled_rows(self, X, y, reset=True)
            if sample_weight is not None:
                sample_weight = check_sample_weight(sample_weight, X, dtype=np.float64)
            budget_in_bytes(self.memory_budget)
            self.estimators_ = fitted_members(self, X, y, sample_weight)
            self.estimator_ = self.estimators_[0]
            self.X_, self.y_, self.sample_weight_ = X, y, sample_weight
            network = open_network(self.estimator_)
            self.classes_ = network.classes
            self.method_ = self._resolved_method(network)
            self.settings_ = named_settings(self)
            self.ahead_ = half_way(self)
            problems = [problem for problem, _ in linearised(self)]
            self.coverage_ = problems[0].coverage
            self.fits_ = [METHODS[self.method_](problem) for problem in problems]
            self._read_reports()
            self._n_features_out = len(X)
            for lazy in ("_self_influence", "_features"):
                vars(self).pop(lazy, None)
        return self

    def _resolved_method(self, network):
        if self.method != "auto":
            return self.method
        owners = [m for m in network.module.modules() if list(m.parameters(recurse=False))]
        size = sum(p.numel() for p in network.module.parameters())
        linear = len(owners) == 1 and isinstance(owners[0], torch.nn.Linear) and size <= 5000
        usable = self.curvature != "empirical" and self.damping != "flow"
        return "exact" if linear and usable and self.gradients == "factorised" else "ggn"

    def _read_reports(self):
        report = self.fits_[0].report
        self.unit_ = self.fits_[0].unit
        self.damping_ = report.get("damping")
        self.kept_trace_ = report.get("kept_trace", 1.0)

    def influence(self, X, y, *, out=None, aggregate=None):
        """Estimate the influence of every training row on every query.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query,)
            Their labels.
        out : ndarray or memmap of shape (n_query, n_train), optional
            Written tile by tile, and returned.
        aggregate : {"sum", "mean"}, optional
            Over the queries; the result is then (n_train,).

        Returns
        -------
        ndarray of shape (n_query, n_train) or (n_train,)
            Positive = proponent.
        """
        check_is_fitted(self)
        X, y = check_labelled_rows(self, X, y)
        return influence_matrix(self, X, y, out=out, aggregate=aggregate)

    def transform(self, X):
        """Estimate influence on the loss at the predicted labels.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.

        Returns
        -------
        ndarray of shape (n_query, n_train)
            Positive = proponent.
        """
        check_is_fitted(self)
        X = check_rows(self, X)
        codes = networks_of(self)[0][0].logits(X).argmax(1).numpy()
        return influence_matrix(self, X, self.classes_[codes])

    def top_k(self, X, y, k=10, *, kind="proponents"):
        """Find the training rows of largest influence, the matrix never formed.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query,)
            Their labels.
        k : int, default=10
            Rows for each query.
        kind : {"proponents", "opponents"}, default="proponents"
            Most positive or most negative influence first.

        Returns
        -------
        TopRows
            A Bunch. indices : ndarray of shape (n_query, k), rows of the training data;
            values : ndarray of shape (n_query, k), their influence.
        """
        check_is_fitted(self)
        X, y = check_labelled_rows(self, X, y)
        if kind not in ("proponents", "opponents"):
            raise ValueError(f"kind must be 'proponents' or 'opponents', got {kind!r}.")
        if not 1 <= k <= min(len(self.X_), self.candidates or len(self.X_)):
            raise ValueError(f"k={k} must be between 1 and the number of rows that are scored.")
        sign = 1 if kind == "proponents" else -1
        indices = np.zeros((len(X), k), dtype=np.intp)
        values = np.zeros((len(X), k), dtype=score_dtype(self))
        best, current = Largest(k), None
        for queries, rows, scores in tiles_of(self, X, y, fill=-sign * np.inf):
            if queries != current:
                best, current = Largest(k), queries
            best.add(rows, sign * scores)
            if rows.stop == len(self.X_):
                indices[queries], values[queries] = best.indices, sign * best.values
        return TopRows(indices=indices, values=values)

    def self_influence(self, X, y):
        """Estimate how much rows matter to themselves, had they been trained on.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Their labels.

        Returns
        -------
        ndarray of shape (n,)
            ``g_i' (C + damping)^-1 g_i / n_train``.
        """
        check_is_fitted(self)
        X, y = check_labelled_rows(self, X, y)
        return self_influences(self, X, y)

    @property
    def self_influence_(self):
        check_is_fitted(self)
        if "_self_influence" not in vars(self):
            weights = open_problem(self, networks_of(self)[0][0]).relative_weights()
            scores = self_influences(self, self.X_, self.y_)
            self._self_influence = scores if weights is None else scores * weights.numpy()
        return self._self_influence

    detect_mislabels = detect_mislabels
    group_influence = group_influence
    loo_effect = loo_effect
    fading = fading
    score = score
    repair = repair
    remove = remove

    @property
    def loss_(self):
        check_is_fitted(self)
        return losses(self, self.X_, self.y_).mean(0)

    def with_damping(self, damping, *, horizon=None):
        """Use another damping, without a new pass through the network except for ``"flow"``.

        Parameters
        ----------
        damping : float, "auto", "horizon" or "flow"
            As the parameter of that name.
        horizon : int, optional
            As the parameter of that name.

        Returns
        -------
        InfluenceScorer
            A fitted one, which shares the gradients of this one except for ``"flow"``;
            ``"ggn"`` and ``"exact"`` only.
        """
        check_is_fitted(self)
        if self.method_ not in ("ggn", "exact"):
            raise ValueError(
                f"with_damping needs method='ggn' or 'exact'; this scorer uses {self.method_!r}."
            )
        horizon = self.horizon if horizon is None else horizon
        return self._redamped(damping, horizon, self.learning_rate)

    def _redamped(self, damping, horizon, learning_rate):
        other = type(self)(**self.get_params(deep=False))
        vars(other).update(vars(self))
        vars(other).pop("_self_influence", None)
        other.damping, other.horizon, other.learning_rate = damping, horizon, learning_rate
        other.settings_ = named_settings(other)
        other.ahead_ = half_way(other)
        moved = other.ahead_ is not None or self.ahead_ is not None
        problems = [problem for problem, _ in linearised(other)]
        other.fits_ = [
            METHODS[self.method_](problem) if moved else redamped(problem, fitted, self.method_)
            for fitted, problem in zip(self.fits_, problems, strict=True)
        ]
        other._read_reports()
        return other
