"""All printing of commands."""

from __future__ import annotations

import re
from collections.abc import Callable

import click

from engine.errors import visible
from engine.show.text import Styled, as_json, fit, terminal_width

_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")  # the escapes of `click.style`, and no others


LIVE = "engine.live"  # key of a command's context for the progress on the terminal


def clear_progress() -> None:
    """Remove progress from the terminal before something is printed."""
    context = click.get_current_context(silent=True)
    shown = None if context is None else context.meta.pop(LIVE, None)
    if shown is not None:
        shown.stop()


def say(text: str, *, err: bool = False, nl: bool = True, raw: bool = False) -> None:
    """Print text that cannot control the terminal: control characters other than line ends and own styles are escaped.

    Lines are fitted to the terminal, unless they are `raw`: JSON, YAML, a script.
    """
    clear_progress()
    fitted = text if raw else fit(text, terminal_width(err))
    parts = _STYLE.split(fitted) if isinstance(text, Styled) else [fitted]
    shown = "".join(p if _STYLE.fullmatch(p) else visible(p, "\n\t") for p in parts)
    click.echo(shown, err=err, nl=nl)


def answer(json: bool, data: object, text: Callable[[], str], *, quiet: bool = False) -> None:
    """Print the result of a command: its data with `json`, else its text, unless `quiet`."""
    if json:
        say(as_json(data), raw=True)
    elif not quiet:
        say(text())
