"""Which training rows made a prediction: the estimator."""

import os
import warnings
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._edited import edited
from skperf.backbone._nets import seed_of
from skperf.backbone._sklearn import (
    DOC_LINK,
    Interval,
    StrOptions,
    check_sample_weight,
    fit_context,
)
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import check_rows, check_targets
from skperf.backbone.interrupts import undisturbed
from skperf.backbone.losses import resolve_loss
from skperf.influence import _actions, _rows, _trust
from skperf.influence._asked import checked, pair, steps_of
from skperf.influence._members import OUTPUTS, Choices, fitted_members, learn, with_damping
from skperf.influence._methods import RECORDS, Method, Nearest, Replay, nearest_rows, resolve_method
from skperf.influence._replay import SMOOTH_ENOUGH, ReplayEnsemble, recording
from skperf.influence._stages import with_weights
from skperf.influence.problem import LOSS_UNIT
from skperf.influence.tiles import budget_in_bytes

_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


@undisturbed
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
    method : str or Method, default="auto"
        ``"ggn"`` row-space Gauss-Newton; ``"ekfac"``, ``"kfac"`` Kronecker-factored;
        ``"exact"`` dense, in double precision; ``"cg"``, ``"lissa"``, ``"arnoldi"`` iterative;
        ``"datainf"``; ``"trak"``; ``"gif"`` generalised influence on few parameters;
        ``"gradient_dot"``; ``"tracin"`` and ``"source"`` over `checkpoints`; ``"replay"`` back
        through the training itself. A record of ``skperf.influence`` sets a method's own
        options, such as ``EKFAC(rank=4)``. ``"auto"`` is exact where a single linear layer of
        at most 5,000 weights trains, else ``"ggn"``.
    loss : "auto", str, nn.Module or callable, default="auto"
        What the network was trained on; ``"auto"`` is what the estimator says.
        ``"cross_entropy"``, ``"binary_cross_entropy"`` (multi-label), ``"squared_error"``, a
        loss module of torch with its weights and smoothing, or a function of (outputs,
        targets) that returns one number a row. Class weights are weights of training rows.
    parameters : str or list of str, default="all"
        ``"all"`` that train, ``"last"`` (the last layer to run) or globs of parameter names.
    output : {"loss", "log_odds", "logit", "margin", "proba"} or callable, default="loss"
        What is influenced. A function of (outputs, targets) returns one number a row, larger
        for better; whatever the output, positive means proponent.
    damping : float, "auto", "horizon" or "flow", default="auto"
        Added to the eigenvalues of the mean loss's curvature, in place of any known penalty.
        ``"auto"``: the penalty that a linear model was trained with; else the weight decay that
        pulls half as hard again as the mean gradient is uncertain. ``"horizon"``:
        ``1 / (learning_rate * horizon)``; ``"flow"``, of ``"ggn"`` and ``"exact"``: instead the
        filter of `horizon` further gradient steps, at the weights that half of them lead to.
    horizon : int, optional
        Number of further training steps whose effect is predicted; ties ``damping="auto"``
        to it.
    learning_rate : float, optional
        Of those steps; by default the estimator's own.
    checkpoints : list of state dicts, modules or estimators, optional
        For ``"tracin"`` and ``"source"``: stages of the same network.
    candidates : int or Nearest, optional
        Score only this many nearest training rows of each query, in the features before the
        last layer; all others get 0. ``Nearest(k, per_class=True)`` takes k of every class.
    gradients : {"auto", "factorised", "reference"}, default="auto"
        ``"auto"`` differentiates row by row only what does not factorise over the rows;
        ``"factorised"`` refuses that; ``"reference"`` takes all row by row, much slower.
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
    target : str or callable, optional
        The first name of `output`.

    Attributes
    ----------
    estimator_ : classifier
        The fitted classifier; of an ensemble, the first.
    estimators_ : list of classifiers
        All members.
    classes_ : ndarray of shape (n_classes,) or None
        Labels; None where targets are no classes.
    method_ : str
        The method in use.
    unit_ : str
        ``"loss"``, ``"relative loss"``, ``"squared gradient"`` or ``"cosine"``.
    damping_ : float or list of float
        What was added to the curvature's eigenvalues, of every layer for Kronecker factors.
    kept_trace_ : float
        Share of the curvature's trace at the outputs that its rows hold by themselves.
    coverage_ : float
        Share of the parameters that train taken into account.
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
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": "no_validation",
        "method": [StrOptions({"auto", *RECORDS}), Method],
        "loss": "no_validation",
        "parameters": [str, list, tuple],
        "output": [StrOptions(set(OUTPUTS)), callable],
        "damping": [
            Interval(Real, 0, None, closed="neither"),
            StrOptions({"auto", "horizon", "flow"}),
        ],
        "horizon": [Interval(Integral, 1, None, closed="left"), None],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), "array-like", None],
        "checkpoints": [list, tuple, None],
        "candidates": [Interval(Integral, 1, None, closed="left"), Nearest, None],
        "gradients": [StrOptions({"auto", "factorised", "reference"})],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "memory_budget": [str, Interval(Real, 0, None, closed="neither")],
        "storage": [str, os.PathLike, None],
        "random_state": ["random_state"],
        "n_jobs": [Integral, None],
        "verbose": ["verbose"],
        "target": [StrOptions(set(OUTPUTS)), callable, None],
    }

    def __init__(
        self,
        estimator=None,
        *,
        method="auto",
        loss="auto",
        parameters="all",
        output="loss",
        damping="auto",
        horizon=None,
        learning_rate=None,
        checkpoints=None,
        candidates=None,
        gradients="auto",
        batch_size=None,
        memory_budget="2GB",
        storage=None,
        random_state=None,
        n_jobs=None,
        verbose=0,
        target=None,
    ):
        self.estimator = estimator
        self.method = method
        self.loss = loss
        self.parameters = parameters
        self.output = output
        self.damping = damping
        self.horizon = horizon
        self.learning_rate = learning_rate
        self.checkpoints = checkpoints
        self.candidates = candidates
        self.gradients = gradients
        self.batch_size = batch_size
        self.memory_budget = memory_budget
        self.storage = storage
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.target = target

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X, y, sample_weight=None):
        """Remember what is needed of the training rows.

        Parameters
        ----------
        X : array-like of shape (n_train, ...)
            Training rows.
        y : array-like of shape (n_train, ...)
            Their labels, or targets as the loss takes them.
        sample_weight : array-like of shape (n_train,), optional
            Weights of the rows in the mean loss.

        Returns
        -------
        InfluenceScorer
            Itself.
        """
        with unchanged_on_error(self):
            rows, y = check_targets(self, X, y, reset=True)
            weights = None
            if sample_weight is not None:
                sample_weight = check_sample_weight(
                    sample_weight, np.empty((len(rows), 1)), dtype=np.float64
                )
                weights = torch.as_tensor(sample_weight)
            choices = self._choices()
            method = choices.method
            estimator = self.estimator
            if isinstance(method, Replay):
                estimator = recording(estimator, method)
            fitted = fitted_members(
                estimator,
                rows,
                y,
                sample_weight=sample_weight,
                random_state=self.random_state,
                loss=choices.loss,
            )
            self._show(*learn(fitted, rows, y, weights, choices))
            self.X_, self.y_, self.sample_weight_ = rows, y, sample_weight
            self._n_features_out = len(rows)
        return self

    def _choices(self):
        output = self.output if self.target is None else self.target
        if self.target is not None and self.output not in ("loss", self.target):
            raise ValueError("target is the first name of output: give one of them.")
        budget_in_bytes(self.memory_budget)
        known = isinstance(self.loss, str) and self.loss == "auto"
        given = self.get_params(deep=False) | {
            "method": resolve_method(self.method),
            "output": output,
            "loss": None if known else resolve_loss(self.loss),
            "candidates": nearest_rows(self.candidates),
            "seed": 0 if self.random_state is None else seed_of(self.random_state),
        }
        return Choices(**{field.name: given[field.name] for field in fields(Choices)})

    def _show(self, learned, network):
        """Keep what was learned, and tell of it."""
        self._learned = learned
        first = learned.stages[0].fit
        self.estimators_ = list(learned.estimators)
        self.estimator_ = learned.estimators[0]
        self.method_ = learned.method.name
        self.unit_ = first.unit
        self.damping_ = first.report.get("damping")
        self.kept_trace_ = first.report.get("kept_trace", 1.0)
        self.coverage_ = learned.coverage(network)
        self.classes_ = network.classes
        for name in ("_self_influence", "_smoothness"):
            vars(self).pop(name, None)

    def _asked(self, X, y):
        """Open what scores need, for rows and their targets."""
        rows, y = self._queries(X, y)
        ensemble = self._learned.opened()
        return ensemble, rows, ensemble.first.network.targets(y).cpu()

    def _queries(self, X, y):
        """Validate rows and their targets, which have as many axes as those of training."""
        check_is_fitted(self)
        rows, y = check_targets(self, X, y)
        if np.ndim(y) != np.ndim(self.y_):
            raise ValueError(
                f"y has {np.ndim(y)} axes, and the targets that were trained on {np.ndim(self.y_)}."
            )
        return rows, y

    def _pair(self, given, name):
        return None if given is None else self._queries(*pair(given, name))

    def influence(self, X, y, *, out=None, aggregate=None, rows=None, tokens=None, change="weight"):
        """Estimate the influence of every training row on every query.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.
        out : ndarray or memmap of shape (n_query, n_train), optional
            Written tile by tile, and returned.
        aggregate : {"sum", "mean"}, optional
            Over the queries; the result is then (n_train,).
        rows : tuple (X, y), optional
            Rows that were not trained on, in place of the training rows: how much the loss on
            a query would fall if they were added, to first order.
        tokens : {"queries", "rows"}, optional
            Leave out the sum over the tokens of queries, (n_query, length, n_train), or of
            training rows, (n_query, n_train, length).
        change : {"weight", "label"}, default="weight"
            With ``method="replay"``, "label" asks how the loss on a query would change if a
            training row had another label: (n_query, n_train, n_classes).

        Returns
        -------
        ndarray of shape (n_query, n_train) or (n_train,)
            Positive = proponent.
        """
        checked("influence", aggregate=aggregate, tokens=tokens, change=change)
        if change == "label":
            return self._through_the_run(X, y, "change='label'", "labels")
        if (rows is not None or tokens) and (
            out is not None or aggregate or (rows is not None and tokens)
        ):
            raise ValueError("rows and tokens go without out and aggregate, and one at a time.")
        ensemble, X, targets = self._asked(X, y)
        if rows is not None:
            if self._learned.method.name == "trak":
                raise ValueError("rows= has no meaning for method='trak', whose rows are weighted.")
            X_new, y_new = self._pair(rows, "rows")
            labels = ensemble.first.network.targets(y_new).cpu()
            return ensemble.of_others(X, targets, X_new, labels)
        if tokens is not None:
            return ensemble.by_token(X, targets, tokens)
        return ensemble.matrix(X, targets, out=out, aggregate=aggregate)

    def _through_the_run(self, X, y, what, question):
        ensemble, rows, targets = self._asked(X, y)
        if not isinstance(ensemble, ReplayEnsemble):
            raise ValueError(f"{what} needs method='replay', got {self.method_!r}.")
        return getattr(ensemble, question)(rows, targets)

    def hyperparameter_gradient(self, X, y):
        """Differentiate the loss on queries by the settings of the training run.

        Only with ``method="replay"``.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.

        Returns
        -------
        dict of ndarray of shape (n_query,)
            Derivatives by ``lr`` (of which a schedule takes multiples) and ``weight_decay``, by
            ``lr.0``, ``lr.1`` and so on where groups of parameters have their own.
        """
        return self._through_the_run(X, y, "hyperparameter_gradient", "hyperparameters")

    @property
    def smoothness_(self):
        check_is_fitted(self)
        ensemble = self._learned.opened()
        if not isinstance(ensemble, ReplayEnsemble):
            raise AttributeError(f"smoothness_ belongs to method='replay', not {self.method_!r}.")
        if "_smoothness" not in vars(self):
            self._smoothness = ensemble.smoothness(self._learned.choices.seed)
            if self._smoothness < SMOOTH_ENOUGH:
                warnings.warn(
                    f"the run is rough: smoothness_ is {self._smoothness:.3f}, below "
                    f"{SMOOTH_ENOUGH}, and single scores say little of what training again would "
                    "do. A smaller rate, a warm-up, larger batches, GELU for ReLU or fewer "
                    "epochs make it smoother.",
                    UserWarning,
                    stacklevel=2,
                )
        return self._smoothness

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
        network = self._learned.network()
        if network.loss.kind not in ("classes", "labels"):
            raise ValueError(
                f"transform scores at predicted labels, and the loss is {network.loss.name}, "
                "which is flat at its own predictions: use influence(X, y)."
            )
        outputs = network.logits(X)
        ensemble = self._learned.opened()
        if network.loss.kind == "labels":
            return ensemble.matrix(X, (outputs > 0).to(outputs))
        axis = 1 if outputs.ndim == 2 or self.y_.shape[1:] == outputs.shape[2:] else -1
        return ensemble.matrix(X, outputs.argmax(axis))

    def top_k(self, X, y, k=10, *, kind="proponents"):
        """Find the training rows of largest influence, the matrix never formed.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.
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
        checked("top_k", k=k, kind=kind)
        ensemble, X, targets = self._asked(X, y)
        if k > ensemble.n_scored:
            raise ValueError(f"k={k} exceeds the {ensemble.n_scored} rows that are scored.")
        sign = 1 if kind == "proponents" else -1
        indices, values = ensemble.top(X, targets, int(k), sign)
        return _rows.TopRows(indices=indices, values=values)

    def self_influence(self, X, y):
        """Estimate how much rows matter to themselves, had they been trained on.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n, ...)
            Their labels or targets.

        Returns
        -------
        ndarray of shape (n,)
            ``g_i' (C + damping)^-1 g_i / n_train``.
        """
        ensemble, X, targets = self._asked(X, y)
        return ensemble.self_influences(X, targets)

    @property
    def self_influence_(self):
        check_is_fitted(self)
        if "_self_influence" not in vars(self):
            ensemble = self._learned.opened()
            problem = ensemble.first
            scores, weights = (
                ensemble.self_influences(problem.X, problem.targets),
                problem.relative_weights(),
            )
            if weights is not None:
                scores = (scores * weights.numpy()).astype(scores.dtype)
            self._self_influence = scores
        return self._self_influence

    @property
    def loss_(self):
        check_is_fitted(self)
        ensemble = self._learned.opened()
        return ensemble.losses(ensemble.first.X, ensemble.first.targets).mean(0)

    def detect_mislabels(self, class_aware=False, *, reference=None):
        """Score every training row by how suspicious its label is.

        Print the AUROC of `loss_`, the plain loss of each row, beside that of these scores: it
        is a strong baseline.

        Parameters
        ----------
        class_aware : bool, default=False
            By default the loss that the row would have had it been left out of training: its
            loss and its influence on itself. Methods and outputs whose scores are no losses
            give the influence on itself alone. With True, minus the smallest of the row's mean
            influences on the reference rows of each class: a row that hurts some class.
        reference : tuple (X, y), optional
            Rows whose labels are known to be right, for `class_aware`; by default the training
            rows themselves.

        Returns
        -------
        ndarray of shape (n_train,)
            Higher = more suspicious.

        References
        ----------
        Nguyen-Duc et al., "Class based Influence Functions for Error Detection" (ACL 2023).
        """
        check_is_fitted(self)
        checked("detect_mislabels", class_aware=class_aware)
        if reference is not None and not class_aware:
            raise ValueError("reference rows are used with class_aware=True.")
        ensemble = self._learned.opened()
        if not class_aware:
            is_loss = self.unit_ == LOSS_UNIT and ensemble.about_loss
            return self.self_influence_ + (self.loss_ if is_loss else 0)
        X, targets = ensemble.first.X, ensemble.first.targets
        if reference is not None:
            ensemble, X, targets = self._asked(*pair(reference, "reference"))
        if targets.ndim > 1 or targets.is_floating_point():
            raise ValueError("class_aware needs class labels.")
        return -_rows.class_aware(ensemble, X, targets)

    def group_influence(self, groups, X, y, *, order=1):
        """Estimate the influence of leaving out groups of training rows together.

        Parameters
        ----------
        groups : list of array-like, or array-like of shape (n_train,)
            Row indices or boolean masks, one a group; or the group number of every training
            row, where -1 belongs to none.
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.
        order : {1, 2}, default=1
            1 adds the rows' influences. 2 also takes out the rows' share of the curvature (a
            Newton step on the rest), which matters for groups of similar rows.

        Returns
        -------
        ndarray of shape (n_query, n_groups)
            Rise of the output's loss, in `unit_`.
        """
        check_is_fitted(self)
        checked("group_influence", order=order)
        members = _rows.members_of_groups(groups, len(self.X_))
        if order == 2 and self.unit_ != LOSS_UNIT:
            raise ValueError(f"order=2 needs a curvature method; {self.method_!r} has none.")
        ensemble, X, targets = self._asked(X, y)
        result = ensemble.groups(X, targets, members)
        if order == 2:
            for column, rows in enumerate(members):
                result[:, column] += _rows.second_order(ensemble, X, targets, rows)
        return result

    def loo_effect(self, X, y):
        """Estimate how much the output's loss rises when single training rows are left out.

        Where the parameters that train are one linear layer, each row's own share of the
        curvature is taken out of the inverse, Newton steps lead to the weights without the row,
        and the queries are evaluated there: leave-one-out itself. (One step is all for class
        weights balanced anew and for very many rows.) With ``damping="auto"`` the penalty is then
        the one the model was trained with, where it is known. Elsewhere this is :meth:`influence`.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.

        Returns
        -------
        ndarray of shape (n_query, n_train)
            In the unit of the output; positive = proponent.

        Raises
        ------
        ValueError
            If the method is first-order and has no such unit.
        """
        X, y = self._queries(X, y)
        effects = [_rows.head_effects(self._learned, i, X, y) for i in range(len(self.estimators_))]
        if all(effect is not None for effect in effects):
            mean = np.mean(effects, axis=0, dtype=effects[0].dtype)
            return mean * self._learned.opened().candidates_of(X)
        if self.unit_ != LOSS_UNIT:
            raise ValueError(
                f"method={self.method_!r} has no unit of loss; use a curvature method such as "
                "'ggn'."
            )
        return self.influence(X, y)

    def radius_effect(self, X, y, *, radius=0.0, norm=np.inf):
        """Estimate how the queries' loss changes with the strength of adversarial training.

        The derivative of the loss on each query by the radius of the attack that every
        training row is trained under, at that radius.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.
        radius : float, default=0
            Radius that the network was trained at.
        norm : {2, inf}, default=inf
            In which the radius is measured.

        Returns
        -------
        ndarray of shape (n_query,)
            Positive = the loss rises with the radius.

        References
        ----------
        Deng, Dwork, Wang, Zhang, "Interpreting Robust Optimization via Adversarial Influence
        Functions" (ICML 2020).
        """
        checked("radius_effect", radius=radius, norm=norm)
        ensemble, X, targets = self._asked(X, y)
        return _rows.radius_effects(ensemble, X, targets, float(radius), float(norm))

    def fading(
        self,
        X,
        y,
        *,
        steps=_STEPS,
        n_train=64,
        learning_rate=None,
        batch_size=64,
        weight_decay=None,
        least=0.8,
    ):
        """Hold predicted against actual effects of further training.

        From the fitted weights the network is trained on with plain gradient steps, once with
        all rows and once for each of some training rows with that row's weight zero wherever
        it is used, in the same order of batches. The actual effect is the difference between
        two such runs.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.
        steps : sequence of int, default=(1, 2, 5, ..., 500)
            When to compare. With a damping tied to a horizon, each is its own horizon.
        n_train : int, default=64
            Training rows, drawn at random, that are left out in turn.
        learning_rate : float, optional
            Step size; by default the scorer's, else the estimator's, else 0.03.
        batch_size : int, default=64
            Rows a step. A row that has not been in a batch yet has no effect yet: the first
            steps of small batches say little.
        weight_decay : float, optional
            By default the estimator's.
        least : float, default=0.8
            Correlation that still counts as usable.

        Returns
        -------
        Bunch
            Entries:
            steps : ndarray of shape (n_steps,);
            pearson, spearman : ndarray of shape (n_steps,), mean over queries of the
            correlation across left-out rows;
            slope : ndarray of shape (n_steps,), actual over predicted effect;
            usable_horizon : int, the last step before `pearson` falls below `least`; 0 where
            already the first does;
            rows : ndarray of shape (n_train,), which rows were left out;
            predicted, actual : ndarray of shape (n_steps, n_query, n_train).
        """
        options = checked(
            "fading",
            n_train=n_train,
            learning_rate=learning_rate,
            batch_size=batch_size,
            weight_decay=weight_decay,
            least=least,
        )
        X, y = self._queries(X, y)
        return _trust.fading_curve(self._learned, X, y, steps=steps_of(steps), **options)

    def diagnose(self, X, y, *, n_train=16, steps=(1, 5, 20, 50)):
        """Measure on this network what influence functions assume.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.
        n_train : int, default=16
            Training rows that are left out in turn.
        steps : sequence of int, default=(1, 5, 20, 50)
            Further training steps, for the fading curve.

        Returns
        -------
        Bunch
            One entry an assumption, each a Bunch of value, threshold, verdict and advice:
            convexity (size of negative curvature beside the largest), stability_of_numbers
            (change with batch size, damping and precision), trajectory (how far the network is
            from rest), divergence (the fading curve), first_order (effect of half a row beside
            that of a whole one) and, of an ensemble, stability (what the mean over training
            seeds is worth).
        """
        checked("diagnose", n_train=n_train)
        X, y = self._queries(X, y)
        return _trust.diagnosis(self._learned, X, y, n_train=n_train, steps=steps_of(steps))

    def score(self, X, y, *, n_subsets=50, fraction=0.5, recipe=None, drop=None):
        """Compute the linear datamodeling score from subset retraining.

        The network is retrained on random subsets of the training rows; the summed influences
        of a subset's rows are correlated, for every query, with minus the retrained loss.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Queries.
        y : array-like of shape (n_query, ...)
            Their labels or targets.
        n_subsets : int, default=50
            Retrainings.
        fraction : float, default=0.5
            Share of the rows in a subset.
        recipe : Recipe, optional
            Train fresh copies of the network this way, all at once. By default the estimator's
            own training is repeated: at once where it is a network of ours without dropout and
            normalisation, by refits otherwise, spread over `n_jobs`. A bare module has no
            training to repeat and gets ``Recipe()``.
        drop : float, optional
            With ``method="replay"``, the share of rows left out of the very same run (its
            initial weights and batches), in place of fresh trainings on subsets.

        Returns
        -------
        float
            Mean over queries of a Spearman correlation; 1 is perfect.
        """
        checked("score", drop=drop, n_subsets=n_subsets, fraction=fraction, recipe=recipe)
        if drop is not None:
            ensemble, X, targets = self._asked(X, y)
            if not isinstance(ensemble, ReplayEnsemble):
                raise ValueError(f"drop= needs method='replay', got {self.method_!r}.")
            seed = self._learned.choices.seed
            return ensemble.same_seed_score(X, targets, drop=drop, n_subsets=n_subsets, seed=seed)
        X, y = self._queries(X, y)
        return _trust.datamodeling_score(
            self._learned, X, y, n_subsets=n_subsets, fraction=fraction, recipe=recipe
        )

    def repair(
        self,
        X,
        y,
        *,
        k=50,
        how="descend",
        max_steps=50,
        guard=None,
        max_drop=0.01,
        learning_rate=0.1,
        precondition="auto",
        baselines=True,
    ):
        """Correct predictions by a few steps on the training rows that matter to them.

        The rows are those that would matter most if they were not fitted yet, each counting by
        how much; the steps raise the odds of their labels, which never saturate, while the loss
        of 500 training rows is held. Neither the queries nor their labels are trained on. Of
        the paths that flip the predictions, the one that moves the parameters least is kept.

        Parameters
        ----------
        X : array-like of shape (n_query, ...)
            Mis-predicted rows.
        y : array-like of shape (n_query, ...)
            Labels they should get.
        k : int, default=50
            Training rows to train on.
        how : {"descend", "ascend", "relabel"}, default="descend"
            Raise the odds of the strongest proponents; lower those of the strongest opponents;
            or raise those of the opponents at the labels that the network, without them, would
            give them: those predicted, or next best where label and prediction agree.
        max_steps : int, default=50
            Most gradient steps.
        guard : tuple (X, y), optional
            Rows whose accuracy may fall by at most `max_drop`; by default half of the training
            rows that are not trained on, 5,000 of them at most.
        max_drop : float, default=0.01
            How far.
        learning_rate : float, default=0.1
            First step size; smaller ones are tried as well.
        precondition : "auto" or bool, default="auto"
            Step along ``(C + damping)^-1 g`` in place of the gradient g, which spares what the
            training rows fix; by default where ``method="ggn"`` has the curvature at hand.
        baselines : bool, default=True
            Also report what the same steps achieve on k random rows of the queries' classes,
            on the k rows nearest in features, and on the queries themselves (more than which
            nothing can do); and plain steps on random rows.

        Returns
        -------
        EditedClassifier
            ``edit_report_`` holds ``flipped`` (one a query), ``n_steps``, ``displacement``,
            ``guard_before``, ``guard_after`` (which the path was stopped by),
            ``judged_before``, ``judged_after`` (training rows that served no choice; NaN where
            nearly all are trained on), ``indices`` (rows trained on), ``share_of_path`` (below
            1 where the guard stopped it) and ``baselines``.
        """
        options = checked(
            "repair",
            k=k,
            how=how,
            max_steps=max_steps,
            max_drop=max_drop,
            learning_rate=learning_rate,
            precondition=precondition,
            baselines=baselines,
        )
        X, y = self._queries(X, y)
        guard = self._pair(guard, "guard")
        network, report = _actions.repaired(self._learned, X, y, guard=guard, **options)
        return self._edited(network, report)

    def remove(
        self,
        indices=None,
        *,
        class_=None,
        how="gif",
        select=None,
        ratio=None,
        ridge=None,
        guard=None,
        max_drop=0.01,
        max_iter=50,
        baseline=True,
    ):
        """Forget training rows, or a class.

        The direction is computed on the training rows; how far to go along it is chosen on
        held-out rows: for a class, where the harmonic mean of its error and of the accuracy on
        the others is best; for rows, the whole way, or as far as the guard allows. All
        accuracies in the report are of other held-out rows, which chose nothing.

        Parameters
        ----------
        indices : array-like of int or bool, optional
            Training rows to forget.
        class_ : label, optional
            Class to forget, in place of rows.
        how : {"gif", "freeze", "project", "plain", "ascent"}, default="gif"
            Generalised influence on few parameters; influence with the others frozen;
            projected to them; influence on all parameters; gradient ascent on them, the
            baseline.
        select : {"gradient", "output", "sam", "random"}, optional
            In place of that of the scorer's ``GIF``.
        ratio : float, optional
            In place of that of the scorer's ``GIF``.
        ridge : float, optional
            In place of that of the scorer's ``GIF``.
        guard : tuple (X, y), optional
            Held-out rows, half of which choose and half of which judge; by default a fifth of
            the training rows that are kept, and for a class of its rows too, which then take
            no part in the direction.
        max_drop : float, default=0.01
            How much accuracy on the rows that choose may be lost when rows are removed; where
            targets are no labels, by how much their mean loss may rise. Minus the loss then
            stands for the accuracy in the report.
        max_iter : int, default=50
            Iterations of the solver.
        baseline : bool, default=True
            Also report restricted gradient ascent.

        Returns
        -------
        EditedClassifier
            ``edit_report_`` holds ``removed_accuracy_before``/``_after``, ``guard_before``/
            ``guard_after``, ``f1``, ``scale``, ``share_changed`` (of the parameters),
            ``n_removed``, ``n_judged`` and ``baseline`` (the same for restricted ascent).
        """
        check_is_fitted(self)
        if (indices is None) == (class_ is None):
            raise ValueError("give either indices or class_, not both and not neither.")
        given = checked("remove", select=select, ratio=ratio, ridge=ridge)
        checked("remove", how=how, max_drop=max_drop, max_iter=max_iter, baseline=baseline)
        task = _actions.removal(
            self._learned,
            _actions.removed_rows(self._learned, indices, class_),
            class_,
            self._pair(guard, "guard"),
            max_drop=max_drop,
            max_iter=max_iter,
            given=given,
        )
        parameters, report = task.run(how)
        if baseline and how != "ascent":
            report["baseline"] = task.run("ascent")[1]
        network = with_weights(task.problem.network, parameters)
        return self._edited(network, {"action": f"remove:{how}", **report})

    def _edited(self, network, report):
        width = getattr(self, "n_features_in_", None)
        names = getattr(self, "feature_names_in_", None)
        return edited(self.estimator_, network, report, width=width, names=names)

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
        checked("with_damping", damping=damping, horizon=horizon)
        horizon = self._learned.choices.horizon if horizon is None else horizon
        other = type(self)(**self.get_params(deep=False))
        vars(other).update(vars(self))
        other.damping, other.horizon = damping, horizon
        learned = with_damping(self._learned, damping, horizon)
        other._show(learned, learned.network())
        return other
