"""Sphinx configuration: ``sphinx-build -n -W docs docs/_build``.

The build needs no network, and the pages none to be read: formulas and pictures are drawn by the
build, from generated data, and there is no intersphinx. That would fetch an inventory from each
project's site at every build, or keep copies that go stale; the types of other projects are plain
text instead.
"""

import sys
from pathlib import Path

import mvsc

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "mvsc"
author = "The mvsc developers"
copyright = "2026, The mvsc developers"
release = version = mvsc.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "executed",
    "formulas",
]
exclude_patterns = ["_build", "gallery", "extensions"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "drawn"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|nn|Tensor|Callable|collections|typing|logging|weakref|os|matplotlib|numpy|Axes|transformers).*",
    )
]

# Links to files beside the docs are for readers of the repository; tests/test_docs.py checks them.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = "mvsc"
html_static_path = ["_static"]
html_css_files = ["mvsc.css"]
