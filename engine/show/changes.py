"""Differences of mappings as text, Markdown, a pull request's comment, or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from engine.errors import counted
from engine.proving.changes import KINDS, ValueChange
from engine.proving.diff import SECTIONS, Change, MappingDiff
from engine.show.render import render
from engine.show.text import Styled, as_json, shown

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
    return Styled("\n\n".join(_told(one, "diff.md" if form == "markdown" else "diff.txt") for one in diffs))


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
    return (f"{said}; tensors: {told}." if told else f"{said}; every tensor goes where it did before.") + valued


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
    given = value.given or ("usual values" if value.others else "")
    more = f", and {counted(value.others, 'more input')}" if value.others else ""
    return (f" with {given}" if given else "") + more
