"""A world that answers."""

import numpy as np
import pytest
from scipy.special import softmax

from skperf.datasets import PerformativeStream

N, K = 400, 4


@pytest.fixture
def rows():
    y = np.repeat(np.array(["a", "b", "c", "d"]), N // K)
    return np.column_stack([np.arange(N), np.arange(N)]), y


def shares(y):
    return np.array([(y == label).mean() for label in "abcd"])


def test_a_round(rows):
    stream = PerformativeStream(*rows, train_size=300, test_size=500, random_state=0)
    first = stream.next_round()
    assert first.round == 0
    assert first.X.shape == (300, 2)
    assert first.X_test.shape == (500, 2)
    assert stream.next_round().round == 1
    np.testing.assert_allclose(first.prior.sum(), 1.0)
    # rows keep their labels
    for X, y in ((first.X, first.y), (first.X_test, first.y_test)):
        np.testing.assert_array_equal(rows[1][X[:, 0]], y)


def test_the_pools_are_disjoint_and_stay(rows):
    stream = PerformativeStream(*rows, random_state=0)
    rounds = [stream.next_round(np.random.default_rng(s).random(K)) for s in range(6)]
    train = np.unique(np.concatenate([r.X[:, 0] for r in rounds]))
    test = np.unique(np.concatenate([r.X_test[:, 0] for r in rounds]))
    assert len(np.intersect1d(train, test)) == 0
    assert len(train) <= N // 2
    assert any(len(np.unique(r.X[:, 0])) < len(r.X) for r in rounds)  # with replacement


@pytest.mark.parametrize(("response", "sign"), [("adversarial", -1), ("popularity", 1)])
def test_answers(rows, response, sign):
    stream = PerformativeStream(
        *rows, response=response, temperature=0.3, test_size=20_000, random_state=0
    )
    stream.next_round()
    statistic = np.array([0.9, 0.5, 0.7, 0.6])
    found = stream.next_round(statistic)
    np.testing.assert_allclose(found.prior, softmax(sign * statistic / 0.3))
    np.testing.assert_allclose(shares(found.y_test), found.prior, atol=0.02)


def test_no_answer_and_an_answer_of_ones_own(rows):
    stream = PerformativeStream(*rows, response="none", random_state=0)
    first = stream.next_round()
    np.testing.assert_allclose(stream.next_round(np.full(K, 0.1)).prior, first.prior)
    own = PerformativeStream(*rows, response=lambda s: s[::-1], random_state=0)
    np.testing.assert_allclose(own.next_round([1, 2, 3, 4]).prior, [0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(own.next_round().prior, [0.4, 0.3, 0.2, 0.1])


def test_the_first_mix_is_nearly_even(rows):
    priors = [PerformativeStream(*rows, random_state=s).next_round().prior for s in range(200)]
    np.testing.assert_allclose(np.mean(priors, axis=0), 1 / K, atol=0.01)
    # Dirichlet(100, ...): each share varies by p (1 - p) / 401
    assert np.std(priors) == pytest.approx(np.sqrt(0.25 * 0.75 / 401), rel=0.15)


def test_the_floor(rows):
    stream = PerformativeStream(
        *rows, response=lambda s: [1, 0, 0, 0], test_size=200, floor=10, random_state=0
    )
    found = stream.next_round(np.zeros(K))
    assert len(found.y_test) == 200
    assert [(found.y_test == label).sum() for label in "abcd"] == [170, 10, 10, 10]
    assert (found.y == "a").all()


def test_seeds(rows):
    one, two = (PerformativeStream(*rows, random_state=3) for _ in range(2))
    other = PerformativeStream(*rows, random_state=4)
    for _ in range(2):
        a, b, c = one.next_round(), two.next_round(), other.next_round()
        np.testing.assert_array_equal(a.X_test, b.X_test)
        assert not np.array_equal(a.X_test, c.X_test)
    before = np.random.get_state()[1].copy()
    PerformativeStream(*rows, random_state=0).next_round()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"response": "kind"}, "response must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"floor": 600}, "takes 2400 rows"),
        ({"floor": -1}, "floor=-1"),
    ],
    ids=["response", "temperature", "none", "much", "negative"],
)
def test_worlds_that_cannot_be(rows, keywords, message):
    with pytest.raises(ValueError, match=message):
        PerformativeStream(*rows, **keywords)


def test_other_mistakes(rows):
    with pytest.raises(ValueError, match="at least twice"):
        PerformativeStream(np.zeros((3, 1)), [0, 0, 1])
    with pytest.raises(ValueError, match="3 rows, but y has 2"):
        PerformativeStream(np.zeros((3, 1)), [0, 0])
    with pytest.raises(ValueError, match="4 classes"):
        PerformativeStream(*rows).next_round(np.ones(3))
    for answer in (lambda s: [1.0, -1, 1, 1], lambda s: [np.nan] * K, lambda s: [1.0]):
        with pytest.raises(ValueError, match="a share for each class"):
            PerformativeStream(*rows, response=answer).next_round(np.ones(K))
