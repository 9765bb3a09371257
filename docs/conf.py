"""Sphinx configuration."""

from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

project = "riemann_unn"
author = "riemann_unn contributors"
copyright = "2026, riemann_unn contributors"
version = release = installed_version("riemann-unn")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "riemann_unn"
html_css_files = ["tables.css"]

# Formulas are drawn in the reader's browser by a MathJax that the build ships, so that they show
# offline. Its SVG output is one file without fonts; the package has all of MathJax, 24 MB.
_mathjax = find_spec("sphinx-mathjax-offline")
assert _mathjax is not None and _mathjax.origin is not None
html_static_path = [
    "_static",
    str(Path(_mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js"),
]
mathjax_path = "tex-svg.js"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shapes", "Shape"), "Reference"]
add_module_names = False

# References within the package must lead somewhere; those to other projects would need the network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|os|geoopt|numpy|pathlib|matplotlib|typing)\..*"),
    (r"py:class", r"Tensor|Module|.*\.T|.*\._\w+|optional|callable|The report"),
    # Named in signatures, and not for direct use.
    (r"py:class", r"riemann_unn\..*\.(LowRankFactors|OutputSpace|Source|table\.Report|Report)"),
]
