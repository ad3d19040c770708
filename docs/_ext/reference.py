"""What the reference shows: the names of `api.md`, their methods, and the notebooks that use them.

Also read by the tests, so that the pages and the tests mean the same list.
"""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

from numpydoc.docscrape import NumpyDocString

DOCS = Path(__file__).parents[1]
FIELDS = "__dataclass_fields__"
# inherited from scikit-learn or skorch, and part of how our objects are used
INHERITED = {
    "fit_transform",
    "get_feature_names_out",
    "get_params",
    "predict",
    "predict_proba",
    "score",
    "set_output",
    "set_params",
}
# classes with docstrings that wait for their turn: entries are removed as they are mended
UNFINISHED = ()


def listed_names():
    """Return the full names that `api.md` lists, in its order."""
    module, names = "skperf", []
    for line in (DOCS / "api.md").read_text().splitlines():
        if found := re.match(r"\.\. (?:current)?module:: (\S+)", line):
            module = found[1]
        elif found := re.match(r"   (\w+)$", line):
            names.append(f"{module}.{found[1]}")
    return names


def resolve(name):
    """Import what a full name stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def shown_methods(cls):
    """Return the public methods of a class that its page shows: ours, and a few inherited."""
    shown = []
    for name, value in inspect.getmembers(cls):
        # a field whose default is a function is no method
        if name.startswith("_") or not callable(value) or name in getattr(cls, FIELDS, ()):
            continue
        owner = next(base for base in cls.__mro__ if name in vars(base))
        # what skorch calls while it trains, and no user does
        hook = any(name in vars(b) for b in cls.__mro__ if b.__module__.startswith("skorch"))
        hook = hook and name not in INHERITED | {"fit", "partial_fit"}
        ours = owner.__module__.startswith("skperf") and not hook
        theirs = owner.__module__.split(".")[0] in ("sklearn", "skorch")
        # `set_fit_request` and its like are made by scikit-learn for metadata routing
        generated = re.fullmatch(r"set_\w+_request", name)
        wanted = (ours and not generated) or (theirs and name in INHERITED)
        if wanted and not inspect.isclass(value):
            shown.append(name)
    # in the order of the source, the inherited ones last
    order = [name for base in cls.__mro__ for name in vars(base)]
    return sorted(shown, key=order.index)


def page_methods(name):
    """Return the methods on the page of a listed name."""
    value = resolve(name)
    return shown_methods(value) if inspect.isclass(value) else []


def own_methods(name):
    """Return the methods on the page of a listed class that are defined in skperf."""
    cls, methods = resolve(name), page_methods(name)
    owners = {method: next(b for b in cls.__mro__ if method in vars(b)) for method in methods}
    return [each for each in methods if owners[each].__module__.startswith("skperf")]


def documented(name):
    """Return the names in the sections Parameters and Attributes of a docstring."""
    page = NumpyDocString(inspect.getdoc(_value(name)) or "")
    return [each.name for each in page["Parameters"] + page["Attributes"]]


def parameters(name):
    """Return the parameters in the signature of a listed name or of a method of one."""
    value = _value(name)
    if not (inspect.isclass(value) or inspect.isroutine(value)) or _is_warning(value):
        return []
    named = [each for each in inspect.signature(value).parameters if each[0] != "_"]
    return [each for each in named if each not in ("self", "cls")]


def _is_warning(value):
    return inspect.isclass(value) and issubclass(value, Warning)


def _value(name):
    listed = max(
        (each for each in listed_names() if name == each or name.startswith(f"{each}.")), key=len
    )
    return resolve(listed) if name == listed else getattr(resolve(listed), name[len(listed) + 1 :])


def notebooks_using(name):
    """Return the documents and titles of the notebooks that import a public name."""
    found = []
    for path in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        if name in _imported(cells):
            title = next(line for line in "".join(cells[0]["source"]).splitlines() if line)
            found.append((f"/notebooks/{path.stem}", title.lstrip("# ")))
    return found


def _imported(cells):
    names = set()
    for cell in cells:
        if cell["cell_type"] == "code":
            lines = [line for line in "".join(cell["source"]).splitlines() if line[:1] not in "%!"]
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("skperf"):
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
                    names |= {f"skperf.{alias.name}" for alias in node.names}
    return names


def page_contents():
    """Return what the template of a page needs, by full name: data that Sphinx can cache."""
    contents = {}
    for name in listed_names():
        contents[name] = {
            "methods": page_methods(name),
            "notebooks": notebooks_using(name),
        }
    return contents
