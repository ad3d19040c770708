"""Methods of InfluenceScorer about single training rows and groups of them."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.backbone.network import two_logits
from skperf.backbone.outputs import loss, resolve_output
from skperf.influence._members import networks_of, open_problem, weight_decay_of
from skperf.influence._scoring import (
    influence_matrix,
    open_members,
    query_gradients,
    score_dtype,
    tiles_of,
)
from skperf.influence.damping import resolve_damping
from skperf.influence.gradients import inner
from skperf.influence.heads import leave_one_out_steps, linear_head_hessian
from skperf.influence.output_rows import softmax_rows
from skperf.influence.problem import LOSS_UNIT, slopes


def losses(scorer, X, y):
    """Loss of each row under each member: X (n, ...), y (n,) -> (n_members, n)."""
    networks = [network for network, _ in networks_of(scorer)]
    return np.stack([loss(n.logits(X), n.codes(y).cpu()).numpy() for n in networks])


def detect_mislabels(self, class_aware=False):
    """Score every training row by how suspicious its label is.

    Print the AUROC of `loss_`, the plain loss of each row, beside that of these scores: it is
    a strong baseline.

    Parameters
    ----------
    class_aware : bool, default=False
        By default the loss that the row would have had it been left out of training: its loss
        and its influence on itself. Methods and targets whose scores are no losses give the
        influence on itself alone. With True, minus the smallest of the row's mean influences
        on the training rows of each class: a row that hurts some class.

    Returns
    -------
    ndarray of shape (n_train,)
        Higher = more suspicious.

    References
    ----------
    Nguyen-Duc et al., "Class based Influence Functions for Error Detection" (ACL 2023).
    """
    check_is_fitted(self)
    if not class_aware:
        is_loss = self.unit_ == LOSS_UNIT and self.target == "loss"
        return self.self_influence_ + (self.loss_ if is_loss else 0)
    means = [
        influence_matrix(
            self, self.X_[self.y_ == label], self.y_[self.y_ == label], aggregate="mean"
        )
        for label in np.unique(self.y_)
    ]
    return -np.min(means, axis=0)


def group_influence(self, groups, X, y, *, order=1):
    """Estimate the influence of leaving out groups of training rows together.

    Parameters
    ----------
    groups : list of array-like, or array-like of shape (n_train,)
        Row indices or boolean masks, one a group; or the group number of every training row,
        where -1 belongs to none.
    X : array-like of shape (n_query, ...)
        Queries.
    y : array-like of shape (n_query,)
        Their labels.
    order : {1, 2}, default=1
        1 adds the rows' influences. 2 also takes out the rows' share of the curvature (a
        Newton step on the rest), which matters for groups of similar rows.

    Returns
    -------
    ndarray of shape (n_query, n_groups)
        Rise of the target's loss, in `unit_`.
    """
    check_is_fitted(self)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    members = _members_of_groups(groups, len(self.X_))
    X, y = check_labelled_rows(self, X, y)
    membership = np.zeros((len(self.X_), len(members)), dtype=score_dtype(self))
    for column, rows in enumerate(members):
        membership[rows, column] = 1
    result = np.zeros((len(X), len(members)), dtype=membership.dtype)
    for queries, rows, scores in tiles_of(self, X, y):
        result[queries] += scores @ membership[rows]
    if order == 2:
        if self.unit_ != LOSS_UNIT:
            raise ValueError(f"order=2 needs a curvature method; {self.method_!r} has none.")
        for column, rows in enumerate(members):
            result[:, column] += _second_order(self, X, y, rows)
    return result


def _members_of_groups(groups, n):
    if not isinstance(groups, list | tuple) or (len(groups) == n and np.ndim(groups[0]) == 0):
        labels = np.asarray(groups)
        if labels.shape != (n,):
            raise ValueError(
                f"groups must be a list of row indices or one number for each of {n} rows."
            )
        return [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    members = []
    for group in groups:
        group = np.asarray(group)
        rows = np.flatnonzero(group) if group.dtype == bool else group.astype(int)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= n:
            raise ValueError(f"a group is empty or holds rows outside 0..{n - 1}.")
        members.append(np.unique(rows))
    return members


def _second_order(scorer, X, y, rows):
    """Add what taking the group's own curvature out of the inverse changes."""
    output = resolve_output(scorer.target, argument="target")
    total = np.zeros(len(X))
    for problem, fitted, weight in open_members(scorer):
        n = problem.n_train
        index = torch.as_tensor(rows)
        shares = problem.shares[index]
        logits = problem.network.logits(scorer.X_[rows])
        own = softmax_rows(logits, shares / shares.sum(), kept_trace=1.0)
        cotangents = own.cotangents * shares.sum().sqrt().to(own.cotangents)
        curvature = problem.gather(scorer.X_[rows], cotangents, own.examples)
        gradients = problem.gradients(loss, scorer.X_[rows], problem.codes[index], shares * n)
        queries = query_gradients(scorer, problem, output, X, y)

        def bilinear(left, right, problem=problem, fitted=fitted, n=n):
            terms, stored = fitted.lift(problem, left), fitted.lift.store(problem, right)
            return inner([f for _, f in terms], [stored[i] for i, _ in terms]) * fitted.scale * n

        reached = bilinear(curvature, curvature).double()
        moved = bilinear(curvature, gradients).double().sum(1) / n
        rest = torch.eye(len(reached), dtype=torch.float64) - (reached + reached.T) / 2
        correction = bilinear(queries, curvature).double() @ torch.linalg.solve(rest, moved)
        total += weight * correction.numpy()
    return total


def loo_effect(self, X, y):
    """Estimate how much the target's loss rises when single training rows are left out.

    Where the parameters taken into account are one linear layer that gives the logits, each
    row's own share of the curvature is taken out of the inverse and the queries are evaluated
    at the resulting weights: one exact Newton step of leave-one-out training. With
    ``damping="auto"`` the penalty is then the one the model was trained with, where it is
    known. Elsewhere this is :meth:`influence`.

    Parameters
    ----------
    X : array-like of shape (n_query, ...)
        Queries.
    y : array-like of shape (n_query,)
        Their labels.

    Returns
    -------
    ndarray of shape (n_query, n_train)
        In the unit of the target; positive = proponent.

    Raises
    ------
    ValueError
        If the method is first-order and has no such unit.
    """
    check_is_fitted(self)
    X, y = check_labelled_rows(self, X, y)
    networks = [network for network, _ in networks_of(self)]
    effects = [_head_effects(self, i, network, X, y) for i, network in enumerate(networks)]
    if all(effect is not None for effect in effects):
        return np.mean(effects, axis=0)
    if self.unit_ != LOSS_UNIT:
        raise ValueError(
            f"method={self.method_!r} has no unit of loss; use a curvature method such as 'ggn'."
        )
    return influence_matrix(self, X, y)


def _head_effects(scorer, i, network, X, y):
    problem = open_problem(scorer, network)
    if len(problem.layers) != 1 or not isinstance(problem.layers[0].module, torch.nn.Linear):
        return None
    layer, readout = problem.layers[0], network.readout
    if readout not in (None, two_logits) or not layer.weight:
        return None
    train = _features(problem, scorer.X_)
    queries = _features(problem, X)
    weights = _weights(layer).double()
    if train.ndim != 2 or not _gives_logits(network, queries, weights, X):
        return None
    to_logits = torch.eye(len(weights), dtype=torch.float64)
    if readout is two_logits:
        to_logits = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    logits = train @ weights.T @ to_logits.T
    shares = problem.shares
    p = logits.softmax(1)
    hessians = shares[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    curvatures = to_logits.T @ hessians @ to_logits
    slope = slopes(loss, logits, problem.codes) * shares[:, None] @ to_logits
    ridge = _ridge(scorer, i, problem, train.shape[1], layer.bias)
    hessian = linear_head_hessian(train, curvatures, ridge)
    steps = leave_one_out_steps(train, slope, curvatures, hessian)
    output = resolve_output(scorer.target, argument="target")
    sign = 1.0 if scorer.target == "loss" else -1.0
    codes = network.codes(y).cpu()
    before_logits = queries @ weights.T @ to_logits.T
    before = output(before_logits, codes)
    effects = []
    for step in steps:
        after = output(before_logits + queries @ step.T @ to_logits.T, codes)
        effects.append(sign * (after - before))
    return torch.stack(effects, 1).numpy()


def _features(problem, X):
    """Read the inputs of the only layer, a one appended for its bias."""
    zero = torch.zeros(len(X), problem.network.n_classes)
    factor = problem.gather(X, zero)[0]
    return getattr(factor, "inputs", torch.zeros(0)).double().cpu()


def _weights(layer):
    weight = layer.module.weight.detach().cpu()
    if not layer.bias:
        return weight
    return torch.cat([weight, layer.module.bias.detach().cpu()[:, None]], 1)


def _gives_logits(network, features, weights, X):
    if features.shape[-1] != weights.shape[1]:
        return False
    outputs = features @ weights.T
    logits = outputs if network.readout is None else network.readout(outputs)
    actual = network.logits(X).double()
    return logits.shape == actual.shape and torch.allclose(logits, actual, rtol=1e-3, atol=1e-3)


def _ridge(scorer, i, problem, d, has_bias):
    """Penalty of each feature, on the scale of the mean loss."""
    ridge = torch.zeros(d, dtype=torch.float64)
    fitted = scorer.estimators_[i]
    inner_estimator = getattr(fitted, "estimator", fitted)
    if scorer.damping != "auto":
        return ridge + resolve_damping(problem)
    if isinstance(inner_estimator, LogisticRegression):
        total = len(scorer.X_) if scorer.sample_weight_ is None else scorer.sample_weight_.sum()
        strength = 0.0 if np.isinf(inner_estimator.C) else 1 / (inner_estimator.C * total)
        ridge[: d - 1 if has_bias else d] = strength
        return ridge
    decay = weight_decay_of(fitted)
    return ridge + (decay if decay > 0 else resolve_damping(problem))
