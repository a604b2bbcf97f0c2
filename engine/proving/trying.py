"""What shows a mutant.

A mapping alone cannot tell gate from up: exchanged, the rules are as total, as invertible and of the same shapes as
before. Only the meaning that is committed beside it can, or, where there is none, what it meant before. A mutant
that nothing shows is reported so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EngineError, EngineErrors
from engine.language.documents import Document
from engine.language.mapping_file import build_mapping
from engine.language.model import Mapping as MappingFile
from engine.language.validation import check_schema
from engine.proving.committed import committed, differences, read_meaning
from engine.proving.edits import Change, Data
from engine.proving.lint import lint
from engine.proving.meaning import flat, meaning_of, parts_of_meaning
from engine.proving.mutants import mutants_of
from engine.proving.proof import Mutant

LOADING, LINT = "loading", "lint"
COMMITTED, BEFORE = "the committed meaning", "its meaning before"


def try_mutants(mapping: MappingFile, changes: Sequence[Change] | None = None) -> list[Mutant]:
    """Every mutant, and the first thing that shows it.

    Args:
        changes: those to try; default: all.
    """
    then = dict(flat({name: part for name, part in parts_of_meaning(mapping)}))
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


def _caught(
    mapping: MappingFile, change: Change, then: Mapping[tuple[str, ...], Any], before: set[tuple[str, str]]
) -> tuple[str | None, str]:
    """The first thing that shows a mutant, weakest evidence first, and its words."""
    try:
        mutant = rebuilt(mapping, change.data)
    except (EngineError, EngineErrors) as error:
        first = error.errors[0] if isinstance(error, EngineErrors) else error
        return LOADING, f"{first.code} {first.message}"
    for finding in lint(mutant):
        if finding.severity == "error" and (finding.code, finding.message) not in before:
            return LINT, f"{finding.code} {finding.message}"
    # Parts of the meaning one after another: most mutants show in one that is quickly known.
    for name, part in parts_of_meaning(mutant):
        now = dict(flat({name: part}))
        was = {path: value for path, value in then.items() if path[0] == name}
        if now != was:
            return BEFORE, next(iter(differences(mutant, was, now))).message
    return None, ""


def rebuilt(mapping: MappingFile, data: Data) -> MappingFile:
    """A mapping of changed data, checked as its file would be.

    Raises:
        EngineError: what loading it would raise.
    """
    document = Document(mapping.files[-1], data, {})
    check_schema(document, "mapping")
    return build_mapping(document, mapping.files)
