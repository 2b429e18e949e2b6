"""Sphinx's settings: `python -m sphinx -W docs build/docs` builds the site, without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ipo_ext

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "ipo_ext"
author = "The ipo_ext authors"
copyright = "The ipo_ext authors, Apache-2.0"
release = ipo_ext.__version__
version = release.partition(".dev")[0]

extensions = [
    "myst_parser",
    "reference_tables",  # ours, in _extensions
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_extensions"]
nitpicky = True  # a name that leads nowhere is a warning
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|numpy)(\..*)?"),  # the pages of others: nothing is fetched
    ("py:.*", r"(collections\.abc\.)?(Callable|Iterable|Iterator|Mapping|Sequence)|optional"),
    ("py:class", r"os\.PathLike"),
    ("py:class", r"(ipo_ext\.output\.)?Metrics"),  # of IPOOutput, for type checkers
    ("py:class", r"typing_extensions\.Unpack|ipo_ext\.config\._(Advantage)?Taus"),  # the same
]

myst_heading_anchors = 3  # links to headings, made as GitHub makes them
myst_enable_extensions: list[str] = []

# Hosts of the integrations.
autodoc_mock_imports = ["skyrl", "torchtitan", "transformers", "trl", "verl"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 90  # beyond it, an argument a line
napoleon_numpy_docstring = False
napoleon_use_admonition_for_examples = False

html_theme = "furo"
html_title = "ipo_ext"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "native"


def show_default_config(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: Any
) -> tuple[str | None, Any]:
    """The default config is `IPOConfig()` to whoever reads the signature, not all its fields."""
    default = repr(ipo_ext.IPOConfig())
    return signature and signature.replace(default, "IPOConfig()"), returned


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", show_default_config)
