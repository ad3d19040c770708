"""Single training rows and groups of them: exact leave-one-out of heads, second order, labels."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import Bunch
from torch import Tensor
from torch.func import jacrev, vmap

from skperf.backbone.losses import Loss
from skperf.backbone.rows import Rows
from skperf.influence._members import Learned
from skperf.influence.damping import resolve_damping
from skperf.influence.heads import leave_one_out_steps, linear_head_hessian
from skperf.influence.layers import from_vectors
from skperf.influence.mapping import plain
from skperf.influence.neighbours import features_of
from skperf.influence.problem import LOSS_UNIT, Problem, curvature_rows, is_last_linear
from skperf.influence.scoring import Ensemble
from skperf.influence.tiles import meet

_MOST_PRODUCTS = 2e11  # of numbers, in every further step of leaving rows out


class TopRows(Bunch):
    """Rows of largest influence: a Bunch whose ``values`` are not the dictionary's."""

    @property
    def values(self) -> Any:
        """Influence of the rows."""
        return self["values"]


def members_of_groups(groups: Any, n: int) -> list[NDArray[Any]]:
    """Read groups given as lists of indices or masks, or as one number a row."""
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
        unknown = group.size and (group.ndim != 1 or group.dtype.kind not in "biu")
        if unknown or (group.dtype == bool and len(group) != n):
            raise ValueError(f"a group must be a list of row indices or a mask of {n} rows.")
        rows = np.flatnonzero(group) if group.dtype == bool else group.astype(int)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= n:
            raise ValueError(f"a group is empty or holds rows outside 0..{n - 1}.")
        members.append(np.unique(rows))
    return members


def second_order(ensemble: Ensemble, X: Rows, targets: Tensor, rows: NDArray[Any]) -> NDArray[Any]:
    """Add what taking the group's own curvature out of the inverse changes: -> (n_query,)."""
    total = np.zeros(len(X))
    for member in ensemble.members:
        problem, fitted = member.problem, member.fit
        n = problem.n_train
        index = torch.as_tensor(rows)
        shares, targets_of = problem.shares[index], problem.targets[index]
        group = replace(
            problem, X=problem.X[rows], targets=targets_of, shares=shares / shares.sum()
        )
        own = curvature_rows(group, kept_trace=1.0, max_rows=None)
        scale = float(shares.sum().sqrt())
        pulled = group.gather(group.X, own.cotangents, own.examples)
        gradients = problem.gradients(problem.loss, group.X, targets_of, shares * n)
        queries = ensemble.query_gradients(problem, X, targets)

        def bilinear(
            left: Any, right: Any, problem: Problem = problem, fitted: Any = fitted
        ) -> Tensor:
            terms, stored = fitted.lift(problem, left), fitted.lift.store(problem, right)
            products = meet(terms, stored)
            return (products * fitted.scale * problem.n_train).double()

        reached = bilinear(pulled, pulled) * scale**2
        moved = bilinear(pulled, gradients).sum(1) * scale / n
        rest = torch.eye(len(reached), dtype=torch.float64) - (reached + reached.T) / 2
        solved = torch.linalg.solve(rest, moved)
        total += member.share * (bilinear(queries, pulled) * scale @ solved).numpy()
    return total


def head_effects(learned: Learned, member: int, X: Rows, y: Any) -> NDArray[Any] | None:
    """Newton steps of leaving out each row of a linear head: (n_query, n_train) or None."""
    network = learned.networks()[member]
    problem = learned.problem(network, learned.stages[0].plan)
    head: Any = problem.layers[0]
    if not is_last_linear(problem.layers, network, X):
        return None
    weight = head.module.weight.detach().cpu().double()
    if head.bias:
        weight = torch.cat([weight, head.module.bias.detach().cpu().double()[:, None]], 1)
    train, queries = (features_of(network, rows).double() for rows in (learned.X, X))
    if head.bias:
        train, queries = (torch.cat([f, torch.ones_like(f[:, :1])], 1) for f in (train, queries))
    read = _readout(problem, queries, weight, X)
    if read is None:
        return None
    targets, asked = problem.targets, network.targets(y).cpu()
    loss, shares = problem.loss, problem.shares

    def value(raw: Tensor, target: Tensor) -> Tensor:
        return loss.value(read(raw[None]), _as_double(target)[None])[0]

    raw = train @ weight.T
    with plain():
        slope = vmap(torch.func.grad(value))(raw, targets) * shares[:, None]
        curvatures = vmap(jacrev(jacrev(value)))(raw, targets) * shares[:, None, None]
    # a loss that is not convex in the outputs lends its positive part
    values, vectors = torch.linalg.eigh(curvatures)
    curvatures = (vectors * values.clamp_min(0)[:, None]) @ vectors.mT
    ridge = _ridge(problem, train.shape[1], head.bias)
    matrix = linear_head_hessian(train, curvatures, ridge)

    def left(chunk: Tensor, own: Tensor, steps: Tensor) -> Tensor:
        """Gradient at the weights that lack rows (m,), less that at the fitted ones: (m, K, d)."""
        rows = chunk[own]
        moved = (train @ (weight + steps).mT).flatten(0, 1).requires_grad_()
        with torch.enable_grad():
            again = targets.repeat(len(rows), *[1] * (targets.ndim - 1))
            (found,) = torch.autograd.grad(loss.value(read(moved), _as_double(again)).sum(), moved)
        found = found.view(len(rows), *slope.shape) * shares[:, None]
        found[torch.arange(len(rows)), rows] = 0  # what is left out
        return (found - slope).mT @ train + ridge * steps

    balanced = getattr(loss, "balanced", False)
    exact = not balanced and slope.numel() * train.numel() <= _MOST_PRODUCTS
    steps = leave_one_out_steps(
        train,
        slope,
        curvatures,
        matrix,
        chunk=max(1, min(256, (1 << 22) // slope.numel())),
        left=left if exact else None,
    )
    if balanced:
        steps = steps + _of_balance(train, slope, targets, learned.weights, matrix)
    ensemble = learned.opened()
    output, sign = ensemble.output, 1.0 if ensemble.about_loss else -1.0

    def judged(outputs: Tensor) -> Tensor:
        own = _as_double(asked)
        return output.value(outputs, own) if isinstance(output, Loss) else output(outputs, own)

    before_raw = queries @ weight.T
    before = judged(read(before_raw))
    effects = [sign * (judged(read(before_raw + queries @ step.T)) - before) for step in steps]
    result: NDArray[Any] = torch.stack(effects, 1).numpy()
    return result.astype(ensemble.dtype, copy=False)


def _of_balance(
    train: Tensor, slope: Tensor, targets: Tensor, given: Tensor | None, matrix: Tensor
) -> Tensor:
    """Add what follows from class weights balanced anew without each row: -> (n, K, d)."""
    # weights are total / (K n_class): without a row its own class gains, and all lose a little
    n, (codes, where) = len(train), targets.unique(return_inverse=True)
    weights = train.new_ones(n) if given is None else given.to(train)
    one_hot = torch.nn.functional.one_hot(where, len(codes)).to(train)
    left, sizes = 1 - weights / weights.sum(), (weights @ one_hot)[where]
    gain = torch.where(sizes > weights, sizes / (sizes - weights).clamp_min(1e-300), 1.0)
    factors = torch.where(one_hot > 0, (gain * left)[:, None], left[:, None]) - 1
    sums = torch.einsum("nc,nk,nd->ckd", one_hot, slope, train)
    itself = (gain * left - 1)[:, None, None] * slope[:, :, None] * train[:, None]
    extra = (torch.einsum("nc,ckd->nkd", factors, sums) - itself).flatten(1)
    return -(extra @ torch.linalg.pinv(matrix, hermitian=True)).view_as(itself)


def _as_double(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets


def _readout(problem: Problem, features: Tensor, weight: Tensor, X: Rows) -> Any:
    """Find the function from what the layer gives to the outputs; None if there is more to it."""
    network = problem.network
    actual = network.logits(X).double()
    raw = features @ weight.T
    candidates = [lambda outputs: outputs, lambda outputs: outputs[:, 0]]
    if network.readout is not None:
        candidates.insert(0, network.readout)
    for candidate in candidates:
        try:
            found = candidate(raw)
        except (RuntimeError, TypeError, KeyError, IndexError, AttributeError):
            continue
        close = isinstance(found, Tensor) and found.shape == actual.shape
        if close and torch.allclose(found, actual, rtol=1e-3, atol=1e-3):
            return candidate
    return None


def _ridge(problem: Problem, d: int, has_bias: bool) -> Tensor:
    """Penalty of each feature, on the scale of the mean loss: -> (d,)."""
    settings = problem.settings
    ridge = torch.zeros(d, dtype=torch.float64)
    if settings.damping == "auto" and settings.horizon is None:
        known = settings.weight_decay
        if known or settings.ridge == 0:
            spared = has_bias and not settings.ridge_on_biases
            ridge[: d - 1 if spared else d] = known
            return ridge
    return ridge + resolve_damping(problem)


def class_aware(ensemble: Ensemble, X: Rows, targets: Tensor) -> NDArray[Any]:
    """Smallest of each row's mean influences on the rows of each class: -> (n_train,)."""
    means = [
        ensemble.matrix(
            X[np.flatnonzero((targets == code).numpy())], targets[targets == code], aggregate="mean"
        )
        for code in targets.unique()
    ]
    smallest: NDArray[Any] = np.min(means, axis=0)
    return smallest


def radius_effects(
    ensemble: Ensemble, X: Rows, targets: Tensor, radius: float, norm: float
) -> NDArray[Any]:
    """Differentiate the queries' loss by the radius of an attack in training: -> (n_query,)."""
    total = np.zeros(len(X))
    for member in ensemble.members:
        problem, fit = member.problem, member.fit
        if fit.unit != LOSS_UNIT:
            raise ValueError("radius_effect needs a curvature method, such as 'ggn' or 'exact'.")
        pushed = _of_attack(problem, radius, norm)
        terms = fit.lift(problem, ensemble.query_gradients(problem, X, targets))
        stored = fit.lift.store(problem, pushed)
        scores = meet(terms, stored)
        # scores are over n; the pull of all rows together is a mean already
        total -= member.share * (scores[:, 0].double() * fit.scale * problem.n_train).numpy()
    return total if ensemble.about_loss else -total


def _of_attack(problem: Problem, radius: float, norm: float) -> Any:
    """Differentiate the mean gradient under attack by its radius: one vector."""
    network = problem.network
    own = {n: p.detach().requires_grad_() for n, p in problem.parameters.items()}
    total = [torch.zeros_like(p) for p in own.values()]
    shares = problem.shares.to(network.device, network.dtype)
    targets = problem.targets.to(network.device)
    with torch.enable_grad():
        for start in range(0, problem.n_train, problem.batch_size):
            rows = slice(start, start + problem.batch_size)
            plain = network.inputs(problem.X[rows]).array
            if not plain.is_floating_point():
                raise ValueError("radius_effect moves the inputs, which must be real numbers.")
            away = _steepest(network, plain, targets[rows], norm)
            inputs = (plain + radius * away).requires_grad_()
            losses = network.loss.value(network(Rows(inputs), own), targets[rows])
            weighted = (losses * shares[rows]).sum()
            (slope,) = torch.autograd.grad(weighted, inputs, create_graph=True)
            found = torch.autograd.grad(
                (slope * away).sum(), list(own.values()), materialize_grads=True, allow_unused=True
            )
            total = [one + more for one, more in zip(total, found, strict=True)]
    vector = torch.cat([part.reshape(-1) for part in total])[None].cpu()
    return [*from_vectors(problem.layers, vector, problem.parameters)]


def _steepest(network: Any, inputs: Tensor, targets: Tensor, norm: float) -> Tensor:
    """Direction of length one in which each row's loss rises fastest: inputs (n, ...)."""
    leaf = inputs.detach().requires_grad_()
    losses = network.loss.value(network(Rows(leaf)), targets)
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    if norm == float("inf"):
        return slope.sign()
    return torch.nn.functional.normalize(slope.flatten(1), dim=1).view_as(slope)
