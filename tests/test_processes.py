"""Fitted estimators in children of this process, forked and spawned, after threads have run."""

import multiprocessing
import os
import pickle
import queue
import sys
import threading

import numpy as np
import pytest

from tests.test_long_runs import KINDS

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="forks as POSIX does"),
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::RuntimeWarning", "ignore:.*fork:DeprecationWarning"
    ),
]
ASKED = [kind for kind in KINDS if kind != "replay"]


def answer(kind, content, said):
    """Answer in a child: one that was forked has the estimator, one that was spawned reads it."""
    import torch

    torch.set_num_threads(1)
    estimator = pickle.loads(content) if isinstance(content, bytes) else content
    said.put(np.asarray(KINDS[kind][1](estimator)))


def asked_in_a_child(start, kind, content):
    # a child forked after threads ran may hang in MKL's memory manager, with torch alone too
    context = multiprocessing.get_context(start)
    for seconds in (30, 30, 60, 120):
        said = context.Queue()
        child = context.Process(target=answer, args=(kind, content, said))
        child.start()
        try:
            return said.get(timeout=seconds)
        except queue.Empty:
            child.kill()
        finally:
            child.join(10)
            child.kill()
    pytest.fail("four children did not answer")


def fitted_and_asked(kind, in_threads):
    make, ask = KINDS[kind]
    estimator = make()
    if in_threads:
        threads = [threading.Thread(target=ask, args=(estimator,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return estimator, np.asarray(ask(estimator))


@pytest.mark.parametrize("kind", ASKED)
def test_a_forked_child_finds_the_same_bits_after_threads_ran(kind):
    if sys.platform == "darwin":
        pytest.skip("frameworks of the system do not fork")
    estimator, expected = fitted_and_asked(kind, in_threads=True)
    np.testing.assert_array_equal(asked_in_a_child("fork", kind, estimator), expected)
    np.testing.assert_array_equal(np.asarray(KINDS[kind][1](estimator)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ASKED)
def test_a_spawned_child_finds_the_same_bits(kind):
    estimator, expected = fitted_and_asked(kind, in_threads=True)
    content = pickle.dumps(estimator)
    np.testing.assert_array_equal(asked_in_a_child("spawn", kind, content), expected)


@pytest.mark.parametrize("kind", ASKED)
def test_a_child_forked_while_threads_ask_answers_too(kind):
    make, ask = KINDS[kind]
    estimator, stop = make(), threading.Event()
    expected = np.asarray(ask(estimator))

    def serve():
        while not stop.is_set():
            ask(estimator)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            found = asked_in_a_child("fork", kind, estimator)
            np.testing.assert_array_equal(found, expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
