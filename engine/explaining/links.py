"""Links: which elements of one stored tensor are which elements of another, by named axes.

A spot is a box of a stored tensor with its storage positions, which are lattices. The intersection of a source spot
and a target spot of the same piece is a link. It is a plan's copy, with the axes still named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import prod

from engine.formats.headers import ITEM_SIZES, TensorHeader
from engine.language.axes import Axes
from engine.language.documents import even_runs, grouped
from engine.planning.boxes import Box, Interval, Region, common, regions
from engine.planning.groups import Group
from engine.planning.pieces import Key
from engine.planning.sides import Shard, Side
from engine.storage.sources import join

MOST_RUNS = 200_000  # more runs than this are counted, not listed


@dataclass(frozen=True, slots=True)
class Lattice:
    """Positions of nested loops, outermost first; `steps` are (stride, size), sizes above 1."""

    start: int
    steps: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return prod(size for _, size in self.steps)

    def __iter__(self) -> Iterator[int]:
        """Positions in the order of the loops.

        >>> list(Lattice(4, ((1, 2), (10, 2))))
        [4, 14, 5, 15]
        """
        for indices in product(*(range(size) for _, size in self.steps)):
            yield self.start + sum(stride * i for (stride, _), i in zip(self.steps, indices, strict=True))

    def ascending(self) -> Lattice:
        """The same positions in ascending order, contiguous loops merged.

        >>> Lattice(4, ((1, 8), (8, 3))).ascending()
        Lattice(start=4, steps=((1, 24),))
        """
        merged: list[tuple[int, int]] = []
        for stride, size in sorted(self.steps, reverse=True):
            if merged and merged[-1][0] == stride * size:
                merged[-1] = (stride, size * merged[-1][1])
            else:
                merged.append((stride, size))
        return Lattice(self.start, tuple(merged))

    def runs(self) -> list[tuple[int, int]]:
        """The positions as sorted intervals without gaps; the lattice must be ascending, with disjoint loops."""
        return join(self.first_runs(None), 0)

    def first_runs(self, keep: int | None) -> list[tuple[int, int]]:
        flat = self.ascending()
        inner = flat.steps[-1][1] if flat.steps and flat.steps[-1][0] == 1 else 1
        outer = Lattice(flat.start, flat.steps[:-1] if inner > 1 else flat.steps)
        return [(low, low + inner) for low in islice(outer, keep)]

    def run_count(self) -> int:
        flat = self.ascending()
        return len(flat) // (flat.steps[-1][1] if flat.steps and flat.steps[-1][0] == 1 else 1)


def joined(lattices: Sequence[Lattice], strides: Sequence[int]) -> Lattice:
    """The positions along several dimensions as positions of one, by the strides of the dimensions in it."""
    both = list(zip(lattices, strides, strict=True))
    steps = ((stride * step, size) for one, stride in both for step, size in one.steps)
    return Lattice(sum(stride * one.start for one, stride in both), tuple(steps))


def join_lattices(lattices: Sequence[Lattice], keep: int) -> tuple[list[tuple[int, int]], int]:
    """The first runs of all lattices together, and the number of runs."""
    total = sum(one.run_count() for one in lattices)
    if total > MOST_RUNS:
        return min(lattices, key=lambda one: one.start).first_runs(keep), total
    runs = join((run for one in lattices for run in one.runs()), 0)
    return runs[:keep], len(runs)


def index_text(lattice: Lattice) -> str:
    """Ascending positions as a slice: `3`, `0:4`, `0:64:2`, or the first few of several.

    >>> index_text(Lattice(3)), index_text(Lattice(0, ((1, 4),))), index_text(Lattice(1, ((2, 32),)))
    ('3', '0:4', '1:64:2')
    >>> index_text(Lattice(0, ((96, 3), (1, 32)))), index_text(Lattice(0, ((96, 8), (1, 32))))
    ('0:32, 96:128, 192:224', '0:32, 96:128, … 672:704 (8 runs)')
    """
    flat = lattice.ascending()
    if not flat.steps:
        return str(flat.start)
    if len(flat.steps) == 1:
        stride, size = flat.steps[0]
        end = flat.start + stride * (size - 1) + 1
        return f"{flat.start}:{end}" if stride == 1 else f"{flat.start}:{end}:{stride}"
    if flat.run_count() > MOST_RUNS:
        return f"from {flat.start}, {len(flat):,} positions"
    runs = [f"{low}:{high}" if high - low > 1 else str(low) for low, high in flat.runs()]
    if len(runs) <= 3:
        return ", ".join(runs)
    return f"{runs[0]}, {runs[1]}, … {runs[-1]} ({len(runs)} runs)"


def words(positions: Sequence[int]) -> str:
    """Positions in their order, with progressions folded.

    >>> words(range(8)), words([5]), words([0, 2, 4, 6, 8]), words([0, 2, 4, 6, 1, 3, 5, 7])
    ('0…7', '5', '0, 2, 4, … 8', '0, 2, 4, 6, then 1, 3, 5, 7')
    """
    stretches = even_runs(len(positions), lambda at: positions[at + 1] - positions[at])
    told = [_progression(positions[start:end]) for start, end in stretches]
    return ", then ".join(told if len(told) <= 4 else [*told[:3], f"… (altogether {len(told)} stretches)"])


def _progression(some: Sequence[int]) -> str:
    if len(some) > 1 and some[1] - some[0] == 1:
        return f"{some[0]}…{some[-1]}"
    return ", ".join(map(str, some)) if len(some) <= 4 else f"{some[0]}, {some[1]}, {some[2]}, … {some[-1]}"


Window = Sequence[Interval]  # an interval of positions per storage dimension


@dataclass(frozen=True, slots=True)
class Spot:
    """A box of a stored tensor, in global indices."""

    key: Key
    box: Box
    dims: tuple[Region, ...]  # one for each storage dimension

    def positions(self, dim: int, box: Box, order: Sequence[str] = ()) -> Lattice:
        """Positions along a dimension, of the part of the spot in `box`; loops in `order`, default: as stored."""
        strides = self.dims[dim].strides
        start = self.dims[dim].base + sum(stride * box[axis][0] for axis, stride in strides.items())
        axes = [axis for axis in order if axis in strides] or list(strides)
        steps = tuple((strides[a], box[a][1] - box[a][0]) for a in axes if box[a][1] - box[a][0] > 1)
        return Lattice(start, steps)


def spots(side: Side, group: Group, shard: Shard, window: Window | None = None) -> list[Spot]:
    """The boxes of a shard, or of the part of it in `window`."""
    per_dim: list[list[Region]] = []
    asked = window or [(0, size) for size in shard.replicas[0].header.shape]
    for node, (first, end), (low, high) in zip(group.instance.axes.dims, shard.window, asked, strict=True):
        part = (low + first, min(high + first, end))
        found = regions(Axes((node,)), shard.sizes, (1,), window=(part,), starts=shard.starts)
        per_dim.append([one._replace(base=one.base + low) for one in found])
    result: list[Spot] = []
    for dims in product(*per_dim):
        box: dict[str, Interval] = {axis: (value, value + 1) for axis, value in group.fixed.items()}
        for one in dims:
            box |= one.box
        result.append(Spot(side.keys[group.instance.key, frozenset(box)], box, dims))
    return result


@dataclass(frozen=True, slots=True)
class Link:
    """Elements that a source tensor and a target tensor share; `box` is in global indices."""

    source: Spot
    target: Spot
    box: Box

    def source_elements(self, header: TensorHeader) -> Lattice:
        """Element addresses in the stored tensor's storage, relative to its first element."""
        return joined([self.source.positions(dim, self.box) for dim in range(len(header.strides))], header.strides)


def links(sources: Sequence[Spot], targets: Sequence[Spot]) -> Iterator[Link]:
    """Every link, in the order of the target."""
    by_key = grouped((one.key, one) for one in sources)
    for target in targets:
        for one in by_key.get(target.key, ()):
            box = common(target.box, one.box)
            if box is not None:
                yield Link(one, target, box)


def in_bytes(runs: Sequence[Interval], header: TensorHeader) -> tuple[Interval, ...]:
    """Runs of elements as absolute byte ranges of the file, the end not included."""
    item = ITEM_SIZES[header.dtype]
    return tuple((header.offset + low * item, header.offset + high * item) for low, high in runs)
