"""Methods of InfluenceScorer that change a copy of the network."""

from dataclasses import replace

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._edited import edited
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.backbone.modes import untouched
from skperf.backbone.outputs import loss
from skperf.backbone.parameters import flatten, unflatten
from skperf.influence._members import networks_of, open_problem
from skperf.influence._scoring import influence_matrix, open_members
from skperf.influence.captures import recording
from skperf.influence.curvature import RowSpace
from skperf.influence.damping import resolve_damping
from skperf.influence.generalized import REMOVALS, removal_update, row_product
from skperf.influence.inverses import chosen_parameters
from skperf.influence.layers import from_vectors, to_vectors
from skperf.influence.problem import curvature_rows
from skperf.influence.repair import (
    accuracy,
    best_scale,
    distance,
    harmonic_mean,
    largest_allowed,
    moved,
    predicted_as,
    smallest_flip,
)

_SIGNS = {"descend": -1.0, "ascend": 1.0, "relabel": -1.0}
_MOST_GUARDS = 5000
_SCALES = tuple(2.0**i for i in range(-10, 4))


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

    Of the paths that flip the predictions, the one that moves the parameters least is kept.

    Parameters
    ----------
    X : array-like of shape (n_query, ...)
        Mis-predicted rows.
    y : array-like of shape (n_query,)
        Labels they should get.
    k : int, default=50
        Training rows to train on.
    how : {"descend", "ascend", "relabel"}, default="descend"
        Descend on the loss of the strongest proponents; ascend on that of the strongest
        opponents; or descend on the opponents' loss at the labels that the network, without
        them, would give them: those predicted, or next best where label and prediction agree.
    max_steps : int, default=50
        Most gradient steps.
    guard : tuple (X, y), optional
        Rows whose accuracy may fall by at most `max_drop`; by default the training rows, 5,000
        of them drawn at random if there are more.
    max_drop : float, default=0.01
        How far.
    learning_rate : float, default=0.1
        First step size; smaller ones are tried as well.
    precondition : "auto" or bool, default="auto"
        Step along ``(C + damping)^-1 g`` in place of the gradient g, which spares what the
        training rows fix; by default where ``method="ggn"`` has the curvature at hand.
    baselines : bool, default=True
        Also report what the same steps on k random rows of the queries' classes achieve, plain
        steps on those, and plain steps on k random rows.

    Returns
    -------
    EditedClassifier
        ``edit_report_`` holds ``flipped`` (one a query), ``n_steps``, ``displacement``,
        ``guard_before``, ``guard_after``, ``indices`` (rows trained on), ``share_of_path``
        (below 1 where the guard stopped it) and ``baselines``.
    """
    check_is_fitted(self)
    X, y = check_labelled_rows(self, X, y)
    if how not in _SIGNS:
        raise ValueError(f"how must be one of {sorted(_SIGNS)}, got {how!r}.")
    k = min(k, len(self.X_))
    guard = _training_guard(self) if guard is None else check_labelled_rows(self, *guard)
    total = influence_matrix(self, X, y, aggregate="sum")
    chosen = np.argsort(-total if how == "descend" else total, kind="stable")[:k]
    network = networks_of(self)[0][0].copy()
    start = {name: p.detach() for name, p in open_problem(self, network).parameters.items()}
    queries = network.tensor(X), network.codes(y)
    guard_rows = network.tensor(guard[0]), network.codes(guard[1])
    options = {"learning_rate": learning_rate, "max_steps": max_steps}
    plain = dict(options)
    if precondition is True or (precondition == "auto" and self.method_ == "ggn"):
        options["precondition"] = _natural(self)
    with untouched(network.module):
        limits = {"before": accuracy(network, start, guard_rows), "max_drop": max_drop}
        rows = _rows_to_train(self, network, chosen, how)
        outcome, report = _guarded(
            network, start, rows, queries, guard_rows, limits, _SIGNS[how], options
        )
        report["indices"] = chosen
        if baselines:
            report["baselines"] = _baselines(
                self, network, start, y, k, queries, guard_rows, limits, options, plain
            )
    _write(network, outcome)
    return edited(self.estimator_, network, {"action": f"repair:{how}", **report})


def _training_guard(scorer):
    n, rng = len(scorer.X_), np.random.default_rng(scorer.settings_.seed)
    rows = rng.permutation(n)[:_MOST_GUARDS] if n > _MOST_GUARDS else slice(None)
    return scorer.X_[rows], scorer.y_[rows]


def _rows_to_train(scorer, network, chosen, how):
    inputs, codes = network.tensor(scorer.X_[chosen]), network.codes(scorer.y_[chosen])
    if how == "relabel":
        with torch.no_grad():
            logits = network(inputs)
        codes = logits.scatter(1, codes[:, None], -torch.inf).argmax(1)
    return inputs, codes


def _guarded(network, start, rows, queries, guard, limits, sign, options):
    path = smallest_flip(network, start, rows, queries, sign=sign, **options)
    parameters, share, kept = largest_allowed(network, start, path.parameters, guard, **limits)
    report = {
        "flipped": predicted_as(network, parameters, queries).cpu().numpy(),
        "n_steps": path.n_steps,
        "displacement": distance(start, parameters),
        "guard_before": limits["before"],
        "guard_after": kept,
        "share_of_path": share,
    }
    return parameters, report


def _natural(scorer):
    """Multiply by the damped inverse curvature of the first member."""
    problem, fitted, _ = open_members(scorer)[0]
    if not hasattr(fitted.lift, "solve"):
        raise ValueError(f"precondition=True needs method='ggn', not {scorer.method_!r}.")

    def apply(gradient):
        factors = from_vectors(problem.layers, flatten(gradient)[None].cpu(), problem.parameters)
        solved = to_vectors(problem.layers, fitted.lift.solve(factors), problem.parameters)
        device = next(iter(gradient.values())).device
        return unflatten(solved[0].to(device), problem.parameters)

    return apply


def _baselines(scorer, network, start, y, k, queries, guard, limits, options, plain):
    rng = np.random.default_rng(scorer.settings_.seed)
    same_class = np.flatnonzero(np.isin(scorer.y_, y))
    pools = {
        "same_class": (same_class, options),
        "same_class_plain": (same_class, plain),
        "random": (np.arange(len(scorer.y_)), plain),
    }
    if options == plain:
        del pools["same_class_plain"]
    found = {}
    for name, (pool, how) in pools.items():
        if len(pool) == 0:
            continue
        picked = rng.choice(pool, min(k, len(pool)), replace=False)
        rows = _rows_to_train(scorer, network, picked, "descend")
        _, report = _guarded(network, start, rows, queries, guard, limits, -1.0, how)
        found[name] = {**report, "indices": picked}
    return found


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
    n_iterations=50,
    baseline=True,
):
    """Forget training rows, or a class.

    The direction is computed on the training rows; how far to go along it is chosen on held-out
    rows: for a class, where the harmonic mean of its error and of the accuracy on the others is
    best; for rows, the whole way, or as far as the guard allows.

    Parameters
    ----------
    indices : array-like of int or bool, optional
        Training rows to forget.
    class_ : label, optional
        Class to forget, in place of rows.
    how : {"gif", "freeze", "project", "plain", "ascent"}, default="gif"
        Generalised influence on few parameters; influence with the others frozen; projected
        to them; influence on all parameters; gradient ascent on them, the baseline.
    select, ratio, ridge : optional
        In place of the scorer's own.
    guard : tuple (X, y), optional
        Held-out rows; by default a tenth of the training rows that are kept, and for a class
        of its rows too, which then take no part in the direction.
    max_drop : float, default=0.01
        How much accuracy on the guard may be lost when rows are removed.
    n_iterations : int, default=50
        Iterations of the solver.
    baseline : bool, default=True
        Also report restricted gradient ascent.

    Returns
    -------
    EditedClassifier
        ``edit_report_`` holds ``removed_accuracy_before``/``_after``, ``guard_before``/
        ``guard_after``, ``f1``, ``scale``, ``share_changed`` (of the parameters) and
        ``baseline`` (the same for restricted ascent).
    """
    check_is_fitted(self)
    if (indices is None) == (class_ is None):
        raise ValueError("give either indices or class_, not both and not neither.")
    if how not in REMOVALS:
        raise ValueError(f"how must be one of {sorted(REMOVALS)}, got {how!r}.")
    removed = _removed_rows(self, indices, class_)
    problem = _with_choices(self, select, ratio, ridge)
    task = _Removal(self, problem, removed, class_, guard, max_drop, n_iterations)
    parameters, report = task.run(how)
    if baseline and how != "ascent":
        report["baseline"] = task.run("ascent")[1]
    network = problem.network
    _write(network, parameters)
    return edited(self.estimator_, network, {"action": f"remove:{how}", **report})


def _removed_rows(scorer, indices, class_):
    if class_ is not None:
        if class_ not in scorer.classes_:
            classes = scorer.classes_.tolist()
            raise ValueError(f"class_={class_!r} is none of the classes {classes}.")
        removed = scorer.y_ == class_
    else:
        removed = np.zeros(len(scorer.X_), dtype=bool)
        indices = np.asarray(indices)
        given = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(int)
        if len(given) and (given.min() < 0 or given.max() >= len(removed)):
            raise ValueError(f"indices must lie between 0 and {len(removed) - 1}.")
        removed[given] = True
    if not removed.any() or removed.all():
        raise ValueError("what is removed must be some of the training rows, not none or all.")
    return removed


def _with_choices(scorer, select, ratio, ridge):
    network = networks_of(scorer)[0][0].copy()
    problem = open_problem(scorer, network)
    given = {"select": select, "ratio": ratio, "ridge": ridge}
    choices = {name: value for name, value in given.items() if value is not None}
    return replace(problem, settings=replace(problem.settings, **choices))


class _Removal:
    """Rows to forget, rows to keep, and held-out rows to judge by."""

    def __init__(self, scorer, problem, removed, class_, guard, max_drop, max_iter):
        self.problem, self.class_, self.max_drop, self.max_iter = (
            problem,
            class_,
            max_drop,
            max_iter,
        )
        known = scorer.damping_
        self.damping = known if isinstance(known, float) and known > 0 else None
        rng = np.random.default_rng(scorer.settings_.seed)
        held_out = np.zeros(len(removed), dtype=bool)
        if guard is None:
            held_out = rng.random(len(removed)) < 0.1
            if class_ is None:
                held_out &= ~removed
            guard = scorer.X_[held_out], scorer.y_[held_out]
        else:
            guard = check_labelled_rows(scorer, *guard)
        self.removed = np.flatnonzero(removed & ~held_out)
        self.kept = np.flatnonzero(~removed & ~held_out)
        network = problem.network
        of_class = guard[1] == class_ if class_ is not None else np.zeros(len(guard[1]), dtype=bool)
        gone = (guard[0][of_class], guard[1][of_class])
        if not of_class.any():
            gone = scorer.X_[self.removed], scorer.y_[self.removed]
        self.gone = network.tensor(gone[0]), network.codes(gone[1])
        self.guard = network.tensor(guard[0][~of_class]), network.codes(guard[1][~of_class])
        self.start = {name: p.detach().clone() for name, p in problem.parameters.items()}
        rows = torch.as_tensor(self.removed)
        self.chosen = chosen_parameters(problem, scorer.X_[self.removed], problem.codes[rows])

    def direction(self, how):
        problem = self.problem
        rows = torch.as_tensor(self.removed)
        gradients = problem.gradients(loss, problem.X[self.removed], problem.codes[rows])
        vectors = to_vectors(problem.layers, gradients, problem.parameters)
        weights = problem.shares[rows].to(vectors)
        kept = torch.as_tensor(self.kept)
        share = problem.shares[kept].sum()
        retained = replace(
            problem,
            X=problem.X[self.kept],
            codes=problem.codes[kept],
            shares=problem.shares[kept] / share,
        )
        damping = 0.0 if how == "gif" else self.damping
        gradient = (weights[:, None] * vectors).sum(0) / float(share)
        device = problem.network.device
        with recording(problem.network.module):
            update = removal_update(
                how,
                torch.zeros_like if how == "ascent" else _products(retained, damping),
                self.chosen.to(device),
                gradient.to(device),
                ridge=problem.settings.ridge,
                max_iter=self.max_iter,
            )
        return unflatten(update, problem.parameters)

    def run(self, how):
        network, start = self.problem.network, self.start
        direction = self.direction(how)
        with untouched(network.module):
            scale = self.scale(direction)
            end = moved(start, direction, scale)
            if self.class_ is None:
                limits = {
                    "before": accuracy(network, start, self.guard),
                    "max_drop": self.max_drop,
                }
                end, share, _ = largest_allowed(network, start, end, self.guard, **limits)
                scale *= share
            return end, self.report(end, scale)

    def scale(self, direction):
        if self.class_ is None:
            return 1.0
        size = distance(self.start, moved(self.start, direction, 1.0))
        length = sum(float(p.square().sum()) for p in self.start.values()) ** 0.5
        unit = length / size if size > 0 else 0.0
        scales = [unit * share for share in _SCALES]
        network = self.problem.network
        return best_scale(network, self.start, direction, self.gone, self.guard, scales)[0]

    def report(self, end, scale):
        network, start = self.problem.network, self.start
        changed = sum(int((end[name] != start[name]).sum()) for name in start)
        removed = accuracy(network, end, self.gone)
        kept = accuracy(network, end, self.guard)
        return {
            "removed_accuracy_before": accuracy(network, start, self.gone),
            "removed_accuracy_after": removed,
            "guard_before": accuracy(network, start, self.guard),
            "guard_after": kept,
            "f1": harmonic_mean(1 - removed, kept),
            "scale": scale,
            "share_changed": changed / sum(p.numel() for p in start.values()),
            "n_removed": len(self.removed),
        }


def _products(problem, damping):
    """Multiply by the curvature, damped unless it is 0; None means as the problem says."""
    settings = problem.settings
    if settings.curvature == "hessian":
        return problem.product(resolve_damping(problem) if damping is None else damping)
    picked = curvature_rows(problem, kept_trace=settings.kept_trace, max_rows=settings.max_rows)
    rows = problem.gather(problem.X, picked.cotangents, picked.examples)
    if damping is None:
        damping = resolve_damping(problem, RowSpace.of(rows))
    return row_product(problem.layers, problem.parameters, rows, damping)


def _write(network, parameters):
    own = dict(network.module.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(value)
