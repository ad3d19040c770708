import numpy as np
import pytest
import torch
from torch import nn

from skperf.influence import CG, EKFAC, GGN, Exact, InfluenceScorer
from skperf.influence.damping import noise_damping

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 5)), np.arange(40) % 3


def linear(scale=1.0):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.mul_(scale)
    return layer


def curvature_rows(layer):
    """Gradients of the log probability of every class, times the root of its probability."""
    rows = []
    for row in torch.as_tensor(X):
        p = layer(row).softmax(0)
        for k in range(3):
            logit_slope = (torch.eye(3, dtype=p.dtype)[k] - p) * p[k].sqrt()
            rows.append(torch.outer(logit_slope, row).flatten())
    return torch.stack(rows).detach()


def test_auto_pulls_as_hard_as_the_mean_gradient_is_uncertain():
    layer = linear()
    probabilities = layer(torch.as_tensor(X)).softmax(1).detach()
    # labels drawn from the model itself: the mean gradient would be zero but for chance
    drawn = torch.multinomial(probabilities, 20_000, replacement=True)
    slopes = probabilities[:, None] - nn.functional.one_hot(drawn, 3)
    means = torch.einsum("ndk,nf->dkf", slopes, torch.as_tensor(X)) / len(X)
    error = means.flatten(1).square().sum(1).mean().sqrt()
    scorer = InfluenceScorer(layer, method=GGN(kept_trace=1.0)).fit(X, Y)
    assert scorer.damping_ == pytest.approx(
        1.5 * float(error / layer.weight.detach().norm()), rel=0.01
    )


def test_auto_is_the_same_with_and_without_rows_of_no_weight():
    weights = np.repeat([2.0, 0.0], 20)
    scorer = InfluenceScorer(linear(), method=GGN(kept_trace=1.0))
    some = scorer.fit(X, Y, sample_weight=weights).damping_
    assert some == pytest.approx(scorer.fit(X[:20], Y[:20]).damping_)


@pytest.mark.parametrize("method", [GGN(1.0), Exact(), EKFAC(rank=None), CG(tol=1e-10)])
def test_units_of_the_inputs_do_not_matter(method):
    plain = InfluenceScorer(linear(), method=method)
    other = InfluenceScorer(linear(10.0), method=method)
    expected = plain.fit(X, Y).influence(X[:4], Y[:4])
    found = other.fit(X / 10, Y).influence(X[:4] / 10, Y[:4])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weights_of_zero_are_no_reason_to_fail():
    trace = float(curvature_rows(linear()).square().sum()) / len(X)
    shares = torch.full((40,), 1 / 40)
    damping = noise_damping(trace, shares, [torch.zeros(3, 5)])
    assert damping == pytest.approx((trace / 40) ** 0.5)
    assert noise_damping(0.0, shares, [torch.ones(2)]) == 1e-8
