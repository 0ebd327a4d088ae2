"""How Sphinx makes a site of these pages and of the docstrings: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import holdfast

project, author = "holdfast", "the holdfast authors"
release = version = holdfast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", "holdfast"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
suppress_warnings = ["myst.header"]  # tables of results begin at the second level
DOCS = Path(__file__).parent


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: shown as written."""
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""] if any(lines) else lines


def read(app: Any, name: str, text: list[str]) -> None:
    """Tables of results begin with their command: their file's name is their title."""
    if name.startswith("results/") and not text[0].startswith("#"):
        text[0] = f"# {Path(name).name}\n\n{text[0]}"
    text[0] = unlinked(text[0], (DOCS / name).parent)


def included(app: Any, path: Path, page: str, text: list[str]) -> None:
    """README, which the first page shows: its links begin beside it."""
    text[0] = unlinked(text[0], DOCS.parent)


def unlinked(text: str, base: Path) -> str:
    """Links to files of the repository that are no pages become their text."""

    def link(found: re.Match[str]) -> str:
        target = (base / found[2].partition("#")[0]).resolve()
        return found[0] if target.is_relative_to(DOCS) else found[1]

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", link, text)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain)
    app.connect("source-read", read)
    app.connect("include-read", included)
