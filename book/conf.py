"""Sphinx's configuration of the book. `build.py` stages the pages and calls Sphinx with it."""

import importlib.util
import re
from pathlib import Path

import fedmitr as fm

project = "fedmitr"
author = copyright = "the fedmitr authors"
version = release = fm.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinxcontrib.bibtex"]
exclude_patterns = ["**/profiles"]
bibtex_bibfiles = [str(Path(__file__).parent.parent / "docs" / "references.bib")]

# Notebooks: the outputs that they store; nothing runs.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # stored sliders need no kernel, and these files would come from the network
myst_enable_extensions = ["amsmath", "dollarmath", "html_image"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
default_role = "code"  # docstrings write `name`

# MathJax of the package that requirements-book.txt pins, with its fonts inside: no network.
MATHJAX = Path(importlib.util.find_spec("mathjax").origin).parent / "static" / "mathjax" / "es5"
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "furo"
html_title = "fedmitr"
html_static_path = [str(Path(__file__).parent / "static"), str(MATHJAX / "tex-svg.js")]
html_css_files = ["book.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"source_repository": "https://github.com/fedmitr/fedmitr"}

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88


def literal_docstring(app, what, name, found, options, lines):
    """Change a docstring so that it is shown as it stands: signs escaped, indented parts literal."""
    text, indented = [], False
    for line in list(lines):
        if line.strip():
            deeper = line.startswith(" ")
            if deeper and not indented:
                text += ["", "::", ""]
            elif indented and not deeper:
                text.append("")
            indented = deeper
        text.append(line if indented else re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", line))
    lines[:] = text


def setup(app):
    app.connect("autodoc-process-docstring", literal_docstring)
