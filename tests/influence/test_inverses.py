"""Solvers of inverses, with weighted rows, against a dense matrix of one Jacobian a row."""

import numpy as np
import pytest
import torch
from influence_nets import brute_curvature, brute_gradients, mlp

from skperf import InfluenceScorer, from_module
from skperf.backbone.network import Network
from skperf.influence import CG, GIF, Exact, LiSSA
from skperf.influence.inverses import largest_of

N, K, DAMPING = 8, 3, 0.1
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N + 3, 4)), RNG.integers(K, size=N + 3)
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5, 0.25, 3.0, 0.75, 1.0])


@pytest.fixture(scope="module")
def dense():
    """Module, gradients of all rows and the curvature of the weighted ones."""
    module = mlp(4, 3, K)
    network, inputs = Network(module, np.arange(K)), torch.tensor(X)
    slopes = network(inputs).softmax(1) - torch.nn.functional.one_hot(torch.tensor(Y), K)
    gradients = brute_gradients(network, inputs, slopes.detach())
    shares = torch.tensor(WEIGHTS / WEIGHTS.sum())
    return module, gradients, brute_curvature(network, inputs[:N], shares)


def scorer(module, method):
    network = from_module(module, np.arange(K))
    scorer = InfluenceScorer(network, method=method, damping=DAMPING, random_state=0)
    return scorer.fit(X[:N], Y[:N], sample_weight=WEIGHTS)


@pytest.mark.parametrize(
    "method",
    [CG(tol=1e-9), LiSSA(tol=1e-6, max_iter=20_000), Exact()],
    ids=["cg", "lissa", "exact"],
)
def test_scores_are_products_with_the_damped_inverse(dense, method):
    module, gradients, curvature = dense
    damped = curvature + DAMPING * torch.eye(len(curvature), dtype=torch.float64)
    mapped = torch.linalg.solve(damped, gradients[N:].T).T
    expected = mapped @ gradients[:N].T * torch.tensor(WEIGHTS / WEIGHTS.sum())
    found = scorer(module, method).influence(X[N:], Y[N:])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_generalised_scores_of_all_parameters_are_ridge_least_squares(dense):
    module, gradients, curvature = dense
    fitted = scorer(module, GIF(ratio=1.0, ridge=1e-2, tol=1e-12, max_iter=500, curvature="ggn"))
    top = float(torch.linalg.eigvalsh(curvature)[-1])
    normal = curvature @ curvature + 1e-2 * top**2 * torch.eye(len(curvature), dtype=torch.float64)
    mapped = torch.linalg.solve(normal, curvature @ gradients[N:].T).T
    expected = mapped @ gradients[:N].T * torch.tensor(WEIGHTS / WEIGHTS.sum())
    np.testing.assert_allclose(fitted.influence(X[N:], Y[N:]), expected, rtol=0.05, atol=1e-6)


def test_the_largest_eigenvalue_is_found_from_products(dense):
    module, _, curvature = dense
    problem = scorer(module, CG())._learned.opened().first
    for matrix in (curvature, -2 * curvature):
        expected = float(torch.linalg.eigvalsh(matrix).abs().max())
        found = largest_of(problem, lambda v, matrix=matrix: v @ matrix)
        assert found == pytest.approx(expected, rel=0.02)
