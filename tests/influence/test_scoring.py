"""Scores of several members with shares, against gradients of every row and token by autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from skperf import InfluenceScorer, from_module
from skperf.influence import scoring

N, LENGTH, K = 7, 3, 4
SHARES = (0.25, 1.5)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N + 3, LENGTH, 3)), RNG.integers(K, size=(N + 3, LENGTH))
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5, 0.25, 3.0, 0.75])
RELATIVE = WEIGHTS / WEIGHTS.mean()


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, K)).double()


@pytest.fixture(scope="module")
def ensemble(module):
    scorer = InfluenceScorer(module, method="gradient_dot")
    scorer.fit(X[:N], Y[:N], sample_weight=WEIGHTS)
    opened = scorer._learned.opened()
    (member,) = opened.members
    return replace(opened, members=[replace(member, share=share) for share in SHARES])


@pytest.fixture(scope="module")
def by_token(module):
    """Gradient of each token's part of the loss of each row, (n, length, n_parameters)."""
    parts = []
    for row, codes in zip(torch.tensor(X), torch.tensor(Y), strict=True):
        losses = cross_entropy(module(row), codes, reduction="none") / LENGTH
        for token in losses:
            found = torch.autograd.grad(token, list(module.parameters()), retain_graph=True)
            parts.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(parts).view(N + 3, LENGTH, -1).numpy()


def asked(ensemble, rows=slice(N, None)):
    """Rows and targets as the ensemble takes them."""
    problem = ensemble.first
    kind = type(problem.X)
    return kind(X[rows]), torch.as_tensor(Y[rows])


def expected_of(by_token):
    gradients = by_token.sum(1)
    return sum(SHARES) * gradients[N:] @ (RELATIVE[:, None] * gradients[:N]).T


@pytest.mark.parametrize("aggregate", [None, "sum", "mean"])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("budget", [None, 4_000], ids=["one tile", "many"])
def test_members_add_up_by_their_shares(ensemble, by_token, aggregate, given, budget):
    if budget is not None:
        ensemble = replace(ensemble, budget=budget)
        assert len([*ensemble.tiles(*asked(ensemble))]) > 1
    expected = expected_of(by_token)
    if aggregate is not None:
        expected = expected.sum(0) / (1 if aggregate == "sum" else 3)
    out = np.full(expected.shape, 7.0) if given else None
    found = ensemble.matrix(*asked(ensemble), out=out, aggregate=aggregate)
    assert found is out or not given
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_few_rows_are_one_tile(ensemble):
    (queries, rows, scores), *further = ensemble.tiles(*asked(ensemble))
    assert not further
    assert (queries, rows) == (slice(0, 3), slice(0, N))
    assert scores.shape == (3, N)


def test_scores_of_other_rows_and_of_some_rows(ensemble, by_token):
    gradients = by_token.sum(1)
    others = asked(ensemble, slice(N - 2, N + 1))
    expected = sum(SHARES) * gradients[N:] @ gradients[N - 2 : N + 1].T
    found = ensemble.of_others(*asked(ensemble), *others)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    some = torch.tensor([5, 0, 2])
    found = ensemble.scores_of(*asked(ensemble), some)
    np.testing.assert_allclose(found, expected_of(by_token)[:, some], rtol=1e-5)


def test_scores_by_token_of_queries_and_of_weighted_rows(ensemble, by_token):
    gradients = by_token.sum(1)
    weighted = RELATIVE[:, None] * gradients[:N]
    of_queries = sum(SHARES) * np.einsum("qtp,np->qtn", by_token[N:], weighted)
    of_rows = sum(SHARES) * np.einsum("qp,ntp,n->qnt", gradients[N:], by_token[:N], RELATIVE)
    found = ensemble.by_token(*asked(ensemble), "queries")
    np.testing.assert_allclose(found, of_queries, rtol=1e-6, atol=1e-12)
    found = ensemble.by_token(*asked(ensemble), "rows")
    np.testing.assert_allclose(found, of_rows, rtol=1e-6, atol=1e-12)


def test_losses_of_each_member(ensemble, module):
    with torch.no_grad():
        each = cross_entropy(module(torch.tensor(X[N:])).mT, torch.tensor(Y[N:]), reduction="none")
    found = ensemble.losses(*asked(ensemble))
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found, [each.mean(1).numpy()] * 2, rtol=1e-6)


def test_self_influence_of_the_loss_is_a_squared_length(ensemble, by_token):
    rows = slice(N - 2, N + 3)
    found = ensemble.self_influences(*asked(ensemble, rows))
    expected = sum(SHARES) * (by_token.sum(1)[rows] ** 2).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_self_influence_of_a_margin_pairs_its_gradient_with_that_of_the_loss():
    torch.manual_seed(0)
    module = nn.Linear(3, K).double()
    rows, codes = X[:N, 0], Y[:N, 0]
    network = from_module(module, np.arange(K))
    scorer = InfluenceScorer(network, method="gradient_dot", output="margin").fit(rows, codes)
    expected = []
    for row, code in zip(torch.tensor(rows), codes, strict=True):
        outputs, pair = module(row), []
        others = outputs[[k for k in range(K) if k != code]]
        margin = outputs[code] - others.max()
        for value in (margin, -outputs.log_softmax(0)[code]):
            found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
            pair.append(torch.cat([g.flatten() for g in found]))
        expected.append(-float(pair[0] @ pair[1]))
    np.testing.assert_allclose(scorer.self_influence(rows, codes), expected, rtol=1e-6)


@pytest.mark.parametrize("worth", [True, False])
def test_workers_compute_gradients_anew_only_where_that_is_worth_it(ensemble, worth, monkeypatch):
    began, anew = [], scoring.anew.tiles_anew

    def begin(*given, **options):
        began.append(given)
        return anew(*given, **options)

    monkeypatch.setattr(scoring.anew, "worth_it", lambda *_, **__: worth)
    monkeypatch.setattr(scoring.anew, "tiles_anew", begin)
    found = ensemble.matrix(*asked(ensemble))
    assert bool(began) == worth
    assert found.shape == (3, N)
