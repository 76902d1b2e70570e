"""Sphinx configuration: ``sphinx-build -n -W docs docs/_build``."""

import mvsc

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
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
# Types of other projects: the build works without network, so nothing is linked outside.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|Tensor|Callable|collections|typing|logging|weakref).*")
]

html_theme = "furo"
html_title = "mvsc"
