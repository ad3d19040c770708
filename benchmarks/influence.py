"""Influence of training rows, side by side with captum, kronfluence and pyDVL.

    python -m benchmarks.influence W1 W1s W2 W2-10k MLP235k --search --memory

Leave the machine alone meanwhile: two threads that wait for a core are measured, too.

Needs the peers of ``benchmarks/peers.txt`` in an environment of their own, and Fashion-MNIST
(``python -m benchmarks.data fetch fashion_mnist``). All methods of a workload run in turn in one
process after a warm-up; medians of wall and CPU seconds go to results/influence_speed.json with
the linear datamodeling score (LDS) against networks retrained on 50 halves, and its jackknife
error over the halves. Peers run at the damping that this same score likes best; ours is what
``benchmarks.influence_damping`` chose on other data. Peak memory is taken in a process of its
own for each method. What the figures come to is written to results/influence_targets.json.
"""

import argparse
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import influence_peers as peers
from benchmarks import runner
from benchmarks.influence_workloads import BUILDERS, load
from benchmarks.timing import interleaved
from skperf import from_module
from skperf.influence import EKFAC, GGN, InfluenceScorer
from skperf.metrics import linear_datamodeling_score

RESULTS = Path(__file__).parent / "results" / "influence_speed.json"
DAMPINGS = {
    "kronfluence EKFAC": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "pyDVL Nystroem 200": (1e-3, 3e-3, 1e-2, 3e-2),
    "pyDVL Direct": (0.01, 0.03, 0.1, 0.3),
}
ORDINARY = {"kronfluence EKFAC": 1e-4, "pyDVL Nystroem 200": 0.01, "pyDVL Direct": 0.01}
PEERS = {
    "kronfluence EKFAC": peers.kronfluence,
    "pyDVL Nystroem 200": peers.pydvl_nystroem,
    "pyDVL Direct": peers.pydvl_direct,
}


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
    methods = {
        "skperf gradient dot": partial(ours, workload, method="gradient_dot"),
        "captum TracInCP": partial(peers.captum_tracin, workload),
    }
    if workload.name == "W2-10k":
        return methods
    methods["skperf GGN (default)"] = partial(ours, workload)
    if workload.name == "W1s":
        methods["skperf GGN, damping 0.01"] = partial(ours, workload, damping=0.01)
    methods["skperf EKFAC"] = partial(ours, workload, method="ekfac")
    for name in peers_of(workload):
        methods[name] = partial(PEERS[name], workload, dampings.get(name, ORDINARY[name]))
    if workload.name == "W1":
        methods["skperf GGN, 8 networks"] = partial(ensemble, workload)
    return methods


def peers_of(workload):
    """Name the peers with a curvature that can run on a workload."""
    small = {"W1": 2, "W1s": 3}
    return list(PEERS)[: small.get(workload.name, 1)]


def best_dampings(workload):
    """Find for each peer the damping that retraining likes best."""
    if workload.losses is None:
        return {}
    return {
        name: max(DAMPINGS[name], key=lambda d: lds(workload, PEERS[name](workload, d))[0])
        for name in peers_of(workload)
    }


def lds(workload, scores):
    """Linear datamodeling score: of all subsets, and of all but each one in turn."""
    subsets, losses = workload.subsets, workload.losses
    others = [np.arange(len(subsets)) != i for i in range(len(subsets))]
    left = [linear_datamodeling_score(scores, subsets[k], losses[k]) for k in others]
    return linear_datamodeling_score(scores, subsets, losses), np.array(left)


def jackknife_error(left_out):
    """Turn what is computed with one subset left out at a time into a standard error."""
    return np.sqrt((len(left_out) - 1) * np.var(left_out))


def qualities(workload, scores):
    """Score all methods; how far the default is ahead of each comes with its paired error."""
    if workload.losses is None:
        return {key: {} for key in scores}
    found = {key: lds(workload, values) for key, values in scores.items()}
    default, without = found["skperf GGN (default)"]
    return {
        key: {
            "LDS": round(score, 3),
            "LDS error": round(jackknife_error(left), 3),
            "default ahead by": round(default - score, 3),
            "error of that": round(jackknife_error(without - left), 3),
        }
        for key, (score, left) in found.items()
    }


def agreements(workload, scores):
    """Check what must agree with what; say it in a note."""
    notes = {}
    ours_dot, theirs = scores["skperf gradient dot"], scores["captum TracInCP"]
    difference = np.abs(ours_dot - theirs).max() / np.abs(theirs).max()
    notes["skperf gradient dot"] = f"greatest difference from captum's {difference:.0e}"
    if workload.name in ("W1", "W1s"):
        scorer = InfluenceScorer(from_module(workload.modules[0]))
        damping = scorer.fit(workload.X_train, workload.y_train).damping_
        exact = ours(workload, damping=damping, method=GGN(kept_trace=1.0, max_rows=8000))
        pearson = _pearson(exact, scores["skperf GGN (default)"])
        notes["skperf GGN (default)"] = f"Pearson {pearson:.4f} with all curvature rows"
        same = {"damping": 1e-3, "method": EKFAC(rank=None, curvature="empirical")}
        theirs = peers.kronfluence(workload, 1e-3, empirical=True)
        pearson = _pearson(ours(workload, **same), theirs)
        notes["kronfluence EKFAC"] = f"Pearson {pearson:.6f} with ours of the same empirical Fisher"
    if "skperf EKFAC" in scores:
        full = ours(workload, method=EKFAC(rank=None))
        pearson = _pearson(full, scores["skperf EKFAC"])
        notes["skperf EKFAC"] = f"Pearson {pearson:.4f} with the full EKFAC score"
    return notes


def _pearson(left, right):
    return np.corrcoef(left.ravel(), right.ravel())[0, 1]


def physical_limit(workload, key):
    """Seconds that the arithmetic of a method takes at the machine's own rate.

    Counts the multiplications that the algorithm cannot do without, at the rate of one large
    matrix product; for fully connected networks.
    """
    weights = [p for p in workload.modules[0].parameters() if p.ndim == 2]
    if workload.name not in ("W1", "W1s", "MLP235k"):
        return None
    size, sums = sum(p.numel() for p in weights), sum(sum(p.shape) for p in weights)
    n, q = len(workload.X_train), len(workload.X_test)
    dot = 4 * (n + q) * size + 2 * n * q * sums
    if key == "skperf gradient dot":
        return dot / gemm_rate()
    if key != "skperf GGN (default)":
        return None
    scorer = InfluenceScorer(from_module(workload.modules[0]), random_state=0)
    r = scorer.fit(workload.X_train, workload.y_train)._learned.stages[0].fit.report["n_rows"]
    grams = r * r * sums + 2 * (n + q) * r * sums
    solved = r**3 / 3 + r * r * (n + q) + 2 * n * q * r
    return (dot + 2 * r * size + grams + solved) / gemm_rate()


def gemm_rate(size=2048):
    """Floating point operations a second of a large product in single precision."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    times = interleaved({"product": lambda: left @ right}, repeats=5)
    return 2 * size**3 / times["product"]["wall_min"]


def peak_memory(workload, name, folder):
    """MiB over what the process holds after the same on 48 rows."""
    command = [sys.executable, "-m", "benchmarks.influence", workload.name, "--memory-of", name]
    done = subprocess.run([*command, "--cache", folder], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def measure_memory(workload, name):
    rows = ("X_train", "y_train", "X_test", "y_test")
    small = replace(workload, **{field: getattr(workload, field)[:48] for field in rows})
    # imports and the libraries' own work space belong to the base
    methods_of(small, {})[name]()
    method = methods_of(workload, {})[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = _status("VmRSS")
    method()
    print((_status("VmHWM") - base) / 1024)


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def with_memory(rows, folder):
    """Measure peak memory for rows whose times are known."""
    for row in rows:
        workload = SimpleNamespace(name=row["workload"])
        row["peak MiB"] = round(peak_memory(workload, row["method"], folder))
        print(row["workload"], row["method"], row["peak MiB"], flush=True)
    return rows


def run(name, folder, repeats, memory, search):
    workload = load(name, folder)
    dampings = best_dampings(workload) if search else {}
    methods, scores = methods_of(workload, dampings), {}

    def keep(method, key):
        scores[key] = method()

    timed = interleaved(
        {key: partial(keep, method, key) for key, method in methods.items()}, repeats=repeats
    )
    notes, quality = agreements(workload, scores), qualities(workload, scores)
    rows = []
    for key, times in timed.items():
        limit = physical_limit(workload, key)
        row = {
            "workload": name,
            "method": key,
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "machine load": round(os.getloadavg()[0]),
            "wall s": round(times["wall"], 4),
            "CPU s": round(times["cpu"], 4),
            "wall range": f"{times['wall_min']:.3g} to {times['wall_max']:.3g}",
            **quality[key],
            "times the limit": None if limit is None else round(times["wall"] / limit, 1),
            "peak MiB": round(peak_memory(workload, key, folder)) if memory else None,
            "note": "; ".join(filter(None, (_damping_note(key, dampings), notes.get(key)))),
        }
        rows.append(row)
        print("  ".join(f"{value}" for value in row.values()), flush=True)
    return rows


def _damping_note(key, dampings):
    """State the damping that a peer ran at."""
    given = ORDINARY | dampings
    return f"damping {given[key]:g}" if key in given else ""


# workload, ours, whose, greatest share of its time, least difference of the scores
TARGETS = (
    ("W1", "skperf gradient dot", "captum TracInCP", 0.10, None),
    ("W1", "skperf GGN (default)", "kronfluence EKFAC", 0.06, 0.02),
    ("W1", "skperf GGN (default)", "pyDVL Nystroem 200", 0.06, -0.005),
    ("W1s", "skperf GGN, damping 0.01", "pyDVL Direct", 0.04, -0.02),
    ("MLP235k", "skperf EKFAC", "kronfluence EKFAC", 0.05, None),
    ("W2", "skperf gradient dot", "captum TracInCP", 0.50, None),
    ("W2-10k", "skperf gradient dot", "captum TracInCP", 0.50, None),
    ("W2", "skperf GGN (default)", "kronfluence EKFAC", 0.20, 0.0),
    ("W1", "skperf GGN, 8 networks", "kronfluence EKFAC", None, 0.05),
    ("W1", "skperf GGN, 8 networks", "pyDVL Nystroem 200", None, 0.05),
)


def write_targets(rows):
    """Set what was measured beside what was aimed at."""
    found = {(row["workload"], row["method"]): row for row in rows}
    comparisons = []
    for workload, own, other, share, gain in TARGETS:
        left, right = found.get((workload, own)), found.get((workload, other))
        if left is None or right is None:
            continue
        record = {"workload": workload, "method": own, "beside": other}
        record["time"] = round(left["wall s"] / right["wall s"], 4)
        record["CPU time"] = round(left["CPU s"] / right["CPU s"], 4)
        record["time aimed at"] = share
        if "LDS" in left:
            record["LDS gain"] = round(left["LDS"] - right["LDS"], 3)
        record["LDS gain aimed at"] = gain
        if left["peak MiB"] is not None:
            record["memory"] = round(left["peak MiB"] / max(right["peak MiB"], 1), 2)
        comparisons.append(record)
    path = RESULTS.with_name("influence_targets.json")
    runner.save(path, comparisons)


def known_rows():
    """Rows of the results so far."""
    return runner.load(RESULTS) if RESULTS.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["W1", "W1s", "W2", "W2-10k", "MLP235k"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", default="influence_workloads")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--search", action="store_true", help="search the peers' best damping")
    parser.add_argument("--only-memory", action="store_true", help="keep the times of before")
    parser.add_argument("--memory-of")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        measure_memory(load(arguments.workloads[0], arguments.cache), arguments.memory_of)
        return
    for name in arguments.workloads:
        if arguments.only_memory:
            timed = [row for row in known_rows() if row["workload"] == name]
            new = with_memory(timed, arguments.cache)
        else:
            new = run(name, arguments.cache, arguments.repeats, arguments.memory, arguments.search)
        rows = [*(row for row in known_rows() if row["workload"] != name), *new]
        rows.sort(key=lambda row: list(BUILDERS).index(row["workload"]))
        runner.save(RESULTS, rows)
        write_targets(rows)


if __name__ == "__main__":
    main()
