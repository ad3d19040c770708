from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from torch import nn

from skperf.influence import CG, EKFAC, GGN, Exact, InfluenceScorer
from skperf.influence.damping import noise_damping, of_each

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


def test_weights_and_biases_get_a_number_each():
    parameters = {"w": torch.ones(2, 3), "b": torch.ones(3), "kernel": torch.ones(2, 1, 2)}
    found = of_each(SimpleNamespace(parameters=parameters), 0.5, 7.0)
    assert found.tolist() == [0.5] * 6 + [7.0] * 3 + [0.5] * 4
    assert found.dtype == torch.float64


@pytest.mark.parametrize("C", [0.02, 5.0])
def test_a_penalty_that_spares_intercepts_hardly_holds_them(C):
    y = (X[:, 0] + 0.3 * np.arange(40) % 2 > 0.2).astype(int)
    fitted = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(X, y)
    scorer = InfluenceScorer(FrozenEstimator(fitted), method=GGN(kept_trace=1.0, max_rows=None))
    found = scorer.fit(X, y).influence(X[:7], y[:7])
    # by hand, in the parameters of one logit, the intercept last and free
    rows = np.c_[X, np.ones(40)]
    p = fitted.predict_proba(X)[:, 1]
    gradients = (p - y)[:, None] * rows
    hessian = (rows * (p * (1 - p))[:, None]).T @ rows / 40
    ridge = np.diag([1 / (C * 40)] * 5 + [0.0])
    expected = gradients[:7] @ np.linalg.solve(hessian + ridge, gradients.T) / 40
    np.testing.assert_allclose(found, expected, atol=3e-3 * np.abs(expected).max())
    held = gradients[:7] @ np.linalg.solve(hessian + ridge[0, 0] * np.eye(6), gradients.T) / 40
    if C < 1:
        assert np.abs(held - expected).max() > 0.05 * np.abs(expected).max()
