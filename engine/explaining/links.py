"""Links: which elements of one stored tensor are which elements of another, by named axes.

A spot is a box of a stored tensor with its storage positions; where a source spot and a target
spot of the same piece meet is a link. It says what a plan's copy says, with the axes still named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from engine.explaining.lattice import Lattice
from engine.formats.headers import ITEM_SIZES, TensorHeader
from engine.language.axes import Axes
from engine.language.documents import grouped
from engine.planning.boxes import Box, Interval, Region, common, regions
from engine.planning.groups import Group
from engine.planning.pieces import Key
from engine.planning.sides import Shard, Side

Window = Sequence[Interval]  # an interval of positions per storage dimension


@dataclass(frozen=True, slots=True)
class Spot:
    """A box of a stored tensor, in global indices."""

    key: Key
    box: Box
    dims: tuple[Region, ...]  # along each storage dimension by itself

    def positions(self, dim: int, box: Box, order: Sequence[str] = ()) -> Lattice:
        """Positions along a dimension of the part of the spot in `box`; loops in `order`, else as stored."""
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
        per_dim.append([replace(one, base=one.base + low) for one in found])
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
        start, steps = 0, []
        for dim, stride in enumerate(header.strides):
            lattice = self.source.positions(dim, self.box)
            start += stride * lattice.start
            steps += [(stride * step, size) for step, size in lattice.steps]
        return Lattice(start, tuple(steps))


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
