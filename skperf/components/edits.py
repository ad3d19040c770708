"""Carry an edit out: who is to change, who is to be spared, what goes, by true passes."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skperf.components.gates import Asked, Circuit
from skperf.components.measures import Measure

Array = NDArray[np.float64]
Order = NDArray[np.intp]
Mask = NDArray[np.bool_]
_SHORTLIST = 16
_STEPS = 8
_TOGETHER = (2, 3, 4, 6, 8, 12)
_LEAST_GAIN = 0.003


def welch_order(target: Array, reference: Array | None, *, increase: bool) -> Order:
    """Rank by Welch's t statistic: target (n_t, N), reference (n_r, N) -> (N,)."""
    # `t_j = (mean_T a_j - mean_R a_j) / sqrt(var_T(a_j) / |T| + var_R(a_j) / |R|)`; lowest first
    # to raise the targets' outputs, highest first to lower them.
    if reference is None or not len(reference):
        reference = np.zeros((1, target.shape[1]))
    difference = target.mean(0) - reference.mean(0)
    variance = target.var(0) / len(target) + reference.var(0) / len(reference)
    positive = variance[variance > 0]
    floor = float(np.sqrt(np.median(positive))) if len(positive) else 1.0
    error = np.where(variance > 0, np.sqrt(variance), floor)
    score = difference / np.where(error > 0, error, 1.0)
    return np.argsort(score if increase else -score, kind="stable")


def budgeted_order(
    target: Array, reference: Array | None, *, increase: bool, target_error: Array | None = None
) -> Order:
    """Rank by gain for the targets over harm to the references: (n_t, N), (n_r, N) -> (N,)."""
    # A linear model makes the choice a knapsack: gain in the targets' mean output over the mean
    # fall of the references' outputs. Falls and rises of different references do not cancel,
    # `harm_j = mean_R max(a_j, 0)`: it is the single example that is lost. Gains below their own
    # standard error come last.
    gain = -target.mean(0) if increase else target.mean(0)
    if target_error is not None:
        noise = np.sqrt((target_error**2).sum(0)) / len(target)
        gain = np.sign(gain) * np.maximum(np.abs(gain) - noise, 0.0)
    harm = np.zeros(len(gain)) if reference is None else np.maximum(reference, 0.0).mean(0)
    return _by_ratio(gain, harm)


def _by_ratio(gain: Array, harm: Array) -> Order:
    ratio = gain / np.maximum(harm, 0.2 * harm.mean() + 1e-12)
    return np.lexsort((-gain, -ratio, gain <= 0))


ORDERS = {"welch": welch_order, "budgeted": budgeted_order}


def grid_of_k(n_components: int, most: int | None = None) -> list[int]:
    """Numbers of components to try, growing by about a third."""
    last = min(most or max(1, n_components // 2), n_components)
    grid, k = [0], 1
    while k < last:
        grid.append(k)
        k = max(k + 1, round(k * 1.35))
    return [*grid, last]


@dataclass(frozen=True)
class Wish:
    """Whose outputs are to change, and how."""

    targets: NDArray[np.intp]  # (n_targets,)
    references: NDArray[np.intp]  # (n_references,)
    direction: str = "increase"
    criterion: str = "budgeted"
    k: int | str = "auto"
    max_drop: float = 0.01
    worst_group: bool = False  # raise the worst guarded group instead

    def __post_init__(self) -> None:
        if self.direction not in ("increase", "decrease"):
            raise ValueError(f"direction={self.direction!r} must be 'increase' or 'decrease'.")
        if self.criterion not in ORDERS:
            raise ValueError(f"criterion={self.criterion!r} must be one of {sorted(ORDERS)}.")

    def order(self, fit: Any, criterion: str) -> Order:
        """Rank components, first those to ablate: -> (n_components,)."""
        if len(self.targets) < 2 and criterion == self.criterion == "welch":
            warnings.warn(
                "target has a single row: Welch's statistic has no variance for it.",
                UserWarning,
                stacklevel=4,
            )
        stderr = fit.stderr[self.targets]
        spared = fit.coefficients[self.references] if len(self.references) else None
        known = criterion == "budgeted" and np.isfinite(stderr).all()
        return ORDERS[criterion](
            fit.coefficients[self.targets],
            spared,
            increase=self.direction == "increase",
            **({"target_error": stderr} if known else {}),
        )


@dataclass(frozen=True)
class Guarded:
    """Rows on which an edit must do no harm, and their groups."""

    asked: Asked  # (n, ...)
    groups: NDArray[Any] | None = None  # (n,)


@dataclass
class Search:
    """A search for components that had better go, each step judged by true passes."""

    circuit: Circuit
    measure: Measure
    asked: Asked
    wish: Wish
    guard: Guarded | None = None
    mask: Mask = field(init=False)
    path: list[dict[str, Any]] = field(init=False)
    beyond: list[dict[str, Any]] = field(default_factory=list)  # tried, and not taken

    def __post_init__(self) -> None:
        self.mask = np.ones(self.circuit.n_components, bool)
        wish, guard = self.wish, self.guard
        rows = {"target": wish.targets, "reference": wish.references}
        self.watched = {name: self.asked[where] for name, where in rows.items() if len(where)}
        if guard is not None:
            self.watched["guard"] = guard.asked
        self.width = 1.0
        seen = self._seen(self.mask[None])
        # accuracies of few rows jump; a smooth step as wide as outputs are moves with each row
        judged = seen["guard" if wish.worst_group else "target"][0]
        self.width = max((0.3 if wish.worst_group else 1.0) * float(np.abs(judged).mean()), 1e-9)
        self.path = self.steps(self.mask[None])

    @property
    def k(self) -> int:
        """Number of components gone."""
        return int((~self.mask).sum())

    def steps(self, masks: Mask) -> list[dict[str, Any]]:
        """Say what true passes show of masks (m, n_components)."""
        seen = self._seen(masks)
        return [
            {"k": int((~mask).sum()), **self._step({name: v[..., i] for name, v in seen.items()})}
            for i, mask in enumerate(masks)
        ]

    def along(self, order: Order, candidates: Sequence[int]) -> None:
        """Go as far along a ranking as is best among what is harmless: order (n_components,)."""
        path = [self.path[0]]
        for k in candidates[1:]:
            path += self.steps(~np.isin(np.arange(len(order)), order[:k])[None])
            if path[-1]["guard_score"] < path[0]["guard_score"] - 4 * self.wish.max_drop - 0.05:
                break
        best = max(filter(self._harmless, path), key=lambda step: (step["aim"], -step["k"]))
        if len(self.path) == 1 or best["aim"] > self.path[-1]["aim"] + _LEAST_GAIN:
            self.mask = ~np.isin(np.arange(len(order)), order[: best["k"]])
            n_kept = path.index(best) + 1
            self.path, self.beyond = path[:n_kept], path[n_kept:]

    def further(self, ranked: Callable[[Mask], Order], most: int, *, forced: bool = False) -> bool:
        """Ablate more, few at a time by gain over what others lose; say if any were worth it."""
        start = self.k
        while self.k < most:
            last, tried = self.path[-1], ranked(self.mask)[:_SHORTLIST]
            masks = self._without(tried[:, None])
            steps = self.steps(masks)
            worth = [self._worth(step) for step in steps]
            if not forced:  # the best of them together as well
                order = [i for i in np.argsort(-np.array(worth), kind="stable") if worth[i] > 0]
                sizes = [n for n in _TOGETHER if n <= min(len(order), most - self.k)]
                masks = np.concatenate([masks, self._without([tried[order[:n]] for n in sizes])])
                steps += self.steps(masks[len(tried) :]) if sizes else []
            # the best of many steps is lucky with the few rows near the boundary; margins are not
            least = self.path[0]["guard_smooth"] - self.wish.max_drop
            allowed = [
                i
                for i, step in enumerate(steps)
                if forced or (self._harmless(step) and step["guard_smooth"] >= least)
            ]
            # as many together as keep half of the best one's worth
            half = max((self._worth(steps[i]) for i in allowed), default=0.0) / 2
            cheap = [i for i in allowed if forced or self._worth(steps[i]) >= half]
            best = max(cheap, key=lambda i: steps[i]["aim"], default=None)
            if best is None or not (forced or steps[best]["aim"] >= last["aim"] + _LEAST_GAIN):
                break
            self.mask = masks[best]
            self.path.append(steps[best])
        return self.k > start

    def predicted(self, fit: Any, mask: Mask) -> Order:
        """Rank what is left by linear models, from where rows stand now: mask (n_components,)."""
        now = {name: seen[0] for name, seen in self._seen(mask[None]).items()}
        sign = 1 if self.wish.direction == "increase" else -1

        def gains(name: str, rows: NDArray[np.intp]) -> Array:
            gone = self._smooth(now[name] - fit.coefficients[rows])
            return np.asarray(gone - self._smooth(now[name]))

        gain = sign * gains("target", self.wish.targets).mean(0)
        harm = np.zeros(len(gain))
        if "reference" in now:
            harm = np.maximum(-gains("reference", self.wish.references), 0.0).mean(0)
        order = _by_ratio(gain, harm)
        return order[mask[order]]

    def _without(self, sets: Any) -> Mask:
        """Masks with more gone: sets of components -> (len(sets), n_components)."""
        masks = np.repeat(self.mask[None], len(sets), 0)
        for mask, gone in zip(masks, sets, strict=True):
            mask[gone] = False
        return masks

    def _worth(self, step: dict[str, Any]) -> float:
        """Say what a step wins for what the others lose."""
        last = self.path[-1]
        fall = max(last["guard_smooth"] - step["guard_smooth"], 0.0)
        worth: float = (step["aim"] - last["aim"]) / (fall + self.wish.max_drop / 20 + 1e-6)
        return worth

    def report(self) -> dict[str, Any]:
        """Say what was done, with a line for each group."""
        before, after = self.path[0], self.path[-1]
        beyond = [step for step in self.beyond if step["k"] > self.k]
        said: dict[str, Any] = {"k": self.k, "path": self.path + beyond}
        if "target_output" in before:
            said["realised_change"] = after["target_output"] - before["target_output"]
        if "groups" in before:
            said["groups"] = {
                name: {"before": before["groups"][name], "after": after["groups"][name]}
                for name in before["groups"]
            }
        return said

    def _harmless(self, step: dict[str, Any]) -> bool:
        first, drop = self.path[0], self.wish.max_drop + 1e-12
        if not self.wish.worst_group:
            return bool(step["guard_score"] >= first["guard_score"] - drop)
        kept = step["guard_mean"] >= first["guard_mean"] - drop
        return bool(kept and step["guard_score"] >= first["guard_score"])

    def _seen(self, masks: Mask) -> dict[str, Array]:
        """Run masks (m, n_components): outputs, and whether they are right, (2, n, m)."""

        def both(outputs: Tensor, asked: Asked) -> Tensor:
            values = self.measure(outputs, asked).reshape(len(asked), -1).double().mean(1)
            return torch.stack([values, _right(outputs, asked).to(values)], 1)

        gates = torch.as_tensor(masks, dtype=torch.float32)
        return {
            name: self.circuit.outputs(asked, both, gates).numpy().transpose(1, 0, 2)  # type: ignore[arg-type]
            for name, asked in self.watched.items()
        }

    def _step(self, seen: dict[str, Array]) -> dict[str, Any]:
        """Sum up one mask: outputs and whether right, (2, n), of all that is watched."""
        step: dict[str, Any] = {"guard_score": 1.0, "guard_smooth": 1.0}
        for name, (output, right) in seen.items():
            kept = output if np.isnan(right).any() else right
            score = float(kept.mean())
            if name != "target":
                smooth = float(self._smooth(output).mean())
                step |= {"guard_score": score, "guard_smooth": smooth}
            if name != "guard":
                step[f"{name}_output"] = float(output.mean())
                step |= {} if kept is output else {f"{name}_accuracy": score}
                continue
            assert self.guard is not None
            step["guard_mean"] = score
            if self.guard.groups is not None:
                step["groups"] = _means(kept, self.guard.groups)
                step["guard_mean"] = float(np.mean(list(step["groups"].values())))
                step["guard_score"] = min(step["groups"].values())
        return {**step, "aim": self._aim(seen)}

    def _aim(self, seen: dict[str, Array]) -> float:
        if self.wish.worst_group:
            assert self.guard is not None
            smooth = self._smooth(seen["guard"][0])
            means = list(_means(smooth, self.guard.groups).values())
            return min(means) + 0.1 * float(np.mean(means))
        sign = 1 if self.wish.direction == "increase" else -1
        return sign * float(self._smooth(seen["target"][0]).mean())

    def _smooth(self, outputs: Array) -> Array:
        if self.measure.output != "margin":
            return outputs / self.width
        smooth: Array = 1 / (1 + np.exp(-outputs / self.width))
        return smooth


def edit(search: Search, fit: Any) -> dict[str, Any]:
    """Choose what to ablate, by linear models of the rows: the search's mask, and a report."""
    wish = search.wish
    own = wish.order(fit, wish.criterion)
    n_components = len(own)
    if wish.k == "auto":
        candidates = grid_of_k(n_components)
        search.along(own, candidates)
        if wish.criterion == "budgeted":  # the released ranking may know better
            search.along(wish.order(fit, "welch"), candidates)
            ends = [search, replace(search, beyond=[])]  # from there, and from the network intact
            for end in ends:
                end.further(partial(end.predicted, fit), n_components)
            best = max(ends, key=lambda end: end.path[-1]["aim"])
            search.mask, search.path, search.beyond = best.mask, best.path, best.beyond
    else:
        k = int(wish.k)
        steps = [step for step in grid_of_k(max(k, 1), k) if 0 < step <= k]
        search.mask[own[:k]] = False
        for step in sorted({*steps, k} - {0}):
            search.path += search.steps(~np.isin(np.arange(n_components), own[:step])[None])
    gone = ~search.mask
    return {
        **search.report(),
        "order": own,
        "direction": wish.direction,
        "criterion": wish.criterion,
        "predicted_change": float(-fit.coefficients[wish.targets][:, gone].sum(1).mean()),
    }


def raise_worst(
    search: Search, fit: Any, outputs: Array, groups: NDArray[Any], most: int, *, forced: bool
) -> bool:
    """Ablate for the worst group, in the order of linear models: outputs, groups (n_examples,)."""
    present = [name for name in search.path[0]["groups"] if (groups == name).any()]
    means = np.array([outputs[groups == name].mean() for name in present])
    falls = np.stack([fit.coefficients[groups == name].mean(0) for name in present])
    start = search.mask

    def ranked(mask: Mask) -> Order:
        here = means - falls[:, start & ~mask].sum(1)
        left = np.flatnonzero(mask)
        predicted = (here[:, None] - falls[:, left]).min(0)
        return left[np.argsort(-predicted, kind="stable")]

    return search.further(ranked, min(most, search.k + _STEPS), forced=forced)


def rows_of(selection: Any, n_rows: int, name: str) -> NDArray[np.intp]:
    """Resolve a selection of rows."""
    if selection is None:
        return np.arange(n_rows)
    rows = np.atleast_1d(np.asarray(selection))
    if rows.dtype == bool:
        if rows.shape != (n_rows,):
            raise ValueError(
                f"{name} is a boolean mask of shape {rows.shape}; the rows of fit are {n_rows}."
            )
        rows = np.flatnonzero(rows)
    elif rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise ValueError(f"{name} must be row indices or a boolean mask over the rows of fit.")
    if not len(rows):
        raise ValueError(f"{name} selects no row.")
    if rows.min() < -n_rows or rows.max() >= n_rows:
        raise ValueError(f"{name} names row {rows.max()}; fit was given {n_rows} rows.")
    resolved: NDArray[np.intp] = rows % n_rows
    return resolved


def wish_of(target: Any, reference: Any, n_rows: int, **options: Any) -> Wish:
    """Read whose outputs are to change: the others are spared unless some are named."""
    targets = rows_of(target, n_rows, "target")
    if reference is None:
        return Wish(targets, np.setdiff1d(np.arange(n_rows), targets), **options)
    return Wish(targets, rows_of(reference, n_rows, "reference"), **options)


def _means(values: Array, groups: Any) -> dict[Any, float]:
    return {name: float(values[groups == name].mean()) for name in np.unique(groups).tolist()}


def _right(outputs: Tensor, asked: Asked) -> Tensor:
    """Whether rows are right, NaN where they have no label each: outputs (n, ...) -> (n,)."""
    targets = asked.targets
    if targets is None or targets.is_floating_point() or targets.ndim > 1:
        return torch.full((len(outputs),), torch.nan)
    several = outputs.ndim == 2 and outputs.shape[1] > 1
    return outputs.argmax(1).eq(targets) if several else torch.full((len(outputs),), torch.nan)
