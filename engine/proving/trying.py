"""Finds what detects a mutant.

A mapping alone does not distinguish gate from up: if they are exchanged, the rules are still total and invertible,
with the same shapes. Only the meaning that is committed beside it shows it, or, if there is none, its meaning before
the change. A mutant that nothing detects is reported as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from engine.errors import EngineError
from engine.language.documents import Document, flat, plain, same
from engine.language.mapping_file import build_mapping
from engine.language.model import MappingFile
from engine.language.validation import check_schema
from engine.proving.committed import committed, differences, read_meaning
from engine.proving.lint import lint
from engine.proving.meaning import Path, facts_of, meaning_of
from engine.proving.mutants import mutants_of
from engine.proving.neighbour import GONE
from engine.proving.proof import Failure, Mutant
from engine.proving.value_mutants import Change, Data

LOADING, LINT = "loading", "lint"
_ROWS = ("reading", "writing")  # parts whose rows are independent of each other
COMMITTED, BEFORE = "the committed meaning", "its meaning before"

Facts = dict[str, dict[Path, Any]]  # part → its facts


def try_mutants(mapping: MappingFile, changes: Sequence[Change] | None = None) -> list[Mutant]:
    """Every mutant, and the first check that detects it.

    Args:
        changes: the changes to try; default: all.

    Raises:
        EngineError: if the unchanged mapping does not load, as then loading shows nothing about mutants.
    """
    rebuilt(mapping, plain(mapping.resolved))
    then: Facts = {}
    for path, value in facts_of(mapping):
        then.setdefault(path[0], {})[path] = value
    known = committed(mapping)
    try:
        is_of = known is not None and read_meaning(known[1]) == dict(flat(meaning_of(mapping)))
    except EngineError:
        is_of = False
    before = {(f.code, f.message) for f in lint(mapping)}
    found: list[Mutant] = []
    for change in changes if changes is not None else mutants_of(mapping):
        caught, told = _caught(mapping, change, then, before)
        if caught == BEFORE and is_of:
            caught = COMMITTED
        found.append(Mutant(change.where, change.what, caught, told, change.kind))
    return found


def _caught(mapping: MappingFile, change: Change, then: Facts, before: set[tuple[str, str]]) -> tuple[str | None, str]:
    """The first check that detects a mutant, weakest evidence first, and its message."""
    try:
        mutant = rebuilt(mapping, change.data)
    except EngineError as error:
        return LOADING, f"{error.code} {error.message}"
    for finding in lint(mutant):
        if finding.severity == "error" and (finding.code, finding.message) not in before:
            return LINT, f"{finding.code} {finding.message}"
    found = first_difference(mutant, then)
    return (None, "") if found is None else (BEFORE, found.message)


def first_difference(mapping: MappingFile, then: Facts) -> Failure | None:
    """The first difference of a mapping's meaning from `then`; parts and rows that are fast to compute come first."""
    left = dict(then)
    for part, facts in groupby(facts_of(mapping), key=lambda fact: fact[0][0]):
        was = left.pop(part, {})
        now: dict[Path, Any] = {}
        for path, value in facts:
            now[path] = value
            if part in _ROWS and not same(was.get(path, GONE), value):
                return _told(mapping, {path: was[path]} if path in was else {}, {path: value})
        if not same(now, was):
            return _told(mapping, was, now)
    lost = {path: value for part in left.values() for path, value in part.items()}
    return _told(mapping, lost, {}) if lost else None


def _told(mapping: MappingFile, was: Mapping[Path, Any], now: Mapping[Path, Any]) -> Failure:
    found = differences(mapping, was, now)
    return found[0] if found else Failure(f"its {next(iter({**now, **was}))[0]} differ", str(mapping.place))


def rebuilt(mapping: MappingFile, data: Data) -> MappingFile:
    """A mapping from changed data, checked like its file.

    Raises:
        EngineError: the errors of loading it from a file.
    """
    document = Document(mapping.files[-1], data)
    check_schema(document, "mapping", merged=True)
    return build_mapping(document, mapping.files)
