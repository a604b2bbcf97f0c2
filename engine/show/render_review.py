"""What `engine lint`, `engine new`, `engine format --diff` and `engine prove` show. No decisions are made here."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from difflib import unified_diff
from typing import TYPE_CHECKING

import click

from engine.discover.notes import shown as one_line
from engine.errors import counted
from engine.language.search import spelled
from engine.show.text import shows

if TYPE_CHECKING:
    from engine.discover.scaffold import Scaffold
    from engine.proving.proof import Check, Finding, Mutant, Proof

_KINDS = {
    "release": "a release of {parent}, which fits",
    "renamed": "{parent} with other sources",
    "own": "rules of its own, as no family is near",
}


def findings(found: Sequence[Finding]) -> str:
    """Lint findings one under another, in the shape of errors, and how many."""
    lines: list[str] = []
    for finding in found:
        colour = "red" if finding.severity == "error" else "yellow"
        first, *rest = finding.in_words().split("\n")
        lines += [click.style(finding.code, fg=colour, bold=True) + first.removeprefix(finding.code), *rest, ""]
    errors = sum(f.severity == "error" for f in found)
    if not found:
        lines.append(click.style("no findings", fg="green"))
    else:
        lines.append(f"{counted(errors, 'error')}, {counted(len(found) - errors, 'warning')}")
    return "\n".join(lines)


def github(found: Sequence[Finding]) -> str:
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


def draft(found: Scaffold, out: str | None, src: str) -> str:
    """What a draft is, what must be decided in it, and what comes next."""
    lines = []
    parent = spelled(found.parent or "")
    if out is not None:
        lines.append(f"wrote {out}: {_KINDS[found.kind].format(parent=parent)}")
        lines += [f"  {out}:{line}  decide: {text}" for line, text in found.decisions]
    if found.state is not None:
        lines.append(f"a run would now say {found.state['code']} {one_line(found.state['message'])}")
    elif out is not None:
        lines.append(f"next: engine plan --mapping {shlex.quote(out)} --src {shlex.quote(src)}")
    return "\n".join(lines)


_WORDS = {True: ("proved", "green"), False: ("fails", "red"), None: ("open", "yellow")}


@shows
def proofs(found: Sequence[Proof]) -> str:
    """Proofs one under another, and how many hold."""
    lines: list[str] = []
    for proof in found:
        lines.append(f"{click.style(proof.mapping, bold=True)} ({proof.seconds:.1f} s)")
        for check in proof.checks:
            lines += _check(check)
        if proof.mutants:
            lines += _mutants(proof.mutants)
    failed = sum(not proof.holds for proof in found)
    told = f"{len(found) - failed} of {len(found)} proved"
    return "\n".join([*lines, click.style(told, fg="red" if failed else "green")])


def _check(check: Check) -> list[str]:
    word, colour = _WORDS[check.holds]
    lines = [f"  {click.style(f'{word:<6}', fg=colour)} {check.name}: {check.told}"]
    for failure in check.failures:
        lines.append(f"         {failure.message}")
        at = "; ".join(part for part in (failure.place, failure.where) if part)
        if at:
            lines.append(f"           {at}")
    return lines


def _mutants(mutants: Sequence[Mutant]) -> list[str]:
    """How many of each kind were caught, and by what; then those that nothing showed."""
    caught = sum(mutant.caught_by is not None for mutant in mutants)
    colour = "green" if caught == len(mutants) else "red"
    lines = [f"  {click.style(f'{caught} of {len(mutants)} mutants caught', fg=colour)}"]
    for kind, count in Counter(mutant.kind for mutant in mutants).items():
        by = Counter(mutant.caught_by or "nothing" for mutant in mutants if mutant.kind == kind)
        told = ", ".join(f"{number} by {name}" for name, number in by.most_common())
        lines.append(f"         {kind}: {count - by['nothing']} of {count}: {told}")
    for mutant in mutants:
        if mutant.caught_by is None:
            lines.append(f"         {mutant.where}, {mutant.what}: {click.style('by nothing', fg='red')}")
    return lines
