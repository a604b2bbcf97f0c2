"""Settings of the documentation site: `make docs` builds it, and every warning is an error."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

import engine

DOCS = Path(__file__).resolve().parent

project = "engine"
author = "the engine's authors"
copyright = author
version = release = engine.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
exclude_patterns = ["_build"]
# Output is shown with its prompts; only what is typed is copied.
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
# JSON and YAML of the pages hold ellipses, which a strict lexer would refuse.
suppress_warnings = ["misc.highlighting_failure"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"engine {release}"


LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)\)")


def unlink_files(app: Sphinx, page: str, text: list[str]) -> None:
    """Links from a page to files of the repository that are no pages become their words.

    In the repository such a link opens the file; a link to nothing stays, and is a warning.
    """
    folder = (DOCS / page).parent

    def unlinked(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        return link[1] if (target.exists() and target.suffix != ".md") or DOCS not in target.parents else link[0]

    text[0] = LINK.sub(unlinked, text[0])


def unlink_included(app: Sphinx, path: Path, page: str, text: list[str]) -> None:
    """The same for a file of the repository that a page includes: its links are from where it lies."""
    text[0] = LINK.sub(lambda link: link[1] if not link[2].startswith("docs/") else link[0], text[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", unlink_files)
    app.connect("include-read", unlink_included)
