"""Links: which elements of one stored tensor are which elements of another, by named axes.

A spot is a box of a stored tensor with its storage positions; where a source spot and a target
spot of the same piece meet is a link. It says what a plan's copy says, with the axes still named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from engine.explaining.lattice import Lattice
from engine.formats.headers import ITEM_SIZES, TensorHeader
from engine.planning.boxes import Interval, Region, cut
from engine.planning.groups import Group
from engine.planning.pieces import Key
from engine.planning.sides import Shard, Side

Window = Sequence[Interval]  # an interval of positions per storage dimension


@dataclass(frozen=True, slots=True)
class Spot:
    """A box of a stored tensor, in global indices.

    The position along dimension d is `bases[d] + Σ strides[d][axis] * index[axis]`.
    """

    key: Key
    box: Mapping[str, Interval]
    bases: tuple[int, ...]
    strides: tuple[Mapping[str, int], ...]

    def positions(self, dim: int, box: Mapping[str, Interval], order: Sequence[str] = ()) -> Lattice:
        """Positions along a dimension of the part of the spot in `box`; loops in `order`, else as stored."""
        strides = self.strides[dim]
        start = self.bases[dim] + sum(stride * box[axis][0] for axis, stride in strides.items())
        axes = [axis for axis in order if axis in strides] or list(strides)
        steps = tuple((strides[a], box[a][1] - box[a][0]) for a in axes if box[a][1] - box[a][0] > 1)
        return Lattice(start, steps)

    def volume(self) -> int:
        return prod(high - low for low, high in self.box.values())


def spots(side: Side, group: Group, shard: Shard, window: Window | None = None) -> list[Spot]:
    """The boxes of a shard, or of the part of it in `window`."""
    shape = shard.replicas[0].header.shape
    per_dim: list[list[Region]] = []
    for position, node in enumerate(group.instance.axes.dims):
        low, high = window[position] if window is not None else (0, shape[position])
        shift, end = shard.window[position]
        per_dim.append(cut(node, low + shift, min(high + shift, end), shard.sizes))
    result: list[Spot] = []
    for combination in product(*per_dim):
        box: dict[str, Interval] = {axis: (value, value + 1) for axis, value in group.fixed.items()}
        bases: list[int] = []
        for position, region in enumerate(combination):
            base = region.base - shard.window[position][0]
            for axis, (low, high) in region.box.items():
                start = shard.starts.get(axis, 0)
                box[axis] = (low + start, high + start)
                base -= region.strides[axis] * start
            bases.append(base)
        key = side.keys[group.instance.key, frozenset(box)]
        result.append(Spot(key, box, tuple(bases), tuple(region.strides for region in combination)))
    return result


@dataclass(frozen=True, slots=True)
class Link:
    """Elements that a source tensor and a target tensor share; `box` is in global indices."""

    source: Spot
    target: Spot
    box: Mapping[str, Interval]

    def volume(self) -> int:
        return prod(high - low for low, high in self.box.values())

    def source_elements(self, header: TensorHeader) -> Lattice:
        """Element addresses in the stored tensor's storage, relative to its first element."""
        start, steps = 0, []
        for dim, stride in enumerate(header.strides):
            lattice = self.source.positions(dim, self.box)
            start += stride * lattice.start
            steps += [(stride * step, size) for step, size in lattice.steps]
        return Lattice(start, tuple(steps))


def meet(source: Spot, target: Spot) -> Link | None:
    """The link of two spots, or None when they hold different pieces or their boxes do not meet."""
    if source.key != target.key:
        return None
    box: dict[str, Interval] = {}
    for axis, (low, high) in target.box.items():
        other_low, other_high = source.box[axis]
        low, high = max(low, other_low), min(high, other_high)
        if low >= high:
            return None
        box[axis] = (low, high)
    return Link(source, target, box)


def links(sources: Sequence[Spot], targets: Sequence[Spot]) -> Iterator[Link]:
    """Every link, in the order of the target."""
    by_key: dict[Key, list[Spot]] = {}
    for one in sources:
        by_key.setdefault(one.key, []).append(one)
    for target in targets:
        for one in by_key.get(target.key, ()):
            link = meet(one, target)
            if link is not None:
                yield link


def in_bytes(runs: Sequence[Interval], header: TensorHeader) -> tuple[Interval, ...]:
    """Runs of elements as absolute byte ranges of the file, the end not included."""
    item = ITEM_SIZES[header.dtype]
    return tuple((header.offset + low * item, header.offset + high * item) for low, high in runs)
