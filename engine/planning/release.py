"""Checks whether a model is the chosen release: compares its sizes with those that the release states."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from engine.errors import EngineError, first_of, meant
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile
from engine.language.search import list_names
from engine.planning.model import Departure
from engine.planning.variants import decide

_MOST_NAMES = 4


def check_release(mapping: MappingFile, sizes: Mapping[str, int], *, strict: bool = False) -> tuple[Departure, ...]:
    """The sizes in which the model differs from the chosen release; empty when it is that release.

    Args:
        strict: refuse any difference.

    Raises:
        EngineError: E213 when another release of the family has exactly these sizes, or when `strict`;
            E108 for an axis in `expect` that no rule has.
    """
    unknown = [axis for axis in mapping.expect if axis not in sizes]
    if unknown:
        raise EngineError(
            "E108",
            f"`expect` names an axis that is not there: {unknown[0]}",
            place=mapping.place,
            fix=meant(unknown[0], sizes),
        )
    found = tuple(Departure(axis, sizes[axis], want) for axis, want in mapping.expect.items() if sizes[axis] != want)
    if not found:
        return ()
    others = _releases_of(mapping, sizes)
    if not others and not strict:
        return found
    told = first_of(others, _MOST_NAMES)
    raise EngineError(
        "E213",
        f"this is not release `{mapping.name}`" + (f": it has the sizes of {told}" if others else ""),
        place=mapping.expect_place or mapping.place,
        got=", ".join(f"{one.key} = {one.got}" for one in found),
        expected=", ".join(f"{one.key} = {one.expected}" for one in found),
        fix=f"Give the mapping of the right one, such as --mapping {others[0]}."
        if others
        else "Leave --strict out to convert it all the same.",
    )


def not_the_release(mapping: MappingFile, found: tuple[Departure, ...]) -> tuple[str, ...]:
    """The notice that it is not the release, one sentence; empty when it is."""
    if not found:
        return ()
    told = "; ".join(f"{one.key}: got {one.got}, expected {one.expected}" for one in found)
    return (f"this is not release `{mapping.name}`: {told}",)


def check_asked(
    mapping: MappingFile, names: Mapping[str, Any], settings: Mapping[str, Any], found: tuple[Departure, ...]
) -> None:
    """E202 for a question that only the release's own default answers, when the model is not that release."""
    defaults = {name: one.default for name, one in mapping.options.items() if name not in settings}
    for variant in mapping.variants.values() if found else ():
        taken = {name: defaults[name] for name in variant.answers if defaults.get(name) is not None}
        try:
            if taken and variant.name not in settings:
                unsaid = {**names, "options": {**names["options"], **dict.fromkeys(taken)}}
                decide({variant.name: variant}, settings, unsaid)
        except EngineError as error:
            raise EngineError(
                "E202",
                f"variant `{variant.name}` cannot be decided: this is not release `{mapping.name}`, which decides it",
                place=variant.place,
                got=not_the_release(mapping, found)[0],
                expected=", ".join(f"--set {name}=VALUE" for name in taken),
                fix=f"{error.fix} `{mapping.name}` has " + ", ".join(f"{n} {v}" for n, v in taken.items()) + ".",
                answers=variant.answers,
            ) from error


def _releases_of(mapping: MappingFile, sizes: Mapping[str, int]) -> list[str]:
    """Mappings in the search folders that read the same tensors and state exactly these sizes, the most alike first.

    A chat release is more like another's chat release than like its base.
    """
    reads = _reads(mapping)
    names: list[str] = []
    for name in list_names():
        try:
            other = load_mapping(name)
        except EngineError:  # ignore an unreadable file on the search path
            continue
        same = other.expect.keys() >= mapping.expect.keys() and _reads(other) == reads
        if same and all(sizes.get(axis) == want for axis, want in other.expect.items()):
            names.append(name.removesuffix(".yaml"))
    return sorted(names, key=lambda name: SequenceMatcher(None, mapping.name, name).ratio(), reverse=True)


def _reads(mapping: MappingFile) -> tuple[str, str, frozenset[str]]:
    return mapping.layout, mapping.model_type, frozenset(text for rule in mapping.rules for text in rule.sources)
