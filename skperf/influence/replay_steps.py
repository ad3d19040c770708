"""Steps of optimizers, gone back through by hand.

An adjoint is the derivative of what is asked about by a state of the run; there are as many as
there are directions asked about, stacked along the first axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skperf.backbone.training_run import Settings, State

# what a row's hyper-parameters' gradient is reported for
HYPERPARAMETERS = ("lr", "weight_decay")


@dataclass
class Adjoint:
    """Derivatives by the state after a step; each tensor (m, ...) has the state's own shape."""

    parameters: list[Tensor]
    slots: list[list[Tensor]]
    buffers: list[Tensor]
    towards: list[Tensor] = field(init=False)  # room for the derivatives by the gradients

    def __post_init__(self) -> None:
        self.towards = [torch.empty(0)] * len(self.parameters)

    def room(self, i: int) -> Tensor:
        """Give memory for what goes towards a gradient: -> (m, ...)."""
        if not len(self.towards[i]):
            self.towards[i] = torch.empty_like(self.parameters[i])
        return self.towards[i]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        return [*self.parameters, *(t for slot in self.slots for t in slot), *self.buffers]


@dataclass(frozen=True)
class Moment:
    """What the way back through one step reads of the way there."""

    before: State
    after: State
    gradients: list[Tensor]  # as the optimizer took them; empty where it asks for none
    count: int  # steps taken, this one included

    def slopes(self, i: int, rate: float, correction: float, eps: float) -> tuple[Tensor, Tensor]:
        """Differentiate one weight's move by Adam's two averages: each as the weight (...)."""
        mean, square = self.after.slots[0][i], self.after.slots[1][i]
        root = square.sqrt()
        denominator = root / correction + eps
        # where the square is zero so is the mean, and the weight has not moved
        slope = torch.where(root > 0, mean / (denominator.square() * root), 0.0)
        return -rate / denominator, slope * (rate / (2 * correction))


# directions of the gradients, what to multiply them by, and the derivative by the weight decay
Towards = tuple[list[Tensor], float, Tensor | None]


def dot(adjoints: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Inner products of stacked tensors with single ones: (m, ...), (...) -> (m,)."""
    products = [a.flatten(1) @ v.reshape(-1) for a, v in zip(adjoints, values, strict=True)]
    return torch.stack(products).sum(0)


def back_through_sgd(
    adjoint: Adjoint, which: Sequence[int], settings: Settings, moment: Moment, by_decay: bool
) -> Towards:
    """Differentiate by the gradients of some parameters and, where asked for, by the weight decay.

    The adjoint becomes that of the state before, up to what goes through the gradients.
    """
    lr, momentum, decay = settings["lr"], settings["momentum"], settings["weight_decay"]
    damped = 1.0 if moment.count == 1 else 1 - settings["dampening"]
    own = [adjoint.parameters[i] for i in which]
    towards, scale = own, -lr
    if momentum:
        towards, scale = [adjoint.slots[0][i] for i in which], damped
        nesterov = settings["nesterov"]
        torch._foreach_add_(towards, own, alpha=-lr * (momentum if nesterov else 1.0))
        if nesterov:
            rooms = [adjoint.room(i) for i in which]
            for room, buffer, weight in zip(rooms, towards, own, strict=True):
                torch.add(buffer * damped, weight, alpha=-lr, out=room)
            torch._foreach_mul_(towards, momentum)
            towards, scale = rooms, 1.0
        else:
            # before the first step there is no buffer: what is left in its place is not read
            torch._foreach_mul_(towards, momentum)
            scale = damped / momentum
    along = None
    if by_decay:
        along = dot(towards, [moment.before.parameters[i] for i in which]) * scale
    if decay and towards is own:
        torch._foreach_mul_(own, 1 + scale * decay)
        scale /= 1 + scale * decay
    elif decay:
        torch._foreach_add_(own, towards, alpha=decay * scale)
    return towards, -scale if settings["maximize"] else scale, along


def back_through_adam(
    adjoint: Adjoint, which: Sequence[int], settings: Settings, moment: Moment, by_decay: bool
) -> Towards:
    """Differentiate by the gradients of some parameters and, where asked for, by the weight decay.

    The adjoint becomes that of the state before, up to what goes through the gradients.
    """
    lr, decay, (beta1, beta2) = settings["lr"], settings["weight_decay"], settings["betas"]
    decoupled = bool(settings.get("decoupled_weight_decay", False))
    sign = -1.0 if settings["maximize"] else 1.0
    rate = lr / (1 - beta1**moment.count)
    root_of_correction = (1 - beta2**moment.count) ** 0.5
    scale, towards, along = 1 - beta1, [], []
    for i in which:
        own = adjoint.parameters[i]
        first, second = adjoint.slots[0][i], adjoint.slots[1][i]
        value = moment.before.parameters[i]
        by_first, by_second = moment.slopes(i, rate, root_of_correction, settings["eps"])
        first.addcmul_(own, by_first)
        second.addcmul_(own, by_second)
        gradient = moment.gradients[i] * sign
        if decay and not decoupled:
            gradient = gradient + decay * value
        share = gradient * (2 * (1 - beta2) / scale)
        toward = torch.addcmul(first, second, share, out=adjoint.room(i))
        first.mul_(beta1)
        second.mul_(beta2)
        if by_decay:
            along.append(-lr * dot([own], [value]) if decoupled else scale * dot([toward], [value]))
        if decay and decoupled:
            own.mul_(1 - lr * decay)
        elif decay:
            own.add_(toward, alpha=decay * scale)
        towards.append(toward)
    return towards, scale * sign, torch.stack(along).sum(0) if by_decay else None


Back = Callable[[Adjoint, Sequence[int], Settings, Moment, bool], Towards]
BACK: dict[Any, Back] = {
    torch.optim.SGD: back_through_sgd,
    torch.optim.Adam: back_through_adam,
    torch.optim.AdamW: back_through_adam,
}


def back_through_clipping(
    towards: Sequence[Tensor], gradients: Sequence[Tensor], max_norm: float
) -> list[Tensor]:
    """Differentiate by the gradients before they were clipped to a norm: (m, ...) each."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = max_norm / (norm + 1e-6)
    if factor >= 1:
        return list(towards)
    along = dot(towards, gradients) * (-factor / (norm + 1e-6) / norm)
    return [
        toward * factor + along.view(-1, *[1] * gradient.ndim) * gradient
        for toward, gradient in zip(towards, gradients, strict=True)
    ]
