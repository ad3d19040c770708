"""Change a copy of the network: correct predictions, forget rows."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters, flatten, unflatten
from skperf.backbone.rows import Rows
from skperf.influence._members import Learned, with_damping
from skperf.influence._methods import GIF
from skperf.influence._stages import with_weights
from skperf.influence.captures import recording
from skperf.influence.curvature import RowSpace
from skperf.influence.damping import damping_of_each, resolve_damping
from skperf.influence.generalized import removal_update, row_product
from skperf.influence.inverses import chosen_parameters, largest_of
from skperf.influence.layers import from_vectors, to_vectors
from skperf.influence.methods import RowForm
from skperf.influence.neighbours import features_of, nearest
from skperf.influence.problem import Problem, curvature_rows
from skperf.influence.repair import (
    REHEARSALS,
    Labelled,
    Lesson,
    accuracy,
    best_scale,
    distance,
    harmonic_mean,
    largest_allowed,
    moved,
    predicted_as,
    smallest_flip,
)

_MOST_GUARDS, _FEWEST_GUARDS, _MOST_KEPT = 5000, 20, 500
_SCALES = tuple(2.0**i for i in range(-10, 4))
Report = dict[str, Any]


def repaired(
    learned: Learned,
    X: Rows,
    y: Any,
    *,
    k: int,
    how: str,
    max_steps: int,
    guard: tuple[Rows, Any] | None,
    max_drop: float,
    learning_rate: float,
    precondition: bool | str,
    baselines: bool,
) -> tuple[Network, Report]:
    """Train a copy of the first network on rows that matter: X (n_query, ...), y (n_query,)."""
    problem = learned.plain_problem()
    network = problem.network
    if network.loss.kind not in ("classes", "labels") or np.ndim(learned.y) > 2:
        raise ValueError(
            f"repair is about predicted labels, and the loss is {network.loss.name}: use "
            "influence and train on yourself."
        )
    start = {name: p.detach() for name, p in problem.parameters.items()}
    k = min(k, problem.n_train)
    ensemble = learned.opened()
    total = ensemble.matrix(X, network.targets(y).cpu(), aggregate="sum")
    # what a row would do if it were not fitted yet: its slope is 1 - p times that of its log odds
    losses = problem.losses(problem.X, problem.targets).astype(float)
    worth = total / np.maximum(1 - np.exp(-losses), 1e-7)
    worth = worth if how == "descend" else -worth
    chosen = np.argsort(-worth, kind="stable")[:k]
    judges = _judges(learned, network, guard, chosen)
    task = _Repair(
        network,
        start,
        (network.inputs(X), network.targets(y)),
        judges,
        accuracy(network, start, judges["guard"]),
        max_drop,
        {"learning_rate": learning_rate, "max_steps": max_steps},
    )
    by_itself = precondition == "auto" and learned.method.name == "ggn"
    ways = _natural_ways(learned) if by_itself or precondition is True else [None]
    weights = np.maximum(worth[chosen], 0)
    weights = weights / weights.mean() if weights.any() else np.ones(k)
    weights = weights * (-1.0 if how == "ascend" else 1.0)
    lesson = Lesson(
        _rows_to_train(learned, network, chosen, how),
        torch.as_tensor(weights).to(network.device, network.dtype),
        judges["kept"],
    )
    outcome, report = task.run(lesson, ways)
    report["indices"] = chosen
    for name, values in (("judged_before", start), ("judged_after", outcome)):
        report[name] = accuracy(network, values, judges["judged"])
    if baselines:
        report["baselines"] = _baselines(learned, task, (X, y), k, ways)
    return with_weights(network, outcome), {"action": f"repair:{how}", **report}


@dataclass(frozen=True)
class _Repair:
    """What to flip, from where, and what limits the way."""

    network: Network
    start: Parameters
    queries: Labelled
    judges: dict[str, Labelled]
    before: float
    max_drop: float
    options: Report

    def run(self, lesson: Lesson, ways: list[Any]) -> tuple[Parameters, Report]:
        """Take the first way to step that flips all queries within the guard; hold less if none."""
        best: tuple[Parameters, Report] | None = None
        for rehearsal, way in product(REHEARSALS, ways):
            found = self._along(replace(lesson, rehearsal=rehearsal), way)
            if best is None or found[1]["flipped"].sum() > best[1]["flipped"].sum():
                best = found
            if best[1]["flipped"].all():
                break
        assert best is not None
        return best

    def _along(self, lesson: Lesson, way: Any) -> tuple[Parameters, Report]:
        network, start, guard = self.network, self.start, self.judges["guard"]
        path = smallest_flip(network, start, lesson, self.queries, precondition=way, **self.options)
        parameters, share, kept = largest_allowed(
            network, start, path.parameters, guard, before=self.before, max_drop=self.max_drop
        )
        report = {
            "flipped": predicted_as(network, parameters, self.queries).cpu().numpy(),
            "n_steps": path.n_steps,
            "displacement": distance(start, parameters),
            "guard_before": self.before,
            "guard_after": kept,
            "share_of_path": share,
        }
        return parameters, report


def _judges(
    learned: Learned, network: Network, guard: tuple[Rows, Any] | None, chosen: NDArray[Any]
) -> dict[str, Labelled]:
    """Rows that limit a change, and others that judge it."""
    # what stops a path says little about the path: it is judged on training rows that neither
    # limited nor made it
    rng = np.random.default_rng(learned.settings.seed)
    rest = np.setdiff1d(np.arange(len(learned.X)), chosen)
    rows, judged = np.array_split(rng.permutation(rest)[: 2 * _MOST_GUARDS], 2)
    if len(rest) < _FEWEST_GUARDS:  # nearly all are trained on: the others are too few to judge
        rows, judged = rng.permutation(len(learned.X))[:_MOST_GUARDS], rest[:0]
    labels = np.asarray(learned.y)
    held = rng.permutation(np.setdiff1d(np.arange(len(labels)), judged))[:_MOST_KEPT]
    pairs = {
        "guard": (learned.X[rows], labels[rows]) if guard is None else guard,
        "judged": (learned.X[judged], labels[judged]),
        "kept": (learned.X[held], labels[held]),
    }
    return {
        name: (network.inputs(rows), network.targets(labels))
        for name, (rows, labels) in pairs.items()
    }


def _rows_to_train(learned: Learned, network: Network, chosen: NDArray[Any], how: str) -> Labelled:
    inputs = network.inputs(learned.X[chosen])
    targets = network.targets(np.asarray(learned.y)[chosen])
    if how == "relabel":
        with torch.no_grad():
            outputs = network(inputs)
        if targets.ndim > 1:
            targets = (outputs > 0).to(targets)
        else:
            targets = outputs.scatter(1, targets[:, None], -torch.inf).argmax(1)
    return inputs, targets


def natural(learned: Learned) -> Any:
    """Multiply by the damped inverse curvature of the first member."""
    member = learned.opened().members[0]
    problem, lift = member.problem, member.fit.lift
    if not isinstance(lift, RowForm):
        raise ValueError(f"precondition=True needs method='ggn', not {learned.method.name!r}.")

    def apply(gradient: Parameters) -> Parameters:
        factors = from_vectors(problem.layers, flatten(gradient)[None].cpu(), problem.parameters)
        solved = to_vectors(problem.layers, lift.applied(problem, factors), problem.parameters)
        device = next(iter(gradient.values())).device
        return unflatten(solved[0].to(device), problem.parameters)

    return apply


def _natural_ways(learned: Learned) -> list[Any]:
    """Take steps at the damping of the scores, and at a tenth and ten times of it."""
    ways, damping = [natural(learned)], learned.stages[0].fit.report.get("damping")
    if isinstance(damping, float) and learned.choices.damping != "flow":
        ways += [natural(with_damping(learned, factor * damping)) for factor in (0.1, 10.0)]
    return ways


def _baselines(
    learned: Learned, task: _Repair, asked: tuple[Rows, Any], k: int, ways: list[Any]
) -> dict[str, Report]:
    rng = np.random.default_rng(learned.settings.seed)
    network, (X, y), labels = task.network, asked, np.asarray(learned.y)
    same = np.flatnonzero(np.isin(labels, y)) if labels.ndim == 1 else np.arange(0)
    close = nearest(features_of(network, learned.X), features_of(network, X), k)
    pools = {
        "same_class": (same, ways),
        "same_class_plain": (same, [None]),
        "random": (np.arange(len(labels)), [None]),
        "nearest": (np.unique(close), ways),
    }
    if ways == [None]:
        del pools["same_class_plain"]
    found = {}
    for name, (pool, own) in pools.items():
        if len(pool) == 0:
            continue
        picked = rng.choice(pool, min(k, len(pool)), replace=False)
        rows = _rows_to_train(learned, network, picked, "descend")
        _, report = task.run(Lesson(rows, kept=task.judges["kept"]), own)
        found[name] = {**report, "indices": picked}
    # the most that any choice of rows could do: the queries themselves, at the labels asked for
    found["query_itself"] = task.run(Lesson(task.queries, kept=task.judges["kept"]), ways)[1]
    return found


def removed_rows(learned: Learned, indices: Any, class_: Any) -> NDArray[Any]:
    """Mark the training rows to forget: -> (n_train,)."""
    labels = np.asarray(learned.y)
    if class_ is not None:
        known = np.unique(labels) if labels.ndim == 1 else np.arange(0)
        if np.ndim(class_) or class_ not in known:
            raise ValueError(f"class_={class_!r} is none of the classes {known.tolist()[:20]}.")
        removed: NDArray[Any] = labels == class_
    else:
        removed = np.zeros(len(learned.X), dtype=bool)
        indices = np.asarray(indices)
        short = indices.dtype == bool and len(indices) != len(removed)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "biu") or short:
            raise ValueError(f"indices must be a list of row numbers or a mask, got {indices!r}.")
        given = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(int)
        if len(given) and (given.min() < 0 or given.max() >= len(removed)):
            raise ValueError(f"indices must lie between 0 and {len(removed) - 1}.")
        removed[given] = True
    if not removed.any() or removed.all():
        raise ValueError("what is removed must be some of the training rows, not none or all.")
    return removed


@dataclass(frozen=True)
class Removal:
    """Rows to forget, rows to keep, and held-out rows: some to choose by, others to judge by."""

    problem: Problem
    damping: float | None
    start: Parameters
    removed: NDArray[Any]
    kept: NDArray[Any]
    of_class: bool
    choose: dict[str, Labelled]
    judge: dict[str, Labelled]
    max_drop: float
    max_iter: int
    options: Report  # select, ratio, ridge

    def run(self, how: str) -> tuple[Parameters, Report]:
        """Go as far along a direction as the rows to choose by say."""
        network, start = self.problem.network, self.start
        direction = self._direction(how)
        scale = self._scale(direction)
        end = moved(start, direction, scale)
        if not self.of_class:
            guard = self.choose["guard"]
            before = accuracy(network, start, guard)
            end, share, _ = largest_allowed(
                network, start, end, guard, before=before, max_drop=self.max_drop
            )
            scale *= share
        return end, self._report(end, scale)

    def _direction(self, how: str) -> Parameters:
        problem = self.problem
        rows, kept = torch.as_tensor(self.removed), torch.as_tensor(self.kept)
        X, targets = problem.X[self.removed], problem.targets[rows]
        options = self.options
        chosen = chosen_parameters(problem, X, targets, options["select"], options["ratio"])
        vectors = to_vectors(
            problem.layers, problem.gradients(problem.loss, X, targets), problem.parameters
        )
        weights, share = problem.shares[rows].to(vectors), problem.shares[kept].sum()
        retained = replace(
            problem,
            X=problem.X[self.kept],
            targets=problem.targets[kept],
            shares=problem.shares[kept] / share,
        )
        gradient = (weights[:, None] * vectors).sum(0) / float(share)
        device = problem.network.device
        multiply, ridge = torch.zeros_like, 0.0
        with recording(problem.network.module):
            if how != "ascent":
                damping = 0.0 if how == "gif" else self.damping
                multiply = products(retained, options["curvature"], damping)
                ridge = options["ridge"] * largest_of(problem, multiply) ** 2
            update = removal_update(
                how,
                multiply,
                chosen.to(device),
                gradient.to(device),
                ridge=ridge,
                max_iter=self.max_iter,
            )
        return unflatten(update, problem.parameters)

    def _scale(self, direction: Parameters) -> float:
        if not self.of_class:
            return 1.0
        size = distance(self.start, moved(self.start, direction, 1.0))
        length = sum(float(p.square().sum()) for p in self.start.values()) ** 0.5
        unit = length / size if size > 0 else 0.0
        scales = [unit * share for share in _SCALES]
        rows = self.choose
        network = self.problem.network
        return best_scale(network, self.start, direction, rows["gone"], rows["guard"], scales)[0]

    def _report(self, end: Parameters, scale: float) -> Report:
        network, start, rows = self.problem.network, self.start, self.judge
        changed = sum(int((end[name] != start[name]).sum()) for name in start)
        removed = accuracy(network, end, rows["gone"])
        kept = accuracy(network, end, rows["guard"])
        return {
            "removed_accuracy_before": accuracy(network, start, rows["gone"]),
            "removed_accuracy_after": removed,
            "guard_before": accuracy(network, start, rows["guard"]),
            "guard_after": kept,
            "f1": harmonic_mean(1 - removed, kept),
            "scale": scale,
            "share_changed": changed / sum(p.numel() for p in start.values()),
            "n_removed": len(self.removed),
            "n_judged": len(rows["guard"][1]),
        }


def removal(
    learned: Learned,
    removed: NDArray[Any],
    class_: Any,
    guard: tuple[Rows, Any] | None,
    *,
    max_drop: float,
    max_iter: int,
    given: Report,
) -> Removal:
    """Set rows aside and state what is to be forgotten: removed (n_train,)."""
    problem = learned.plain_problem()
    method = learned.method if isinstance(learned.method, GIF) else GIF(curvature="ggn")
    options = method.options() | {k: v for k, v in given.items() if v is not None}
    known = learned.stages[0].fit.report.get("damping")
    rng = np.random.default_rng(learned.settings.seed)
    held_out = np.zeros(len(removed), dtype=bool)
    if guard is None:
        for group in (~removed, removed) if class_ is not None else (~removed,):
            own = rng.permutation(np.flatnonzero(group))
            held_out[own[: max(4, round(0.2 * len(own)))]] = True
        guard = learned.X[held_out], np.asarray(learned.y)[held_out]
    if (removed & ~held_out).sum() < 2 and class_ is not None:
        raise ValueError(
            f"class_={class_!r} has too few training rows to set some aside: give guard=(X, y)."
        )
    parts = _halves(guard, class_, rng)
    if class_ is None:
        gone = learned.X[removed], np.asarray(learned.y)[removed]
        for part in parts:
            part["gone"] = gone
    network = problem.network

    def ready(part: dict[str, tuple[Rows, Any]]) -> dict[str, Labelled]:
        return {n: (network.inputs(X), network.targets(y)) for n, (X, y) in part.items()}

    return Removal(
        problem,
        known if isinstance(known, float) and known > 0 else None,
        {name: p.detach().clone() for name, p in problem.parameters.items()},
        np.flatnonzero(removed & ~held_out),
        np.flatnonzero(~removed & ~held_out),
        class_ is not None,
        ready(parts[0]),
        ready(parts[1]),
        max_drop,
        max_iter,
        options,
    )


def _halves(
    guard: tuple[Rows, Any], class_: Any, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cut held-out rows into those that choose and those that judge, by class or not."""
    X, y = guard
    labels = np.asarray(y)
    of_class = labels == class_ if class_ is not None else np.zeros(len(labels), dtype=bool)
    groups = {"guard": ~of_class, "gone": of_class}
    halves: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, mask in groups.items():
        if name == "gone" and class_ is None:
            continue
        rows = rng.permutation(np.flatnonzero(mask))
        if len(rows) < 2:
            what = "other rows" if name == "guard" else f"rows of class {class_!r}"
            raise ValueError(
                f"guard holds {len(rows)} {what}: at least two are needed, one to choose how far "
                "to go and one to judge it by."
            )
        middle = len(rows) // 2
        for half, part in zip(halves, (rows[:middle], rows[middle:]), strict=True):
            half[name] = X[part], labels[part]
    return halves


def products(problem: Problem, curvature: str, damping: float | None, **which: Any) -> Any:
    """Multiply by the curvature, damped unless it is 0; None means as the problem says."""

    def of_each(space: RowSpace | None = None) -> torch.Tensor:
        known = resolve_damping(problem, space) if damping is None else damping
        each = damping_of_each(problem, known)
        return each.to(problem.network.device, problem.network.dtype)

    if curvature == "hessian":
        return problem.product("hessian", of_each())
    picked = curvature_rows(problem, **which)
    rows = problem.gather(problem.X, picked.cotangents, picked.examples)
    space = RowSpace.of(rows) if damping is None else None
    return row_product(problem.layers, problem.parameters, rows, of_each(space))
