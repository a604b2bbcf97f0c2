"""Parts: a plan's work dealt out by bytes, each share done by itself, on any machine; and what ties them together.

A part writes its outputs where a run would, and then a marker that says what it wrote. Whoever has all markers knows
the digest and checksum of every output, and completes the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import EngineError, Place
from engine.planning.model import Plan
from engine.run.journal import Done, identity_of
from engine.run.schedule import Job
from engine.storage.json_text import parse_json
from engine.storage.store import Store

MARKER = ".part-"
_MOST = 1 << 28  # bytes of a marker


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


def share(jobs: Sequence[Job], part: Part) -> list[Job]:
    """The units of a part: a run of all units in the order of the files, which has its share of the bytes.

    Every unit is in exactly one part, whatever their number.
    """
    ordered = sorted(jobs, key=lambda job: job.files)
    total = sum(job.nbytes for job in ordered) or 1
    found: list[Job] = []
    before = 0
    for job in ordered:
        mine: list[int] = []
        for number, size in enumerate(job.sizes):
            if (2 * before + size) * part.count // (2 * total + 1) == part.number - 1:
                mine.append(number)
            before += size
        if mine:
            units, sizes = tuple(job.units[i] for i in mine), tuple(job.sizes[i] for i in mine)
            found.append(replace(job, units=units, sizes=sizes))
    return sorted(found, key=lambda job: -job.nbytes)


def write_marker(plan: Plan, store: Store, part: Part, done: dict[int, Done]) -> None:
    """Say that a part is done: what it wrote, and for which plan."""
    told = {
        "work": identity_of(plan),
        "part": [part.number, part.count],
        "outputs": {str(output): [one.digest, one.checksum] for output, one in done.items()},
    }
    store.put(part.marker, json.dumps(told, separators=(",", ":")).encode())


def is_done(plan: Plan, store: Store, part: Part) -> bool:
    """Whether a part has been done already, of the same plan."""
    return store.has(part.marker) and _read(store, part.marker)["work"] == identity_of(plan)


def read_markers(plan: Plan, store: Store) -> dict[int, Done]:
    """What all parts wrote.

    Raises:
        EngineError: E409 when a part is missing, or is one of another plan or number of parts.
    """
    try:
        names = [name for name in store.names() if name.startswith(MARKER)]
    except FileNotFoundError:
        names = []
    found = {name: _read(store, name) for name in names}
    work = identity_of(plan)
    foreign = [name for name, one in found.items() if one["work"] != work]
    counts = {one["part"][1] for one in found.values()}
    if foreign or len(counts) > 1:
        raise _not_together(
            store,
            "parts of different plans, or of different numbers of parts",
            ", ".join(sorted(foreign or found)[:4]),
            "Use one saved plan and one number of parts; `engine clean` removes what is there.",
        )
    count = counts.pop() if counts else 0
    there = {one["part"][0] for one in found.values()}
    missing = [number for number in range(1, count + 1) if number not in there]
    if missing or not found:
        told = f"{len(there)} of {count} parts; missing: {', '.join(map(str, missing[:8]))}" if found else "no part"
        raise _not_together(store, "parts are missing", told, "Run the missing parts, then commit again.")
    done = {output: Done(*one) for marker in found.values() for output, one in marker["outputs"].items()}
    if done.keys() != set(range(len(plan.outputs))):
        raise _not_together(
            store, "parts do not cover the plan", f"{len(done)} of {len(plan.outputs)} tensors", "Run the parts again."
        )
    return done


def check_parts(plan: Plan, store: Store, told: Mapping[int, Done], found: Mapping[int, Done]) -> None:
    """E409 for the first file that no longer holds what a part wrote to it."""
    for file in plan.shards:
        lost = [plan.outputs[output].name for output in file.outputs if found.get(output) != told[output]]
        if lost:
            raise _not_together(
                store,
                f"`{file.name}` is not what the parts wrote",
                f"other bytes, or none, of {len(lost)} tensors: {', '.join(lost[:3])}",
                "Something else changed it. Remove what is there with `engine clean`, and run the parts again.",
            )


def _read(store: Store, name: str) -> dict[str, Any]:
    with store.open(name) as file:
        raw = file.read(_MOST)
    try:
        told = parse_json(raw, own=True)
        Part(*told["part"])
        outputs = {int(output): tuple(entry) for output, entry in told["outputs"].items()}
        if isinstance(told["work"], str) and all(tuple(map(type, one)) == (str, int) for one in outputs.values()):
            return {**told, "outputs": outputs}
    except (ValueError, LookupError, TypeError, AttributeError, EngineError):
        pass
    raise _not_together(store, "a marker of a part cannot be read", name, "Remove it, and run that part again.")


def _not_together(store: Store, message: str, got: str, fix: str) -> EngineError:
    return EngineError("E409", message, place=Place(store.place()), got=got, fix=fix)
