"""Every random operator draws from the generator given, none from the global stream."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from skperf.backbone.randomness import drawing_from

HALF = torch.full((5,), 0.5)
OPERATORS = {
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(2, 2),
    "randint": lambda: torch.randint(9, (9,)),
    "randint low": lambda: torch.randint(2, 99, (9,)),
    "randperm": lambda: torch.randperm(30),
    "uniform_": lambda: torch.empty(3).uniform_(),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "bernoulli": lambda: torch.bernoulli(torch.full((40,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(50), 20),
    "rand_like": lambda: torch.rand_like(HALF),
    "poisson": lambda: torch.poisson(torch.full((20,), 5.0)),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "dropout": lambda: F.dropout(torch.ones(40), 0.5),
    "attention": lambda: F.scaled_dot_product_attention(
        *[torch.ones(1, 1, 9, 4)] * 3, dropout_p=0.5
    ),
    "rrelu": lambda: F.rrelu(-torch.ones(9), training=True),
    "linear": lambda: nn.Linear(4, 3).weight.detach(),
    "lstm": lambda: nn.LSTM(4, 4, 2, dropout=0.5)(torch.ones(6, 4))[0].detach(),
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(3, 3)),
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(3, 3)),
    "distribution": lambda: torch.distributions.Gamma(2.0, 1.0).sample((3,)),
}


@pytest.mark.parametrize("grad", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPERATORS)
def test_draws_are_the_generators_own(name, grad):
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with grad(), drawing_from(torch.Generator().manual_seed(seed)) as mode:
            drawn.append(OPERATORS[name]())
        assert mode.drawn
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_drops_its_share_and_scales_the_rest():
    with drawing_from(torch.Generator().manual_seed(0)):
        values = F.dropout(torch.ones(20_000), 0.3)
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs(float((values == 0).float().mean()) - 0.3) < 0.02


def test_what_draws_nothing_is_seen_to():
    with drawing_from(torch.Generator()) as mode:
        nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert not mode.drawn


@pytest.mark.parametrize("trains", [True, False])  # torch has an operator of its own for each
@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
def test_what_dropout_keeps_makes_up_for_what_it_drops(p, trains):
    with drawing_from(torch.Generator().manual_seed(0)):
        found = F.dropout(torch.ones(4000, requires_grad=trains), p)
        still = F.dropout(torch.ones(9), p, training=False)
    found = found.detach()
    kept = found[found != 0]
    assert len(kept) / 4000 == pytest.approx(1 - p, abs=0.03)
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p) if p < 1 else 1.0))
    assert torch.equal(still, torch.ones(9))


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_the_fused_operator_scales_what_it_keeps_as_well(p):
    with drawing_from(torch.Generator().manual_seed(0)):
        found, kept = torch.native_dropout(torch.ones(4000), p, True)
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.03)
    torch.testing.assert_close(found, kept / (1 - p))
