"""Sphinx configuration; built by `make docs`, with nothing fetched from elsewhere."""

import os
import sys
from pathlib import Path

import skperf

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "skperf"
author = "the skperf developers"
copyright = "2026, the skperf developers"
version = release = skperf.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_nb",
    "sphinx_design",
    "benchmark_tables",
    "peer_table",
]
exclude_patterns = ["_build", "_ext", "check.py", "guide/peers/**", "**.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}

# notebooks are committed executed; the test suite runs them
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

mathjax_path = "mathjax/tex-mml-chtml.js"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_theme = "pydata_sphinx_theme"
html_title = "skperf"
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "start", "benchmarks", "changelog")}
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
suppress_warnings = ["mystnb.unknown_mime_type", "config.cache"]
