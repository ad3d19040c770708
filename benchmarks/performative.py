"""How much of a known label mix's gain is had by anticipating it, in simulated worlds.

Run with ``python -m benchmarks.performative [--seeds 5]``; writes
``benchmarks/results/performative.json``, and goes on where the same code was broken off. G is the
log loss saved against no correction over that saved by an oracle, on the arm's own trajectory. The
oracle knows the mix that the round is drawn from; "G realised" is against one that knows the shares
which the drawn rows happen to have.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from benchmarks import runner
from benchmarks.performative_worlds import ARMS, COLUMNS, ROUNDS, run

RESULTS = Path(__file__).parent / "results" / "performative.json"
CONTROLS = ("independent 100", "independent 5")


def gain(losses, oracle=2):
    """G of rows (none, arm, drawn mix, realised mix, ...)."""
    return float((losses[:, 0] - losses[:, 1]).sum() / (losses[:, 0] - losses[:, oracle]).sum())


def summarise(column, arm, runs):
    """One record of the table: means over seeds and the range of G."""
    over_all = [gain(losses) for losses in runs]
    record = {
        "world": column,
        "arm": arm,
        "G": np.mean(over_all),
        "G min": min(over_all),
        "G max": max(over_all),
        "G rounds 1-20": np.mean([gain(losses[1:21]) for losses in runs]),
        "G rounds 20+": np.mean([gain(losses[20:]) for losses in runs]),
        "G last 50": np.mean([gain(losses[-50:]) for losses in runs]),
        "G pooled": gain(np.concatenate(runs)),
        "G realised": np.mean([gain(losses, 3) for losses in runs]),
        "G realised pooled": gain(np.concatenate(runs), 3),
        "log loss": np.mean([losses[:, 1].mean() for losses in runs]),
        "over none": np.mean([(losses[:, 1] - losses[:, 0]).mean() for losses in runs]),
        "accuracy": np.mean([losses[:, 4].mean() for losses in runs]),
        "worst recall": np.mean([losses[:, 5].mean() for losses in runs]),
        "seeds": len(runs),
    }
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in record.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    records = runner.begun(RESULTS)
    done = [(one["world"], one["arm"]) for one in records if one["seeds"] == options.seeds]
    for column, arm in product(COLUMNS, ARMS):
        if arm == "auto + EM" and column.startswith("C100"):
            continue  # the batch is short for a hundred classes, and costs as much again
        if (column, arm) in done:
            continue
        runs = Parallel(n_jobs=options.jobs)(
            delayed(run)(column, seed, arm, n_rounds=options.rounds)
            for seed in range(options.seeds)
        )
        record = summarise(column, arm, runs)
        print(*(f"{name} {value}" for name, value in record.items()), sep="  ", flush=True)
        records = [r for r in records if (r["world"], r["arm"]) != (column, arm)] + [record]
        order = {pair: i for i, pair in enumerate(product(COLUMNS, ARMS))}
        records.sort(key=lambda r: order[r["world"], r["arm"]])
        runner.save(RESULTS, records, seeds=range(options.seeds))


if __name__ == "__main__":
    main()
