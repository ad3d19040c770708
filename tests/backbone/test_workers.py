"""Pieces of work give the same results on every backend; what they share is sent once."""

import numpy as np
import pytest
from joblib import parallel_config

from skperf.backbone._workers import spread


class Shared:
    """Counts how often it is pickled."""

    def __init__(self):
        self.values = np.arange(4.0)
        self.pickled = 0

    def __getstate__(self):
        self.pickled += 1
        return self.__dict__


def scaled(common, piece):
    return common.values * piece


def changed(common, piece):
    common.values += piece
    return common.values.copy()


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_results_come_in_the_order_of_the_pieces(backend):
    with parallel_config(backend):
        results = list(spread(scaled, Shared(), range(5), n_jobs=2))
    np.testing.assert_array_equal(results, np.outer(range(5), np.arange(4.0)))


def test_one_worker_computes_in_place_and_lazily():
    common = Shared()
    results = spread(changed, common, [1, 10], n_jobs=None)
    np.testing.assert_array_equal(next(results), np.arange(4) + 1)
    np.testing.assert_array_equal(common.values, np.arange(4) + 1)


def test_processes_take_what_is_shared_once():
    common = Shared()
    with parallel_config("loky"):
        list(spread(scaled, common, range(7), n_jobs=2))
    assert common.pickled == 1


def test_threads_that_change_what_is_shared_have_a_copy_each():
    common = Shared()
    results = list(spread(changed, common, [1, 10], n_jobs=2, prefer="threads", own=True))
    np.testing.assert_array_equal(results, [np.arange(4) + 1, np.arange(4) + 10])
    np.testing.assert_array_equal(common.values, np.arange(4))


def test_a_lambda_reaches_processes():
    with parallel_config("loky"):
        results = list(spread(called, lambda piece: piece + 0.5, [1, 2], n_jobs=2))
    assert results == [1.5, 2.5]


def called(common, piece):
    return common(piece)
