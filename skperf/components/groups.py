"""Raise the worst of several groups, one component after another, by true passes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skperf.components.edits import Guarded
from skperf.components.gates import Circuit
from skperf.components.measures import Measure

Array = NDArray[np.float64]
_SHORTLIST = 24
_STEPS = 8
_LEAST_GAIN = 0.003


@dataclass
class WorstGroup:
    """A search for components whose loss raises the worst group and harms no other below it."""

    circuit: Circuit
    measure: Measure
    guard: Guarded
    max_drop: float
    mask: NDArray[np.bool_] = field(init=False)
    path: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.mask = np.ones(self.circuit.n_components, bool)
        margins = self._margins(self.mask[None])
        # accuracies of few rows jump; a smooth step as wide as margins are moves with each row
        self.width = max(float(np.abs(margins).mean()), 1e-9)
        self.path = [self._step(margins[:, 0])]

    @property
    def k(self) -> int:
        """Number of components gone."""
        return int((~self.mask).sum())

    def go_on(
        self,
        attributions: Array,
        outputs: Array,
        groups: NDArray[Any],
        most: int,
        *,
        forced: bool = False,
    ) -> bool:
        """Ablate a few more, tried in the order the linear model names; say if any were worth it.

        Shapes: attributions (n_examples, n_components), outputs (n_examples,), groups
        (n_examples,).
        """
        names = list(self.path[0]["groups"])
        present = [name for name in names if (groups == name).any()]
        means = np.array([outputs[groups == name].mean() for name in present])
        falls = np.stack([attributions[groups == name].mean(0) for name in present])
        start = self.k
        while self.k < min(most, start + _STEPS):
            left = np.flatnonzero(self.mask)
            predicted = (means[:, None] - falls[:, left]).min(0)
            tried = left[np.argsort(-predicted, kind="stable")[:_SHORTLIST]]
            masks = np.repeat(self.mask[None], len(tried), 0)
            masks[np.arange(len(tried)), tried] = False
            margins = self._margins(masks)
            steps = [self._step(margins[:, i]) for i in range(len(tried))]
            allowed = [i for i, step in enumerate(steps) if forced or self._harmless(step)]
            if not allowed:
                break
            best = max(allowed, key=lambda i: steps[i]["aim"])
            if not forced and steps[best]["aim"] < self.path[-1]["aim"] + _LEAST_GAIN:
                break
            self.mask = masks[best]
            self.path.append({**steps[best], "k": self.k})
            means = means - falls[:, tried[best]]
        return self.k > start

    def report(self) -> dict[str, Any]:
        """Say what was done, with a line for each group."""
        before, after = self.path[0]["groups"], self.path[-1]["groups"]
        lines = {name: {"before": before[name], "after": after[name]} for name in before}
        return {"k": self.k, "path": self.path, "groups": lines}

    def _harmless(self, step: dict[str, Any]) -> bool:
        first = self.path[0]
        kept = step["guard_mean"] >= first["guard_mean"] - self.max_drop
        return bool(kept and step["guard_score"] >= first["guard_score"])

    def _margins(self, masks: NDArray[np.bool_]) -> Array:
        gates = torch.as_tensor(masks, dtype=torch.float32)
        margins: Array = (
            self.circuit.outputs(self.guard.asked, self.measure, gates).double().numpy()
        )
        return margins

    def _step(self, margins: Array) -> dict[str, Any]:
        assert self.guard.groups is not None
        soft, right = 1 / (1 + np.exp(-margins / self.width)), margins > 0
        names = np.unique(self.guard.groups).tolist()
        lines = {g: float(right[self.guard.groups == g].mean()) for g in names}
        smooth = [float(soft[self.guard.groups == g].mean()) for g in names]
        return {
            "k": self.k,
            "groups": lines,
            "guard_score": min(lines.values()),
            "guard_mean": float(np.mean(list(lines.values()))),
            "aim": min(smooth) + 0.1 * float(np.mean(smooth)),
        }
