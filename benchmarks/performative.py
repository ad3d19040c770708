"""How much of a known label mix's gain is had by anticipating it, in simulated worlds.

Run with ``python -m benchmarks.performative [--seeds 5]``; writes
``benchmarks/results/performative.json`` and, seed by seed, ``performative_rows.json``, from which
it goes on where the same code was broken off. G is the log loss saved against no correction over
that saved by an oracle, on the arm's own trajectory. The oracle knows the mix that the round is
drawn from; "G realised" is against one that knows the shares which the drawn rows happen to have.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import runner
from benchmarks.performative_worlds import ARMS, COLUMNS, ROUNDS, run

FOLDER = Path(__file__).parent / "results"
ROWS, TABLE = FOLDER / "performative_rows.json", FOLDER / "performative.json"


def gain(losses, oracle=2):
    """G of rows (none, arm, drawn mix, realised mix, ...)."""
    return float((losses[:, 0] - losses[:, 1]).sum() / (losses[:, 0] - losses[:, oracle]).sum())


def measured(column, arm, seed, losses):
    """One run: G over parts of it, and what it is made of."""
    saved = (losses[:, :1] - losses[:, 1:4]).sum(axis=0)  # by the arm, the two oracles
    found = {
        "G": gain(losses),
        "G rounds 1-20": gain(losses[1:21]),
        "G rounds 20+": gain(losses[20:]),
        "G last 50": gain(losses[-50:]),
        "G realised": gain(losses, 3),
        "log loss": losses[:, 1].mean(),
        "over none": (losses[:, 1] - losses[:, 0]).mean(),
        "accuracy": losses[:, 4].mean(),
        "worst recall": losses[:, 5].mean(),
    } | dict(zip(("saved", "to save", "to save realised"), saved, strict=True))
    return {"world": column, "arm": arm, "seed": seed} | {k: float(v) for k, v in found.items()}


def summarise(runs):
    """One record of the table: means over seeds and the range of G."""
    names = [name for name, value in runs[0].items() if isinstance(value, float)]
    means = {name: np.mean([one[name] for one in runs]) for name in names}
    saved, drawn, realised = (means.pop(n) for n in ("saved", "to save", "to save realised"))
    spread = {"G min": min(one["G"] for one in runs), "G max": max(one["G"] for one in runs)}
    pooled = {"G pooled": saved / drawn, "G realised pooled": saved / realised}
    told = {name: runs[0][name] for name in ("world", "arm")}
    record = told | means | spread | pooled | {"seeds": len(runs)}
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in record.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    rows, seeds = runner.begun(ROWS), range(options.seeds)
    done = [(one["world"], one["arm"], one["seed"]) for one in rows]
    for seed, column, arm in product(seeds, COLUMNS, ARMS):
        if arm == "auto + EM" and column.startswith("C100"):
            continue  # the batch is short for a hundred classes, and costs as much again
        if (column, arm, seed) in done:
            continue
        losses = run(column, seed, arm, n_rounds=options.rounds)
        rows.append(measured(column, arm, seed, losses))
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="  ", flush=True)
        runner.save(ROWS, rows)
    records = []
    for column, arm in product(COLUMNS, ARMS):
        runs = [one for one in rows if (one["world"], one["arm"]) == (column, arm)]
        records += [summarise(runs)] if runs else []
    runner.save(TABLE, records, seeds=seeds)


if __name__ == "__main__":
    main()
