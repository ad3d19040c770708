"""Quality beside cost: replay, ensembles at the final weights, and plain retraining.

    python -m benchmarks.replay_cost           # both trainings, three seeds
    python -m benchmarks.replay_cost digits 0  # one training and seed, beside what is saved
    python -m benchmarks.replay_cost plot      # draws what was saved

Costs are CPU seconds on one thread over one bare training. Retraining fits a ridge regression of
the queries' losses on the rows that were left out, k trainings side by side.
"""

import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import RidgeCV

from benchmarks import runner
from benchmarks.replay import (
    SUBSETS,
    Kept,
    bare_loop,
    datamodeling,
    dropped,
    retrained,
    trained,
)
from benchmarks.replay_configurations import CONFIGURATIONS, SEEDS
from skperf import InfluenceScorer
from skperf.influence.replay import Budget, replayed

NAMES = ("digits, SGD", "breast_cancer, SGD")
RESULT = runner.RESULTS / "replay_cost.json"
MEMBERS, TRAININGS, SHARE = (1, 2, 4, 8, 16), (10, 40, 160, 640), 0.1


def ways(config: Any, seed: int) -> Any:
    """Give the name, the size, the CPU seconds and the scores of each way to predict."""
    net, asked, (X, y, X_query, y_query) = trained(config, seed)
    run = net.run_.recorded
    started = time.process_time()
    bare_loop(run, run.module)
    bare = time.process_time() - started
    yield "training", 1, bare, None
    started = time.process_time()
    found = replayed(run, Budget()).influence(asked.inputs, asked.targets)
    yield "replay", 1, bare + time.process_time() - started, found.numpy()
    # members have other seeds, as the sessions that will use an ensemble do; the first is the net
    nets = [net] + [_other(config, seed, i) for i in range(1, max(MEMBERS))]
    for method in ("ekfac", "trak"):
        total, seconds = np.zeros((len(X_query), len(X))), 0.0
        for k, member in enumerate(nets, 1):
            started = time.process_time()
            scorer = InfluenceScorer(FrozenEstimator(member), method=method, random_state=k)
            total += scorer.fit(X, y).influence(X_query, y_query)
            seconds += bare + time.process_time() - started
            if k in MEMBERS:
                yield f"ensemble of {method}", k, seconds, total / k
    losses, seconds, weights = [], 0.0, dropped(len(X), SHARE, max(TRAININGS), seed + 1000)
    for some in weights.split(40):
        started = time.process_time()
        losses.append(retrained(run, some, asked))
        seconds += time.process_time() - started
        done = 40 * len(losses)
        for k in (k for k in TRAININGS if done - 40 < k <= done):
            ridge = RidgeCV(np.logspace(-2, 4, 13)).fit(
                1 - weights[:k].numpy(), np.concatenate(losses)[:k]
            )
            yield "retraining", k, seconds * k / done, ridge.coef_


def _other(config: Any, seed: int, i: int) -> Any:
    X, y, _, _ = config.rows(seed)
    own = replace(config, rows=lambda _: (X, y, X[:1], y[:1]))
    return trained(own, 1000 * (seed + 1) + i)[0]


def measure(wanted: str, seeds: Any) -> None:
    rows = runner.load(RESULT) if RESULT.exists() else []
    for config in (c for c in CONFIGURATIONS if c.name in NAMES and wanted in c.name):
        for seed in seeds:
            rows = [r for r in rows if (r["configuration"], r["seed"]) != (config.name, seed)]
            net, asked, (X, *_) = trained(config, seed)
            weights = dropped(len(X), SHARE, SUBSETS, seed)
            truth = Kept(config, seed, net)(
                f"losses {SHARE:g}",
                lambda n=net, w=weights, a=asked: retrained(n.run_.recorded, w, a),
            )
            bare = 1.0
            for way, k, seconds, scores in ways(config, seed):
                bare = seconds if way == "training" else bare
                if scores is None:
                    continue
                rows.append(
                    {
                        "configuration": config.name,
                        "seed": seed,
                        "way": way,
                        "k": k,
                        "bare trainings": seconds / bare,
                        "LDS 0.1": datamodeling(scores, weights, truth),
                    }
                )
                print(*rows[-1].values(), flush=True)
            runner.save(RESULT, rows)


def plot() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = runner.load(RESULT)
    figure, axes = plt.subplots(1, len(NAMES), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, NAMES, strict=True):
        own = [row for row in rows if row["configuration"] == name]
        for way in dict.fromkeys(row["way"] for row in own):
            points = []
            for k in sorted({row["k"] for row in own if row["way"] == way}):
                some = [row for row in own if (row["way"], row["k"]) == (way, k)]
                values = [row["LDS 0.1"] for row in some]
                cost = np.median([row["bare trainings"] for row in some])
                points.append((cost, np.mean(values), min(values), max(values)))
            x, middle, low, high = np.array(points).T
            axis.errorbar(
                x, middle, [middle - low, high - middle], marker="o", capsize=2, label=way
            )
        axis.set(xscale="log", title=name, xlabel="CPU time over one bare training")
    axes[0].set_ylabel("LDS, 10 % of the rows left out")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(RESULT.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if "plot" not in sys.argv:
        measure("".join(sys.argv[1:2]), [int(seed) for seed in sys.argv[2:]] or SEEDS)
    plot()
