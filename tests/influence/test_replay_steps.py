"""One step of an optimizer gone back through, against torch's derivative of the step."""

import itertools

import pytest
import torch

from skperf.backbone.training_run import State
from skperf.influence.replay_steps import (
    Adjoint,
    Moment,
    back_through_adam,
    back_through_clipping,
    back_through_sgd,
    dot,
)

SHAPES, M = ((2, 3), (4,)), 2


def drawn(*lead):
    return [torch.randn(*lead, *shape).double() for shape in SHAPES]


def held_against_autograd(step, back, settings, slots, count):
    """Compare all that a way back gives with derivatives of a step: ([p], [g], slots, wd) -> ..."""
    values, gradients = drawn(), drawn()
    decay = torch.tensor(settings["weight_decay"]).double()
    leaves = [[t.clone().requires_grad_() for t in part] for part in (values, gradients, *slots)]
    decay.requires_grad_()
    after = step(leaves[0], leaves[1], leaves[2:], decay, count)
    directions = [[torch.randn(M, *t.shape).double() for t in part] for part in after]
    flat = [t for part in after for t in part]
    sources = [*(t for part in leaves for t in part), decay]
    pulled = [
        torch.autograd.grad(
            flat, sources, [d[m] for part in directions for d in part],
            retain_graph=True, materialize_grads=True,
        )
        for m in range(M)
    ]  # fmt: skip
    expected = [torch.stack(column) for column in zip(*pulled, strict=True)]
    adjoint = Adjoint(
        [d.clone() for d in directions[0]],
        [[d.clone() for d in part] for part in directions[1:]],
        [],
    )
    states = [
        State([t.detach() for t in part[0]], [[t.detach() for t in s] for s in part[1:]], [])
        for part in ((leaves[0], *leaves[2:]), after)
    ]
    towards, scale, along = back(adjoint, [0, 1], settings, Moment(*states, gradients, count), True)
    n = len(SHAPES)
    for i in range(n):
        by_gradient = towards[i] * scale
        torch.testing.assert_close(by_gradient, expected[n + i])
        torch.testing.assert_close(adjoint.parameters[i], expected[i])
        for k, slot in enumerate(adjoint.slots):
            if count > 1:
                torch.testing.assert_close(slot[i], expected[(2 + k) * n + i])
    torch.testing.assert_close(along, expected[-1])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "count"),
    [
        (0.0, 0.0, False, 3),
        (0.8, 0.0, False, 3),
        (0.8, 0.25, False, 3),
        (0.8, 0.25, False, 1),
        (0.8, 0.0, True, 3),
    ],
)
def test_sgd(momentum, dampening, nesterov, count, decay, maximize):
    torch.manual_seed(0)
    settings = {
        "lr": 0.1, "momentum": momentum, "dampening": dampening, "nesterov": nesterov,
        "weight_decay": decay, "maximize": maximize,
    }  # fmt: skip

    def step(values, gradients, slots, weight_decay, count):
        buffers, moved = [], []
        for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            own = (-gradient if maximize else gradient) + weight_decay * value
            if momentum:
                buffer = own if count == 1 else momentum * slots[0][i] + (1 - dampening) * own
                buffers.append(buffer)
                own = own + momentum * buffer if nesterov else buffer
            moved.append(value - 0.1 * own)
        return [moved, buffers] if momentum else [moved]

    held_against_autograd(step, back_through_sgd, settings, [drawn()] if momentum else [], count)


@pytest.mark.parametrize(
    ("decoupled", "decay", "maximize"), itertools.product([False, True], [0.0, 0.3], [False, True])
)
def test_adam(decoupled, decay, maximize):
    torch.manual_seed(0)
    settings = {
        "lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": decay,
        "decoupled_weight_decay": decoupled, "maximize": maximize,
    }  # fmt: skip

    def step(values, gradients, slots, weight_decay, count):
        moved, means, squares = [], [], []
        for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            own, start = (-gradient if maximize else gradient), value
            if decoupled:
                start = value * (1 - 0.1 * weight_decay)
            else:
                own = own + weight_decay * value
            mean = 0.8 * slots[0][i] + 0.2 * own
            square = 0.95 * slots[1][i] + 0.05 * own**2
            root = (square / (1 - 0.95**count)).sqrt() + 1e-3
            moved.append(start - 0.1 * mean / (1 - 0.8**count) / root)
            means.append(mean)
            squares.append(square)
        return [moved, means, squares]

    slots = [drawn(), [t.square() + 0.1 for t in drawn()]]
    held_against_autograd(step, back_through_adam, settings, slots, 4)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping(max_norm):
    torch.manual_seed(0)
    gradients, towards = [g.requires_grad_() for g in drawn()], drawn(M)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    clipped = [g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for g in gradients]
    found = back_through_clipping(towards, [g.detach() for g in gradients], max_norm)
    for m in range(M):
        expected = torch.autograd.grad(
            clipped, gradients, [t[m] for t in towards], retain_graph=True
        )
        for own, by_torch in zip(found, expected, strict=True):
            torch.testing.assert_close(own[m], by_torch)


def test_inner_products_are_of_equally_many_tensors():
    adjoints, values = drawn(M), drawn()
    expected = [
        sum(float((a[m] * v).sum()) for a, v in zip(adjoints, values, strict=True))
        for m in range(M)
    ]
    assert dot(adjoints, values).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="zip"):
        dot(adjoints, values[:1])
