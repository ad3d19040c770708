import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from scipy.stats import entropy

from skperf.reprogramming.judging import best_score
from skperf.reprogramming.rejection import (
    FEATURE_SCORES,
    KEPT_DIRECTIONS,
    SCORES,
    Gaussians,
    VirtualLogit,
    agreement,
    left_out_aurocs,
    retention_threshold,
)

SIMILARITIES = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_scores_equal_their_definitions(temperature):
    s = SIMILARITIES.numpy() / temperature
    expected = {
        "mcm": softmax(s, axis=1).max(1),
        "max_logit": SIMILARITIES.numpy().max(1),
        "energy": temperature * logsumexp(s, axis=1),
        "entropy": -entropy(softmax(s, axis=1), axis=1),
    }
    assert set(expected) == set(SCORES)
    for name, values in expected.items():
        np.testing.assert_allclose(SCORES[name](SIMILARITIES, temperature).numpy(), values)


def test_agreement_is_a_cosine():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(agreement(a, b), torch.tensor([1.0, 0.0]))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.floats(0.01, 1))
def test_threshold_lies_between_the_ranks_of_a_fresh_row(scores, retention):
    scores = np.sort(scores)
    threshold = retention_threshold(scores, retention)
    rank = (1 - retention) * (len(scores) + 1)  # of n + 1 rows, n + 1 places are as likely
    below, above = int(np.floor(rank)), int(np.ceil(rank))
    assert scores[max(0, below - 1)] - 1e-9 <= threshold
    assert threshold <= scores[min(len(scores), max(1, above)) - 1] + 1e-9


@pytest.mark.parametrize("n", [20, 33, 100])
def test_threshold_keeps_the_share_of_fresh_rows(n):
    generator = np.random.RandomState(0)
    kept = []
    for _ in range(4000):
        scores = generator.exponential(size=n)
        kept.append(np.exp(-retention_threshold(scores, 0.95)))  # share of fresh rows above
    assert abs(np.mean(kept) - 0.95) < 0.01


def clusters(n_classes, n=30, width=8, spread=3.0):
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.2, 2, width)
    codes = torch.arange(n_classes).repeat_interleave(n)
    centres = spread * torch.randn(n_classes, width, generator=generator)
    return centres[codes] + scales * torch.randn(len(codes), width, generator=generator), codes


def test_mahalanobis_equals_the_distance_by_the_inverse_of_a_shrunk_covariance():
    outputs, codes = clusters(3)
    x, means = outputs.numpy(), torch.stack([outputs[codes == k].mean(0) for k in range(3)]).numpy()
    residuals = x - means[codes]
    covariance = residuals.T @ residuals / (len(x) - 3)
    share = 8 / (len(x) + 8)
    covariance = (1 - share) * covariance + share * covariance.trace() / 8 * np.eye(8)
    asked = np.random.RandomState(0).normal(size=(6, 8)).astype(np.float32)
    apart = asked[:, None] - means
    expected = -np.einsum("nkd,de,nke->nk", apart, np.linalg.inv(covariance), apart).min(1)
    ours = FEATURE_SCORES["mahalanobis"].fit(outputs, codes).score(torch.as_tensor(asked))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-3)


def test_left_out_classes_are_not_known_to_the_score():
    _, codes = clusters(4)
    seen = []

    def score(known, asked):
        seen.append((set(codes[known].tolist()), set(codes[asked].tolist())))
        assert not set(known) & set(asked)
        return torch.as_tensor(-np.isin(codes[asked], codes[known]).astype(float))

    assert left_out_aurocs(score, codes, 10).tolist() == [0.0] * 4
    assert [asked - known for known, asked in seen] == [{0}, {1}, {2}, {3}]
    assert len(left_out_aurocs(lambda known, asked: torch.zeros(len(asked)), codes, 2)) == 2


def test_the_usual_score_stays_unless_another_is_clearly_better():
    assert best_score(*clusters(5)) == "mahalanobis"
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(6).repeat_interleave(20)
    assert best_score(torch.randn(120, 5, generator=generator), codes) in FEATURE_SCORES
    assert best_score(torch.randn(6, 5, generator=generator), torch.arange(6)) == "mahalanobis"


@pytest.mark.parametrize("n", [3, 4, 9])
def test_the_variance_is_that_within_classes_shrunk_to_its_mean(n):
    """As many degrees of freedom as rows less classes; one direction is kept of two."""
    rng = np.random.default_rng(n)
    codes = np.arange(n) % 2
    outputs = rng.normal(size=(n, 2)) * [3.0, 1.0] + 5 * codes[:, None]
    centred = outputs - np.array([outputs[codes == k].mean(0) for k in (0, 1)])[codes]
    covariance = centred.T @ centred / (n - 2)
    share = min(0.9, max(0.05, 2 / (n + 2)))
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / 2 * np.eye(2)
    low, high = np.linalg.eigvalsh(shrunk)
    fitted = Gaussians.fit(torch.tensor(outputs), torch.tensor(codes))
    assert fitted.deviation == pytest.approx(np.sqrt(low))
    assert float(fitted.shares[0]) == pytest.approx(np.sqrt(low / high) - 1)


def test_one_direction_stays_aside_where_all_vary_alike():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(400, 3)) * [1.0, 1.2, 1.1]
    found = VirtualLogit.fit(torch.tensor(outputs), torch.zeros(400, dtype=torch.long))
    _, vectors = np.linalg.eigh(np.cov(outputs.T))
    assert found.directions.shape == (3, 2)
    assert float((found.directions.T @ torch.tensor(vectors[:, 0])).norm()) == pytest.approx(0)


def test_more_dimensions_than_rows_cost_no_matrix_of_all_pairs():
    """The scores are those of the whole covariance's eigenvectors."""
    rng = np.random.default_rng(0)
    outputs, codes = rng.normal(size=(30, 70)) @ rng.normal(size=(70, 70)), np.arange(30) % 3
    asked = rng.normal(size=(9, 70)) @ rng.normal(size=(70, 70))
    means = np.stack([outputs[codes == k].mean(0) for k in range(3)])
    covariance = (outputs - means[codes]).T @ (outputs - means[codes]) / 27
    values, vectors = np.linalg.eigh(
        0.3 * covariance + 0.7 * np.trace(covariance) / 70 * np.eye(70)
    )
    values[:-KEPT_DIRECTIONS] = values[:-KEPT_DIRECTIONS].mean()
    inverse = vectors / values @ vectors.T
    away = asked[:, None] - means
    expected = -np.einsum("nkd,de,nke->nk", away, inverse, away).min(1)
    fitted = Gaussians.fit(torch.tensor(outputs), torch.tensor(codes))
    np.testing.assert_allclose(fitted.score(torch.tensor(asked)), expected, rtol=1e-6)
    centred = outputs - outputs.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    kept = int((values[::-1].cumsum() < 0.95 * values.sum()).sum()) + 1
    rest = (asked - outputs.mean(0)) @ vectors[:, : 70 - kept]
    expected = -np.linalg.norm(rest, axis=1) / np.linalg.norm(asked - outputs.mean(0), axis=1)
    fitted = VirtualLogit.fit(torch.tensor(outputs), torch.tensor(codes))
    np.testing.assert_allclose(fitted.score(torch.tensor(asked)), expected, rtol=1e-6)


def test_a_virtual_logit_is_the_share_outside_the_principal_directions():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6)) * [9, 6, 4, 1, 0.5, 0.2] + [5, -8, 3, 7, -6, 4]
    centre = rows.mean(0)
    _, values, directions = np.linalg.svd(rows - centre)
    kept = int((np.cumsum(values**2) < 0.95 * (values**2).sum()).sum()) + 1
    assert kept == 3
    fitted = VirtualLogit.fit(torch.tensor(rows), torch.zeros(40, dtype=torch.long))
    asked = rng.normal(size=(7, 6)) * 5
    outside = (asked - centre) @ directions[kept:].T
    expected = -np.linalg.norm(outside, axis=1) / np.linalg.norm(asked - centre, axis=1)
    np.testing.assert_allclose(fitted.score(torch.tensor(asked)), expected, rtol=1e-9)


def test_distances_to_classes_are_those_of_their_shrunk_covariance():
    rng = np.random.default_rng(0)
    width, codes = 5, np.repeat([0, 2, 3], [9, 12, 15])
    centres = rng.normal(size=(4, width)) * 4
    rows = centres[codes] + rng.normal(size=(36, width)) * [3, 2, 1, 0.5, 0.2]
    means = np.stack([rows[codes == c].mean(0) for c in (0, 2, 3)])
    residuals = rows - means[np.searchsorted([0, 2, 3], codes)]
    values, vectors = np.linalg.eigh(residuals.T @ residuals / (36 - 3))
    share = min(0.9, max(0.05, width / (36 + width)))
    shrunk = (1 - share) * values + share * values.mean()
    inverse = vectors @ np.diag(1 / shrunk) @ vectors.T
    asked = rng.normal(size=(6, width)) * 3
    gaps = asked[:, None] - means
    expected = -np.einsum("ncd,de,nce->nc", gaps, inverse, gaps).min(1)
    fitted = Gaussians.fit(torch.tensor(rows), torch.tensor(codes))
    np.testing.assert_allclose(fitted.score(torch.tensor(asked)), expected, rtol=1e-6)


def test_a_row_near_the_centre_has_its_share_outside_too():
    score = VirtualLogit(torch.zeros(2).double(), torch.tensor([[1.0], [0.0]]).double())
    rows = torch.tensor([[0.0, 1.5e-12], [3.0, 4.0], [2.0, 0.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(score.score(rows), torch.tensor([-1, -0.8, 0, 0]).double())
