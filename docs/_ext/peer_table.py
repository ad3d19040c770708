"""The directive ``peer-table``: what the snippets under ``guide/peers`` ask of a user.

Statements, own classes and own functions are counted in the snippets themselves.
"""

import ast
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

SNIPPETS = Path(__file__).parents[1] / "guide" / "peers"
HEAD = ("task", "with", "lines of code", "statements", "classes and functions to write")


class PeerTable(Directive):
    """Draw the counts of every snippet, task by task."""

    def run(self):
        table = nodes.table(classes=["benchmark"])
        group = nodes.tgroup(cols=len(HEAD))
        table += group
        group += [nodes.colspec(colwidth=1) for _ in HEAD]
        group += nodes.thead("", _row(HEAD))
        body = nodes.tbody()
        group += body
        for path in sorted(SNIPPETS.glob("*/*.py"), key=lambda p: (p.parent, p.stem == "skperf")):
            self.state.document.settings.record_dependencies.add(str(path))
            body += _row([path.parent.name.replace("_", " "), path.stem, *counts(path.read_text())])
        return [table]


def counts(source):
    """Lines that hold code, statements at any depth, definitions of the user's own."""
    tree = ast.parse(source)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    lines = {n for s in statements for n in range(s.lineno, s.end_lineno + 1)}
    code = [line for line in source.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    kinds = (ast.ClassDef, ast.FunctionDef)
    return (
        min(len(lines), len(code)),
        len(statements),
        sum(isinstance(s, kinds) for s in statements),
    )


def _row(cells):
    return nodes.row("", *(nodes.entry("", nodes.paragraph(text=str(cell))) for cell in cells))


def setup(app):
    app.add_directive("peer-table", PeerTable)
    return {"parallel_read_safe": True}
