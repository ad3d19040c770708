"""Hold this checkout's speed against another's, such as an older commit's.

``git worktree add ../first e7f9731 && python -m benchmarks.against ../first`` runs each workload in
processes of their own, in turn, and writes ``benchmarks/results/against.json``: medians of CPU
time, and the ratio with the spread of its seven pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import runner

REPEATS = 7
HERE = Path(__file__).parents[1]


def timed(work: Callable[[], object], times: int) -> float:
    """CPU seconds of the fastest of several runs, the first not counted."""
    work()
    spent = []
    for _ in range(times):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


def run(name: str) -> float:
    """One workload in this process."""
    import numpy as np
    import torch
    from torch import nn

    import skperf

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 64)).astype(np.float32)
    y = rng.integers(0, 10, 3000)
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    images = rng.random((400, 1, 28, 28), dtype=np.float32)
    filters = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(400, 10),
    ).eval()

    def scorer(method: str) -> Callable[[], object]:
        def work() -> object:
            fitted = skperf.InfluenceScorer(mlp, method=method, random_state=0).fit(X, y)
            return fitted.influence(X[:200], y[:200])

        return work

    if name.startswith("influence "):
        return timed(scorer(name.split()[1]), 3)
    if name == "components":
        attributor = skperf.ComponentAttributor(filters, budget=120, random_state=0)
        return timed(lambda: attributor.fit(images[:100], y[:100]), 2)
    if name == "training":
        net = skperf.Net(skperf.MLP, max_epochs=5, random_state=0)
        return timed(lambda: net.fit(X, y), 3)
    if name == "prediction":
        classifier = skperf.from_module(mlp, classes=range(10))
        many = np.tile(X, (4, 1))
        return timed(lambda: classifier.predict_proba(many), 10)
    if name == "performative":
        rounds = np.repeat(np.arange(30), 100)
        adapter = skperf.PerformativeAdapter(mlp, random_state=0)
        return timed(lambda: adapter.fit(X, y, rounds=rounds), 2)
    reprogrammer = skperf.Reprogrammer(filters, border=2, max_epochs=2, random_state=0)
    return timed(lambda: reprogrammer.fit(images, y[:400]), 2)


WORKLOADS = [
    "influence gradient_dot",
    "influence ggn",
    "influence ekfac",
    "components",
    "training",
    "prediction",
    "performative",
    "reprogramming",
]


def in_checkout(path: Path, name: str) -> float:
    """Run a workload with the package of a checkout; CPU seconds."""
    code = f"from benchmarks.against import run; print('seconds', run({name!r}))"
    # this file's code, the other's package: a checkout's own folder would come first
    paths = f"{path}{os.pathsep}{HERE}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    loader = (
        "import importlib.util, sys; "
        f"sys.path[:0] = [{str(path)!r}]; import skperf; "
        f"assert skperf.__file__.startswith({str(path)!r}); "
        f"sys.path[:0] = [{str(HERE)!r}]; "
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", loader + code],
        env=environment,
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.rsplit("seconds", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--only", nargs="*", default=WORKLOADS)
    arguments = parser.parse_args()
    report = []
    for name in arguments.only:
        pairs = [
            (in_checkout(arguments.other.resolve(), name), in_checkout(HERE, name))
            for _ in range(REPEATS)
        ]
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        report.append(
            {
                "workload": name,
                "other, CPU s": theirs,
                "here, CPU s": ours,
                "here / other": statistics.median(ratios),
                "smallest pair": ratios[0],
                "largest pair": ratios[-1],
            }
        )
        print(json.dumps(report[-1]))
    runner.save(HERE / "benchmarks" / "results" / "against.json", report)


if __name__ == "__main__":
    main()
