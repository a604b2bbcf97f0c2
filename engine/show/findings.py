"""Findings of `engine lint`, also beside the lines of a pull request, and what `engine format` would change."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import unified_diff

import click

from engine.errors import EngineError, counted
from engine.show.render import error
from engine.show.text import Styled


def findings(found: Sequence[EngineError]) -> Styled:
    """Lint findings one under another, and how many."""
    lines = [line for one in found for line in (error(one), "")]
    errors = sum(f.severity == "error" for f in found)
    if not found:
        return Styled(click.style("no findings", fg="green"))
    return Styled("\n".join([*lines, f"{counted(errors, 'error')}, {counted(len(found) - errors, 'warning')}"]))


def beside_lines(found: Sequence[EngineError]) -> str:
    """Findings as a workflow's run shows them beside the lines of a pull request."""
    lines = []
    for finding in found:
        parts = [finding.message]
        parts += [f"{label}: {text}" for label, text in (("got", finding.got), ("expected", finding.expected)) if text]
        parts += [finding.fix] if finding.fix else []
        at = {} if finding.place is None else finding.place.as_dict()
        where = {"file": at.get("file"), "line": at.get("line"), "col": at.get("column"), "title": finding.code}
        told = ",".join(f"{name}={_escaped(str(value), ':,')}" for name, value in where.items() if value is not None)
        lines.append(f"::{finding.severity} {told}::{_escaped(chr(10).join(parts))}")
    return "\n".join(lines)


def _escaped(text: str, also: str = "") -> str:
    """Text in which nothing ends a workflow's command.

    >>> _escaped("50 %\\r\\nnext: x", ":,")
    '50 %25%0D%0Anext%3A x'
    """
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + also else c for c in text)


def unified(file: str, before: str, after: str) -> str:
    """What formatting would change of a file, as `diff -u` says it."""
    lines = unified_diff(before.splitlines(True), after.splitlines(True), file, f"{file} (formatted)")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
