"""Mappings reviewed: their differences, and findings, for the terminal and for pull requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import unified_diff
from html import escape
from typing import TYPE_CHECKING

from engine.errors import counted
from engine.proving.changes import KINDS, ValueChange
from engine.proving.diff import SECTIONS, Change, MappingDiff
from engine.show.render import render
from engine.show.text import as_json, shown

if TYPE_CHECKING:
    from engine.proving.proof import Finding

_MAX_COMMENT = 60_000  # GitHub refuses comments of more than 65,536 characters


def rendered(diffs: Sequence[MappingDiff], form: str) -> str:
    """Differences as `text`, `markdown`, `json` or `github`."""
    if form == "json":
        return as_json({"mappings": [one.as_dict() for one in diffs]})
    diffs = [shown(one) for one in diffs]
    if form == "github":
        return github(diffs)
    if not diffs:
        return "no differences"
    return "\n\n".join(_told(one, "diff.md" if form == "markdown" else "diff.txt") for one in diffs)


def _told(one: MappingDiff, template: str, level: int = 3) -> str:
    return render(template, one=one, headline=_headline(one), kinds=KINDS, sections=_sections(one), level=level,
                  given=_given)  # fmt: skip


def summary(diffs: Sequence[MappingDiff]) -> str:
    """One line: how many mappings and tensors change.

    >>> summary([])
    'No mapping changes.'
    """
    if not diffs:
        return "No mapping changes."
    said = f"{counted(sum(1 + len(one.same_in) for one in diffs), 'mapping')} changed"
    values = sum(len(one.values) for one in diffs)
    valued = f" **{counted(values, 'value')} of what is written differ{'s' if values == 1 else ''}.**" if values else ""
    counts = {kind: sum(c.kind == kind for one in diffs for c in one.tensors) for kind in KINDS}
    told = ", ".join(f"{count} {KINDS[kind]}" for kind, count in counts.items() if count)
    return (f"{said}; tensors: {told}." if told else f"{said}; every tensor goes where it went.") + valued


def github(diffs: Sequence[MappingDiff]) -> str:
    """A comment: one line that says it all, and the details folded away."""
    lines = [f"**Mappings:** {summary(diffs)}"]
    left = _MAX_COMMENT
    for index, one in enumerate(diffs):
        body = _told(one, "diff.md", 4)
        if len(body) > left:
            more = len(diffs) - index
            lines += ["", f"{more} more differ{'s' if more == 1 else ''}: run `engine diff` to see the rest."]
            break
        left -= len(body)
        told = escape(_headline(one), quote=False)
        lines += ["", "<details>", f"<summary>{told}</summary>", "", body, "", "</details>"]
    return "\n".join(lines)


def _headline(one: MappingDiff) -> str:
    if one.old is None:
        return f"{one.name}: new, {one.new}" + (f", compared with its parent {one.parent}" if one.parent else "")
    if one.new is None:
        return f"{one.name}: removed, was {one.old}"
    return f"{one.name}: {one.old}" + ("" if one.old == one.new else f" → {one.new}")


def _sections(one: MappingDiff) -> Iterator[tuple[str, list[Change]]]:
    for section, called in SECTIONS.items():
        if changes := [change for change in one.changes if change.section == section]:
            yield called, changes


def _given(value: ValueChange) -> str:
    more = f", and {value.others} more" if value.others else ""
    return (f" with {value.given}" if value.given else "") + more


def beside_lines(found: Sequence[Finding]) -> str:
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

    >>> _escaped("50 %\\nnext: x", ":,")
    '50 %25%0Anext%3A x'
    """
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + also else c for c in text)


def unified(file: str, before: str, after: str) -> str:
    """What formatting would change of a file, as `diff -u` says it."""
    lines = unified_diff(before.splitlines(True), after.splitlines(True), file, f"{file} (formatted)")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
