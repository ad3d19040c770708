"""Second derivatives of a chain of layers by hand: few matrix products a layer for all directions.

Activations are (width, b) between linear layers and (b, c, ...) between convolutions; directions
stand before them, (m, width, b), so that a linear layer moves all of them in one product.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skperf.backbone.losses import CrossEntropy, Loss
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Run

_ENTRYWISE = "ReLU Tanh Sigmoid GELU SiLU ELU SELU CELU Mish Softplus LeakyReLU Softsign ReLU6"
_FUNCTIONS = tuple(getattr(nn, name) for name in _ENTRYWISE.split())


Tensors = Sequence[Tensor]
Moved = Tensor | None  # (m, ...); None where nothing moves


class Link:
    """One step of a chain, at the rows of one batch; as it stands, one that does nothing."""

    moving: Moved = None  # what reached it

    def __init__(self, part: Any = None) -> None:
        self.part = part
        self.rooms: dict[str, Tensor] = {}

    def room(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Give memory for a result, the same at every step: -> shape."""
        # fresh pages for every product would cost more than the product
        size = math.prod(shape)
        if name not in self.rooms or len(self.rooms[name]) < size:
            self.rooms[name] = like.new_empty(size)
        return self.rooms[name][:size].view(*shape)

    def forwards(self, at: Tensor, weights: Tensors) -> Tensor:
        """Go forwards."""
        return at

    def backwards(self, slope: Tensor) -> Tensor:
        """Take the slope by what it returned to that by what it was given."""
        return slope

    def moved(self, moving: Moved, towards: Tensors) -> Moved:
        """Say how what it returns moves."""
        return moving

    def pulled(self, back: Tensor, towards: Tensors, into: Tensors, scale: float) -> Moved:
        """Go back from how the slope moved; `towards` is read before `into` changes."""
        return back


class _Reshaped(Link):
    """Rows in the form that the first layer takes."""

    def forwards(self, at: Tensor, weights: Tensors) -> Tensor:
        return at.reshape(len(at), *self.part)


class _Entrywise(Link):
    """A function of each number."""

    def forwards(self, at: Tensor, weights: Tensors) -> Tensor:
        outputs, self.first, self.second = derivatives(self.part, at)
        return outputs

    def backwards(self, slope: Tensor) -> Tensor:
        self.bent = None if self.second is None else slope * self.second
        return slope * self.first

    def moved(self, moving: Moved, towards: Tensors) -> Moved:
        self.moving = moving
        if moving is None:
            return None
        # what came is still needed where the second derivative is not zero
        room = moving if self.bent is None else self.room("moved", moving.shape, moving)
        return torch.mul(moving, self.first, out=room)

    def pulled(self, back: Tensor, towards: Tensors, into: Tensors, scale: float) -> Moved:
        back.mul_(self.first)
        if self.bent is not None and self.moving is not None:
            back.addcmul_(self.moving, self.bent)
        return back


class _Dropped(_Entrywise):
    """Dropout, with the mask that the step drew."""

    def forwards(self, at: Tensor, weights: Tensors) -> Tensor:
        # drawn in the order in which the layer itself does
        turned = at.ndim == 2
        ones = torch.ones_like(at.T if turned else at, memory_format=torch.contiguous_format)
        kept = functional.dropout(ones, self.part.p)
        self.first, self.second = kept.T if turned else kept, None
        return at * self.first


class _Turned(Link):
    """From rows first to rows last: (b, ...) -> (width, b)."""

    def forwards(self, at: Tensor, weights: Tensors) -> Tensor:
        self.shape = at.shape
        return at.flatten(1).T.contiguous()

    def backwards(self, slope: Tensor) -> Tensor:
        return slope.T.reshape(self.shape)

    def moved(self, moving: Moved, towards: Tensors) -> Moved:
        return None if moving is None else moving.flatten(2).transpose(1, 2).contiguous()

    def pulled(self, back: Tensor, towards: Tensors, into: Tensors, scale: float) -> Moved:
        return back.transpose(1, 2).reshape(len(back), *self.shape)


class Layer(Link):
    """A layer with weights."""

    first = False  # of those with weights: nothing moves before it, nothing is asked behind it
    at: Tensor  # what it was given
    value: Tensor  # its weights
    slope: Tensor  # by what it returns

    def __init__(self, part: Any, weight: int, bias: int | None = None) -> None:
        super().__init__(part)
        self.weight, self.bias = weight, bias

    def gradients(self) -> dict[int, Tensor]:
        """By its own parameters, by their places."""
        raise NotImplementedError  # every kind of layer has its own


class _Linear(Layer):
    def forwards(self, at: Tensor, weights: Tensors) -> Tensor:
        self.at, self.value = at, weights[self.weight]
        if self.bias is None:
            return self.value @ at
        return torch.addmm(weights[self.bias][:, None], self.value, at)

    def backwards(self, slope: Tensor) -> Tensor:
        self.slope = slope
        return slope if self.first else self.value.T @ slope

    def gradients(self) -> dict[int, Tensor]:
        bias = {} if self.bias is None else {self.bias: self.slope.sum(1)}
        return {self.weight: self.slope @ self.at.T, **bias}

    def moved(self, moving: Moved, towards: Tensors) -> Moved:
        self.moving = moving
        m, n_out, n_in = towards[self.weight].shape
        weight = towards[self.weight].view(-1, n_in)
        room = self.room("moved", (m * n_out, self.at.shape[1]), self.at)
        if self.bias is None:
            torch.mm(weight, self.at, out=room)
        else:
            torch.addmm(towards[self.bias].view(-1, 1), weight, self.at, out=room)
        room = room.view(m, n_out, -1)
        if moving is not None:
            room.baddbmm_(self.value.expand(m, n_out, n_in), moving)
        return room

    def pulled(self, back: Tensor, towards: Tensors, into: Tensors, scale: float) -> Moved:
        m, n_out, b = back.shape
        slopes = self.slope.expand(m, n_out, b)
        further, own = None, into[self.weight]
        if not self.first:
            further = self.room("further", (m, self.at.shape[0], b), back)
            torch.bmm(self.value.T.expand(m, -1, n_out), back, out=further)
            further.baddbmm_(towards[self.weight].transpose(1, 2), slopes)
        own.view(m * n_out, -1).addmm_(back.view(m * n_out, b), self.at.T, alpha=scale)
        if self.moving is not None:
            own.baddbmm_(slopes, self.moving.transpose(1, 2), alpha=scale)
        if self.bias is not None:
            into[self.bias].add_(back.sum(2), alpha=scale)
        return further


class _Convolution(Layer):
    """One direction after another: batched kernels are slower."""

    def __init__(self, part: Any, weight: int, bias: int | None = None) -> None:
        super().__init__(part, weight, bias)
        none = [0] * len(part.stride)
        self.how: Any = part.stride, part.padding, part.dilation, False, none, part.groups

    def _back(self, slope: Tensor, at: Tensor, weight: Tensor, *wanted: bool) -> Any:
        sizes = None if self.bias is None else [len(weight)]
        back = torch.ops.aten.convolution_backward
        return back(slope, at, weight, sizes, *self.how, wanted)

    def forwards(self, at: Tensor, weights: Tensors) -> Tensor:
        self.at, self.value = at, weights[self.weight]
        bias = None if self.bias is None else weights[self.bias]
        result: Tensor = torch.convolution(at, self.value, bias, *self.how)
        return result

    def backwards(self, slope: Tensor) -> Tensor:
        self.slope = slope
        if self.first:
            return slope
        before: Tensor = self._back(slope, self.at, self.value, True, False, False)[0]
        return before

    def gradients(self) -> dict[int, Tensor]:
        biased = self.bias is not None
        _, weight, bias = self._back(self.slope, self.at, self.value, False, True, biased)
        return {self.weight: weight} | ({} if self.bias is None else {self.bias: bias})

    def moved(self, moving: Moved, towards: Tensors) -> Moved:
        self.moving = moving
        weights = towards[self.weight]
        biases = [None] * len(weights) if self.bias is None else list(towards[self.bias])
        pairs = zip(weights, biases, strict=True)
        result = torch.stack([torch.convolution(self.at, *pair, *self.how) for pair in pairs])
        if moving is not None:
            further = torch.convolution(moving.flatten(0, 1), self.value, None, *self.how)
            result += further.view(result.shape)
        return result

    def pulled(self, back: Tensor, towards: Tensors, into: Tensors, scale: float) -> Moved:
        further, asked, biased = [], not self.first, self.bias is not None
        for k, own in enumerate(back):
            before, weight, bias = self._back(own, self.at, self.value, asked, True, biased)
            toward = towards[self.weight][k]
            if self.moving is not None:
                at = self.moving[k]
                more, crossed, _ = self._back(self.slope, at, toward, asked, True, False)
                before, weight = before + more, weight + crossed
            into[self.weight][k].add_(weight, alpha=scale)
            if self.bias is not None:
                into[self.bias][k].add_(bias, alpha=scale)
            further.append(before)
        return None if self.first else torch.stack(further)


def find_chain(module: nn.Module, inputs: Rows, run: Run) -> list[Link] | None:
    """Watch one forward: layers and entrywise functions, each fed by the one before."""
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
    places = {id(module.get_parameter(name)): i for i, name in enumerate(run.names)}
    links = _links(calls, inputs.array, places)
    layers = [link for link in links or [] if isinstance(link, Layer)]
    covered = [id(p) for layer in layers for p in layer.part.parameters()]
    # every parameter of every layer trains, and none twice
    if not layers or len(covered) != len(set(covered)) or set(covered) != set(places):
        return None
    layers[0].first = True
    return links if len(list(module.parameters())) == len(places) else None


def _links(
    calls: Sequence[tuple[nn.Module, Any, Any]], at: Tensor, places: dict[int, int]
) -> list[Link] | None:
    links: list[Link] = []
    turned = False
    for part, own, output in calls:
        tensors = isinstance(own, Tensor) and isinstance(output, Tensor)
        if not tensors or own.data_ptr() != at.data_ptr() or not own.is_contiguous():
            return None
        flattened = own.ndim == 2 and own.numel() == at.numel()
        if own.shape != at.shape and not flattened and (links or own.numel() != at.numel()):
            return None
        if links and not turned and flattened:
            links.append(_Turned())
            turned = True
        trains = [places.get(id(p)) for p in part.parameters()]
        if None in trains:
            return None
        if type(part) is nn.Linear and own.ndim == 2:
            links += [] if turned else [_Turned()]
            turned = True
            links.append(_Linear(part, *trains))  # type: ignore[arg-type]
        elif type(part) in (nn.Conv1d, nn.Conv2d) and not turned:
            zeros: Any = part
            if zeros.padding_mode != "zeros" or isinstance(zeros.padding, str):
                return None
            links += [] if links else [_Reshaped(own.shape[1:])]
            links.append(_Convolution(part, *trains))  # type: ignore[arg-type]
        elif type(part) is nn.Dropout:
            links += [_Dropped(part)] if part.training else []
        elif type(part) in _FUNCTIONS and not getattr(part, "inplace", False):
            links.append(_Entrywise(part))
        elif type(part) not in (nn.Identity, nn.Flatten, nn.Unflatten):
            return None
        at = output
    return links


class Chain:
    """A network's loss at one batch, and products with its Hessian."""

    def __init__(self, links: Sequence[Link], loss: Loss, *, labels: bool = False) -> None:
        self.links, self.loss, self.labels = list(links), loss, labels
        start = next(i for i, link in enumerate(links) if isinstance(link, Layer))
        self.returning = self.links[: start - 1 if start else None : -1]
        plain = isinstance(loss, CrossEntropy) and loss.weight is None
        self.plain = plain and not loss.label_smoothing and not loss.balanced  # type: ignore[attr-defined]

    def take(
        self, inputs: Tensor, targets: Tensor, weights: Sequence[Tensor], shares: Tensor | None
    ) -> None:
        """Run forwards and back once: inputs (b, ...), shares (b,) or None for ones."""
        at = inputs
        for link in self.links:
            at = link.forwards(at, weights)
        b, loss = len(targets), self.loss
        self.outputs, self.targets = at, targets  # (K, b)
        self.share = at.softmax(0) if isinstance(loss, CrossEntropy) else None
        quick = self.plain and not targets.is_floating_point() and targets.ndim == 1
        self.codes = None
        if quick and self.share is not None and int(targets.min()) >= 0:
            self.codes = targets[None]
            self.slope = self.share.scatter_add(0, self.codes, at.new_full((1, b), -1.0))
        else:
            self.slope = loss.slope(at.T, targets).T
        own = loss.weights(targets)
        self.unit = at.new_full((b,), 1 / b) if own is None else own.to(at) / b
        self.shares = torch.ones_like(self.unit) if shares is None else shares
        self.scale = self.unit * self.shares
        back = self.slope * self.scale
        for link in self.returning:
            back = link.backwards(back)
        self.curvature: Tensor | None = None
        if self.codes is not None and self.share is not None:
            self.scaled = self.share * self.scale
        else:
            self.curvature = loss.hessian(at.T, targets) * self.scale[:, None, None]

    def gradients(self) -> list[Tensor]:
        """Of the batch's loss, by the parameters."""
        found: dict[int, Tensor] = {}
        for link in self.returning:
            if isinstance(link, Layer):
                found.update(link.gradients())
        return [found[i] for i in range(len(found))]

    def pull(
        self,
        towards: Sequence[Tensor],
        into: Sequence[Tensor],
        buffers: Sequence[Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Add Hessian products along directions (m, ...): -> by rows (m, b), by labels (m, b, K).

        `towards` may be `into` itself, which is then changed last.
        """
        moving: Tensor | None = None
        for link in self.links:
            moving = link.moved(moving, towards)
        assert moving is not None
        labels = self._labels(moving) * scale if self.labels else None
        rows, back = self._curved(moving)
        further: Tensor | None = back
        for link in self.returning:
            assert further is not None
            further = link.pulled(further, towards, into, scale)
        return rows.mul_(scale), labels

    def _curved(self, moved: Tensor) -> tuple[Tensor, Tensor]:
        """By the rows' weights (m, b), and times the loss's Hessian (m, K, b)."""
        if self.codes is not None and self.share is not None:
            mean = (moved * self.share).sum(1, keepdim=True)
            own = moved.gather(1, self.codes.expand(len(moved), 1, -1))
            rows = (mean - own)[:, 0] * self.unit
            return rows, moved.sub_(mean).mul_(self.scaled)
        assert self.curvature is not None
        rows = (moved * (self.slope * self.unit)).sum(1)
        return rows, torch.einsum("bkl,mlb->mkb", self.curvature, moved).contiguous()

    def _labels(self, moved: Tensor) -> Tensor:
        loss = self.loss
        assert isinstance(loss, CrossEntropy)
        assert self.share is not None
        smooth, k = loss.label_smoothing, len(self.outputs)
        mean = (moved * (self.share - smooth / k)).sum(1, keepdim=True)
        every = mean - (1 - smooth) * moved
        if loss.weight is not None:
            every = every * loss.weight.to(every)[:, None]
        own = every.gather(1, self.targets.expand(len(moved), 1, -1))
        # the class weight of the row's own label is in `every` already
        return ((every - own) * (self.shares / len(self.shares))).transpose(1, 2)


def derivatives(part: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
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
    if type(part) is nn.GELU and part.approximate == "none":
        below = torch.erf(inputs * 0.5**0.5).add_(1).mul_(0.5)
        density = torch.exp(inputs.square() * -0.5).mul_((2 * math.pi) ** -0.5)
        first = torch.addcmul(below, inputs, density)
        second = density.mul_(2 - inputs.square())
        return inputs * below, first, second
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        outputs = part(leaf)
        (first,) = torch.autograd.grad(outputs.sum(), leaf, create_graph=True)
        if not first.requires_grad:
            return outputs.detach(), first, None
        (second,) = torch.autograd.grad(first.sum(), leaf)
    return outputs.detach(), first.detach(), second
