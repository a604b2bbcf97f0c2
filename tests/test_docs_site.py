"""The documentation site: every page is reached from its index, and what the pages include is there."""

from __future__ import annotations

import re
from pathlib import Path

from engine.commands.main import cli

DOCS = Path(__file__).parents[1] / "docs"
TREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def listed(page: Path) -> set[Path]:
    """Pages that the tables of contents of a page name, patterns followed."""
    lines = [line.strip() for tree in TREE.findall(page.read_text()) for line in tree.splitlines()]
    return {path for line in lines if line and not line.startswith(":") for path in page.parent.glob(f"{line}.md")}


def test_every_page_is_reached_from_the_index() -> None:
    reached, new = {DOCS / "index.md"}, {DOCS / "index.md"}
    while new:
        new = {path for page in new for path in listed(page)} - reached
        reached |= new
    assert reached == set(DOCS.rglob("*.md"))


def test_what_a_page_includes_is_there() -> None:
    included = [
        (page, name) for page in DOCS.rglob("*.md") for name in re.findall(r"\{include\} (\S+)", page.read_text())
    ]
    assert len(included) >= 3
    assert all((page.parent / name).is_file() for page, name in included)


def test_the_help_of_every_command_names_a_page_that_is_there() -> None:
    for command in cli.commands.values():
        assert (DOCS.parent / str(command.epilog).removeprefix("Documentation: ")).is_file(), command.name
