"""A real cluster of processes gives the results of one process, also when a worker dies."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from skperf import ComponentAttributor, InfluenceScorer, from_module
from skperf.datasets import load_fashion_cnn, load_fashion_mnist

distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def rows():
    fashion = load_fashion_mnist(subset="test")
    return fashion.images[:150, None].astype(np.float32) / 255, fashion.target[:150]


@pytest.fixture(scope="module")
def network():
    return from_module(load_fashion_cnn(), np.arange(10))


def test_influence_tiles(client, rows, network):
    X, y = rows
    scorer = InfluenceScorer(network, method="gradient_dot").fit(X[:100], y[:100])
    alone = scorer.influence(X[100:], y[100:])
    with parallel_config("dask", n_jobs=2):
        spread = scorer.influence(X[100:], y[100:])
    np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-7)


def test_component_masks(client, rows, network):
    X, y = rows
    params = {"estimator": network, "budget": 60, "random_state": 0}
    alone = ComponentAttributor(**params).fit(X[:40], y[:40])
    with parallel_config("dask", n_jobs=2):
        spread = ComponentAttributor(**params, n_jobs=2).fit(X[:40], y[:40])
    np.testing.assert_allclose(spread.attributions_, alone.attributions_, rtol=1e-4, atol=1e-5)


def test_grid_search(client):
    X, y = load_digits(return_X_y=True)
    search = GridSearchCV(
        InfluenceScorer(method="ggn", random_state=0),
        {"damping": [1e-3, 1e-1]},
        scoring=lambda scorer, X, y: float(scorer.influence(X[:10], y[:10]).std()),
        cv=2,
    )
    alone = search.fit(X[:200] / 16, y[:200]).cv_results_["mean_test_score"]
    with parallel_config("dask", n_jobs=2):
        spread = search.fit(X[:200] / 16, y[:200]).cv_results_["mean_test_score"]
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


def test_a_worker_killed_in_the_middle_costs_time_not_results(client, rows, network):
    X, y = (part[:60] for part in rows)
    params = {"estimator": network, "budget": 100, "random_state": 0}
    alone = ComponentAttributor(**params).fit(X, y)
    killed = threading.Event()

    def kill_one():
        while not any(client.processing().values()):
            time.sleep(0.02)
        pids = client.run(os.getpid)
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with parallel_config("dask", n_jobs=2):
        spread = ComponentAttributor(**params, n_jobs=2).fit(X, y)
    killer.join()
    assert killed.is_set()
    np.testing.assert_allclose(spread.attributions_, alone.attributions_, rtol=1e-4, atol=1e-5)
