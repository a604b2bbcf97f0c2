"""Everything that a command prints goes through here."""

from __future__ import annotations

import re

import click

from engine.errors import visible

_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")  # what `click.style` writes, and nothing else of a terminal's


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text that cannot steer the terminal: what is not a line's end or a colour is shown as an escape."""
    parts = _STYLE.split(text)
    click.echo("".join(p if _STYLE.fullmatch(p) else visible(p, "\n\t") for p in parts), err=err, nl=nl)
