"""What a round is said to have cost and how much of it was right."""

import numpy as np
import pytest
from sklearn.frozen import FrozenEstimator

from skperf import PerformativeAdapter
from skperf.performative.learning import _entry  # noqa: F401
from tests.performative.conftest import K


def test_accuracies_of_a_round_are_those_of_its_predictions(classifier, world):
    adapter = PerformativeAdapter(FrozenEstimator(classifier), adapter="tied", random_state=0)
    weights = np.random.default_rng(0).uniform(0.5, 2, 300)
    told = []
    for number in range(8):
        X, y = world.draw(300, [0.7, 0.1, 0.1, 0.1] if number % 2 else np.full(K, 1 / K))
        predicted = adapter.predict(X) if number else classifier.predict(X)
        told.append(
            [
                np.average(hits, weights=weights)
                for hits in (predicted == y, classifier.predict(X) == y)
            ]
        )
        adapter.partial_fit(X, y, rounds=number, sample_weight=weights, classes=range(K))
    record = adapter.prequential_
    np.testing.assert_allclose(record.accuracy_none, [one[1] for one in told])
    assert record.accuracy[1:] == pytest.approx([one[0] for one in told[1:]])
