"""The directive ``benchmark-table``: a committed result file as a table.

Each file in ``benchmarks/results`` that the docs show is a list of flat records, all with
the same keys, or a record that holds such a list under ``rows``.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive, directives

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class BenchmarkTable(Directive):
    """Draw a result file; ``:columns:`` picks and orders its keys."""

    required_arguments = 1
    option_spec = {"columns": directives.unchanged}  # noqa: RUF012 (docutils' own idiom)

    def run(self):
        path = RESULTS / self.arguments[0]
        self.state.document.settings.record_dependencies.add(str(path))
        if not path.exists():
            return [nodes.paragraph(text="No result is committed yet: run the command above.")]
        records = json.loads(path.read_text())
        rows = records["rows"] if isinstance(records, dict) else records
        columns = [c.strip() for c in self.options.get("columns", ",".join(rows[0])).split(",")]
        table = nodes.table(classes=["benchmark"])
        group = nodes.tgroup(cols=len(columns))
        table += group
        group += [nodes.colspec(colwidth=1) for _ in columns]
        group += nodes.thead("", _row(columns))
        group += nodes.tbody("", *(_row([_shown(row.get(c)) for c in columns]) for row in rows))
        return [table]


def _shown(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _row(cells):
    return nodes.row("", *(nodes.entry("", nodes.paragraph(text=cell)) for cell in cells))


def setup(app):
    app.add_directive("benchmark-table", BenchmarkTable)
    return {"parallel_read_safe": True}
