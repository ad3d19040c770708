"""A small world that answers, and a classifier trained at equal shares."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

K = 4


class World:
    """Gaussian classes; the next mix answers the statistic."""

    def __init__(self, seed=0, temperature=0.2):
        self.rng = np.random.default_rng(seed)
        self.means = np.random.default_rng(7).normal(size=(K, 3)) * 1.6
        self.temperature = temperature
        self.prior = np.full(K, 1 / K)

    def rows(self, y):
        return self.means[y] + self.rng.normal(size=(len(y), 3))

    def draw(self, size, prior=None):
        y = self.rng.choice(K, size, p=self.prior if prior is None else prior)
        return self.rows(y), y

    def next_round(self, statistic=None, size=400):
        if statistic is not None:
            self.prior = softmax(-np.asarray(statistic) / self.temperature)
        return self.draw(size)


@pytest.fixture(scope="session")
def classifier():
    world = World(seed=1)
    y = np.repeat(np.arange(K), 100)
    return LogisticRegression().fit(world.rows(y), y)


@pytest.fixture
def frozen(classifier):
    return FrozenEstimator(classifier)


@pytest.fixture
def world():
    return World()


def live(adapter, world, n_rounds, **draw):
    """Deploy, measure, learn: one partial_fit a round; gives all rows back."""
    statistic, parts = None, []
    for number in range(n_rounds):
        X, y = world.next_round(statistic, **draw)
        adapter.partial_fit(X, y, rounds=number)
        statistic = adapter.statistic_
        parts.append((X, y, np.full(len(y), number)))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@pytest.fixture(scope="session")
def lived(classifier):
    """Rows of 12 rounds and the adapter that lived them; not to be changed."""
    from skperf import PerformativeAdapter

    adapter = PerformativeAdapter(
        FrozenEstimator(classifier), adapter=["fixed", "tied", "curve", "linear"], random_state=0
    )
    return adapter, live(adapter, World(), 12)
