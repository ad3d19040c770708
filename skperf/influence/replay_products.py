"""Second derivatives of one step's loss, along many directions at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skperf.backbone.losses import CrossEntropy, Loss
from skperf.backbone.parameters import substituted
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Run, Step, drawing, floating_buffers, weighted_losses
from skperf.influence.curvature import PlainAttention
from skperf.influence.replay_chain import Chain, find_chain

BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Batch(NamedTuple):
    """A step's loss is taken of these."""

    step: Step
    inputs: Rows  # (b, ...)
    targets: Tensor  # (b, ...)
    parameters: Sequence[Tensor]
    shares: Tensor | None  # (b,), weights of the rows


class Differentiator:
    """Differentiates the steps of a run in a copy of its network that is ours alone."""

    def __init__(self, run: Run, module: nn.Module, *, labels: int = 0) -> None:
        self.run, self.module, self.labels = run, module, labels
        named = dict(module.named_parameters())
        for parameter in named.values():
            parameter.requires_grad_(False)
        self.norms = [
            part
            for part in module.modules()
            if isinstance(part, BATCH_NORM) and part.running_mean is not None and part.training
        ]
        convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
        # batched convolution kernels are slower than one direction after another
        self.one_by_one = convolves
        self.chain: Chain | None = None
        self.tried = False

    def take(
        self, step: Step, parameters: Sequence[Tensor], buffers: Sequence[Tensor], weights: Any
    ) -> "Twice | Chain":
        """Differentiate a step's loss at given weights, once: weights (n,)."""
        assert self.run.data is not None
        inputs, targets = self.run.data.batch(step)
        shares = None if weights is None else weights[step.rows.long()].to(parameters[0])
        batch = Batch(step, inputs, targets, parameters, shares)
        if not self.tried:
            self.tried = True
            self._load(buffers)
            self._check_buffers(batch, buffers)
            self.chain = self._checked_chain(batch)
        self._load(buffers)
        if self.chain is None:
            return self._twice(batch)
        with drawing(step.stream):
            self.chain.take(inputs.array, targets, parameters, shares)
        return self.chain

    def _twice(self, batch: Batch) -> "Twice":
        run = self.run
        leaves = [parameter.detach().requires_grad_() for parameter in batch.parameters]
        shares = leaves[0].new_ones(len(batch.targets)) if batch.shares is None else batch.shares
        shares = shares.detach().requires_grad_()
        seen: dict[nn.Module, Tensor] = {}
        handles = [
            norm.register_forward_pre_hook(lambda part, args: seen.update({part: args[0]}))
            for norm in self.norms
        ]
        try:
            with (
                torch.enable_grad(),
                drawing(batch.step.stream),
                # fused attention has no second derivative
                PlainAttention(),
                substituted(self.module, dict(zip(run.names, leaves, strict=True))),
            ):
                momenta = [_momentum(norm) for norm in self.norms]
                outputs = run.compute(self.module, batch.inputs)
                losses = weighted_losses(run.loss, outputs, batch.targets)
                relabelled = None
                if self.labels:
                    relabelled = losses.new_zeros(len(losses), self.labels).requires_grad_()
                    losses = losses + _of_other_labels(run.loss, outputs, losses, relabelled)
                total = (losses * shares).mean()
                gradients = torch.autograd.grad(
                    total, leaves, create_graph=True, materialize_grads=True
                )
                statistics = [
                    (momentum, *_batch_statistics(seen[norm]))
                    for norm, momentum in zip(self.norms, momenta, strict=True)
                ]
        finally:
            for handle in handles:
                handle.remove()
        sources = [*leaves, shares] + ([] if relabelled is None else [relabelled])
        return Twice(
            list(gradients), sources, statistics, self._places(), len(leaves), self.one_by_one
        )

    def _load(self, buffers: Sequence[Tensor]) -> None:
        # forwards write to them, or put others in their place
        for own, value in zip(floating_buffers(self.module).values(), buffers, strict=True):
            own.copy_(value)

    def _check_buffers(self, batch: Batch, buffers: Sequence[Tensor]) -> None:
        """Refuse buffers that follow the weights: what goes back through them is not known."""
        known = {id(b) for norm in self.norms for b in norm.buffers()}
        names = [n for n, b in floating_buffers(self.module).items() if id(b) not in known]
        generator, after = torch.Generator().manual_seed(0), []
        for by in (0.0, 1e-3) if names else ():
            near = [
                p + by * torch.randn(p.shape, generator=generator).to(p) for p in batch.parameters
            ]
            self._load(buffers)
            named = dict(zip(self.run.names, near, strict=True))
            with drawing(batch.step.stream), substituted(self.module, named):
                self.run.compute(self.module, batch.inputs)
            after.append([self.module.get_buffer(name).clone() for name in names])
        for name, own, other in zip(names, *after, strict=True) if names else ():
            if not torch.equal(own, other):
                raise ValueError(
                    f"buffer {name!r} follows the weights while the network trains: of such, a run "
                    "can be gone back through the running statistics of batch normalisation only."
                )

    def _places(self) -> list[tuple[int, int]]:
        owned = floating_buffers(self.module).values()
        where = {id(buffer): i for i, buffer in enumerate(owned)}
        return [(where[id(n.running_mean)], where[id(n.running_var)]) for n in self.norms]

    def _checked_chain(self, batch: Batch) -> "Chain | None":
        """Find a plain chain of layers, and hold its products against autograd's."""
        loss, like = self.run.loss, batch.parameters
        if self.labels and not (
            isinstance(loss, CrossEntropy) and (loss.weight is None or not loss.label_smoothing)
        ):
            return None
        with drawing(batch.step.stream):
            links = find_chain(self.module, batch.inputs, self.run)
        if links is None:
            return None
        chain = Chain(links, loss, labels=self.labels > 0)
        with drawing(batch.step.stream):
            chain.take(batch.inputs.array, batch.targets, like, batch.shares)
        generator = torch.Generator().manual_seed(0)
        towards = [torch.randn(2, *p.shape, generator=generator).to(p) for p in like]
        found = []
        for taken in (chain, self._twice(batch)):
            into = [torch.zeros_like(toward) for toward in towards]
            rows, _ = taken.pull(towards, into, [], -0.5)
            found.append([*taken.gradients(), *into, rows])
        tolerance = 1e-3 if like[0].dtype == torch.float32 else 1e-8
        same = all(
            torch.allclose(a, b.detach(), 0, tolerance * (float(b.detach().abs().max()) + 1e-6))
            for a, b in zip(*found, strict=True)
        )
        return chain if same else None


@dataclass(frozen=True)
class Twice:
    """A step's loss with the graph of its gradient."""

    outputs: list[Tensor]  # the gradients
    sources: list[Tensor]  # parameters, shares and, where asked for, shares of labels
    statistics: list[tuple[float, Tensor, Tensor]]  # momentum, mean and variance of each norm
    places: list[tuple[int, int]]  # of running mean and variance among the buffers
    n_parameters: int
    one_by_one: bool

    def gradients(self) -> list[Tensor]:
        """Of the batch's loss, by the parameters."""
        return [gradient.detach() for gradient in self.outputs]

    def pull(
        self,
        towards: Sequence[Tensor],
        into: Sequence[Tensor],
        buffers: Sequence[Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Add Hessian products along directions (m, ...): -> by rows (m, b), by labels (m, b, K).

        What is asked of the new buffers becomes what is asked of those before, in place.
        """
        outputs, directions = list(self.outputs), list(towards)
        if scale != 1 and self.statistics:
            directions, scale = [toward * scale for toward in towards], 1.0
        for (momentum, mean, variance), places in zip(self.statistics, self.places, strict=True):
            outputs += [mean, variance]
            directions += [momentum * buffers[at] for at in places]
            for at in places:
                buffers[at].mul_(1 - momentum)
        kept = [i for i, output in enumerate(outputs) if output.requires_grad]
        pull = partial(
            torch.autograd.grad,
            [outputs[i] for i in kept],
            self.sources,
            retain_graph=True,
            materialize_grads=True,
        )
        directions = [directions[i] for i in kept]
        m = len(towards[0])
        if m == 1 or self.one_by_one:
            parts = [pull(grad_outputs=[d[k] for d in directions]) for k in range(m)]
            pulled = [torch.stack(column) for column in zip(*parts, strict=True)]
        else:
            pulled = list(pull(grad_outputs=directions, is_grads_batched=True))
        n = self.n_parameters
        torch._foreach_add_(list(into), pulled[:n], alpha=scale)
        labels = pulled[n + 1] * scale if len(pulled) > n + 1 else None
        return pulled[n] * scale, labels


def _momentum(norm: Any) -> float:
    if norm.momentum is not None:
        return float(norm.momentum)
    return 1.0 / (float(norm.num_batches_tracked) + 1)


def _batch_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance as batch normalisation keeps them: inputs (n, c, ...) -> (c,), (c,)."""
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    return inputs.mean(axes), inputs.var(axes, unbiased=True)


def _of_other_labels(loss: Loss, outputs: Tensor, losses: Tensor, relabelled: Tensor) -> Tensor:
    """Say what shares of other labels would add: outputs (n, ...), relabelled (n, K) -> (n,)."""
    n, k = relabelled.shape
    every = [
        weighted_losses(loss, outputs, torch.full((n,), label, device=outputs.device))
        for label in range(k)
    ]
    return ((torch.stack(every, 1) - losses[:, None]) * relabelled).sum(1)
