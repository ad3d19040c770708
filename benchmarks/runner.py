"""Run the benchmarks one after another, and save what they find with where it came from.

    python -m benchmarks.runner --list             # every workload, its question and its results
    python -m benchmarks.runner influence cluster  # groups of workloads; none means all

A script keeps its rows with `save` and reads them again with `load`. A result names its
command, commit, versions, seeds, threads and machine; the documentation draws its tables from
these files.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "skorch")


@dataclass(frozen=True)
class Workload:
    """One run of one script: the question it answers, and the results that pages show."""

    group: str
    question: str
    command: str  # behind `python -m benchmarks.`
    results: tuple[str, ...] = ()
    page: str = ""


WORKLOADS = (
    Workload(
        "backbone",
        "Training and prediction, over bare torch",
        "backbone",
        ("backbone.json",),
        "benchmarks",
    ),
    Workload(
        "growth",
        "How time and memory grow with each size",
        "growth",
        ("growth.json",),
        "benchmarks",
    ),
    Workload(
        "shapes",
        "Networks of real size on two cores",
        "shapes",
        ("shapes.json",),
        "benchmarks",
    ),
    Workload(
        "shapes",
        "Networks of real size on a GPU",
        "shapes --cuda",
        ("shapes_gpu.json",),
        "benchmarks",
    ),
    Workload("cluster", "A dask cluster", "cluster", ("cluster.json",), "guide/clusters"),
    Workload(
        "performative",
        "Anticipation in simulated worlds",
        "performative",
        ("performative.json", "performative_rows.json"),
        "guide/performative",
    ),
    Workload(
        "performative",
        "Ranking candidates before they are deployed",
        "performative_selection",
        ("performative_selection.json", "performative_selection_rows.json"),
        "guide/performative",
    ),
    Workload(
        "performative",
        "Anticipation on real rows",
        "performative_real",
        ("performative_real.json", "performative_real.png"),
        "guide/performative",
    ),
    Workload(
        "performative",
        "Worlds that drift, change or do nothing",
        "performative_drift",
        ("performative_drift.json",),
        "guide/performative",
    ),
    Workload(
        "performative",
        "Twenty classifiers behind an adapter",
        "performative_classifiers",
        ("performative_classifiers.json",),
        "guide/performative",
    ),
    Workload(
        "performative",
        "A backbone retrained every round",
        "performative_retraining",
        (
            "performative_retraining.json",
            "performative_retraining_selection.json",
            "performative_retraining.png",
        ),
        "guide/performative",
    ),
    Workload(
        "performative",
        "The price of refits and corrections",
        "performative_speed",
        ("performative_speed.json",),
        "guide/performative",
    ),
    Workload(
        "performative",
        "Time and memory of ten thousand rounds",
        "performative_rounds",
        ("performative_rounds.json",),
        "guide/performative",
    ),
    Workload(
        "influence",
        "Influence against captum, kronfluence and pyDVL",
        "influence --search --memory",
        ("influence_speed.json", "influence_targets.json"),
        "guide/influence",
    ),
    Workload(
        "influence",
        "How the default damping was chosen",
        "influence_damping",
        ("influence_damping.json",),
        "guide/influence",
    ),
    Workload(
        "influence",
        "Wrong labels, fading, repair and removal",
        "influence_use",
        tuple(
            f"influence_{use}.json"
            for use in ("mislabels", "fading", "deeper", "repair", "removal")
        ),
        "guide/influence",
    ),
    Workload(
        "influence",
        "What each library of influence takes",
        "influence_takes",
        ("influence_takes.json",),
        "guide/peers",
    ),
    Workload(
        "influence",
        "A tenth of R8 chosen by LESS",
        "influence_selection",
        ("influence_selection.json",),
        "guide/influence",
    ),
    *(
        Workload(
            "replay",
            question,
            f"replay {part}",
            (f"replay_{part}.json",),
            "guide/replay",
        )
        for part, question in (
            ("threshold", "When is a training run smooth enough to be differentiated?"),
            ("quality", "Influence through the training run against retraining"),
            ("speed", "The price of going back through a training run"),
            ("basis", "What few directions leave out of a training run's scores"),
            ("bergson", "The same training run in Bergson's magic"),
            ("memory", "Memory of a training run, with checkpoints and without"),
        )
    ),
    Workload(
        "replay",
        "Replay, ensembles and retraining at equal cost",
        "replay_cost",
        ("replay_cost.json", "replay_cost.png"),
        "guide/replay",
    ),
    Workload(
        "replay",
        "What shortcuts leave out of a training run's scores",
        "replay_shortcuts",
        ("replay_shortcuts.json",),
        "guide/replay",
    ),
    *(
        Workload(
            "components",
            "Effects of components at equal cost",
            f"components curve --network {network} --fraction {share} --seed {seed}",
            (f"components_curve_{network}_{share}_{seed}.json",),
            "guide/components",
        )
        for network, seeds in (("resnet", 1), ("rnet", 3), ("minilm", 1))
        for seed in range(seeds)
        for share in (0.1, 0.05)
    ),
    Workload(
        "components",
        "Effects of components at equal cost, on EfficientNet-Lite0",
        "components curve --network lite0 --n-test 60",
        ("components_curve_lite0_0.01_0.json",),
        "guide/components",
    ),
    Workload(
        "components",
        "captum's attributions and the released loop",
        "components race",
        ("components_race.json",),
        "guide/components",
    ),
    Workload(
        "components",
        "The price of a mask",
        "components speed",
        ("components_speed.json",),
        "guide/components",
    ),
    Workload(
        "components",
        "Do the standard errors cover?",
        "components coverage",
        ("components_coverage.json",),
        "guide/components",
    ),
    Workload(
        "components",
        "The figure of all curves",
        "components plot",
        ("components.png", "components_lite0.png"),
        "guide/components",
    ),
    Workload(
        "components",
        "Edits of five kinds on real networks",
        "components_edits",
        ("components_edits.json",),
        "guide/components",
    ),
    Workload(
        "components",
        "The strongest components taken away, or left alone",
        "components_deletion",
        ("components_deletion.json", "components_deletion.png"),
        "guide/components",
    ),
    Workload(
        "components",
        "Memory of a fit on networks of real size",
        "components_memory",
        ("components_memory.json",),
        "guide/components",
    ),
    Workload(
        "reprogramming",
        "Reprogramming EfficientNet-Lite0 joined to MiniLM",
        "reprogramming",
        ("reprogramming_lite0.json", "reprogramming_lite0_rows.json"),
        "guide/reprogramming",
    ),
    Workload(
        "reprogramming",
        "The default beside what is simpler, on tasks that chose nothing",
        "reprogramming_default --seeds 0 1 2",
        ("reprogramming_default.json", "reprogramming_default_rows.json"),
        "guide/reprogramming",
    ),
    Workload(
        "reprogramming",
        "Rows that are no pictures on encoders of pictures and signals",
        "reprogramming_rows --seeds 0 1 2",
        ("reprogramming_rows.json",),
        "guide/reprogramming",
    ),
    Workload(
        "reprogramming",
        "Rejection scores beside pytorch-ood's",
        "reprogramming_peers",
        ("reprogramming_peers.json",),
        "guide/reprogramming",
    ),
    Workload(
        "reprogramming",
        "Memory of a fit of ImageNet's shape",
        "reprogramming_paper imagenet",
        ("reprogramming_imagenet.json",),
        "guide/reprogramming",
    ),
    Workload(
        "reprogramming",
        "The price of a step and of a fit",
        "reprogramming_cost",
        ("reprogramming_cost.json",),
        "guide/reprogramming",
    ),
)


def save(path: Path, found: Any, *, seeds: Sequence[int] | None = None) -> None:
    """Write a result with where it came from; records are kept under "rows"."""
    if seeds is None and isinstance(found, list):
        seeds = sorted({row["seed"] for row in found if isinstance(row.get("seed"), int)})
    kept = {"provenance": provenance(seeds), "rows": found}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, default=float, ensure_ascii=False) + "\n")


def load(path: Path) -> Any:
    """Read what `save` wrote, or an older result, which is the records alone."""
    kept = json.loads(path.read_text())
    return kept["rows"] if isinstance(kept, dict) and "rows" in kept else kept


def begun(path: Path) -> Any:
    """Read rows that the code of this commit has written already; none of an older one's."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    ours = isinstance(kept, dict) and kept.get("provenance", {}).get("commit") == _commit()
    return kept["rows"] if ours else []


def provenance(seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Return what is needed to run a result again, and to doubt it."""
    import torch

    spec = sys.modules["__main__"].__spec__
    script = spec.name if spec else Path(sys.argv[0]).name
    return {
        "command": " ".join(["python -m", script, *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seeds": list(seeds or []),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, GPU and how busy the machine is."""
    import torch

    described = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        described["processor"] = names[0].split(":")[1].strip() if names else platform.machine()
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        described["memory GB"] = round(pages * size / 1e9)
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    # how many processes wanted to run in the last minute: what else ran beside is in here
    described["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return described


def _commit() -> str:
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "skperf", "benchmarks/*.py"
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" and changes" if changed else "")


# Peers come after the environment's own packages, so that they replace none of them.
_WITH_PEERS = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); sys.argv = sys.argv[1:]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run workloads in turn; the status counts those that failed."""
    parser = argparse.ArgumentParser("python -m benchmarks.runner")
    parser.add_argument("groups", nargs="*", choices=[*_groups(), []], metavar="GROUP")
    parser.add_argument("--list", action="store_true", help="show the workloads")
    parser.add_argument("--peers", default="", help="folder of the other libraries")
    options = parser.parse_args(arguments)
    failed = 0
    for workload in WORKLOADS:
        if options.groups and workload.group not in options.groups:
            continue
        print(f"{workload.question}\n    python -m benchmarks.{workload.command}", flush=True)
        if options.list:
            print(f"    {', '.join(workload.results)}")
            continue
        command = [sys.executable, "-c", _WITH_PEERS, options.peers]
        command += f"benchmarks.{workload.command}".split()
        failed += subprocess.run(command, check=False).returncode != 0
    return failed


def _groups() -> list[str]:
    return list(dict.fromkeys(workload.group for workload in WORKLOADS))


if __name__ == "__main__":
    sys.exit(main())
