"""A training as a record: what a run again, forwards or backwards, needs to know of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from skperf.backbone.losses import Loss
from skperf.backbone.randomness import Drawing, drawing_from
from skperf.backbone.rows import Rows, call
from skperf.backbone.views import own_copy

# the states beside the weights of the optimizers that a run can be gone back through
SLOTS: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
}
Settings = dict[str, Any]


def outputs_of(module: nn.Module, inputs: Rows) -> Tensor:
    """Run a module on rows in its own way of taking them: (n, ...) -> (n, ...)."""
    return tensor_of(call(module, inputs.tree))


def tensor_of(returned: Any) -> Tensor:
    """Find the outputs in what a module returns: -> (n, ...)."""
    if isinstance(returned, Tensor):
        return returned
    outputs = returned["logits"] if hasattr(returned, "keys") else returned[0]
    assert isinstance(outputs, Tensor)
    return outputs


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
    convert: Callable[[Rows], Rows] | None = None  # for rows that stay on disk

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, step: Step) -> tuple[Rows, Tensor]:
        """Gather the batch of a step: -> (b, ...), (b, ...)."""
        if step.batch is not None:
            return step.batch
        rows = step.rows.long()
        return self.gather(rows), self.targets[rows]

    def gather(self, rows: Any) -> Rows:
        """Give rows as the module takes them: -> (b, ...)."""
        inputs = self.inputs[rows]
        return inputs.load() if self.convert is None else self.convert(inputs)


@dataclass(frozen=True, eq=False)
class Run:
    """A training from its first step to its last."""

    module: nn.Module  # ours, with the initial weights; copied before it is trained
    loss: Loss
    optimizer: type[Optimizer]
    groups: tuple[tuple[str, ...], ...]  # names of the parameters that train
    steps: list[Step]
    data: Data | None = None
    max_norm: float | None = None  # at which the gradient is clipped
    masks: dict[str, Tensor] = field(default_factory=dict)  # entries that train, by parameter
    states: list[Tensor] | None = None  # (n_steps + 1) states, where they were kept
    end: Tensor | None = None  # the last state, as trained
    base_lr: tuple[float, ...] = ()  # of each group, before any schedule

    compute = staticmethod(outputs_of)

    @property
    def names(self) -> list[str]:
        """Names of the parameters that train."""
        return [name for group in self.groups for name in group]

    @property
    def slots(self) -> tuple[str, ...]:
        """What the optimizer keeps beside the weights."""
        return slots_of(self.optimizer, self.steps[0].settings)

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


def slots_of(optimizer: type[Optimizer], settings: Sequence[Settings]) -> tuple[str, ...]:
    """Names of what an optimizer keeps beside the weights."""
    kept = SLOTS.get(optimizer, ())
    if optimizer is torch.optim.SGD and not any(group["momentum"] for group in settings):
        return ()
    return kept


def mean_loss(
    loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Weighted sum of losses (n, ...) over the number of rows, those of weight 0 counted."""
    losses = weighted_losses(loss, outputs, targets)
    return (losses if weights is None else losses * weights).mean()


def weighted_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Losses of rows times the loss's own weights: (n, ...), (n, ...) -> (n,)."""
    losses, own = loss.value(outputs, targets), loss.weights(targets)
    return losses if own is None else losses * own


def stream_of(seed: int, step: int) -> int:
    """Give every step of a run a seed of its own."""
    # a 64-bit mix, so that neighbours have nothing in common
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 31) * 0x94D049BB133111EB >> 2 & 0x7FFFFFFFFFFFFFFF


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
        self.taken = 0
        named = dict(self.module.named_parameters())
        self.parameters: list[Tensor] = [named[name] for name in run.names]
        trained = {id(parameter) for parameter in self.parameters}
        for parameter in named.values():
            parameter.requires_grad_(id(parameter) in trained)
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
        own = None if weights is None else weights[step.rows.long()].to(self.parameters[0].device)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            with drawing(step.stream):
                outputs = outputs_of(self.module, inputs)
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
        # looked up at every step: a module may put new tensors in the place of its buffers
        buffers = floating_buffers(self.module).values()
        return _flat_state(self.parameters, self.optimizer, self.run.slots, buffers)

    def load(self, state: Tensor, taken: int) -> None:
        """Go to another step: state (n_values,)."""
        parts = split_state(self.run, self.module, state)
        own = [*self.parameters, *floating_buffers(self.module).values()]
        with torch.no_grad():
            torch._foreach_copy_(own, [*parts.parameters, *parts.buffers])
        self.optimizer.state.clear()
        self.taken = taken
        if not taken:
            return
        for i, parameter in enumerate(self.parameters):
            kept = {name: parts.slots[k][i].clone() for k, name in enumerate(self.run.slots)}
            if self.run.optimizer is not torch.optim.SGD:
                kept["step"] = torch.tensor(float(taken))
            self.optimizer.state[parameter] = kept


def _flat_state(
    parameters: Sequence[Tensor],
    optimizer: Optimizer,
    slots: Sequence[str],
    buffers: Iterable[Tensor],
) -> Tensor:
    tensors = list(parameters)
    for name in slots:
        for parameter in parameters:
            kept = optimizer.state.get(parameter, {}).get(name)
            tensors.append(torch.zeros_like(parameter) if kept is None else kept)
    dtype = parameters[0].dtype
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in [*tensors, *buffers]])


@dataclass(frozen=True)
class State:
    """A state, cut into its tensors."""

    parameters: list[Tensor]
    slots: list[list[Tensor]]  # one list a slot of the optimizer
    buffers: list[Tensor]


def split_state(run: Run, module: nn.Module, state: Tensor, *, n_slots: int | None = None) -> State:
    """Cut states into tensors, as views: state (..., n_values)."""
    n_slots = len(run.slots) if n_slots is None else n_slots
    named = dict(module.named_parameters())
    own = [named[name] for name in run.names]
    buffers = list(floating_buffers(module).values())
    like = [*own * (1 + n_slots), *buffers]
    pieces = state.split([tensor.numel() for tensor in like], -1)
    shaped = [
        piece.view([*state.shape[:-1], *tensor.shape])
        for piece, tensor in zip(pieces, like, strict=True)
    ]
    n = len(own)
    slots = [shaped[n * (k + 1) : n * (k + 2)] for k in range(n_slots)]
    return State(shaped[:n], slots, shaped[n * (1 + n_slots) :])


def mask_gradients(module: nn.Module, masks: dict[str, Tensor]) -> None:
    """Leave only the entries that train in the gradients."""
    for name, mask in masks.items():
        gradient = module.get_parameter(name).grad
        if gradient is not None:
            gradient.mul_(mask)


def restore_masked(module: nn.Module, masks: dict[str, Tensor], initial: dict[str, Tensor]) -> None:
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


# Recording --------------------------------------------------------------------------------------


class Recording:
    """What is noted while a training goes on, by whoever takes its steps."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        masks: dict[str, Tensor] | None = None,
        keep: int = 0,
    ) -> None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in optimizer.param_groups:
            unknown = [p for p in group["params"] if id(p) not in names]
            if unknown:
                raise ValueError(
                    f"optimizer trains {len(unknown)} tensors that are no parameters of "
                    f"{type(module).__name__}; a run is recorded of one module."
                )
        if optimizer.state:
            raise ValueError(
                "optimizer has taken steps already; a run is recorded from its first step on."
            )
        self.module, self.optimizer = module, optimizer
        self.masks, self.keep = masks or {}, keep
        self.initial = own_copy(module)
        self.steps: list[Step] = []
        self.left = keep  # bytes of states that may still be kept
        self.states: list[Tensor] | None = None
        self.base_lr = tuple(
            float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups
        )
        self.groups: tuple[tuple[str, ...], ...] = ()  # known at the first step
        self.moved: str | None = None  # what was done to the weights beside the steps
        self.versions = [p._version for p in module.parameters()]

    def before_step(
        self,
        rows: Tensor,
        stream: int | Tensor | None = None,
        batch: tuple[Rows, Tensor] | None = None,
    ) -> None:
        """Note the batch and the settings of a step that is about to be taken: rows (b,)."""
        names = {id(p): n for n, p in self.module.named_parameters() if p.requires_grad}
        groups = tuple(
            tuple(names[id(p)] for p in group["params"] if id(p) in names)
            for group in self.optimizer.param_groups
        )
        if self.keep and self.versions != [p._version for p in self.module.parameters()]:
            self.moved = "weights were changed beside the steps"
        if self.steps and groups != self.groups:
            self.moved = "layers were frozen or thawed after the first step"
        if not self.steps:
            # callbacks have frozen by now what does not train; no weight has moved
            self.groups = groups
            self.states = [self.state(self.initial)] if self.keep else None
            for own, theirs in zip(self.initial.modules(), self.module.modules(), strict=True):
                own.training = theirs.training
        settings = tuple(
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        )
        if self.steps and settings == self.steps[-1].settings:
            settings = self.steps[-1].settings
        self.steps.append(Step(rows.to("cpu", torch.int32), settings, stream, batch))

    def after_step(self) -> None:
        """Keep the state after a step, as long as there is room."""
        self.versions = [p._version for p in self.module.parameters()]
        if self.states is None:
            return
        state = self.state()
        self.left -= state.numel() * state.element_size()
        if self.left < 0:
            self.states = None
        else:
            self.states.append(state)

    def state(self, module: nn.Module | None = None) -> Tensor:
        """Everything that the next step starts from (n_values,)."""
        module = self.module if module is None else module
        named = dict(module.named_parameters())
        parameters = [named[name] for group in self.groups for name in group]
        settings = tuple(self.optimizer.param_groups)
        buffers = floating_buffers(module).values()
        return _flat_state(
            parameters, self.optimizer, slots_of(type(self.optimizer), settings), buffers
        )

    def finish(self, loss: Loss, data: Data | None, max_norm: float | None) -> Run:
        """Close the record."""
        if not self.steps:
            raise ValueError("no step was recorded: the run has none.")
        end = self.state()
        if self.moved is not None:
            raise ValueError(
                f"{self.moved}, by a callback perhaps: no run can be gone back through then."
            )
        if self.states is not None and not torch.equal(self.states[-1], end):
            raise ValueError(
                "the weights were changed after the last step, as EarlyStopping(load_best=True) "
                "does: a run ends where its last step leads."
            )
        return Run(
            self.initial,
            loss,
            type(self.optimizer),
            self.groups,
            self.steps,
            data,
            max_norm,
            self.masks,
            self.states,
            end,
            self.base_lr,
        )


class Streams:
    """Numbers that a module draws in training, a stream a step; only what draws is wrapped."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers = [
            part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd)
        ]
        self.others: bool | None = None  # whether anything else draws; not known before a step
        self.generator = torch.Generator()
        self.latest: int | None = None

    def __enter__(self) -> "Streams":
        for layer in self.layers:
            # the module is ours while it trains, and is given back without the wrapping
            layer.forward = _Wrapped(layer.forward, self)  # type: ignore[method-assign]
        return self

    def __exit__(self, *raised: object) -> None:
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run the forward of one step."""
        self.latest = None
        if not self.layers and self.others is False:
            yield
            return
        self.latest = stream_of(self.seed, number)
        self.generator.manual_seed(self.latest)
        if self.others is False:
            yield
            return
        with _Others(self.generator) as mode:
            yield
        self.others = bool(self.others or mode.others)
        if not self.layers and not self.others:
            self.latest = None


class _Others(Drawing):
    """Notices operators that no wrapped layer has given a generator."""

    others = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not (kwargs or {}).get("generator"):
            self.others = True
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(frozen=True)
class _Wrapped:
    forward: Callable[..., Tensor]
    streams: Streams

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with drawing_from(self.streams.generator):
            return self.forward(*args, **kwargs)
