"""What a dask cluster on this machine costs and gives: seconds and bytes.

Run with ``python -m benchmarks.cluster``; writes ``benchmarks/results/cluster.json``. Bytes are
those that cross the loopback interface while the work runs, pickled tasks and results included.
"""

import time
from pathlib import Path

import dask
import numpy as np
import psutil
import torch
from distributed import Client, LocalCluster
from joblib import parallel_config

from benchmarks import runner
from skperf import ComponentAttributor, InfluenceScorer, from_module
from skperf.datasets import load_fashion_mnist, load_small_resnet

RESULTS = Path(__file__).parent / "results" / "cluster.json"
REPEATS = 3
# dask has workers give memory back after every tensor, which costs much of torch's time
KEEP_MEMORY = {
    f"distributed.nanny.pre-spawn-environ.MALLOC_{name}_THRESHOLD_": 2**30
    for name in ("TRIM", "MMAP")
}


def main() -> None:
    torch.set_num_threads(1)
    dask.config.set(KEEP_MEMORY)
    fashion = load_fashion_mnist(subset="test")
    X, y = fashion.images[:, None].astype(np.float32) / 255, fashion.target
    module = load_small_resnet()
    network = from_module(module, np.arange(10))
    scorer = InfluenceScorer(network, method="gradient_dot").fit(X[:1000], y[:1000])

    def influence(n):
        return scorer.influence(X[1000 : 1000 + n], y[1000 : 1000 + n])

    def components(n_masks):
        attributor = ComponentAttributor(
            network, method="regression", budget=n_masks, random_state=0, n_jobs=-1
        )
        return attributor.fit(X[:100], y[:100]).attributions_

    work = {
        "influence of 1,000 rows on 200": lambda: influence(200),
        "influence of 1,000 rows on 800": lambda: influence(800),
        "150 masks of 560 filters, 100 examples": lambda: components(150),
        "600 masks of 560 filters, 100 examples": lambda: components(600),
    }
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    rows = []
    for n_workers in (1, 2):
        with (
            LocalCluster(
                n_workers=n_workers, threads_per_worker=1, dashboard_address=None
            ) as cluster,
            Client(cluster),
            parallel_config("dask", n_jobs=n_workers),
        ):
            for name, function in work.items():
                result = function()  # workers import torch in the first round
                seconds, shipped = zip(*(measured(function) for _ in range(REPEATS)), strict=True)
                rows.append(
                    {
                        "work": name,
                        "processes": n_workers,
                        "seconds (median)": float(np.median(seconds)),
                        "MB shipped": float(np.median(shipped)) / 1e6,
                        "MB of result": result.nbytes / 1e6,
                        "MB of network": size / 1e6,
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    runner.save(RESULTS, rows)


def measured(function):
    before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    return seconds, psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before


if __name__ == "__main__":
    main()
