"""Choose what ``damping="auto"`` is: a share of the curvature's mean eigenvalue.

    python -m benchmarks.influence_damping

Tasks of which ``benchmarks.influence`` reports nothing: other data, other rows, other
retrainings. Writes results/influence_damping.json: for each task the linear datamodeling score
(LDS) against networks retrained on 50 halves at every share, the score of the whole, and what
plain gradient dot products reach. The best share is the one whose LDS, as a part of each
task's own best, is highest on average.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.influence_workloads import load
from skperf import from_module
from skperf.influence import InfluenceScorer
from skperf.metrics import linear_datamodeling_score

RESULTS = Path(__file__).parent / "results" / "influence_damping.json"
TASKS = ("images", "images, one layer", "mails", "CNN")
SHARES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def scores_by_share(workload):
    """LDS at every share, and of gradient dot products."""

    def lds(scorer):
        scores = scorer.influence(workload.X_test, workload.y_test)
        return linear_datamodeling_score(scores, workload.subsets, workload.losses)

    network, rows = from_module(workload.modules[0]), (workload.X_train, workload.y_train)
    scorer = InfluenceScorer(network).fit(*rows)
    mean = scorer.fits_[0].lift.curvature.mean_eigenvalue
    found = {share: lds(scorer.with_damping(share * mean)) for share in SHARES}
    return found, lds(InfluenceScorer(network, method="gradient_dot").fit(*rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", default="influence_workloads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: scores_by_share(load(name, arguments.cache)) for name in TASKS}
    rows = []
    for share in SHARES:
        row = {"share": share} | {name: round(by[share], 3) for name, (by, _) in found.items()}
        parts = [by[share] / max(by.values()) for by, _ in found.values()]
        rows.append({**row, "of the best": round(sum(parts) / len(parts), 3)})
        print(rows[-1], flush=True)
    plain = {name: round(dot, 3) for name, (_, dot) in found.items()}
    rows.append({"share": "gradient dot", **plain, "of the best": None})
    best = max(rows[:-1], key=lambda row: row["of the best"])["share"]
    RESULTS.write_text(json.dumps({"best share": best, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
