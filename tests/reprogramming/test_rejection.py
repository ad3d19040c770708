import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from scipy.stats import entropy

from skperf.reprogramming.rejection import SCORES, agreement, retention_threshold

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
