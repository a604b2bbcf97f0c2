"""The model card: what a converted model is, where it came from and what was decided in the conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import visible
from engine.planning.given import amount

if TYPE_CHECKING:
    from jinja2 import Environment, Template


def model_card(facts: Mapping[str, Any]) -> bytes:
    """README.md from `templates/model_card.md.j2`; the same facts give the same bytes.

    Args:
        facts: `mapping`, `mapping_version`, `layout`, `ranks`, `decisions` and so on, as
            `engine.assets.bundle.card_facts` collects them. The line of a missing fact is left out.
    """
    return visible(_template().render(facts), "\n").encode()


@cache  # compiling it takes longer than a small conversion
def _template() -> Template:
    return environment(Path(__file__).parent / "templates", strict=False).get_template("model_card.md.j2")


def environment(folder: Path, *, escape: bool = False, strict: bool = True) -> Environment:
    """A sandboxed Jinja environment for the templates of a folder.

    Args:
        escape: whether to escape for HTML; in Markdown, `cell` and `code` escape what would break a table or span.
        strict: whether an undefined name is an error.
    """
    from jinja2 import FileSystemLoader, StrictUndefined, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=escape,
        undefined=StrictUndefined if strict else Undefined,
    )
    made.filters.update(cell=cell, code=code, size=amount, count=lambda number: f"{number:,}")
    return made


def cell(value: object) -> str:
    """Text for a table cell: one line, with all markup escaped.

    >>> cell("a|b <script>\\n[x](y)")
    'a\\\\|b &lt;script&gt; \\\\[x\\\\](y)'
    """
    text = " ".join(str(value).split())
    for character in "\\|[]*_`":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(value: object) -> str:
    """A code span for any text, including backticks and the bars of a table.

    >>> code("w2_is_down"), code("a`b|c")
    ('`w2_is_down`', '`` a`b\\\\|c ``')
    """
    if value is None:
        return ""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
