"""Parts: a plan's work split by bytes, so that each part can run by itself on any machine; and their markers.

A part writes its outputs where a run would, and then a marker that says what it wrote. All markers together give
the digest and checksum of every output, which is enough to complete the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.errors import EngineError, Place, first_of
from engine.planning.model import Plan
from engine.run.journal import Done
from engine.run.schedule import Job, Unit
from engine.storage.json_text import parse_json
from engine.storage.store import Store, Target

MARKER = ".part-"
_MOST = 1 << 28  # bytes of a marker
_SLACK = 0.02  # of a part: how far its ends may move so that no tensor is cut
Span = tuple[int, int, int, str]  # an output, begin and end of a byte range in it, and the range's digest


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` shares of a plan, numbered from 1."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= 1 << 20:
            raise EngineError(
                "E001", "there is no such part", got=f"{self.number}/{self.count}", expected="K/N with K from 1 to N",
                fix="The first of eight parts is 1/8.",
            )  # fmt: skip

    @property
    def marker(self) -> str:
        return f"{MARKER}{self.number:05d}-of-{self.count:05d}"


WHOLE = Part(1, 1)  # after a commit, its marker lists what all parts wrote


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: whole outputs, and spans of outputs that several parts share."""

    done: Mapping[int, Done]
    spans: Sequence[Span] = field(default=())
    kept: int = 0  # bytes that an interrupted run had written
    objects: Mapping[str, Any] = field(default_factory=dict)  # states of whole files in a store, by their names


def share(jobs: Sequence[Job], part: Part, *, cut: bool = False) -> list[Job]:
    """The units of a part: a contiguous run of all units, in file order, with its share of the bytes.

    Every byte is in exactly one part, for any number of parts.

    Args:
        cut: whether parts may share an output, where whole outputs would make their sizes too unequal.
    """
    ordered = sorted(jobs, key=lambda job: job.files)
    mean = sum(job.nbytes for job in ordered) / part.count
    first, last = (_edge(ordered, mean * n, mean, cut) for n in (part.number - 1, part.number))
    found: list[Job] = []
    before = 0
    for job in ordered:
        mine: list[tuple[Unit, int]] = []
        for unit, size in zip(job.units, job.sizes, strict=True):
            low, high = max(first, before), min(last, before + size)
            if low < high:
                span = None if high - low == size else (low - before, high - before)
                mine.append((replace(unit, span=span), high - low))
            elif not size and first <= before and (before < last or part.number == part.count):
                mine.append((unit, 0))
            before += size
        if mine:
            units, sizes = zip(*mine, strict=True)
            found.append(replace(job, units=units, sizes=sizes))
    return sorted(found, key=lambda job: -job.nbytes)


def _edge(jobs: Sequence[Job], wanted: float, mean: float, cut: bool) -> int:
    """Where a part ends, in bytes of all units: between two units, or inside one that is cut."""
    before = 0
    for job in jobs:
        for unit, size in zip(job.units, job.sizes, strict=True):
            if before + size < wanted:
                before += size
                continue
            near = before if wanted - before <= before + size - wanted else before + size
            cuts = cut and len(unit.outputs) == 1 and not unit.scattered
            return round(wanted) if cuts and abs(near - wanted) > _SLACK * mean else near
    return before


def write_marker(work: str, store: Target, part: Part, written: Written) -> None:
    """Record that a part is done: what it wrote, and the digest of its saved plan."""
    told = {
        "work": work,
        "part": [part.number, part.count],
        "outputs": {str(output): [one.digest, one.checksum] for output, one in written.done.items()},
        "spans": written.spans,
        "objects": written.objects,
    }
    store.put(part.marker, json.dumps(told, separators=(",", ":")).encode())


def is_done(work: str, store: Store, part: Part) -> bool:
    """Whether this part of the same plan has been done already."""
    return store.has(part.marker) and _read(store, part.marker)["work"] == work


def read_markers(plan: Plan, work: str, store: Store) -> Written:
    """Collect what all parts wrote; E409 when one is missing, or belongs to another plan or number of parts."""
    try:
        names = [name for name in store.names() if name.startswith(MARKER)]
        names = [WHOLE.marker] if WHOLE.marker in names else names
    except FileNotFoundError:
        names = []
    found = {name: _read(store, name) for name in names}
    foreign = [name for name, one in found.items() if one["work"] != work]
    counts = {one["part"][1] for one in found.values()}
    if foreign or len(counts) > 1:
        raise _not_together(
            store,
            "parts of different plans, or of different numbers of parts",
            first_of(sorted(foreign or found), 4),
            "Use one saved plan and one number of parts; `engine clean` removes what is there.",
        )
    count = counts.pop() if counts else 0
    there = {one["part"][0] for one in found.values()}
    missing = [number for number in range(1, count + 1) if number not in there]
    if missing or not found:
        told = f"{len(there)} of {count} parts; missing: {first_of(missing, 8)}" if found else "no part"
        raise _not_together(store, "parts are missing", told, "Run the missing parts, then commit again.")
    done = {output: Done(*one) for marker in found.values() for output, one in marker["outputs"].items()}
    spans = sorted(span for marker in found.values() for span in marker["spans"])
    ends: dict[int, int] = {}
    for output, low, high, _ in spans:
        ends[output] = high if low == ends.get(output, 0) else -1
    sizes = {number: output.nbytes for number, output in enumerate(plan.outputs)}
    joined = {output for output, end in ends.items() if end == sizes.get(output)}
    there = done.keys() | joined
    if there != sizes.keys() or joined != ends.keys():
        raise _not_together(
            store, "parts do not cover the plan", f"{len(there)} of {len(plan.outputs)} tensors", "Run the parts again."
        )
    return Written(done, spans, objects={k: v for one in found.values() for k, v in one["objects"].items()})


def check_parts(plan: Plan, store: Target, told: Mapping[int, Done], found: Mapping[int, Done]) -> None:
    """E409 for the first file that no longer holds what a part wrote to it."""
    for file in plan.shards:
        lost = [
            plan.outputs[output].name
            for output in file.outputs
            if output not in found or found[output] != told.get(output, found[output])
        ]
        if lost:
            raise _not_together(
                store,
                f"`{file.name}` is not what the parts wrote",
                f"other bytes, or none, of {len(lost)} tensors: {first_of(lost, 3)}",
                "Something else changed it. Remove what is there with `engine clean`, and run the parts again.",
            )


def _read(store: Store, name: str) -> dict[str, Any]:
    with store.open(name) as file:
        raw = file.read(_MOST)
    try:
        told = parse_json(raw, own=True)
        Part(*told["part"])
        outputs = {int(output): tuple(entry) for output, entry in told["outputs"].items()}
        spans = [tuple(one) for one in told["spans"]]
        sound = all(tuple(map(type, one)) == (str, int) for one in outputs.values())
        sound &= [*map(type, told["part"])] == [int, int]
        sound &= all([*map(type, one)] == [int, int, int, str] for one in spans)
        if isinstance(told["work"], str) and isinstance(objects := told.get("objects", {}), dict) and sound:
            return {**told, "outputs": outputs, "spans": spans, "objects": objects}
    except (ValueError, LookupError, TypeError, AttributeError, EngineError):
        pass
    raise _not_together(store, "a marker of a part cannot be read", name, "Remove it, and run that part again.")


def _not_together(store: Store | Target, message: str, got: str, fix: str) -> EngineError:
    return EngineError("E409", message, place=Place(store.place()), got=got, fix=fix)
