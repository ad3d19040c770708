"""Long lives of one process, and the same bits wherever they are computed."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from torch import nn

from skperf import (
    ComponentAttributor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    Reprogrammer,
    from_module,
)

RNG = np.random.default_rng(0)
X = RNG.random((40, 16)).astype(np.float32)
y = np.arange(40) % 3
ROUNDS = np.repeat(np.arange(5), 8)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).eval()


def influence(**params):
    return InfluenceScorer(module(), random_state=0, **params).fit(X, y)


def replayed(**params):
    net = Net(module(), max_epochs=2, random_state=0)
    return InfluenceScorer(net, method="replay", **params).fit(X, y)


def components(**params):
    params = {"components": "neurons", "fraction": 0.3, "budget": 30, "random_state": 0} | params
    return ComponentAttributor(module(), **params).fit(X, y)


def performative(**params):
    return PerformativeAdapter(from_module(module()), random_state=0).fit(X, y, rounds=ROUNDS)


def reprogramming(**params):
    params = {"image_shape": (1, 4, 4), "border": 1, "max_epochs": 1, "random_state": 0}
    return Reprogrammer(encoder(), **params).fit(X, y)


def net(**params):
    return Net(module(), max_epochs=2, random_state=0).fit(X, y)


# what is fitted, and what it is asked
KINDS = {
    "influence": (influence, lambda e: e.influence(X[:4], y[:4])),
    "replay": (replayed, lambda e: e.influence(X[:4], y[:4])),
    "components": (components, lambda e: e.attribute(X[:4], y[:4])),
    "performative": (performative, lambda e: e.predict_proba(X)),
    "reprogramming": (reprogramming, lambda e: e.predict_proba(X)),
    "net": (net, lambda e: e.predict_proba(X)),
}


def resident():
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def lives(work, times):
    """Run work many times: growth of memory over the later half, what is held, times."""
    for _ in range(max(2, times // 10)):
        work()
    before, sizes, seconds = held(), [], []
    for i in range(times):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
        if i % max(1, times // 10) == 0:
            gc.collect()
            sizes.append(resident())
    third = max(1, times // 3)
    return {
        "growth": max(sizes[-3:]) - max(sizes[: len(sizes) // 2]),
        "held": (before, held()),
        "slower": float(np.median(seconds[-third:]) / np.median(seconds[:third])),
    }


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "times"), [("calls", 1000), ("fits", 100)])
def test_memory_files_threads_and_times_stay_flat(kind, what, times):
    make, ask = KINDS[kind]
    fitted = make()
    life = lives((lambda: ask(fitted)) if what == "calls" else make, times)
    assert life["growth"] < 8 * 2**20
    assert life["held"][0] == life["held"][1]
    assert life["slower"] < 1.5


@needs_proc
@pytest.mark.slow
def test_ten_thousand_rounds_one_by_one():
    adapter = PerformativeAdapter(from_module(module()), random_state=0, adapter="tied")
    adapter.fit(X, y, rounds=ROUNDS)
    life = lives(lambda: adapter.partial_fit(X[:8], y[:8]), 10_000)
    assert life["growth"] < 16 * 2**20
    assert life["held"][0] == life["held"][1]
    assert life["slower"] < 1.5


# The same bits ---------------------------------------------------------------------------------


def digest(kind):
    """Say in another process what this one should find too."""
    make, ask = KINDS[kind]
    print(joblib.hash(np.asarray(ask(make()))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_process_finds_the_same_bits(kind):
    make, ask = KINDS[kind]
    code = (
        "import warnings; warnings.simplefilter('ignore'); import torch; torch.set_num_threads(1);"
        f"from tests.test_long_runs import digest; digest({kind!r})"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    assert said == joblib.hash(np.asarray(ask(make())))
    assert said == joblib.hash(np.asarray(ask(make())))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["influence", "components"])
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_workers_of_any_kind_find_the_same_bits(kind, backend):
    make, ask = KINDS[kind]
    expected = np.asarray(ask(make()))
    with joblib.parallel_config(backend):
        found = np.asarray(ask(make(n_jobs=2)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_threads_change_rounding_only(kind):
    make, ask = KINDS[kind]
    expected, before = np.asarray(ask(make())), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = np.asarray(ask(make()))
    finally:
        torch.set_num_threads(before)
    # a whole run of training between the two makes more of rounding
    scale = np.abs(expected).max() * (1e-3 if kind == "replay" else 1e-4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=scale)


# Many threads on one fitted estimator ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_beside_one_that_toggles_and_draws(kind):
    make, ask = KINDS[kind]
    estimator = make()
    expected, stop = np.asarray(ask(estimator)), time.time() + 3
    wrong, errors, draws = [], [], []
    body = getattr(estimator, "estimator", None) or getattr(estimator, "encoder", None)
    shared = body if isinstance(body, nn.Module) else module()

    def serve():
        while time.time() < stop:
            try:
                wrong.append(not np.array_equal(np.asarray(ask(estimator)), expected))
            except Exception as error:  # whatever it is, it is a failure here
                errors.append(error)
                return

    def disturb():
        while time.time() < stop:
            shared.train().requires_grad_(False)
            shared.eval().requires_grad_(True)
            draws.append(float(torch.rand((), dtype=torch.float64)))

    threads = [threading.Thread(target=serve) for _ in range(8)]
    threads.append(threading.Thread(target=disturb))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert wrong
    assert not any(wrong)
    assert len(set(draws)) == len(draws)
