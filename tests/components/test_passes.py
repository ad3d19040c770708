"""Passes of a plan, counted."""

import numpy as np

from skperf.components.designs import Plan
from skperf.components.passes import Measurements, measure_baseline, spend


class Question:
    """Notes the masks that are run; the fall of an output is the number of the component."""

    n_components = 4

    def __init__(self):
        self.run = []

    def outcomes(self, masks, first=0):
        self.run.append((np.asarray(masks).copy(), first))
        gone = 1 - np.asarray(masks, float)
        return np.stack([10 - gone @ np.arange(4.0), 20 - gone @ np.arange(4.0)], 1)

    def masks(self, numbers):
        return np.array([[number % 2, 1, 0, 1] for number in numbers])


def test_the_intact_network_runs_once():
    question = Question()
    np.testing.assert_array_equal(measure_baseline(question), [10, 20])
    ((masks, first),) = question.run
    np.testing.assert_array_equal(masks, np.ones((1, 4)))
    assert first == 0


def test_a_plan_is_run_on_from_what_is_done():
    question = Question()
    measured = Measurements(measure_baseline(question), 4)
    spend(question, measured, Plan(singles=3, masks=2))
    assert measured.alone is None
    spend(question, measured, Plan(singles=1, masks=3))
    assert (measured.done.singles, measured.done.masks) == (4, 5)
    np.testing.assert_allclose(measured.alone, [[0, 1, 2, 3]] * 2)
    gone = 1 - question.masks(range(5))
    np.testing.assert_allclose(measured.outcomes[:, 0], 10 - gone @ np.arange(4.0))
    assert [first for masks, first in question.run[1:]] == [0, 0, 3, 2]
