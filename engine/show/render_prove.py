"""What `engine prove` shows: a line per check, counter-examples below it, mutants by what caught them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from engine.show.text import shows

if TYPE_CHECKING:
    from engine.proving.proof import Check, Mutant, Proof

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
