"""Influence through a training run: the derivative of the whole run, by going back through it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from joblib import effective_n_jobs
from torch import Tensor, nn

from skperf.backbone._workers import leaves_the_process, spread
from skperf.backbone.progress import track
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import (
    Run,
    State,
    Step,
    Trainer,
    split_state,
    states_between,
    train_again,
)
from skperf.backbone.views import own_copy
from skperf.influence.replay_products import Differentiator
from skperf.influence.replay_queries import Basis, Value, basis_of, query_gradients
from skperf.influence.replay_steps import (
    BACK,
    HYPERPARAMETERS,
    Adjoint,
    Moment,
    back_through_clipping,
    dot,
)
from skperf.influence.replay_store import Shelf, state_at

Visited = tuple[int, Tensor, Tensor]  # a step, the state before it and the state after it
_COPIES = 6  # of an adjoint that are alive at once while a step is gone back through
_CACHED = 2**20  # bytes of adjoints that are worked on together


@dataclass(frozen=True)
class Budget:
    """What going back may use."""

    memory: int = 2**30  # bytes
    tolerance: float = 1e-4  # relative error of each query's gradient in the common basis
    folder: str | None = None  # where checkpoints are kept, if not in memory
    verbose: int = 0
    n_jobs: int | None = None  # groups of directions that go back side by side, through joblib


@dataclass(frozen=True)
class Derivative:
    """Derivatives of what was asked about, for each of m directions or queries."""

    rows: Tensor  # (m, n), by the weights of the training rows
    hyperparameters: dict[str, Tensor]  # (m,) each
    labels: Tensor | None = None  # (m, n, K), by the shares of their labels

    def combined(self, coefficients: Tensor) -> "Derivative":
        """Give queries their sums of directions: coefficients (q, m)."""
        labels = self.labels
        if labels is not None:
            labels = torch.tensordot(coefficients, labels, dims=1).cpu()
        named = {name: (coefficients @ value).cpu() for name, value in self.hyperparameters.items()}
        return Derivative((coefficients @ self.rows).cpu(), named, labels)


# The way back ----------------------------------------------------------------------------------


@dataclass
class Pass:
    """How far the way back has come, for each of m directions; the tensors change in place."""

    adjoints: list[Adjoint]  # the directions in pieces, each small enough for the cache
    rows: Tensor  # (n, m)
    hyperparameters: dict[str, Tensor]  # (m,) each; empty where not asked about
    labels: Tensor | None = None  # (n, m, K)

    @classmethod
    def start(
        cls, run: Run, directions: Tensor, *, hyperparameters: bool, n_labels: int | None
    ) -> "Pass":
        """Start from gradients by the last weights and buffers: directions (m, p)."""
        assert run.data is not None
        n, m = len(run.data), len(directions)
        size = max(4, _CACHED // (directions.shape[1] * directions.element_size()))
        pieces = [adjoint_of(run, part) for part in directions.split(size)]
        named = {
            name: directions.new_zeros(m)
            for group in range(len(run.groups) * hyperparameters)
            for name in hyperparameter_names(run, group)
        }
        labels = None if n_labels is None else directions.new_zeros(n, m, n_labels)
        return cls(pieces, directions.new_zeros(n, m), named, labels)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name, to be kept or restored."""
        adjoints = {
            f"adjoint.{k}.{i}": tensor
            for k, adjoint in enumerate(self.adjoints)
            for i, tensor in enumerate(adjoint.tensors)
        }
        labels = {} if self.labels is None else {"labels": self.labels}
        return {**adjoints, "rows": self.rows, **self.hyperparameters, **labels}

    def derivative(self) -> Derivative:
        """Read off what the steps gone back through give."""
        labels = None if self.labels is None else self.labels.transpose(0, 1)
        return Derivative(self.rows.T, self.hyperparameters, labels)


@torch.no_grad()
def go_back(run: Run, state: Pass, visited: Iterator[Visited]) -> Iterator[int]:
    """Go back step by step, adding each one's share; gives the step's number once it is done."""
    assert run.data is not None
    module = own_copy(run.module)
    differentiator = Differentiator(
        run, module, labels=0 if state.labels is None else state.labels.shape[2]
    )
    masks = [run.masks.get(name) for name in run.names]
    reads_gradients = run.optimizer is not torch.optim.SGD or run.max_norm is not None
    known: tuple[Tensor, State] | None = None
    for t, first, last in visited:
        step, before = run.steps[t], split_state(run, module, first)
        after = known[1] if known and known[0] is last else split_state(run, module, last)
        known = first, before
        taken = differentiator.take(step, before.parameters, before.buffers, run.data.weights)
        raw = taken.gradients() if reads_gradients else []
        if raw:
            _mask(raw, masks)
        moment = Moment(before, after, _clipped(raw, run.max_norm), t + 1)
        rows, start = step.rows.long().to(state.rows.device), 0
        for adjoint in state.adjoints:
            part = slice(start, start + len(adjoint.parameters[0]))
            start = part.stop
            _mask(adjoint.parameters, masks)
            towards, scale = _towards(run, step, adjoint, moment, state.hyperparameters, part)
            if run.max_norm is not None:
                towards = back_through_clipping(towards, raw, run.max_norm)
            _mask(towards, masks)
            by_rows, labels = taken.pull(towards, adjoint.parameters, adjoint.buffers, scale)
            state.rows[:, part].index_add_(0, rows, by_rows.T)
            if state.labels is not None and labels is not None:
                state.labels[:, part].index_add_(0, rows, labels.transpose(0, 1))
        yield t


def _towards(
    run: Run, step: Step, adjoint: Adjoint, moment: Moment, named: dict[str, Tensor], part: slice
) -> tuple[list[Tensor], float]:
    """Go back through the optimizer, to the gradients it took: (m, ...) each, times a number."""
    if len(run.groups) == 1 and not named:
        every = range(len(adjoint.parameters))
        towards, scale, _ = BACK[run.optimizer](adjoint, every, step.settings[0], moment, False)
        return towards, scale
    towards = list(adjoint.parameters)
    places = {name: i for i, name in enumerate(run.names)}
    for k, (names, settings) in enumerate(zip(run.groups, step.settings, strict=True)):
        group = [places[name] for name in names]
        base = run.base_lr[k] if run.base_lr else 0
        rate, decay = hyperparameter_names(run, k)
        if named and settings["lr"] and base:
            # every rule moves the weights in proportion to the rate, and schedules scale its base
            moves = [moment.after.parameters[i] - moment.before.parameters[i] for i in group]
            named[rate][part] += dot([adjoint.parameters[i] for i in group], moves) / base
        back, scale, along = BACK[run.optimizer](adjoint, group, settings, moment, bool(named))
        if along is not None:
            named[decay][part] += along
        for i, toward in zip(group, back, strict=True):
            towards[i] = toward * scale
    return towards, 1.0


def hyperparameter_names(run: Run, group: int) -> list[str]:
    """Name the derivatives by a parameter group's settings."""
    more = f".{group}" if len(run.groups) > 1 else ""
    return [f"{name}{more}" for name in HYPERPARAMETERS]


def _mask(tensors: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    for tensor, mask in zip(tensors, masks, strict=True):
        if mask is not None:
            tensor.mul_(mask)


def _clipped(gradients: Sequence[Tensor], max_norm: float | None) -> list[Tensor]:
    if max_norm is None:
        return list(gradients)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


# States on the way ------------------------------------------------------------------------------


def visit_backwards(
    run: Run, budget: Budget, shelf: Shelf | None = None, last: int | None = None
) -> Iterator[Visited]:
    """Give the states around every step, last step first, within a budget of memory."""
    n_steps = len(run.steps) if last is None else last
    if run.states is not None:
        for t in range(n_steps - 1, -1, -1):
            yield t, run.states[t], run.states[t + 1]
        return
    trainer = Trainer(run)
    start = trainer.state()
    size = start.numel() * start.element_size()
    n_slots = max(0, budget.memory // 2 // size)
    if n_slots < 4:
        raise ValueError(
            f"memory_budget={budget.memory} is too small: one state of this run (weights, "
            f"optimizer, buffers) has {size} bytes and at least 4 must fit into half of it; "
            f"needed are {8 * size} bytes."
        )
    yield from _between(trainer, start, 0, n_steps, n_slots, shelf)


def _between(
    trainer: Trainer, start: Tensor, first: int, last: int, n_slots: int, shelf: Shelf | None
) -> Iterator[Visited]:
    if last - first < n_slots:
        states = list(states_between(trainer, start, first, last))
        while len(states) > 1:
            after = states.pop()
            yield first + len(states) - 1, states[-1], after
        return
    length, left = _segment(last - first, n_slots, on_disk=shelf is not None)
    starts = list(range(first, last, length))
    kept: Any = {} if shelf is None else shelf
    missing = [t for t in starts if t not in kept]
    if missing:
        at = max((t for t in starts if t < missing[0]), default=first)
        state = state_at(at, kept, trainer, start, first)
        for t, one in enumerate(states_between(trainer, state, at, missing[-1]), at):
            if t in missing:
                kept[t] = one
    for at in reversed(starts):
        # only the outermost checkpoints are worth a place on disk
        state = state_at(at, kept, trainer, start, first)
        yield from _between(trainer, state, at, min(at + length, last), left, None)
        del kept[at]


def _segment(n_steps: int, n_slots: int, *, on_disk: bool) -> tuple[int, int]:
    """Length of the segments between checkpoints, and the slots left inside one."""
    if on_disk:
        return max(1, min(n_slots - 1, round(n_steps**0.5))), n_slots
    for n_pieces in range(2, n_slots):
        length = -(-n_steps // n_pieces)
        if length + 1 + n_pieces <= n_slots:
            return length, n_slots - n_pieces
    # one more pass over the steps for every level of checkpoints within checkpoints
    n_pieces = max(2, n_slots // 2)
    return -(-n_steps // n_pieces), max(2, n_slots - n_pieces)


def adjoint_of(run: Run, directions: Tensor) -> Adjoint:
    """Start the way back from gradients by the last weights and buffers: (m, p)."""
    parts = split_state(run, run.module, directions, n_slots=0)
    parameters = [part.clone() for part in parts.parameters]
    slots = [[torch.zeros_like(p) for p in parameters] for _ in run.slots]
    return Adjoint(parameters, slots, [part.clone() for part in parts.buffers])


# The fitted record --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Replayed:
    """A run that has been held against its end, ready to be gone back through."""

    run: Run
    end: Tensor  # the last state (n_values,)
    budget: Budget = Budget()

    def influence(
        self, inputs: Rows, targets: Tensor, *, value: Value | None = None, aggregate: bool = False
    ) -> Tensor:
        """How much each query's loss would rise without each training row: -> (q, n)."""
        found = self.derivative(inputs, targets, value=value, aggregate=aggregate)
        assert self.run.data is not None
        weights = self.run.data.weights
        return -found.rows if weights is None else -found.rows * weights.to(found.rows)

    def derivative(
        self,
        inputs: Rows,
        targets: Tensor,
        *,
        value: Value | None = None,
        hyperparameters: bool = False,
        n_labels: int | None = None,
        aggregate: bool = False,
    ) -> Derivative:
        """Everything that is asked of one pass back: inputs (q, ...), targets (q, ...)."""
        basis = self.basis(inputs, targets, value=value, aggregate=aggregate)
        n_jobs = effective_n_jobs(self.budget.n_jobs)
        if n_jobs > 1 and self.budget.folder is not None:
            raise ValueError("Replay(folder=...) keeps one pass at a time: give n_jobs=1.")
        asked: dict[str, Any] = {"hyperparameters": hyperparameters, "n_labels": n_labels}
        # a run leaves its rows and states behind where it is pickled, and states are as many bytes
        # to send as they cost time to compute again
        leaves = leaves_the_process(n_jobs, "threads")
        common = self, self.run.data, None if leaves else self.run.states, asked
        directions = basis.directions
        size = max(1, min(self.at_once // n_jobs, -(-len(directions) // n_jobs)))
        groups = directions.split(size)
        parts = spread(_back, common, groups, n_jobs=self.budget.n_jobs, prefer="threads")
        return _joined(list(parts)).combined(basis.coefficients)

    def basis(
        self, inputs: Rows, targets: Tensor, *, value: Value | None = None, aggregate: bool = False
    ) -> "Basis":
        """Gradients of the queries in a few directions: inputs (q, ...), targets (q, ...)."""
        found = query_gradients(self.run, self.end, inputs, targets, value, aggregate=aggregate)
        return basis_of(found, self.budget.tolerance)

    @property
    def at_once(self) -> int:
        """Directions whose adjoints fit the memory together."""
        one = self.end.numel() * self.end.element_size() * _COPIES
        return max(1, self.budget.memory // 2 // one)

    def back(
        self, directions: Tensor, *, hyperparameters: bool = False, n_labels: int | None = None
    ) -> Derivative:
        """Go back from directions at the end: (m, p)."""
        run, budget = self.run, self.budget
        state = Pass.start(run, directions, hyperparameters=hyperparameters, n_labels=n_labels)
        shelf, last = None, len(run.steps)
        if budget.folder is not None:
            shelf = Shelf(budget.folder, self.end, directions)
            last = shelf.resume(state.tensors, last)
        steps = go_back(run, state, visit_backwards(run, budget, shelf, last))
        for t in track(steps, description="going back", total=last, verbose=budget.verbose):
            if shelf is not None and t in shelf:
                shelf.save_progress(t, state.tensors)
        if shelf is not None:
            shelf.clear()
        return state.derivative()


def _back(common: tuple[Replayed, Any, Any, dict[str, Any]], directions: Tensor) -> Derivative:
    fitted, data, states, asked = common
    run = replace(fitted.run, data=data, states=states)
    return replace(fitted, run=run).back(directions, **asked)


def _joined(parts: Sequence[Derivative]) -> Derivative:
    names = parts[0].hyperparameters
    labels = [part.labels for part in parts if part.labels is not None]
    return Derivative(
        torch.cat([part.rows for part in parts]),
        {name: torch.cat([part.hyperparameters[name] for part in parts]) for name in names},
        torch.cat(labels) if labels else None,
    )


def replayed(run: Run, budget: Budget | None = None, *, check: bool = True) -> Replayed:
    """Hold a run against its end: trained again, it must arrive where it did."""
    budget = Budget() if budget is None else budget
    _check_reversible(run)
    if run.states is not None:
        if check:
            _check_steps(run, run.states)
        return Replayed(run, run.states[-1], budget)
    if run.end is not None and not check:
        return Replayed(run, run.end, budget)
    trainer = Trainer(run)
    weights = None if run.data is None else run.data.weights
    for _ in track(run.steps, description="replaying", verbose=budget.verbose):
        trainer.step(weights)
    end = trainer.state()
    if run.end is not None and not torch.equal(end, run.end):
        worst = float((end - run.end).abs().max())
        raise ValueError(
            f"run does not reproduce its end: trained again it arrives {worst:.3g} away from the "
            "fitted weights. Its rows, their order, the initial weights, the loss or the "
            "optimizer differ from what was recorded, gradients were changed or added up between "
            "backward and step (clip by max_norm=...), or a layer is not deterministic."
        )
    return Replayed(run, end, budget)


def _check_steps(run: Run, states: list[Tensor]) -> None:
    """Take some steps again from where they started: states (n_steps + 1) of (n_values,)."""
    weights = None if run.data is None else run.data.weights
    # all of them would cost as much as the training
    for t in sorted(set(torch.linspace(0, len(run.steps) - 1, 8).long().tolist())):
        trainer = Trainer(run)
        trainer.load(states[t], t)
        trainer.step(weights)
        if not torch.equal(trainer.state(), states[t + 1]):
            raise ValueError(
                f"run does not reproduce its step {t}: taken again it leads elsewhere. The net's "
                "own get_loss or train_step, or a callback, changes the loss, the gradients or the "
                "weights, or a layer is not deterministic."
            )


def _check_reversible(run: Run) -> None:
    name = run.optimizer.__name__
    if run.optimizer not in BACK:
        raise ValueError(
            f"a run of {name} can't be gone back through; "
            f"{', '.join(sorted(known.__name__ for known in BACK))} can."
        )
    if any(settings.get("amsgrad") for settings in run.steps[0].settings):
        raise ValueError(
            f"a run of {name} with amsgrad=True can't be gone back through; train without it."
        )


def smoothness(
    fitted: Replayed,
    inputs: Rows,
    targets: Tensor,
    *,
    n_directions: int = 4,
    share: float = 0.1,
    seed: int = 0,
) -> float:
    """Agreement of predicted and actual changes of queries when random rows are left out.

    The mean over queries of the cosine between the two, over a few draws of a share of the rows:
    1 where the derivative says what retraining does. Shapes: inputs (q, ...), targets (q, ...).
    """
    run = fitted.run
    assert run.data is not None
    n = len(run.data)
    order = torch.rand(n_directions, n, generator=torch.Generator().manual_seed(seed)).argsort(1)
    given = run.data.weights
    weights = torch.ones(n, dtype=fitted.end.dtype) if given is None else given.cpu()
    moves = torch.zeros(n_directions, n).scatter_(1, order[:, : max(1, round(share * n))], 1.0)
    moves = moves.to(weights) * weights
    predicted = -fitted.derivative(inputs, targets).rows @ moves.T
    base, *again = retrained(run, [weights, *(weights - moves)], inputs, targets)
    actual = torch.stack(again, 1) - base[:, None]
    # every query counts alike, also one whose loss hardly moves
    return float(torch.nn.functional.cosine_similarity(predicted, actual, 1, 1e-30).mean())


def retrained(
    run: Run, weights: Iterable[Tensor], inputs: Rows, targets: Tensor
) -> Iterator[Tensor]:
    """Train again with each of some weights of rows (n,), and give the losses of queries (q,)."""
    return (losses_at(run, train_again(run, w).module, inputs, targets) for w in weights)


def losses_at(run: Run, module: nn.Module, inputs: Rows, targets: Tensor) -> Tensor:
    """Plain losses of rows, the module in evaluation mode: (q, ...), (q, ...) -> (q,)."""
    module.eval()
    parts, targets = [], targets.to(next(module.parameters()).device)
    with torch.no_grad():
        for i in range(0, len(inputs), 256):
            outputs = run.compute(module, inputs[i : i + 256].load())
            parts.append(run.loss.value(outputs, targets[i : i + 256]).cpu())
    return torch.cat(parts)
