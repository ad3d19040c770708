"""The directives ``benchmark-table`` and ``workload-table``: committed results as tables.

Each file in ``benchmarks/results`` that the docs show is a list of flat records under ``rows``,
beside it where they came from (``benchmarks.runner.save``); older files are the list alone.
"""

import json
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx import addnodes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
# what a reader calls the columns whose keys are short
HEADINGS = {
    "arm": "prior used",
    "AUROC": "rejects: AUROC",
    "cpu_s": "CPU seconds",
    "CPU s": "CPU seconds",
    "FPR95": "lets in at 95 %",
    "f1": "F1",
    "f1: range": "F1, least to greatest",
    "G": "gain over no correction",
    "G min": "least",
    "G rounds 1-20": "rounds 1 to 20",
    "G rounds 20+": "rounds from 20",
    "ID": "accuracy",
    "LDS": "rank correlation with retraining (LDS)",
    "shifted": "accuracy, shifted rows",
    "wall s": "seconds",
    "wall range": "least to greatest",
}
# and what stands in cells
WORDS = {
    "query_itself": "the query itself",
    "same_class": "random rows of its class",
    "same_class_plain": "the same, plain steps",
}


class BenchmarkTable(Directive):
    """Draw a result file; ``:columns:`` picks and orders its keys, ``key as heading`` names one.

    ``:across: way, flipped`` gives each value of ``way`` a column, which holds ``flipped``; then
    one row stands for all that agree in ``:columns:``.
    """

    required_arguments = 1
    option_spec = {  # noqa: RUF012 (docutils' own idiom)
        "columns": directives.unchanged,
        "across": directives.unchanged,
    }

    def run(self):
        path = RESULTS / self.arguments[0]
        self.state.document.settings.record_dependencies.add(str(path))
        if not path.exists():
            return [nodes.paragraph(text="No result is committed yet: run the command above.")]
        records = json.loads(path.read_text())
        rows = records["rows"] if isinstance(records, dict) else records
        # names of columns may hold commas, so only a list that was asked for is taken apart
        asked = self.options.get("columns")
        columns = (
            [column.strip().partition(" as ")[0] for column in asked.split(",")]
            if asked
            else list(dict.fromkeys(column for row in rows for column in row))
        )
        if "across" in self.options:
            spread, shown = (name.strip() for name in self.options["across"].split(","))
            rows, added = _across(rows, columns, spread, shown)
            columns += added
        unknown = [column for column in columns if not any(column in row for row in rows)]
        if unknown:
            # `tests/benchmarks/test_runner.py` names the results that wait to be made anew
            text = "The committed result is that of an older form of this benchmark and not shown."
            return [nodes.paragraph(text=f"{text} It has no column {', '.join(unknown)}.")]
        named = (column.strip().partition(" as ") for column in (asked or "").split(","))
        headings = HEADINGS | {key: heading for key, _, heading in named if heading}
        head = [headings.get(column, WORDS.get(column, column)) for column in columns]
        found = [_table(head, [[row.get(column) for column in columns] for row in rows])]
        origin = records.get("provenance") if isinstance(records, dict) else None
        return [*found, _origin(origin) if origin else _unknown_origin()]


class WorkloadTable(Directive):
    """Draw what is measured, linked to the page that shows it, and by which command."""

    def run(self):
        from benchmarks.runner import WORKLOADS

        first = {each.question: each for each in reversed(WORKLOADS) if each.page}
        here = self.state.document.settings.env.docname
        rows = [
            [
                _link(here, each.page, question),
                nodes.literal(text=f"python -m benchmarks.{each.command}"),
            ]
            for question, each in reversed(first.items())
        ]
        return [_table(["what is measured", "command"], rows)]


def _across(rows, columns, spread, shown):
    """Rows that agree in ``columns`` as one, with a column for each value of ``spread``."""
    joined = {}
    for row in rows:
        kept = {column: row.get(column) for column in columns}
        joined.setdefault(tuple(kept.values()), kept)[row[spread]] = row.get(shown)
    return list(joined.values()), list(dict.fromkeys(row[spread] for row in rows))


def _table(head, rows):
    table = nodes.table(classes=["benchmark"])
    group = nodes.tgroup(cols=len(head))
    table += group
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", _row(head))
    group += nodes.tbody("", *(_row(row) for row in rows))
    return table


def _link(here, page, text):
    link = addnodes.pending_xref(
        "", refdomain="std", reftype="doc", reftarget=f"/{page}", refdoc=here, refexplicit=True
    )
    link += nodes.inline(text=text)
    return link


def _unknown_origin():
    text = "Recorded with the code of the first edition; not run again with the present code."
    return nodes.paragraph(text=text, classes=["origin"])


def _origin(origin):
    machine, versions = origin["machine"], origin["versions"]
    text = f"{origin['command']}, commit {origin['commit']}, {origin['date']}; "
    if origin["seeds"]:
        text += f"seeds {', '.join(map(str, origin['seeds']))}; "
    text += f"{origin['threads']} of {machine['cores']} cores, {machine['processor']}"
    text += f" (load {machine['load']})" if machine.get("load") is not None else ""
    text += "; " + ", ".join(f"{name} {number}" for name, number in versions.items())
    return nodes.paragraph(text=text, classes=["origin"])


def _shown(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else WORDS.get(value, str(value))


def _row(cells):
    row = nodes.row()
    for cell in cells:
        is_number = isinstance(cell, int | float)
        shown = cell if isinstance(cell, nodes.Node) else nodes.Text(_shown(cell))
        entry = nodes.entry("", nodes.paragraph("", "", shown))
        entry["classes"] += ["number"] if is_number else []
        row += entry
    return row


def setup(app):
    app.add_directive("benchmark-table", BenchmarkTable)
    app.add_directive("workload-table", WorkloadTable)
    return {"parallel_read_safe": True}
