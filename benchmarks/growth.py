"""How time and peak memory grow with each size, one at a time; everything else stays as it is.

    python -m benchmarks.growth                        # all axes, two minutes
    python -m benchmarks.growth "training rows"        # one of them
    python -m benchmarks.growth --large                # up to the largest sizes

Every point is a process of its own with one thread. Seconds are CPU time, the least of three runs;
memory is the peak of the process above what it held before the work. The slope is that of the
straight line through the logarithms of the last three points: 1 is linear.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import runner
from benchmarks.timing import Peak, resident

RESULTS = Path(__file__).parent / "results" / "growth.json"


@dataclass(frozen=True)
class Axis:
    """One size that grows, and the work at each: `prepare(size)` returns what is measured."""

    work: str
    prepare: Callable[[int], Callable[[], object]]
    sizes: tuple[int, ...]
    large: tuple[int, ...] = ()


def rows(n, n_features=64, n_classes=10, seed=0):
    """Draw rows whose labels follow from them: -> (n, n_features), (n,)."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, n_features)).astype(np.float32)
    return X, (X @ rng.normal(size=(n_features, n_classes))).argmax(1)


def network(width=128, n_features=64, n_classes=10):
    """Return a network of 9,610 parameters by default, with random weights."""
    import torch
    from torch import nn

    from skperf import from_module

    torch.manual_seed(0)
    layers = [nn.Linear(n_features, width), nn.ReLU(), nn.Linear(width, n_classes)]
    return from_module(nn.Sequential(*layers))


def influence_of_rows(n):
    """Fit on n training rows."""
    from skperf import InfluenceScorer

    X, y = rows(n)
    return lambda: InfluenceScorer(network(), random_state=0).fit(X, y)


def influence_of_queries(n):
    """Score n queries against 2,000 training rows."""
    from skperf import InfluenceScorer

    X, y = rows(2000 + n)
    scorer = InfluenceScorer(network(), random_state=0).fit(X[:2000], y[:2000])
    return lambda: scorer.influence(X[2000:], y[2000:])


def influence_of_parameters(n):
    """Fit a network of n parameters, nearly all in a square layer, on 500 rows."""
    import torch
    from torch import nn

    from skperf import InfluenceScorer, from_module

    torch.manual_seed(0)
    width = round((76**2 / 4 + n) ** 0.5 - 76 / 2)  # w^2 + 76 w weights and biases
    layers = [nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    X, y = rows(500)
    body = from_module(nn.Sequential(*layers, nn.Linear(width, 10)))
    return lambda: InfluenceScorer(body, random_state=0).fit(X, y)


def influence_of_classes(n):
    """Fit a network of n classes on 1,000 rows."""
    from skperf import InfluenceScorer

    X, y = rows(1000, n_classes=n)
    return lambda: InfluenceScorer(network(n_classes=n), random_state=0).fit(X, y)


def effects_of_components(n):
    """Estimate effects of n neurons on 50 rows, with masks for a tenth of them."""
    from skperf import ComponentAttributor

    X, y = rows(50)
    model = ComponentAttributor(
        network(n), components="neurons", budget=max(n // 10, 20), random_state=0
    )
    return lambda: model.fit(X, y)


def adapter_of_rounds(n):
    """Fit on the record of n rounds of 10 classes."""
    from skperf import PerformativeAdapter

    rng = np.random.default_rng(0)
    statistics = rng.uniform(0.5, 1, (n, 10))
    shares = np.exp(-statistics / 0.3)
    counts = np.round(1000 * shares / shares.sum(1, keepdims=True))
    return lambda: PerformativeAdapter(random_state=0).fit_trajectory(statistics, counts)


def influence_of_steps(n):
    """Go back through a recorded run of n steps, asked about the mean loss of 100 queries."""
    from sklearn.frozen import FrozenEstimator

    from skperf import MLP, InfluenceScorer, Net

    X, y = rows(500)
    settings = {"batch_size": 50, "max_epochs": n // 10, "random_state": 0, "record_run": True}
    net = Net(MLP, module__hidden=(32,), **settings)
    scorer = InfluenceScorer(FrozenEstimator(net.fit(X, y)), method="replay").fit(X, y)
    return lambda: scorer.influence(X[:100], y[:100], aggregate="mean")


AXES = {
    "training rows": Axis(
        "InfluenceScorer.fit", influence_of_rows, (1000, 4000, 16_000), (64_000, 200_000)
    ),
    "queries": Axis("InfluenceScorer.influence", influence_of_queries, (10, 100, 1000), (10_000,)),
    "parameters": Axis(
        "InfluenceScorer.fit",
        influence_of_parameters,
        (10_000, 100_000, 1_000_000),
        (10_000_000, 110_000_000),
    ),
    "classes": Axis("InfluenceScorer.fit", influence_of_classes, (2, 20, 200), (1000, 5000)),
    "components": Axis(
        "ComponentAttributor.fit", effects_of_components, (100, 1000, 3000), (10_000, 30_000)
    ),
    "steps": Axis("InfluenceScorer(replay).influence", influence_of_steps, (50, 200, 800), (3200,)),
    "rounds": Axis("PerformativeAdapter.fit_trajectory", adapter_of_rounds, (10, 50, 250), (1000,)),
}


def measure(name, size):
    """Measure one point in this process: -> CPU seconds and MB."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    axis = AXES[name]
    axis.prepare(axis.sizes[0])()  # what is imported and allocated once is no growth
    work = axis.prepare(size)
    seconds = []
    with Peak(resident) as peak:
        for _ in range(3):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
            if sum(seconds) > 20:
                break
    return {
        "seconds": round(min(seconds), 3),
        "MB": round(max(peak.highest - peak.before, 0) / 1e6, 1),
    }


def slope(sizes, values):
    """Return the exponent of growth over the last three points."""
    last = slice(-3, None)
    return round(float(np.polyfit(np.log(sizes[last]), np.log(values[last]), 1)[0]), 2)


def main():
    parser = argparse.ArgumentParser("python -m benchmarks.growth")
    parser.add_argument("axes", nargs="*", help=f"of {', '.join(AXES)}")
    parser.add_argument("--large", action="store_true", help="go on to the largest sizes")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options.point[0], int(options.point[1]))))
        return
    kept = runner.load(RESULTS) if RESULTS.exists() else []
    for name in options.axes or AXES:
        axis = AXES[name]
        found = []
        for size in axis.sizes + (axis.large if options.large else ()):
            command = [sys.executable, "-m", "benchmarks.growth", "--point", name, str(size)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                print(name, size, done.stderr.splitlines()[-1:], flush=True)
                break
            found.append({"grows": name, "work": axis.work, "size": size} | json.loads(done.stdout))
            print(found[-1], flush=True)
        if len(found) > 2:
            times = np.array([max(point["seconds"], 1e-3) for point in found])
            memory = np.array([max(point["MB"], 0.1) for point in found])
            sizes = np.array([point["size"] for point in found])
            found[-1] |= {"slope of time": slope(sizes, times), "slope of MB": slope(sizes, memory)}
        kept = [row for row in kept if row["grows"] != name] + found
        runner.save(RESULTS, kept)


if __name__ == "__main__":
    main()
