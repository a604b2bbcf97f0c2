"""The matrix that a mapping is proved over: layouts, choices, and the combinations of them to run.

Every layout occurs in some row, and so does every pair of facts (a choice of one variant with a choice of
another, or with a parallel mode). All combinations would be thousands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from random import Random
from typing import Any

from engine.checkpoint.ranks import stage_dims, written_dims
from engine.language.expressions import names_in
from engine.language.model import Layout, MappingFile, Mode
from engine.planning.request import Request

_MAX_COMBINATIONS = 512
_MOST_NAMED = 4096
_SAMPLE = 60  # candidates for each row
# At real sizes: ranks that cut an axis, and ranks that cut rows, also inside heads.
_REAL = ((8, 32), (4, 32), (2, 32), (2, 16), (2, 2), (1, 1))
STAGES = 4  # pipeline ranks of the first mode, or half of them
# At tiny sizes: ranks that cut an axis, ranks that cut rows (4 cut inside a head), pipeline ranks; even and uneven.
_TINY = ((2, 4, 2), (3, 3, 3))


Fact = tuple[str, str]
Combination = tuple[Mapping[str, str], bool]  # choices; most (True) or fewest optional tensors


@dataclass(frozen=True, slots=True)
class Case:
    """One layout to write: the arguments of `reverse`."""

    label: str
    mode: str
    sizes: Mapping[str, int]
    chunks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)  # variants and options of the layout
    holds: Mapping[str, str] = field(default_factory=dict)  # the only choices of variants that it can write

    def takes(self, choices: Mapping[str, str]) -> bool:
        """Whether a model with these choices can be written this way."""
        return all(choices.get(name, choice) == choice for name, choice in self.holds.items())

    def request(self, mapping: MappingFile, choices: Mapping[str, str], lossy: Sequence[str] = ()) -> Request:
        """The request that writes a mapping's model of these choices this way."""
        return Request(
            mapping,
            settings={**choices, **self.settings},
            reads="whole",
            writes="training",
            mode=self.mode,
            ranks=self.sizes,
            chunks=self.chunks,
            lossy=lossy,
        )


def cases(layout: Layout) -> list[Case]:
    """One rank and many, even and uneven, in every mode; also chunks, and the layout's switches."""
    found: list[Case] = []
    for number, mode in enumerate(mode for mode in layout.modes if mode.only_read is None):
        dims = written_dims(mode.files[0])
        if number == 0:
            found.append(_case(mode, dict.fromkeys(dims, 1)))
        found += [_case(mode, _ranks(layout, mode, *counts)) for counts in _TINY]
        if number == 0 and {*stage_dims(layout)} & {*dims} and "chunk" in names_in(layout.layers.stage):
            variants = layout.layers.variants
            every = (dict(zip(variants, one, strict=True)) for one in product(*(v.choices for v in variants.values())))
            found += [_case(mode, dict.fromkeys(dims, 2), chunks=2, **choices) for choices in every]
    switches = [name for name, option in layout.options.items() if option.type == "boolean"]
    if switches:
        found.append(_case(layout.modes[0], found[1].sizes, **dict.fromkeys(switches, True)))
    return found


def _ranks(layout: Layout, mode: Mode, few: int, wide: int, stages: int) -> dict[str, int]:
    """Ranks for each dimension of a mode; more where storage rows are cut."""
    staged = stage_dims(layout)
    file = mode.files[0]
    by_rows = {dim for cuts in file.cuts.values() for dim, role in cuts.items() if role == "rows"}
    return {d: stages if d in staged else wide if d in by_rows else few for d in written_dims(file)}


def _case(mode: Mode, sizes: Mapping[str, int], *, chunks: int = 1, **settings: Any) -> Case:
    words = [mode.name, *(f"{dim}{count}" for dim, count in sizes.items())]
    words += [f"chunks{chunks}"] if chunks > 1 else []
    words += [name if value is True else str(value) for name, value in settings.items()]
    return Case(" ".join(words), mode.name, sizes, chunks, settings, mode.choices)


@dataclass(frozen=True, slots=True)
class Row:
    """One run: a combination of choices, with most or fewest optional tensors, in one layout."""

    choices: Mapping[str, str]
    most: bool
    case: Case


def rows(
    mapping: MappingFile, layouts: Sequence[Case], possible: Sequence[Combination], refused: Collection[str]
) -> Iterator[Row]:
    """Rows in which every possible pair of facts and every layout occurs.

    The caller adds the labels of layouts that do not fit to `refused` while rows are made; then theirs do not count.
    """
    every = [Row(choices, most, case) for choices, most in possible for case in layouts if case.takes(choices)]
    random = Random(mapping.name)
    seen: set[tuple[Fact, Fact]] = set()
    known = -1
    candidates: list[Row] = []
    left: set[tuple[Fact, Fact]] = set()
    while True:
        if known != len(refused):
            known = len(refused)
            candidates = [row for row in every if row.case.label not in refused]
            left = {pair for row in candidates for pair in _pairs(row)} - seen
        if not left:
            return
        wanted = min(left)
        fitting = [row for row in candidates if set(wanted) <= set(_facts(row))]
        sample = random.sample(fitting, min(_SAMPLE, len(fitting)))
        best = max(sample, key=lambda row: len(left.intersection(_pairs(row))))
        yield best
        if best.case.label not in refused:
            seen.update(_pairs(best))
            left.difference_update(_pairs(best))


def choices_named(mappings: Sequence[MappingFile]) -> list[dict[str, str]]:
    """Every combination of choices of the variants that rules name, with the choices of all the mappings."""
    choices: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for name in dict.fromkeys(name for rule in mapping.rules for name in rule.when):
            choices.setdefault(name, {}).update(dict.fromkeys(mapping.variants[name].choices))
    every = islice(product(*choices.values()), _MOST_NAMED)
    return [dict(zip(choices, combination, strict=True)) for combination in every]


def combinations_of(mapping: MappingFile) -> list[Combination]:
    """Combinations of choices, at most 512; each with most and with fewest optional tensors."""
    names = list(mapping.variants)
    every = list(product(*(mapping.variants[n].choices for n in names)))
    if len(every) > _MAX_COMBINATIONS:
        every = Random(mapping.name).sample(every, _MAX_COMBINATIONS)
    loose = any("{param}" in rule.sources[0] or rule.optional for rule in mapping.rules)
    return [
        (dict(zip(names, one, strict=True)), most) for one in every for most in ((True, False) if loose else (True,))
    ]


def _facts(row: Row) -> list[Fact]:
    return [*row.choices.items(), ("", str(row.most)), ("mode", row.case.mode), ("layout", row.case.label)]


def _pairs(row: Row) -> list[tuple[Fact, Fact]]:
    """Every pair of a row's facts, and the layout alone, since its mode represents it in pairs."""
    *facts, layout = _facts(row)
    return [*combinations(facts, 2), (layout, layout)]


def real_cases(layout: Layout) -> list[list[Case]]:
    """For every way to cut layers, layouts as used at real sizes; the first that fits is enough.

    Modes whose ranks differ only while training runs cut layers alike: the later of them has few ranks.
    """
    found: list[list[Case]] = []
    seen: list[object] = []
    stored: list[object] = []
    for number, mode in enumerate(mode for mode in layout.modes if mode.only_read is None):
        cuts = mode.files[0].cuts.get("layers", {})
        if cuts in seen:
            continue
        in_files = {dim: role for dim, role in cuts.items() if role != "runtime"}
        again = in_files in stored
        stages = (2 if number else STAGES, 1)  # a single one last, for models of one layer
        counts = [(few, few if again else wide, many) for many in stages for few, wide in _REAL]
        tried = [_ranks(layout, mode, *count) for count in counts]
        seen.append(cuts)
        stored.append(in_files)
        found.append([_case(mode, sizes) for sizes in tried])
    return found
