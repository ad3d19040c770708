"""Sphinx configuration; built by `make docs`, with nothing fetched from elsewhere."""

import os
import sys
from pathlib import Path

import skperf

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from inventories import inventories
from reference import listed_names, page_contents

project = "skperf"
author = "the skperf developers"
copyright = "2026, the skperf developers"
version = release = skperf.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_nb",
    "sphinx_design",
    "benchmark_tables",
    "component_tables",
    "gallery",
    "peer_table",
]
exclude_patterns = ["_build", "_ext", "check.py", "guide/peers/**", "**.ipynb_checkpoints"]
# autosummary writes its stubs with the first suffix, and they are reStructuredText
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

# notebooks are committed executed; the test suite runs them
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_context = {"pages": page_contents()}
autodoc_typehints = "none"
python_maximum_signature_line_length = 88
# a name in single backticks in a docstring links where it is one of ours, and is code elsewhere
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:meth", "save_program"),  # named in a summary, where no class is known
    # bases that autodoc never names on a page, and types in the docstrings of scikit-learn
    ("py:class", r"(sklearn|skorch|torch)\..*"),
]
intersphinx_mapping = inventories(Path(__file__).parent / "_build" / "inventories")
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"  # but these
numpydoc_xref_aliases = {
    "array-like": ":term:`sklearn:array-like`",
    "classifier": ":term:`sklearn:classifier`",
    "estimator": ":term:`sklearn:estimator`",
    "ndarray": "numpy.ndarray",
    "memmap": "numpy.memmap",
    "recarray": "numpy.recarray",
    "RandomState": "numpy.random.RandomState",
    "Bunch": "sklearn.utils.Bunch",
    "FrozenEstimator": "sklearn.frozen.FrozenEstimator",
    "Tensor": "torch.Tensor",
    "nn.Module": "torch.nn.Module",
    "torch.device": "torch.device",
    "torch.dtype": "torch.dtype",
    "Dataset": "torch.utils.data.Dataset",
    "skorch.History": "skorch.history.History",
    "Axes": "matplotlib.axes.Axes",
    "Figure": "matplotlib.figure.Figure",
    "Line2D": "matplotlib.lines.Line2D",
    "ValueError": "ValueError",
    "TypeError": "TypeError",
    **{name.rpartition(".")[2]: name for name in listed_names()},
}

mathjax_path = "mathjax/tex-mml-chtml.js"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["skperf.css"]
toc_object_entries_show_parents = "hide"
html_theme = "pydata_sphinx_theme"
html_title = "skperf"
html_show_sourcelink = False
WITHOUT_SIDEBAR = ("index", "install", "start", "gallery", "benchmarks", "glossary")
WITHOUT_SIDEBAR += ("contributing", "changelog")
html_sidebars = {page: [] for page in WITHOUT_SIDEBAR}
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "header_links_before_dropdown": 7,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
suppress_warnings = ["mystnb.unknown_mime_type", "config.cache"]
