"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html`."""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "_ext")]

import lora_lite  # noqa: E402

project = "lora-lite"
author = "the lora-lite authors"
version = release = lora_lite.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "from_code", "unbroken"]
exclude_patterns = ["_build", "_ext", "_static"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"lora-lite {version}"
html_show_copyright = False


def code_in_markdown_way(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Turn the docstrings' `code` into reStructuredText's; in place, as autodoc wants it."""
    lines[:] = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    """Connect before napoleon, which splits fields at colons outside of code."""
    app.connect("autodoc-process-docstring", code_in_markdown_way, priority=100)
