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
def test_threshold_keeps_the_share(scores, retention):
    scores = np.array(scores)
    threshold = retention_threshold(scores, retention)
    assert np.mean(scores >= threshold) >= retention - 1e-9
    higher = scores[scores > threshold]
    assert len(higher) / len(scores) < retention + 1 / len(scores)
