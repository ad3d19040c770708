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


def known(bias, weight):
    """A chain with one batch taken, and what torch needs to say the same."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias)
    module = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(27, K)).double()
    inputs, targets = torch.randn(B, 2, 5, 5).double(), torch.tensor([0, 2, 1, 1, 0])
    shares = torch.linspace(0.5, 2, B).double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    run = SimpleNamespace(names=[*parameters], compute=lambda module, rows: module(rows.array))
    links = find_chain(module, Rows(inputs), run)
    chain = Chain(links, CrossEntropy(weight=weight), labels=True)
    chain.take(inputs, targets, [*parameters.values()], shares)

    def losses(parameters, codes):
        logits = functional_call(module, parameters, (inputs,))
        each = -logits.log_softmax(1).gather(1, codes[:, None])[:, 0]
        return each if weight is None else each * weight[codes]

    return chain, parameters, losses, targets, shares


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 3.0])], ids=["plain", "weights"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_products_and_derivatives_by_labels(bias, weight):
    weight = None if weight is None else weight.double()
    chain, parameters, losses, targets, shares = known(bias, weight)

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
