"""Second derivatives of one step's loss, along many directions at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from skperf.backbone.losses import CrossEntropy, Loss
from skperf.backbone.parameters import substituted
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Run, Step, drawing, floating_buffers

BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Pulled:
    """What comes back through the gradient of a step's loss, for each of m directions."""

    parameters: list[Tensor]  # (m, ...) each, Hessian times direction
    rows: Tensor  # (m, b), by the weights of the batch's rows
    buffers: list[Tensor]  # (m, ...) each
    labels: Tensor | None = None  # (m, b, K), by the shares of the labels


class Given(NamedTuple):
    """A step's loss is taken of these."""

    step: Step
    inputs: Rows  # (b, ...)
    targets: Tensor  # (b, ...)
    parameters: Sequence[Tensor]
    shares: Tensor  # (b,), weights of the rows


class Differentiator:
    """Differentiates the steps of a run in a copy of its network that is ours alone."""

    def __init__(self, run: Run, module: nn.Module, *, labels: bool = False) -> None:
        self.run, self.module, self.labels = run, module, labels
        named = dict(module.named_parameters())
        for parameter in named.values():
            parameter.requires_grad_(False)
        self.own_buffers = list(floating_buffers(module).values())
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
    ) -> "Twice | ChainTaken":
        """Differentiate a step's loss at given weights, once: weights (n,)."""
        assert self.run.data is not None
        inputs, targets = self.run.data.batch(step)
        shares = parameters[0].new_ones(len(targets))
        if weights is not None:
            shares = weights[step.rows.long()].to(shares)
        given = Given(step, inputs, targets, parameters, shares)
        if not self.tried:
            self.tried = True
            self.chain = self._checked_chain(given)
        # after the trial, whose forwards write to them
        for own, value in zip(self.own_buffers, buffers, strict=True):
            own.copy_(value)
        if self.chain is None:
            return self._twice(given)
        with drawing(step.stream):
            return self.chain.take(given)

    def _twice(self, given: Given) -> "Twice":
        run = self.run
        leaves = [parameter.detach().requires_grad_() for parameter in given.parameters]
        shares = given.shares.detach().requires_grad_()
        seen: dict[nn.Module, Tensor] = {}
        handles = [
            norm.register_forward_pre_hook(lambda part, args: seen.update({part: args[0]}))
            for norm in self.norms
        ]
        try:
            with (
                torch.enable_grad(),
                drawing(given.step.stream),
                # fused attention has no second derivative
                sdpa_kernel(SDPBackend.MATH),
                substituted(self.module, dict(zip(run.names, leaves, strict=True))),
            ):
                momenta = [_momentum(norm) for norm in self.norms]
                outputs = run.compute(self.module, given.inputs)
                losses = _weighted(run.loss, outputs, given.targets)
                relabelled = None
                if self.labels:
                    relabelled = losses.new_zeros(*outputs.shape).requires_grad_()
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

    def _places(self) -> list[tuple[int, int]]:
        where = {id(buffer): i for i, buffer in enumerate(self.own_buffers)}
        return [(where[id(n.running_mean)], where[id(n.running_var)]) for n in self.norms]

    def _checked_chain(self, given: Given) -> "Chain | None":
        """Find a plain chain of layers, and hold its products against autograd's."""
        loss = self.run.loss
        if self.labels and not (
            isinstance(loss, CrossEntropy) and (loss.weight is None or not loss.label_smoothing)
        ):
            return None
        with drawing(given.step.stream):
            links = find_chain(self.module, given.inputs, self.run)
        if links is None:
            return None
        chain = Chain(links, self.module, self.run, labels=self.labels)
        generator = torch.Generator().manual_seed(0)
        towards = [torch.randn(2, *p.shape, generator=generator).to(p) for p in given.parameters]
        with drawing(given.step.stream):
            quick = chain.take(given)
        slow = self._twice(given)
        ours, theirs = quick.pull(towards, []), slow.pull(towards, [])
        pairs = zip(
            [*quick.gradients, *ours.parameters, ours.rows],
            [*slow.gradients, *theirs.parameters, theirs.rows],
            strict=True,
        )
        tolerance = 1e-3 if given.shares.dtype == torch.float32 else 1e-8
        same = all(
            torch.allclose(a, b.detach(), 0, tolerance * (float(b.detach().abs().max()) + 1e-6))
            for a, b in pairs
        )
        return chain if same else None


@dataclass(frozen=True)
class Twice:
    """A step's loss with the graph of its gradient."""

    gradients: list[Tensor]
    sources: list[Tensor]  # parameters, shares and, where asked for, shares of labels
    statistics: list[tuple[float, Tensor, Tensor]]  # momentum, mean and variance of each norm
    places: list[tuple[int, int]]  # of running mean and variance among the buffers
    n_parameters: int
    one_by_one: bool

    def pull(self, towards: Sequence[Tensor], buffers: Sequence[Tensor]) -> Pulled:
        """Differentiate the gradients and new buffers along directions (m, ...)."""
        outputs, directions = list(self.gradients), list(towards)
        before = [buffer.clone() for buffer in buffers]
        for (momentum, mean, variance), (at_mean, at_variance) in zip(
            self.statistics, self.places, strict=True
        ):
            outputs += [mean, variance]
            directions += [momentum * buffers[at_mean], momentum * buffers[at_variance]]
            before[at_mean] *= 1 - momentum
            before[at_variance] *= 1 - momentum
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
        return Pulled(pulled[:n], pulled[n], before, pulled[n + 1] if len(pulled) > n + 1 else None)


def _momentum(norm: Any) -> float:
    if norm.momentum is not None:
        return float(norm.momentum)
    return 1.0 / (float(norm.num_batches_tracked) + 1)


def _batch_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance as batch normalisation keeps them: inputs (n, c, ...) -> (c,), (c,)."""
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    return inputs.mean(axes), inputs.var(axes, unbiased=True)


def _weighted(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    losses, own = loss.value(outputs, targets), loss.weights(targets)
    return losses if own is None else losses * own


def _of_other_labels(loss: Loss, outputs: Tensor, losses: Tensor, relabelled: Tensor) -> Tensor:
    """Say what shares of other labels would add: outputs (n, K), relabelled (n, K) -> (n,)."""
    n, k = outputs.shape
    every = [
        _weighted(loss, outputs, torch.full((n,), label, device=outputs.device))
        for label in range(k)
    ]
    return ((torch.stack(every, 1) - losses[:, None]) * relabelled).sum(1)


# Chains of layers -----------------------------------------------------------------------------

Link = tuple[str, Any]
_ENTRYWISE = "ReLU Tanh Sigmoid GELU SiLU ELU SELU CELU Mish Softplus LeakyReLU Softsign ReLU6"
_FUNCTIONS = tuple(getattr(nn, name) for name in _ENTRYWISE.split())


def find_chain(module: nn.Module, inputs: Rows, run: Run) -> list[Link] | None:
    """Watch one forward: linear layers and entrywise functions, each fed by the one before."""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def seen(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((part, args[0] if args else None, output))

    leaves = [part for part in module.modules() if not list(part.children())]
    handles = [part.register_forward_hook(seen) for part in leaves]
    try:
        with torch.no_grad():
            outputs = run.compute(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not inputs.single or not calls or outputs.ndim != 2 or calls[-1][2] is not outputs:
        return None
    at: Any = inputs.array
    links: list[Link] = []
    for part, own, output in calls:
        same_values = (
            isinstance(own, Tensor)
            and own.data_ptr() == at.data_ptr()
            and own.numel() == at.numel()
            and own.ndim == 2
            and own.is_contiguous()
        )
        if not isinstance(output, Tensor) or not same_values:
            return None
        if type(part) is nn.Linear:
            links.append(("linear", part))
        elif type(part) is nn.Dropout:
            links += [("dropout", part)] if part.training else []
        elif type(part) in _FUNCTIONS and not getattr(part, "inplace", False):
            links.append(("entrywise", part))
        elif type(part) not in (nn.Identity, nn.Flatten):
            return None
        at = output
    linear = [part for kind, part in links if kind == "linear"]
    names = {name for name, parameter in module.named_parameters()}
    trained = {id(module.get_parameter(name)) for name in run.names}
    covered = {id(p) for part in linear for p in part.parameters()}
    # every parameter of every layer trains, and none twice
    whole = len(set(map(id, linear))) == len(linear) and covered == trained
    return links if whole and len(names) == len(run.names) and linear else None


class Chain:
    """Products with the Hessian of a chain: a few matrix products a layer for all directions."""

    # Directions stand beside one another as (b, m, width), so that every product is one large
    # matrix product, never a batch of small ones.
    def __init__(
        self, links: Sequence[Link], module: nn.Module, run: Run, *, labels: bool = False
    ) -> None:
        self.links, self.loss, self.labels = list(links), run.loss, labels
        self.place = {id(module.get_parameter(name)): i for i, name in enumerate(run.names)}
        self.first = next(i for i, (kind, _) in enumerate(links) if kind == "linear")
        self.rooms: dict[Any, Tensor] = {}

    def room(self, name: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Give memory for a result, the same at every step: -> shape."""
        # fresh pages for every product would cost more than the product
        size = math.prod(shape)
        if name not in self.rooms or len(self.rooms[name]) < size:
            self.rooms[name] = like.new_empty(size)
        return self.rooms[name][:size].view(shape)

    def indices(self, linear: nn.Linear) -> tuple[int, int | None]:
        """Where a layer's weight and bias stand among the parameters."""
        bias = None if linear.bias is None else self.place[id(linear.bias)]
        return self.place[id(linear.weight)], bias

    def take(self, given: Given) -> "ChainTaken":
        """Run forwards and back once."""
        inputs, targets, parameters, shares = given[1:]
        at = inputs.array.flatten(1)
        passed: list[tuple[Tensor, Tensor | None]] = []
        for kind, part in self.links:
            if kind == "linear":
                weight, bias = self.indices(part)
                passed.append((at, None))
                offset = None if bias is None else parameters[bias]
                at = functional.linear(at, parameters[weight], offset)
            elif kind == "dropout":
                kept = functional.dropout(torch.ones_like(at), part.p)
                passed.append((kept, None))
                at = at * kept
            else:
                at, first, second = _entrywise(part, at)
                passed.append((first, second))
        own = self.loss.weights(targets)
        unit = torch.full_like(shares, 1 / len(shares)) if own is None else own / len(shares)
        slope = self.loss.slope(at, targets)
        slopes: list[Tensor] = [at] * len(self.links)
        gradients = [torch.empty(0)] * len(parameters)
        back = slope * (unit * shares)[:, None]
        for i in range(len(self.links) - 1, self.first - 1, -1):
            kind, part = self.links[i]
            slopes[i] = back  # by what this link returns
            if kind == "linear":
                weight, bias = self.indices(part)
                gradients[weight] = back.T @ passed[i][0]
                if bias is not None:
                    gradients[bias] = back.sum(0)
                if i > self.first:
                    back = back @ parameters[weight]
            else:
                back = back * passed[i][0]
        return ChainTaken(
            gradients, self, parameters, passed, slopes, at, targets, unit, shares, slope
        )


@dataclass(frozen=True)
class ChainTaken:
    """A step's loss with what its chain passed on and handed back."""

    gradients: list[Tensor]
    chain: Chain
    weights: Sequence[Tensor]
    passed: list[tuple[Tensor, Tensor | None]]  # inputs, or first and second derivatives
    slopes: list[Tensor]  # (b, width), by what each link returns
    outputs: Tensor  # (b, K)
    targets: Tensor
    unit: Tensor  # (b,), of a row of weight 1 in the loss
    shares: Tensor  # (b,), the rows' weights
    slope: Tensor  # (b, K), of each row's own loss

    def pull(self, towards: Sequence[Tensor], buffers: Sequence[Tensor]) -> Pulled:
        """Differentiate the gradients along directions (m, ...)."""
        moved, through = self._forwards(towards)
        curved = self._curved(moved)
        result = self._backwards(towards, curved, through)
        rows = torch.bmm(moved, (self.slope * self.unit[:, None])[:, :, None])[:, :, 0].T
        labels = self._labels(moved) if self.chain.labels else None
        return Pulled(result, rows, [], labels)

    def _forwards(self, towards: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Move the outputs along the directions: -> (b, m, K), and what reached each link."""
        moving: Tensor | None = None
        through: list[Tensor | None] = []
        b, m = len(self.outputs), len(towards[0])
        for i, (kind, part) in enumerate(self.chain.links):
            own, second = self.passed[i]
            through.append(moving)
            if kind == "linear":
                weight, bias = self.chain.indices(part)
                flat = towards[weight].reshape(-1, part.in_features)  # (m * out, in)
                moved = self.chain.room(("moved", i), (b, len(flat)), own)
                if bias is None:
                    torch.mm(own, flat.T, out=moved)
                else:
                    torch.addmm(towards[bias].reshape(-1), own, flat.T, out=moved)
                if moving is not None:
                    moved = moved.view(b * m, part.out_features)
                    moved.addmm_(moving.view(b * m, -1), self.weights[weight].T)
                moving = moved.view(b, m, -1)
            elif moving is not None and second is None:
                moving.mul_(own[:, None])
            elif moving is not None:
                # kept as it was, too: the second derivative will ask for it
                room = self.chain.room(("passed", i), tuple(moving.shape), own)
                moving = torch.mul(moving, own[:, None], out=room)
        assert moving is not None
        return moving, through

    def _curved(self, moved: Tensor) -> Tensor:
        """Multiply by the loss's Hessian at the outputs: (b, m, K) -> (b, m, K)."""
        scale = self.unit * self.shares
        loss = self.chain.loss
        if isinstance(loss, CrossEntropy) and not self.targets.is_floating_point():
            share = self.outputs.softmax(1)
            if loss.weight is not None or bool((self.targets == loss.ignore_index).any()):
                scale = scale * loss.sizes(self.targets).to(scale)
            centred = moved - torch.bmm(moved, share[:, :, None])
            return centred * (share * scale[:, None])[:, None]
        hessian = loss.hessian(self.outputs, self.targets) * scale[:, None, None]
        return moved @ hessian

    def _backwards(
        self, towards: Sequence[Tensor], back: Tensor, through: list[Tensor | None]
    ) -> list[Tensor]:
        chain, m, b = self.chain, len(towards[0]), len(self.outputs)
        result = [torch.empty(0)] * len(towards)
        for i in range(len(chain.links) - 1, chain.first - 1, -1):
            (kind, part), (own, second), moving = chain.links[i], self.passed[i], through[i]
            slopes = self.slopes[i]
            if kind != "linear":
                back.mul_(own[:, None])
                if second is not None and moving is not None:
                    back.addcmul_(moving, (slopes * second)[:, None])
                continue
            weight, bias = chain.indices(part)
            n_out, n_in = part.out_features, part.in_features
            product = chain.room(("product", i), (m * n_out, n_in), own)
            torch.mm(back.view(b, -1).T, own, out=product)
            result[weight] = product.view(m, n_out, n_in)
            if moving is not None:
                crossed = chain.room(("crossed", i), (n_out, m * n_in), own)
                torch.mm(slopes.T, moving.view(b, -1), out=crossed)
                result[weight] += crossed.view(n_out, m, n_in).transpose(0, 1)
            if bias is not None:
                result[bias] = back.sum(0)
            if i > chain.first:
                turned = chain.room(("turned", i), (n_out, m, n_in), own)
                turned.copy_(towards[weight].transpose(0, 1))
                further = chain.room(("further", i), (b, m * n_in), own)
                torch.mm(slopes, turned.view(n_out, -1), out=further)
                further = further.view(b * m, n_in)
                further.addmm_(back.view(b * m, n_out), self.weights[weight])
                back = further.view(b, m, n_in)
        return result

    def _labels(self, moved: Tensor) -> Tensor:
        loss = self.chain.loss
        assert isinstance(loss, CrossEntropy)
        k = self.outputs.shape[1]
        share = self.outputs.softmax(1) - loss.label_smoothing / k
        every = torch.bmm(moved, share[:, :, None]) - (1 - loss.label_smoothing) * moved
        weight = None if loss.weight is None else loss.weight.to(every)
        if weight is not None:
            every = every * weight
        own = every.gather(2, self.targets[:, None, None].expand(-1, every.shape[1], 1))
        # the class weight of the row's own label is in `every` already
        return ((every - own) * (self.shares / len(self.shares))[:, None, None]).transpose(0, 1)


def _entrywise(part: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Apply an entrywise function: -> its values, first and second derivatives (None for zero)."""
    if type(part) is nn.ReLU:
        outputs = inputs.relu()
        return outputs, (outputs > 0).to(inputs), None
    if type(part) is nn.Tanh:
        outputs = inputs.tanh()
        first = 1 - outputs * outputs
        return outputs, first, -2 * outputs * first
    if type(part) is nn.Sigmoid:
        outputs = inputs.sigmoid()
        first = outputs * (1 - outputs)
        return outputs, first, first * (1 - 2 * outputs)
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        outputs = part(leaf)
        (first,) = torch.autograd.grad(outputs.sum(), leaf, create_graph=True)
        if not first.requires_grad:
            return outputs.detach(), first, None
        (second,) = torch.autograd.grad(first.sum(), leaf)
    return outputs.detach(), first.detach(), second
