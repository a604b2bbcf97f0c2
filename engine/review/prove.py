"""Proving a mapping: that it is total, injective and exactly invertible, in every layout.

At tiny sizes by running the real planner and runner on index tensors, at a release's own sizes by
box arithmetic, and against the names and shapes that transformers has.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import EngineError, EngineErrors
from engine.language.layout_file import load_layout
from engine.language.lint import Finding, lint
from engine.language.mapping_file import load_mapping
from engine.language.model import Layout
from engine.language.model import Mapping as MappingFile
from engine.review.counterexamples import counter_examples
from engine.review.matrix import Case, Row, cases, combinations_of, rows
from engine.review.proof import Check, Failure, Proof, check_of
from engine.review.roundtrip import Trip, compare_trip, plan_back, write_ranks, write_world
from engine.review.tiny import World, guess_sizes, make_world, shows

_MOST_FAILURES = 5  # counter-examples told of one check


@dataclass(slots=True)
class _Proven:
    """What one mapping's proof leaves for the next, and for mutants."""

    names: dict[str, str]  # what a round trip depends on → the mapping it was proved for

    def key(self, mapping: MappingFile) -> str:
        parts = ("rules", "dims", "variants", "ignore", "refuse", "config", "training_config", "source")
        return json.dumps([mapping.resolved.get(part) for part in parts], default=str, sort_keys=True)


def prove(names: Sequence[str | Path | MappingFile], *, mutants: bool = False) -> list[Proof]:
    """Prove mappings one after another; rules that several share are run once."""
    proven = _Proven({})
    found: list[Proof] = []
    for name in names:
        started = time.monotonic()
        try:
            mapping = name if isinstance(name, MappingFile) else load_mapping(str(name))
            checks = _prove(mapping, proven)
        except (EngineError, EngineErrors) as error:
            errors = error.errors if isinstance(error, EngineErrors) else [error]
            failures = [Failure.of(one) for one in errors]
            found.append(Proof(str(name), (check_of("loads", "the file is a mapping", failures),)))
            continue
        found.append(Proof(mapping.name, tuple(checks), (), time.monotonic() - started))
    return found


def _prove(mapping: MappingFile, proven: _Proven) -> list[Check]:
    layout = load_layout(mapping.layout)
    combinations = combinations_of(mapping)
    checks = [check_rules(mapping, [choices for choices, _ in combinations])]
    if not checks[0].holds:
        return checks
    key = proven.key(mapping)
    if key in proven.names:
        checks.append(Check("round trip", True, f"the rules of {proven.names[key]}, proved there"))
        return checks
    proven.names[key] = mapping.name
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        check, _ = check_round_trip(mapping, layout, combinations, Path(folder))
        checks.append(check)
    return checks


def check_rules(mapping: MappingFile, combinations: Sequence[Mapping[str, str]]) -> Check:
    """Every source piece in one target, every target piece from one source, under all choices."""
    errors = [finding for finding in lint(mapping) if finding.severity == "error"]
    failures: list[Failure] = []
    if errors:
        distinct = {json.dumps(_whens(mapping, one)): one for one in combinations}
        failures += counter_examples(mapping, list(distinct.values()))[:_MOST_FAILURES]
        failures += [_of_finding(finding) for finding in errors[:_MOST_FAILURES]]
    told = f"{len(mapping.rules)} rules, each piece in exactly one place on either side"
    return check_of("rules", told, failures)


def _whens(mapping: MappingFile, choices: Mapping[str, str]) -> list[bool]:
    """Which rules a combination of choices makes active."""
    return [all(choices[name] in allowed for name, allowed in rule.when.items()) for rule in mapping.rules]


def _of_finding(finding: Finding) -> Failure:
    return Failure(f"{finding.code} {finding.message}", None if finding.place is None else str(finding.place))


def check_round_trip(
    mapping: MappingFile, layout: Layout, combinations: Sequence[tuple[Mapping[str, str], bool]], folder: Path
) -> tuple[Check, list[Trip]]:
    """Index tensors to rank files and back, over a matrix of layouts and choices."""
    name = "round trip"
    if not mapping.training_config:
        return Check(name, None, "not checked: the mapping has no `training_config`, so nothing can be written"), []
    free = guess_sizes(mapping)
    possible = [(choices, most) for choices, most in combinations if shows(mapping, choices, most=most)]
    if not possible:
        failure = Failure("no set of tensors shows any combination of choices", str(mapping.place))
        return check_of(name, "no combination of choices can be reached", [failure]), []
    layouts = cases(layout)
    failures: list[Failure] = []
    trips: list[Trip] = []
    lossy: set[str] = set()
    refused: dict[str, str] = {}
    ran: set[str] = set()
    for number, row in enumerate(rows(mapping, layouts, possible)):
        if len(failures) >= _MOST_FAILURES:
            break
        try:
            world = make_world(mapping, row.choices, free, most=row.most)
            if world is None:
                continue
            trip = _trip(mapping, layout, world, row.case, folder / str(number))
            plan, given = plan_back(mapping, layout, trip)
            failures += compare_trip(trip, plan, folder / str(number) / "back")
        except EngineError as error:
            if error.code == "E214":
                refused[row.case.label] = error.got or error.message
            else:
                failures.append(Failure.of(error, f"{row.case.label}; {_told(row)}"))
            continue
        trips.append(replace(trip, settings=given))
        ran.add(row.case.label)
        lossy |= set(world.lossy)
    told = f"{len(trips)} round trips of {free_of(free)} over {len(ran)} layouts, every element back at its place"
    if lossy:
        told += f"; totality only for {', '.join(sorted(lossy))}, which change or drop values"
    left = [label for label in refused if label not in ran]
    if left:
        told += f"; too many ranks for these sizes: {', '.join(left)}"
    if not trips and not failures:
        failures.append(Failure("no layout can hold a tiny model", str(mapping.place)))
    return check_of(name, told, failures), trips


def _trip(mapping: MappingFile, layout: Layout, world: World, case: Case, folder: Path) -> Trip:
    whole = write_world(world, folder / "hf")
    return write_ranks(mapping, layout, world, whole, case, folder / "ranks")


def _told(row: Row) -> str:
    return ", ".join(f"{name}={choice}" for name, choice in row.choices.items())


def free_of(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())
