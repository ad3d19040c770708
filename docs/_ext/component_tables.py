"""The directive ``component-table``: results of the component benchmarks, over their seeds.

``curve NETWORK FRACTION``, ``large`` (EfficientNet-Lite0), ``race``, ``speed``, ``coverage``,
``deletion``, ``memory`` and ``edits``. A cell is the mean over seeds, in brackets the least and the
greatest.
"""

import json
import re
from collections import defaultdict

import numpy as np
from benchmark_tables import RESULTS, _origin, _table, _unknown_origin
from docutils.parsers.rst import Directive

METHODS = ("auto", "least squares", "ridge", "leave one out", "gradient x parameter")


class ComponentTable(Directive):
    """Draw one of the tables."""

    required_arguments = 1
    optional_arguments = 2

    def run(self):
        head, rows, paths = TABLES[self.arguments[0]](*self.arguments[1:])
        for path in paths:
            self.state.document.settings.record_dependencies.add(str(path))
        kept = [json.loads(path.read_text()) for path in paths]
        known = [each["provenance"] for each in kept if "provenance" in each]
        # one line for all files: only where every one of them says where it came from
        origin = _origin(known[-1]) if len(known) == len(paths) else _unknown_origin()
        return [_table(head, rows), origin]


def _load(path):
    from benchmarks import runner

    return runner.load(path)


def _span(values, digits=3):
    """Mean, and the range where there are several: ``.720 (.702-.743)``."""
    if not values:
        return None
    shown = [f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values))]
    mean, low, high = (re.sub(r"^(-?)0\.", r"\1.", each) for each in shown)
    return mean if len(values) == 1 else f"{mean} ({low}\u00a0to\u00a0{high})"


def _curves(network, fraction):
    paths = sorted(RESULTS.glob(f"components_curve_{network}_{fraction}_*.json"))
    found = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for row in _load(path):
            for quantity in ("correlation", "slope"):
                found[row["method"], row["cost"]][quantity].append(row[quantity])
    return found, paths


def curve(network, fraction):
    found, paths = _curves(network, fraction)
    costs = sorted({cost for _, cost in found})
    methods = [method for method in METHODS if any(method == name for name, _ in found)]
    rows = [
        [cost, *(_span(found[method, cost]["correlation"]) for method in methods)] for cost in costs
    ]
    return ["forward-equivalents", *methods], rows, paths


def large():
    found, paths = _curves("lite0", "0.01")
    rows = [
        [cost, method, _span(found[method, cost]["correlation"]),
         _span(found[method, cost]["slope"], 2), len(found[method, cost]["slope"])]
        for method, cost in sorted(found, key=lambda key: key[1])
    ]  # fmt: skip
    return ["forward-equivalents", "method", "correlation", "slope", "runs"], rows, paths


def race():
    path = RESULTS / "components_race.json"
    runs = _load(path)
    names = [name for name in runs[0] if f"{name} s" in runs[0]]
    rows = [
        [
            name,
            _span([run[name] for run in runs]),
            float(np.mean([run[f"{name} s"] for run in runs])),
        ]
        for name in names
    ]
    return ["method", "correlation", "CPU seconds"], rows, [path]


def speed():
    path = RESULTS / "components_speed.json"
    rows = [
        [name, row["ours_ms"], row["loop_ms"], row["ratio"], f"{row['largest_difference']:.0e}"]
        for name, row in _load(path).items()
    ]
    head = ["what", "here, ms", "plain loop, ms", "ratio", "largest difference of outputs"]
    return head, rows, [path]


def coverage():
    path = RESULTS / "components_coverage.json"
    found = json.loads(path.read_text())
    found = found.get("rows", found)
    rows = [[name, found[name]] for name in found if name not in ("n_repeats", "budget")]
    return ["method", "share within two standard errors"], rows, [path]


def deletion():
    from benchmarks.components_deletion import RESULTS as path
    from benchmarks.components_deletion import table

    return *table(), [path]


def memory():
    path = RESULTS / "components_memory.json"
    shown = ("network", "components", "weights MB", "above MB", "share")
    return list(shown), [[row[name] for name in shown] for row in _load(path)], [path]


def edits():
    from benchmarks.components_edits import table

    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table())
    return head, rows, [RESULTS / "components_edits.json"]


TABLES = {
    each.__name__: each for each in (curve, large, race, speed, coverage, deletion, memory, edits)
}


def setup(app):
    app.add_directive("component-table", ComponentTable)
    return {"parallel_read_safe": True}
