"""Products by hand of one batch against torch's own derivatives."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp

from skperf.backbone.losses import CrossEntropy
from skperf.backbone.rows import Rows
from skperf.influence.replay_chain import Chain, find_chain

K, B, M = 3, 5, 2
SCALE = -0.5


NETWORKS = {
    "convolution": lambda bias: (
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias), nn.Tanh(), nn.Flatten(),
        nn.Linear(27, K),
    ),
    "two convolutions": lambda bias: (
        nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 3, 3, bias=bias), nn.Sigmoid(),
        nn.Conv2d(3, 4, 2, bias=bias), nn.GELU(), nn.Flatten(), nn.Linear(16, K, bias=bias),
    ),
    "two layers": lambda bias: (
        nn.Linear(50, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.Softplus(),
        nn.Linear(5, K, bias=bias),
    ),
}  # fmt: skip


def known(bias, weight, kind="convolution", smoothing=0.0):
    """A chain with one batch taken, and what torch needs to say the same."""
    torch.manual_seed(0)
    module = nn.Sequential(*NETWORKS[kind](bias)).double()
    inputs, targets = torch.randn(B, 2, 5, 5).double(), torch.tensor([0, 2, 1, 1, 0])
    inputs = inputs if kind == "convolution" else inputs.flatten(1)
    shares = torch.linspace(0.5, 2, B).double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    run = SimpleNamespace(names=[*parameters], compute=lambda module, rows: module(rows.array))
    links = find_chain(module, Rows(inputs), run)
    loss = CrossEntropy(weight=weight, label_smoothing=smoothing)
    chain = Chain(links, loss, labels=True)
    chain.take(inputs, targets, [*parameters.values()], shares)

    def losses(parameters, codes):
        logits = functional_call(module, parameters, (inputs,))
        every = -logits.log_softmax(1)
        own = every.gather(1, codes[:, None])[:, 0]
        each = (1 - smoothing) * own + smoothing * every.mean(1)
        return each if weight is None else each * weight[codes]

    return chain, parameters, losses, targets, shares


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 3.0])], ids=["plain", "weights"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_products_and_derivatives_by_labels(kind, bias, weight):
    weight = None if weight is None else weight.double()
    smoothing = 0.0 if weight is not None or bias else 0.2
    chain, parameters, losses, targets, shares = known(bias, weight, kind, smoothing)

    def batch(parameters):
        return (losses(parameters, targets) * shares).mean()

    slope = grad(batch)(parameters)
    for found, expected in zip(chain.gradients(), slope.values(), strict=True):
        torch.testing.assert_close(found, expected)
    towards = {name: torch.randn(M, *p.shape).double() for name, p in parameters.items()}
    into = [torch.ones_like(direction) for direction in towards.values()]
    rows, labels = chain.pull([*towards.values()], into, [], SCALE)
    for m in range(M):
        direction = {name: d[m] for name, d in towards.items()}
        _, products = jvp(grad(batch), (parameters,), (direction,))
        for found, expected in zip(into, products.values(), strict=True):
            torch.testing.assert_close(found[m], 1 + SCALE * expected)
        by_class = [
            jvp(lambda p, k=k: losses(p, torch.full((B,), k)), (parameters,), (direction,))[1]
            for k in range(K)
        ]
        by_class = torch.stack(by_class, 1)
        own = by_class.gather(1, targets[:, None])
        torch.testing.assert_close(rows[m], SCALE * own[:, 0] / B)
        torch.testing.assert_close(labels[m], SCALE * (by_class - own) * shares[:, None] / B)
