"""The directives ``notebook-gallery`` and ``front-page``: pictures drawn from what is committed.

The gallery shows each notebook's title, first sentence and one of its own pictures. The front
page shows the code in it and the picture that this very code makes.
"""

import base64
import io
import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "_static" / "drawn"


class NotebookGallery(Directive):
    """A card for each notebook of the toctree on the same page."""

    def run(self):
        lines = [":::::{grid} 1 1 2 3", ":gutter: 3", ""]
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            self.state.document.settings.record_dependencies.add(str(path))
            title, sentence, picture = _head(path)
            lines += [f"::::{{grid-item-card}} {title}", f":link: /notebooks/{path.stem}"]
            lines += [":link-type: doc"]
            if picture:
                PICTURES.mkdir(parents=True, exist_ok=True)
                (PICTURES / f"{path.stem}.png").write_bytes(picture)
                lines += [f":img-top: /_static/drawn/{path.stem}.png"]
                lines += [f":img-alt: a figure of the notebook {path.stem}"]
            lines += ["", sentence, "", ":::{card-footer}"]
            lines += [f"{{download}}`download </notebooks/{path.name}>`", ":::", "::::", ""]
        lines += [":::::"]
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, "gallery"), self.content_offset, holder)
        return holder.children


def _head(path):
    cells = json.loads(path.read_text())["cells"]
    title, *text = [line for line in "".join(cells[0]["source"]).split("\n\n") if line.strip()]
    sentence = re.split(r"(?<=[.?!])\s", " ".join(text[0].split()))[0] if text else ""
    pictures = [
        base64.b64decode(output["data"]["image/png"])
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return title.lstrip("# ").strip(), sentence, pictures[0] if pictures else None


class FrontPage(Directive):
    """Code, and the figure that it draws when the page is built."""

    has_content = True
    required_arguments = 1

    def run(self):
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        code = "\n".join(self.content)
        exec(compile(code, "the front page", "exec"), {})
        PICTURES.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        plt.gcf().savefig(buffer, dpi=130, bbox_inches="tight")
        plt.close("all")
        (PICTURES / self.arguments[0]).write_bytes(buffer.getvalue())
        picture = nodes.image(uri=f"/_static/drawn/{self.arguments[0]}", alt="what the code draws")
        return [nodes.literal_block(code, code, language="python"), picture]


def setup(app):
    app.add_directive("notebook-gallery", NotebookGallery)
    app.add_directive("front-page", FrontPage)
    return {"parallel_read_safe": True}
