"""Boxes: the elements of a rule's index space that a stored tensor holds, their addresses, and copies between them.

A stored tensor holds one box of each piece (several if weight parallelism cuts rows in the middle of
a group). Inside a box the address is affine: a base plus one stride per axis. Where two boxes
intersect, there is one strided copy between their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from engine.formats.headers import dense_strides
from engine.language.axes import Axes, Axis, Node, Sum, extent

Interval = tuple[int, int]
Box = Mapping[str, Interval]  # by axis


def volume(box: Box) -> int:
    return prod(high - low for low, high in box.values())


def common(one: Box, other: Box) -> dict[str, Interval] | None:
    """The intersection of two boxes of the same axes; None if it is empty."""
    found: dict[str, Interval] = {}
    for axis, (low, high) in one.items():
        other_low, other_high = other[axis]
        low, high = max(low, other_low), min(high, other_high)
        if low >= high:
            return None
        found[axis] = low, high
    return found


class Region(NamedTuple):
    """A box with its affine address: `address(index) = base + sum(stride * index)`.

    `box` and `strides` are by axis name, in the rule's global indices.
    """

    box: Box
    base: int
    strides: Mapping[str, int]

    @property
    def piece(self) -> frozenset[str]:
        return frozenset(self.box)


class Holding(NamedTuple):
    """A region that one tensor of a plan holds; `tensor` indexes the plan's tensor table."""

    tensor: int
    region: Region


def cut(node: Node, low: int, high: int, sizes: Mapping[str, int]) -> list[Region]:
    """Decompose positions low..high of one storage dimension into regions.

    Positions 5..11 of `(heads=3 head_dim=4)` are head 1, columns 1..4, and head 2, columns 0..3:

    >>> from engine.language.axes import parse_axes
    >>> node = parse_axes("(heads head_dim)").dims[0]
    >>> for region in cut(node, 5, 11, {"heads": 3, "head_dim": 4}):
    ...     print(dict(region.box))
    {'heads': (1, 2), 'head_dim': (1, 4)}
    {'heads': (2, 3), 'head_dim': (0, 3)}
    """
    if low >= high:
        return []
    if isinstance(node, Axis):
        return [Region({node.name: (low, high)}, 0, {node.name: 1})]
    if isinstance(node, Sum):
        regions: list[Region] = []
        start = 0
        for term in node.terms:
            size = extent(term, sizes)
            for r in cut(term, max(low - start, 0), min(high - start, size), sizes):
                regions.append(Region(r.box, r.base + start, r.strides))
            start += size
        return regions
    return _cut_product(node.terms, low, high, sizes)


def _cut_product(terms: Sequence[Node], low: int, high: int, sizes: Mapping[str, int]) -> list[Region]:
    if len(terms) == 1:
        return cut(terms[0], low, high, sizes)
    outer, rest = terms[0], terms[1:]
    inner = prod(extent(term, sizes) for term in rest)
    first, head = divmod(low, inner)
    last, tail = divmod(high, inner)  # `last` is the first row that is not wholly inside
    bands: list[tuple[int, int, int, int]] = []  # outer low, high, inner low, high
    if first == last:
        bands.append((first, first + 1, head, tail))
    else:
        if head:
            bands.append((first, first + 1, head, inner))
            first += 1
        if first < last:
            bands.append((first, last, 0, inner))
        if tail:
            bands.append((last, last + 1, 0, tail))
    regions: list[Region] = []
    for outer_low, outer_high, inner_low, inner_high in bands:
        for a in cut(outer, outer_low, outer_high, sizes):
            for b in _cut_product(rest, inner_low, inner_high, sizes):
                strides = {name: stride * inner for name, stride in a.strides.items()}
                regions.append(Region({**a.box, **b.box}, a.base * inner + b.base, {**strides, **b.strides}))
    return regions


def regions(
    axes: Axes,
    sizes: Mapping[str, int],
    strides: Sequence[int],
    *,
    window: Sequence[Interval] | None = None,
    starts: Mapping[str, int] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> list[Region]:
    """The regions of one stored tensor.

    Args:
        axes: its storage dimensions.
        sizes: extent of each axis as stored (local extents where an axis is cut).
        strides: elements per step of each storage dimension.
        window: the interval of each dimension of the whole tensor that is stored (default: all).
        starts: global index of the first stored element, for axes that are cut.
        fixed: values of axes that are not stored but known from the name (`layer`, `expert`).
    """
    result = [Region({}, 0, {})]
    for position, (node, step) in enumerate(zip(axes.dims, strides, strict=True)):
        low, high = window[position] if window is not None else (0, extent(node, sizes))
        here = cut(node, low, high, sizes)
        result = [
            Region(
                {**left.box, **right.box},
                left.base + (right.base - low) * step,
                {**left.strides, **{name: stride * step for name, stride in right.strides.items()}},
            )
            for left in result
            for right in here
        ]
    return [_place(region, starts or {}, fixed or {}) for region in result]


def _place(region: Region, starts: Mapping[str, int], fixed: Mapping[str, int]) -> Region:
    """Move a region from local to global indices, and add the axes that the name fixes."""
    box = dict(region.box)
    strides = dict(region.strides)
    base = region.base
    for name, start in starts.items():
        if name in box and start:
            low, high = box[name]
            box[name] = (low + start, high + start)
            base -= strides[name] * start
    for name, value in fixed.items():
        box[name] = (value, value + 1)
        strides[name] = 0
    return Region(box, base, strides)


class Copy(NamedTuple):
    """One strided copy, in elements.

    Axes are sorted by target stride, largest first, and merged where they are contiguous on both
    sides. Offsets are relative to the first element of each tensor.
    """

    source: int
    target: int
    source_offset: int
    target_offset: int
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    def volume(self) -> int:
        return prod(self.shape)


def in_order(source: int, shape: Sequence[int], strides: Sequence[int]) -> Copy:
    """The copy of a whole strided tensor that puts its elements in row-major order."""
    axes = [axis for axis in zip(shape, strides, dense_strides(shape), strict=True) if axis[0] > 1]
    sizes, sources, targets = (tuple(axis[part] for axis in axes) for part in range(3))
    return Copy(source, 0, 0, 0, sizes, sources, targets)


def intersect(source: Holding, target: Holding) -> Copy | None:
    """The copy between two parts of the same piece; None when their boxes do not intersect."""
    a, b = source.region, target.region
    shared = common(b.box, a.box)
    if shared is None:
        return None
    at, to = (one.base + sum(one.strides[name] * low for name, (low, _) in shared.items()) for one in (a, b))
    axes = ((b.strides[name], a.strides[name], high - low) for name, (low, high) in shared.items())
    return Copy(source.tensor, target.tensor, at, to, *_merged(tuple(axis for axis in axes if axis[2] > 1)))


@lru_cache(maxsize=4096)  # layers are alike
def _merged(axes: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, source and target strides of axes (target stride, source stride, size), with contiguous axes merged."""
    merged: list[list[int]] = []
    for target_stride, source_stride, size in sorted(axes, reverse=True):
        if merged:
            outer = merged[-1]
            if outer[0] == target_stride * size and outer[1] == source_stride * size:
                outer[0], outer[1] = target_stride, source_stride
                outer[2] *= size
                continue
        merged.append([target_stride, source_stride, size])
    return tuple(m[2] for m in merged), tuple(m[1] for m in merged), tuple(m[0] for m in merged)


def swap(copy: Copy) -> Copy:
    """The copy with source and target exchanged: scatter is gather of the swapped plan."""
    axes = tuple(zip(copy.source_strides, copy.target_strides, copy.shape, strict=True))
    return Copy(copy.target, copy.source, copy.target_offset, copy.source_offset, *_merged(axes))


def clip(copy: Copy, low: int, high: int) -> Iterator[Copy]:
    """The parts of a copy that write elements low..high of the target.

    At most 2·ndim - 1 copies: along each axis a partial head, the whole middle, a partial tail.

    >>> whole = Copy(0, 0, 0, 0, (3, 4), (10, 1), (4, 1))
    >>> [(c.target_offset, c.shape) for c in clip(whole, 2, 9)]
    [(2, (2,)), (4, (4,)), (8, ())]
    """
    spans = [0] * (len(copy.shape) + 1)  # target elements spanned by the axes from i on, minus one
    for i in range(len(copy.shape) - 1, -1, -1):
        spans[i] = spans[i + 1] + (copy.shape[i] - 1) * copy.target_strides[i]
    if copy.target_offset >= low and copy.target_offset + spans[0] < high:
        yield copy
        return
    if copy.target_offset >= high or copy.target_offset + spans[0] < low:
        return
    step, span, size = copy.target_strides[0], spans[1], copy.shape[0]
    # Rows i whose [start, start + span] is wholly inside, and rows that only overlap.
    inside_low = max(0, -((copy.target_offset - low) // step))
    inside_high = min(size, (high - 1 - span - copy.target_offset) // step + 1)
    touch_low = max(0, -((copy.target_offset + span - low) // step))
    touch_high = min(size, (high - 1 - copy.target_offset) // step + 1)
    if inside_low >= inside_high:
        inside_low = inside_high = touch_high
    for i in range(touch_low, min(inside_low, touch_high)):
        yield from clip(row(copy, i), low, high)
    if inside_low < inside_high:
        yield part_of(copy, inside_low, inside_high)
    for i in range(max(inside_high, touch_low), touch_high):
        yield from clip(row(copy, i), low, high)


def row(copy: Copy, i: int) -> Copy:
    """The part of a copy at index i of its first axis."""
    return part_of(copy, i, i + 1)


def part_of(copy: Copy, low: int, high: int, axis: int = 0) -> Copy:
    """The part of a copy at indices low..high of an axis; an axis of a single index is left out."""
    end = axis + (high - low == 1)
    size = () if end > axis else (high - low,)
    return copy._replace(
        source_offset=copy.source_offset + low * copy.source_strides[axis],
        target_offset=copy.target_offset + low * copy.target_strides[axis],
        shape=(*copy.shape[:axis], *size, *copy.shape[axis + 1 :]),
        source_strides=copy.source_strides[:axis] + copy.source_strides[end:],
        target_strides=copy.target_strides[:axis] + copy.target_strides[end:],
    )
