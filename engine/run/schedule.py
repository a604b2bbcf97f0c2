"""Scheduling: which side drives each tensor, which files are filled together, and which worker moves what.

The target drives (gather) unless its blocks would touch more runs than the source's (scatter): so whole
tensors that are cut by columns into many ranks are scattered. Tensors with common sources are decided together.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath

from engine.formats.headers import ITEM_SIZES, dense_strides
from engine.formats.written import FORMATS, FileLayout
from engine.language.documents import grouped, portions
from engine.move.runs import READ_THROUGH, runs
from engine.planning.boxes import Copy, swap
from engine.planning.model import OutputFile, Work

_RUN_COST = 8 * 1024  # bytes that can be moved in the time that starting a run takes
_BLOCKS_TOGETHER = 8  # times the bytes read ahead: what one worker gathers without a pause
_CLEARLY = 0.8  # scatter only if it costs less than this fraction of gathering


@dataclass(frozen=True, slots=True)
class Unit:
    """Outputs that are moved together: gathered, or scattered from their common sources."""

    outputs: tuple[int, ...]
    scattered: bool = False
    span: tuple[int, int] | None = None  # byte range of its only output, if other units move the rest


@dataclass(frozen=True, slots=True)
class Job:
    """Files that are filled together, and the units that fill them."""

    files: tuple[int, ...]
    units: tuple[Unit, ...]
    sizes: tuple[int, ...]  # bytes of each unit

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)


class Sets:
    """Disjoint sets of numbers (union-find)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, one: int) -> int:
        while self._parent[one] != one:
            self._parent[one] = self._parent[self._parent[one]]
            one = self._parent[one]
        return one

    def join(self, numbers: Iterable[int]) -> None:
        roots = {self.find(number) for number in numbers}
        first = min(roots, default=0)
        for root in roots:
            self._parent[root] = first

    def members(self) -> dict[int, list[int]]:
        """The numbers of each set, by the one that `find` gives."""
        return grouped((self.find(one), one) for one in range(len(self._parent)))


def schedule(plan: Work, *, positioned: bool = True, scattered: Sequence[Sequence[int]] | None = None) -> list[Job]:
    """The jobs of a plan, largest first. Every output is in exactly one.

    Files into which the same sources are scattered form one job.

    Args:
        positioned: whether a file can be written at any position; if not, each file is one unit.
        scattered: the result of `scattered_outputs`, if it is known already.
    """
    block = max((file.file.store.block for file in plan.files), default=0)
    if block or not positioned:  # remote storage is fetched in the order of the output
        units = _together(plan, block * _BLOCKS_TOGETHER if positioned else None)
    else:
        units = [
            Unit(tuple(one), scattered=True) for one in (scattered_outputs(plan) if scattered is None else scattered)
        ]
        apart = {output for unit in units for output in unit.outputs}
        units += [Unit((i,)) for i in range(len(plan.outputs)) if i not in apart]
    file_of = {output: i for i, file in enumerate(plan.shards) for output in file.outputs}
    files = Sets(len(plan.shards))
    for unit in units:
        if unit.scattered:
            files.join(file_of[output] for output in unit.outputs)
    members = files.members()
    filled: dict[int, list[Unit]] = {root: [] for root in members}
    order = {output: n for n, output in enumerate(o for file in plan.shards for o in file.outputs)}
    for unit in sorted(units, key=lambda unit: order[unit.outputs[0]]):
        filled[files.find(file_of[unit.outputs[0]])].append(unit)
    jobs: list[Job] = []
    for root, held in filled.items():
        sizes = tuple(sum(plan.outputs[output].nbytes for output in unit.outputs) for unit in held)
        jobs.append(Job(tuple(members[root]), tuple(held), sizes))
    return sorted(jobs, key=lambda job: -job.nbytes)


def _together(plan: Work, nbytes: int | None) -> list[Unit]:
    """Groups of outputs that one worker gathers, in file order, each up to a number of bytes."""
    sized = ([(output, plan.outputs[output].nbytes) for output in file.outputs] for file in plan.shards)
    return [Unit(tuple(held)) for outputs in sized for held in portions(outputs, nbytes)]


def layout_of(plan: Work, file: OutputFile) -> FileLayout:
    """Where each byte range of a weights file goes."""
    tensors = [(plan.outputs[i].name, plan.outputs[i].dtype, plan.outputs[i].shape) for i in file.outputs]
    return FORMATS[file.format](tensors, PurePosixPath(file.name).stem, file.around)


def scattered_outputs(plan: Work) -> list[list[int]]:
    """Sets of outputs that are cheaper to scatter from their common sources than to gather."""
    copies = [plan.copies(i) for i in range(len(plan.outputs))]
    wide = {i for i, held in enumerate(copies) if any(_skips(c, plan) for c in held)}
    if not wide:
        return []
    by_source = grouped((source, i) for i, held in enumerate(copies) for source in {c.source for c in held})
    sets = Sets(len(plan.outputs))
    for outputs in by_source.values():
        sets.join(outputs)
    return [
        outputs
        for outputs in sets.members().values()
        if wide.intersection(outputs) and _scatters(plan, outputs, [c for i in outputs for c in copies[i]])
    ]


def _skips(copy: Copy, plan: Work) -> bool:
    item = ITEM_SIZES[plan.sources[copy.source].header.dtype]
    return runs(copy, READ_THROUGH // item) != (1, copy.volume())


def _scatters(plan: Work, outputs: Sequence[int], copies: Sequence[Copy]) -> bool:
    """Whether these outputs can be scattered from their sources, and whether that is cheaper."""
    if not all(plan.outputs[i].unchanged for i in outputs):
        return False
    moved: dict[int, int] = {}
    gathering = scattering = 0
    for copy in copies:
        moved[copy.source] = moved.get(copy.source, 0) + copy.volume()
        item = ITEM_SIZES[plan.sources[copy.source].header.dtype]
        count, elements = runs(copy, READ_THROUGH // item)
        gathering += count * _RUN_COST + elements * item
        count, elements = runs(swap(copy), 0)
        scattering += count * _RUN_COST + elements * item
    for source, volume in moved.items():
        header = plan.sources[source].header
        # Elements that go to several outputs, or to none, have no single place in a source's block.
        if volume != prod(header.shape) or header.strides != dense_strides(header.shape):
            return False
    return scattering < _CLEARLY * gathering


def copies_from(plan: Work, unit: Unit) -> dict[int, list[Copy]]:
    """For each source of a scattered unit, its copies with source and target exchanged."""
    found = grouped((copy.source, swap(copy)) for output in unit.outputs for copy in plan.copies(output))
    for held in found.values():
        held.sort(key=lambda c: (c.target_offset, c.source, c.source_offset))
    return dict(sorted(found.items()))


class Shares:
    """Hands out units to workers. Each worker fills its own job in order, while jobs are left.

    After that, it takes the largest unit of the job with the most bytes left. Then several workers write
    to one file and wait for each other a little, but none is idle and all end together.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._left = [OrderedDict(enumerate(job.units)) for job in jobs]
        self._bytes = [job.nbytes for job in jobs]
        self._unfinished = [len(job.units) for job in jobs]
        self._new = deque(range(len(jobs)))
        self._lock = threading.Lock()

    def take(self, own: int | None) -> tuple[int, Unit] | None:
        """A job and one of its units, if it can be of the worker's `own` job; None when no unit is left."""
        with self._lock:
            if own is not None and self._left[own]:
                return self._give(own, next(iter(self._left[own])))
            while self._new:
                job = self._new.popleft()
                if self._left[job]:
                    return self._give(job, next(iter(self._left[job])))
            job = max(range(len(self._jobs)), key=self._bytes.__getitem__, default=0)
            if not any(self._left):
                return None
            if not self._left[job]:  # only units without bytes are left
                job = next(i for i, left in enumerate(self._left) if left)
            return self._give(job, max(self._left[job], key=self._jobs[job].sizes.__getitem__))

    def _give(self, job: int, unit: int) -> tuple[int, Unit]:
        self._bytes[job] -= self._jobs[job].sizes[unit]
        return job, self._left[job].pop(unit)

    def files(self, job: int) -> tuple[int, ...]:
        """The files that a job fills."""
        return self._jobs[job].files

    def finish(self, job: int) -> bool:
        """Count a unit of a job as done; True for the last one."""
        with self._lock:
            self._unfinished[job] -= 1
            return self._unfinished[job] == 0
