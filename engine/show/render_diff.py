"""Differences of mappings as text, markdown, a pull request's comment, or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

import click

from engine.assets.model_card import code
from engine.errors import counted
from engine.proving.changes import KINDS, TensorChange, ValueChange
from engine.proving.diff import SECTIONS, Change, MappingDiff
from engine.show.text import as_json, shown

FORMATS = ("text", "markdown", "json", "github")
_MARKS = {"added": "+", "removed": "-", "changed": "~"}
_MAX_COMMENT = 60_000  # GitHub refuses comments of more than 65,536 characters


def rendered(diffs: Sequence[MappingDiff], form: str) -> str:
    """Differences in one of `FORMATS`."""
    if form == "json":
        return as_json({"mappings": [one.as_dict() for one in diffs]})
    diffs = [shown(one) for one in diffs]
    if form == "github":
        return github(diffs)
    if not diffs:
        return "no differences"
    return "\n\n".join((markdown if form == "markdown" else text)(one) for one in diffs)


def summary(diffs: Sequence[MappingDiff]) -> str:
    """One line: how many mappings and tensors change.

    >>> summary([])
    'No mapping changes.'
    """
    if not diffs:
        return "No mapping changes."
    mappings = sum(1 + len(one.same_in) for one in diffs)
    tensors = sum(len(one.tensors) for one in diffs)
    said = f"{counted(mappings, 'mapping')} changed"
    values = sum(len(one.values) for one in diffs)
    valued = f" **{counted(values, 'value')} of what is written differ{'s' if values == 1 else ''}.**"
    if not tensors:
        return f"{said}; every tensor goes where it went." + (valued if values else "")
    counts = {kind: sum(c.kind == kind for one in diffs for c in one.tensors) for kind in KINDS}
    told = ", ".join(f"{count} {KINDS[kind]}" for kind, count in counts.items() if count)
    return f"{said}; tensors: {told}." + (valued if values else "")


def text(one: MappingDiff) -> str:
    """For the terminal: `-` and `+` as in a diff."""
    lines = [_title(one)]
    if one.same_in:
        lines.append(f"the same in {', '.join(one.same_in)}")
    if one.tensors or one.values:
        lines += ["", click.style("WHAT IS WRITTEN CHANGES", fg="red", bold=True)]
    else:
        lines += ["", click.style("what is written stays the same", fg="green")]
    for tensor in one.tensors:
        lines.append(f"  {KINDS[tensor.kind]}: {tensor.target}{_when(tensor)}")
        lines += _sides(tensor.old, tensor.new)
    for value in one.values:
        lines.append(f"  {value.file} {value.name}{_given(value)}")
        lines += _sides(value.old, value.new)
    for section, changes in _sections(one):
        lines += ["", f"in the file: {SECTIONS[section]}"]
        for change in changes:
            lines.append(f"  {_MARKS[change.kind]} {change.name}")
            lines += _sides(change.old, change.new)
    return "\n".join(lines)


def _sides(old: str | None, new: str | None) -> list[str]:
    lines = [] if old is None else [click.style(f"      - {old}", fg="red")]
    return lines + ([] if new is None else [click.style(f"      + {new}", fg="green")])


def markdown(one: MappingDiff, level: int = 3) -> str:
    """A heading, a table of tensors first, then what the file says."""
    lines = [f"{'#' * level} {_title(one)}", ""]
    if one.same_in:
        lines += [f"The same in {', '.join(map(_code, one.same_in))}.", ""]
    if one.tensors or one.values:
        lines += ["**What is written changes.**", ""]
    if one.tensors:
        lines += _table("| tensor | | before | after | when |", [
            (_code(tensor.target), KINDS[tensor.kind], _code(tensor.old), _code(tensor.new),
             ", ".join(map(_code, tensor.when))) for tensor in one.tensors
        ])  # fmt: skip
    else:
        lines.append("Every tensor goes where it went.")
    if one.values:
        lines += ["", "**What is written differently**", "", *_table("| file | key | before | after | when |", [
            (value.file, _code(value.name), _code(value.old), _code(value.new), _code(_given(value).strip()))
            for value in one.values
        ])]  # fmt: skip
    for section, changes in _sections(one):
        lines += ["", f"**{SECTIONS[section]}**", "", *_table("| | key | before | after |", [
            (change.kind, _code(change.name), _code(change.old), _code(change.new)) for change in changes
        ])]  # fmt: skip
    return "\n".join(lines)


def _table(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    return [header, "|" + "---|" * (header.count("|") - 1), *(f"| {' | '.join(cells)} |" for cells in rows)]


def github(diffs: Sequence[MappingDiff]) -> str:
    """A comment: one line that says it all, and the details folded away."""
    lines = [f"**Mappings:** {summary(diffs)}"]
    left = _MAX_COMMENT
    for index, one in enumerate(diffs):
        body = markdown(one, 4)
        if len(body) > left:
            more = len(diffs) - index
            lines += ["", f"{more} more differ{'s' if more == 1 else ''}: run `engine diff` to see the rest."]
            break
        left -= len(body)
        lines += ["", "<details>", f"<summary>{escape(_title(one), quote=False)}</summary>", "", body, "", "</details>"]
    return "\n".join(lines)


def _title(one: MappingDiff) -> str:
    if one.old is None:
        return f"{one.name}: new, {one.new}" + (f", compared with its parent {one.parent}" if one.parent else "")
    if one.new is None:
        return f"{one.name}: removed, was {one.old}"
    return f"{one.name}: {one.old}" + ("" if one.old == one.new else f" → {one.new}")


def _sections(one: MappingDiff) -> Iterator[tuple[str, list[Change]]]:
    for section in SECTIONS:
        changes = [change for change in one.changes if change.section == section]
        if changes:
            yield section, changes


def _given(value: ValueChange) -> str:
    more = f", and {value.others} more" if value.others else ""
    return (f" with {value.given}" if value.given else "") + more


def _when(tensor: TensorChange) -> str:
    return f" when {', '.join(tensor.when)}" if tensor.when else ""


def _code(value: str | None) -> str:
    return "" if value is None else code(value)
