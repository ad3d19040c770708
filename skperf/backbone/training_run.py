"""A training as a record: what a run again, forwards or backwards, needs to know of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from skperf.backbone.losses import Loss
from skperf.backbone.randomness import drawing_from
from skperf.backbone.rows import Rows
from skperf.backbone.views import own_copy

# the states beside the weights of the optimizers that a run can be gone back through
SLOTS: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
}
Settings = dict[str, Any]
Compute = Callable[[nn.Module, Rows], Tensor]


@dataclass(frozen=True)
class Step:
    """One step of a training."""

    rows: Tensor  # (b,), the training rows of its batch
    settings: tuple[Settings, ...]  # of each parameter group
    stream: int | Tensor | None = None  # seed, or state, of the numbers that its forward draws
    batch: tuple[Rows, Tensor] | None = None  # as seen, where it differs from the training rows


@dataclass(frozen=True, eq=False)
class Data:
    """The rows that a run trains on."""

    inputs: Rows  # (n, ...), on the device, in the network's types
    targets: Tensor  # (n, ...)
    weights: Tensor | None = None  # (n,), those the run was fitted with

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, step: Step) -> tuple[Rows, Tensor]:
        """Gather the batch of a step: -> (b, ...), (b, ...)."""
        if step.batch is not None:
            return step.batch
        rows = step.rows.long()
        return self.inputs[rows].load(), self.targets[rows]


@dataclass(frozen=True, eq=False)
class Run:
    """A training from its first step to its last."""

    module: nn.Module  # ours, with the initial weights; copied before it is trained
    loss: Loss
    optimizer: type[Optimizer]
    groups: tuple[tuple[str, ...], ...]  # names of the parameters that train
    steps: list[Step]
    compute: Compute
    data: Data | None = None
    max_norm: float | None = None  # at which the gradient is clipped
    masks: dict[str, Tensor] = field(default_factory=dict)  # entries that train, by parameter
    states: list[Tensor] | None = None  # (n_steps + 1) states, where they were kept
    end: Tensor | None = None  # the last state, as trained
    base_lr: tuple[float, ...] = ()  # of each group, before any schedule

    @property
    def names(self) -> list[str]:
        """Names of the parameters that train."""
        return [name for group in self.groups for name in group]

    @property
    def slots(self) -> tuple[str, ...]:
        """What the optimizer keeps beside the weights."""
        kept = SLOTS[self.optimizer]
        if self.optimizer is torch.optim.SGD and not any(
            settings["momentum"] for settings in self.steps[0].settings
        ):
            return ()
        return kept

    def with_data(self, data: Data) -> "Run":
        """Give the run its rows again."""
        highest = max(int(step.rows.max()) for step in self.steps)
        if highest >= len(data):
            raise ValueError(
                f"X holds {len(data)} rows, but the run trained on row {highest}; pass the rows "
                "that it was trained on, in their order."
            )
        return replace(self, data=data)

    def __getstate__(self) -> dict[str, Any]:
        # the rows and the kept states are large, and can be had again
        return {**self.__dict__, "data": None, "states": None}


def mean_loss(
    loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Weighted sum over the number of rows, which a row of weight 0 still counts in.

    Shapes: outputs (n, ...), targets (n, ...), weights (n,) -> ().
    """
    losses = loss.value(outputs, targets)
    own = loss.weights(targets)
    if own is not None:
        losses = losses * own
    return (losses if weights is None else losses * weights).mean()


def outputs_of(module: nn.Module, inputs: Rows) -> Tensor:
    """Run a module on rows in its own way of taking them: (n, ...) -> (n, ...)."""
    tree = inputs.tree
    if isinstance(tree, dict):
        returned = module(**tree)
    else:
        returned = module(*tree) if isinstance(tree, tuple) else module(tree)
    if isinstance(returned, Tensor):
        return returned
    outputs = returned[0] if isinstance(returned, tuple) else returned["logits"]
    assert isinstance(outputs, Tensor)
    return outputs


def seeded(*numbers: int) -> torch.Generator:
    """Start a stream of its own for every tuple of numbers, such as a seed and a step."""
    mixed = 0
    for number in numbers:  # a 64-bit mix, so that neighbours have nothing in common
        mixed = (mixed ^ number) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed >> 1)


def drawing(stream: int | Tensor | None) -> AbstractContextManager[Any]:
    """Let a forward draw what it drew when the step was taken."""
    if stream is None:
        return nullcontext()
    if isinstance(stream, int):
        return drawing_from(torch.Generator().manual_seed(stream))
    generator = torch.Generator()
    generator.set_state(stream)
    return drawing_from(generator)


def floating_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a training may change, counters included."""
    return {n: b for n, b in module.named_buffers() if b.is_floating_point() or b.ndim == 0}


def clip_gradients(gradients: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a norm, in place, as torch's clip_grad_norm_: -> factor ()."""
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return factor


class Trainer:
    """A copy of a run's network, at some step of the run."""

    def __init__(self, run: Run) -> None:
        if run.data is None:
            raise ValueError(
                "the run does not hold its rows (a run that was pickled leaves them out); give "
                "them again: X and y as at fit."
            )
        self.run = run
        self.module = own_copy(run.module)
        self.module.train()
        self.taken = 0
        named = dict(self.module.named_parameters())
        self.parameters = [named[name] for name in run.names]
        trained = {id(parameter) for parameter in self.parameters}
        for parameter in named.values():
            parameter.requires_grad_(id(parameter) in trained)
        self.buffers = list(floating_buffers(self.module).values())
        self.initial = {n: named[n].detach().clone() for n in run.masks}
        first = run.steps[0].settings
        groups = [
            {**settings, "params": [named[name] for name in group]}
            for group, settings in zip(run.groups, first, strict=True)
        ]
        # what the groups do not say is the optimizer's default
        self.optimizer = run.optimizer(groups)  # type: ignore[call-arg]
        self.settings = first

    def step(self, weights: Tensor | None = None) -> None:
        """Take the next step, with weights (n,) on the rows' losses."""
        run, step = self.run, self.run.steps[self.taken]
        assert run.data is not None
        inputs, targets = run.data.batch(step)
        own = None if weights is None else weights[step.rows.long()]
        self.optimizer.zero_grad()
        with torch.enable_grad():
            with drawing(step.stream):
                outputs = run.compute(self.module, inputs)
            mean_loss(run.loss, outputs, targets, own).backward()  # type: ignore[no-untyped-call]
        mask_gradients(self.module, run.masks)
        if run.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, run.max_norm)
        if step.settings is not self.settings:
            self.settings = step.settings
            for group, settings in zip(self.optimizer.param_groups, step.settings, strict=True):
                group.update(settings)
        self.optimizer.step()
        restore_masked(self.module, run.masks, self.initial)
        self.taken += 1

    def state(self) -> Tensor:
        """Everything that the next step starts from, as one vector (n_values,)."""
        slots = [
            self._slot(parameter, name) for name in self.run.slots for parameter in self.parameters
        ]
        tensors = [*self.parameters, *slots, *self.buffers]
        dtype = self.parameters[0].dtype
        return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])

    def load(self, state: Tensor, taken: int) -> None:
        """Go to another step: state (n_values,)."""
        parts = split_state(self.run, self.module, state)
        with torch.no_grad():
            for own, value in zip(self.parameters, parts.parameters, strict=True):
                own.copy_(value)
            for own, value in zip(self.buffers, parts.buffers, strict=True):
                own.copy_(value)
        self.optimizer.state.clear()
        self.taken = taken
        if not taken:
            return
        for i, parameter in enumerate(self.parameters):
            kept = {name: parts.slots[k][i].clone() for k, name in enumerate(self.run.slots)}
            if self.run.optimizer is not torch.optim.SGD:
                kept["step"] = torch.tensor(float(taken))
            self.optimizer.state[parameter] = kept

    def _slot(self, parameter: Tensor, name: str) -> Tensor:
        kept = self.optimizer.state.get(parameter, {}).get(name)
        return torch.zeros_like(parameter) if kept is None else kept


@dataclass(frozen=True)
class State:
    """A state, cut into its tensors."""

    parameters: list[Tensor]
    slots: list[list[Tensor]]  # one list a slot of the optimizer
    buffers: list[Tensor]


def split_state(run: Run, module: nn.Module, state: Tensor) -> State:
    """Cut states into tensors, as views: state (..., n_values)."""
    named = dict(module.named_parameters())
    own = [named[name] for name in run.names]
    buffers = list(floating_buffers(module).values())
    like = [*own * (1 + len(run.slots)), *buffers]
    pieces = state.split([tensor.numel() for tensor in like], -1)
    shaped = [
        piece.view([*state.shape[:-1], *tensor.shape])
        for piece, tensor in zip(pieces, like, strict=True)
    ]
    n, n_slots = len(own), len(run.slots)
    slots = [shaped[n * (k + 1) : n * (k + 2)] for k in range(n_slots)]
    return State(shaped[:n], slots, shaped[n * (1 + n_slots) :])


def mask_gradients(module: nn.Module, masks: dict[str, Tensor]) -> None:
    """Leave only the entries that train in the gradients."""
    for name, mask in masks.items():
        gradient = module.get_parameter(name).grad
        if gradient is not None:
            gradient.mul_(mask)


def restore_masked(
    module: nn.Module, masks: dict[str, Tensor], initial: dict[str, Tensor]
) -> None:
    """Put entries that do not train back, whatever decay did to them."""
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = module.get_parameter(name)
            parameter.copy_(torch.where(mask, parameter, initial[name]))


def train_again(run: Run, weights: Tensor | None = None) -> Trainer:
    """Take all steps of a run anew, with weights (n,) on the rows' losses."""
    trainer = Trainer(run)
    for _ in run.steps:
        trainer.step(weights)
    return trainer


def states_between(trainer: Trainer, start: Tensor, first: int, last: int) -> Iterator[Tensor]:
    """Give the states at steps first, ..., last, each (n_values,)."""
    assert trainer.run.data is not None
    trainer.load(start, first)
    yield start
    for _ in range(first, last):
        trainer.step(trainer.run.data.weights)
        yield trainer.state()
