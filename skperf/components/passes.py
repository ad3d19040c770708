"""Run the passes of a plan, in pieces and in any order of workers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skperf.backbone._workers import spread
from skperf.backbone.progress import track
from skperf.components.designs import Plan, bernoulli_masks, path_gates
from skperf.components.gates import Asked, Circuit
from skperf.components.measures import Measure
from skperf.components.priors import PathSums

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """What is measured: a circuit, examples and an output."""

    circuit: Circuit
    asked: Asked  # (n_rows, ...)
    measure: Measure
    seed: int
    fraction: float
    alike: bool = False

    @property
    def n_rows(self) -> int:
        """Number of rows; each may give several numbers, which count as examples."""
        return len(self.asked)

    @property
    def n_components(self) -> int:
        """Number of gates."""
        return self.circuit.n_components

    @property
    def n_groups(self) -> int:
        """Passes in a round: the share under test has twice the fraction ablated."""
        return max(2, round(1 / (2 * self.fraction)))

    def gates(self, number: int) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
        """Gates of one gradient pass, and which are under test: two (n_rows, n_components)."""
        rows = range(1) if self.alike else range(self.n_rows)
        gates, tested = path_gates(self.seed, number, rows, self.n_components, self.n_groups)
        shape = (self.n_rows, self.n_components)
        return np.broadcast_to(gates, shape), np.broadcast_to(tested, shape)

    def masks(self, numbers: range) -> NDArray[np.bool_]:
        """Random masks of a fit: -> (len(numbers), n_components)."""
        return bernoulli_masks(self.seed, numbers, self.n_components, self.fraction)

    def outcomes(self, masks: NDArray[Any], first: int = 0) -> Array:
        """Compute true outputs under masks: masks (m, n_components) -> (m, n_examples)."""
        tensor = torch.as_tensor(np.asarray(masks, np.float32))
        values = self.circuit.outputs(self.asked, self.measure, tensor, first=first)
        outcomes: Array = values.flatten(0, -2).T.double().numpy()
        if not np.isfinite(outcomes).all():
            mask, row = np.argwhere(~np.isfinite(outcomes))[0]
            ablated = np.flatnonzero(np.asarray(masks)[mask] == 0)
            names = [self.circuit.wiring.components[i].name for i in ablated[:1]]
            raise ValueError(
                f"the output of example {row} is not finite under mask {first + mask} "
                f"(seed {self.seed}), which ablates {len(ablated)} components"
                + (f", the first {names[0]}." if names else ".")
            )
        return outcomes


@dataclass
class Measurements:
    """What has been measured on some examples so far."""

    baseline: Array  # (n_examples,)
    n_components: int
    done: Plan = field(default_factory=Plan)
    paths: PathSums | None = None
    path_values: list[Array] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)
    singles: list[Array] = field(default_factory=list)

    @property
    def outcomes(self) -> Array:
        """Outputs under the masks, (m, n_examples)."""
        return np.concatenate(self.rows) if self.rows else np.zeros((0, len(self.baseline)))

    @property
    def alone(self) -> Array | None:
        """Fall of the output when each component alone goes, (n_examples, n_components)."""
        # None until all of them have been tried.
        if self.done.singles < self.n_components:
            return None
        return self.baseline[:, None] - np.concatenate(self.singles).T

    def take(self, kind: str, made: Any) -> None:
        """Take in what a worker has measured: gradients, singles or masks."""
        if kind == "gradients":
            sums, made = made
            if self.paths is None:
                self.paths = PathSums(sums.n_components, sums.n_examples)
            self.paths.merge(sums)
        kept = {"gradients": self.path_values, "singles": self.singles, "masks": self.rows}
        kept[kind].append(made)
        self.done = replace(self.done, **{kind: getattr(self.done, kind) + len(made)})


def measure_baseline(question: Question) -> Array:
    """Compute outputs of the intact network: -> (n_examples,)."""
    outputs: Array = question.outcomes(np.ones((1, question.n_components)))[0]
    return outputs


def spend(
    question: Question,
    measured: Measurements,
    plan: Plan,
    *,
    n_jobs: int | None = None,
    verbose: int = 0,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Run the passes of a plan; what is done stays done if it is interrupted."""
    tasks: tuple[tuple[str, Callable[[Question, range], Any], int], ...] = (
        ("gradients", _paths, 8),
        ("singles", _singles, 64),
        ("masks", _masks, 32),
    )
    for kind, task, size in tasks:
        start = getattr(measured.done, kind)
        stop_at = start + getattr(plan, kind)
        pieces = [range(i, min(i + size, stop_at)) for i in range(start, stop_at, size)]
        # threads would share the circuit, whose hooks a pass sets
        results = spread(task, question, pieces, n_jobs=n_jobs, own=True)
        for made in track(results, description=kind, total=len(pieces), verbose=verbose):
            measured.take(kind, made)
            if kind == "masks" and stop is not None and stop():
                break


def intact_gradients(question: Question) -> Array:
    """Compute derivatives at the intact network: -> (n_examples, n_components)."""
    ones = torch.ones(question.n_components)
    _, gradients = question.circuit.gradients(question.asked, question.measure, ones)
    return gradients.double().numpy()


def _paths(question: Question, numbers: range) -> tuple[PathSums, Array]:
    sums = PathSums(question.n_components, question.n_rows)
    values = []
    for number in numbers:
        gates, tested = question.gates(number)
        outputs, gradients = question.circuit.gradients(
            question.asked, question.measure, torch.as_tensor(np.array(gates)), first=number
        )
        sums.add(gradients.double().numpy(), tested)
        values.append(outputs.double().numpy())
    return sums, np.stack(values)


def _masks(question: Question, numbers: range) -> Array:
    return question.outcomes(question.masks(numbers), numbers.start)


def _singles(question: Question, numbers: range) -> Array:
    masks = np.ones((len(numbers), question.n_components), bool)
    masks[np.arange(len(numbers)), np.asarray(numbers)] = False
    return question.outcomes(masks, numbers.start)
