"""Influence of training rows, side by side with captum, kronfluence and pyDVL.

    python -m benchmarks.influence W1 W1s W2 W2-10k MLP235k --search --memory

Needs the peers of ``benchmarks/peers.txt`` in an environment of their own, and Fashion-MNIST
(``python -m skperf.datasets fetch fashion_mnist``). All methods of a workload run in turn in one
process after a warm-up; medians of wall and CPU seconds go to results/influence_speed.json with
the linear datamodeling score (LDS) against networks retrained on 50 halves. Peak memory is taken
in a process of its own for each method.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import influence_peers as peers
from benchmarks.influence_workloads import load
from benchmarks.timing import interleaved
from skperf import from_module
from skperf.influence import InfluenceScorer
from skperf.metrics import linear_datamodeling_score

RESULTS = Path(__file__).parent / "results" / "influence_speed.json"
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2)


def ours(workload, **params):
    members = [from_module(module) for module in workload.modules]
    scorer = InfluenceScorer(members[0], random_state=0, **params)
    scorer.fit(workload.X_train, workload.y_train)
    return scorer.influence(workload.X_test, workload.y_test)


def ensemble(workload):
    scorer = InfluenceScorer(list(workload.modules), random_state=0)
    scorer.fit(workload.X_train, workload.y_train)
    return scorer.influence(workload.X_test, workload.y_test)


def methods_of(workload, dampings):
    """List what runs on a workload, each as a function without arguments."""
    small = workload.name in ("W1", "W1s")
    methods = {
        "skperf gradient dot": partial(ours, workload, method="gradient_dot"),
        "captum TracInCP": partial(peers.captum_tracin, workload),
    }
    if workload.name == "W2-10k":
        return methods
    own = {"damping": 0.01} if workload.name == "W1s" else {}
    methods["skperf GGN (default)"] = partial(ours, workload, **own)
    methods["skperf EKFAC"] = partial(ours, workload, method="ekfac")
    kron = dampings.get("kronfluence EKFAC", 1e-4)
    methods["kronfluence EKFAC"] = partial(peers.kronfluence, workload, kron)
    if small:
        nystroem = dampings.get("pyDVL Nystroem 200", 0.01)
        methods["pyDVL Nystroem 200"] = partial(peers.pydvl_nystroem, workload, nystroem)
    if workload.name == "W1s":
        methods["pyDVL Direct"] = partial(peers.pydvl_direct, workload, 0.01)
    if workload.name == "W1":
        methods["skperf GGN, 8 networks"] = partial(ensemble, workload)
    return methods


def best_dampings(workload):
    """Each peer at the damping that retraining likes best."""
    if workload.losses is None:
        return {}
    found = {}
    candidates = {"kronfluence EKFAC": peers.kronfluence}
    if workload.name == "W1":
        candidates["pyDVL Nystroem 200"] = peers.pydvl_nystroem
    for name, method in candidates.items():
        options = DAMPINGS if name.startswith("kron") else DAMPINGS[2:]
        found[name] = max(options, key=lambda d: lds(workload, method(workload, d)))
    return found


def lds(workload, scores):
    if workload.losses is None:
        return None
    return linear_datamodeling_score(scores, workload.subsets, workload.losses)


def agreements(workload, scores):
    """Check what must agree with what; say it in a note."""
    notes = {}
    ours_dot, theirs = scores["skperf gradient dot"], scores["captum TracInCP"]
    difference = np.abs(ours_dot - theirs).max() / np.abs(theirs).max()
    notes["skperf gradient dot"] = f"greatest difference from captum's {difference:.0e}"
    if workload.name in ("W1", "W1s"):
        damping = 0.01 if workload.name == "W1s" else None
        scorer = InfluenceScorer(from_module(workload.modules[0]))
        damping = damping or scorer.fit(workload.X_train, workload.y_train).damping_
        exact = ours(workload, damping=damping, kept_trace=1.0, max_rows=8000)
        pearson = np.corrcoef(exact.ravel(), scores["skperf GGN (default)"].ravel())[0, 1]
        notes["skperf GGN (default)"] = f"Pearson {pearson:.4f} with all curvature rows"
    if "skperf EKFAC" in scores:
        full = ours(workload, method="ekfac", rank=None)
        pearson = np.corrcoef(full.ravel(), scores["skperf EKFAC"].ravel())[0, 1]
        notes["skperf EKFAC"] = f"Pearson {pearson:.4f} with the full EKFAC score"
    return notes


def peak_memory(workload, name, folder):
    """MiB over what the process holds before the call."""
    command = [sys.executable, "-m", "benchmarks.influence", workload.name, "--memory-of", name]
    done = subprocess.run([*command, "--cache", folder], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def measure_memory(workload, name):
    methods = methods_of(workload, {})
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    methods[name]()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)


def run(name, folder, repeats, memory, search):
    workload = load(name, folder)
    dampings = best_dampings(workload) if search else {}
    methods, scores = methods_of(workload, dampings), {}

    def keep(method, key):
        scores[key] = method()

    timed = interleaved(
        {key: partial(keep, method, key) for key, method in methods.items()}, repeats=repeats
    )
    notes = agreements(workload, scores)
    rows = []
    for key, times in timed.items():
        score = lds(workload, scores[key])
        row = {
            "workload": name,
            "method": key,
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "machine load": round(os.getloadavg()[0]),
            "wall s": round(times["wall"], 4),
            "CPU s": round(times["cpu"], 4),
            "wall range": f"{times['wall_min']:.3g} to {times['wall_max']:.3g}",
            "LDS": None if score is None else round(score, 3),
            "peak MiB": round(peak_memory(workload, key, folder)) if memory else None,
            "note": notes.get(key, _damping_note(key, dampings)),
        }
        rows.append(row)
        print("  ".join(f"{value}" for value in row.values()), flush=True)
    return rows


def _damping_note(key, dampings):
    """State the damping that a peer ran at."""
    given = {"kronfluence EKFAC": 1e-4, "pyDVL Nystroem 200": 0.01, "pyDVL Direct": 0.01} | dampings
    return f"damping {given[key]:g}" if key in given else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["W1", "W1s", "W2", "W2-10k", "MLP235k"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", default="influence_workloads")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--search", action="store_true", help="search the peers' best damping")
    parser.add_argument("--memory-of")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        measure_memory(load(arguments.workloads[0], arguments.cache), arguments.memory_of)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    for name in arguments.workloads:
        kept = [row for row in results["rows"] if row["workload"] != name]
        new = run(name, arguments.cache, arguments.repeats, arguments.memory, arguments.search)
        results = {
            "rows": [*kept, *new],
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
