"""Choose what ``damping="auto"`` is: how hard it pulls, in units of the gradient's own noise.

    python -m benchmarks.influence_damping

Tasks of which ``benchmarks.influence`` reports nothing: other data, other rows, other
retrainings. For each the linear datamodeling score (LDS) against networks retrained on 50 halves,
for Gauss-Newton and EKFAC at several pulls, beside a damping that is a share of the curvature's
mean eigenvalue, each weighted by itself. What is best keeps on average the largest part of each
task's own best score. Writes results/influence_damping.json.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import runner
from benchmarks.influence_workloads import load
from skperf import from_module
from skperf.influence import InfluenceScorer, damping
from skperf.metrics import linear_datamodeling_score

RESULTS = Path(__file__).parent / "results" / "influence_damping.json"
TASKS = (
    "images, 400",
    "images",
    "images, one layer",
    "images, 6,000",
    "CNN",
    "news",
    "mails",
    "tumours",
)
PULLS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
PULLS_OF_LAYERS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SHARES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)


def lds(workload, scorer):
    scores = scorer.influence(workload.X_test, workload.y_test)
    return linear_datamodeling_score(scores, workload.subsets, workload.losses)


def scores(workload):
    """LDS of every method and damping, by (method, rule, number)."""
    network, rows = from_module(workload.modules[0]), (workload.X_train, workload.y_train)
    scorer = InfluenceScorer(network, random_state=0).fit(*rows)
    found = {}
    for pull in PULLS:
        with patch.object(damping, "_PULL", pull):
            found["GGN", "pull", pull] = lds(workload, scorer.with_damping("auto"))
    gram = scorer._learned.stages[0].fit.lift.curvature.gram
    mean = float(gram.square().sum() / gram.diagonal().sum())
    for share in SHARES:
        damped = scorer.with_damping(share * mean)
        found["GGN", "share of the mean eigenvalue", share] = lds(workload, damped)
    for pull in PULLS_OF_LAYERS:
        with patch.object(damping, "_PULL_OF_LAYER", pull):
            fitted = InfluenceScorer(network, method="ekfac", random_state=0).fit(*rows)
            found["EKFAC", "pull", pull] = lds(workload, fitted)
    plain = InfluenceScorer(network, method="gradient_dot").fit(*rows)
    found["gradient dot", "", None] = lds(workload, plain)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="influence_workloads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: scores(load(name, arguments.cache)) for name in TASKS}
    rows = []
    for method, rule, number in found[TASKS[0]]:
        row = {"method": method, "rule": rule, "number": number}
        own = [found[name][method, rule, number] for name in TASKS]
        best = [max(v for key, v in found[name].items() if key[0] == method) for name in TASKS]
        parts = [score / most for score, most in zip(own, best, strict=True)]
        row |= {name: round(score, 3) for name, score in zip(TASKS, own, strict=True)}
        row |= {"of the best": round(sum(parts) / len(parts), 3), "least": round(min(parts), 3)}
        rows.append(row)
        print(*row.values(), flush=True)
    runner.save(RESULTS, rows)


if __name__ == "__main__":
    main()
