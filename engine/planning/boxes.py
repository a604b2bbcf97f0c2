"""Boxes: which elements of a rule's index space a stored tensor holds, and at which address.

A stored tensor holds, of each piece, one box (several where weight parallelism cuts rows in the
middle of a group), and inside a box the address is affine: a base plus one stride per axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from engine.language.axes import Axes, Axis, Node, Sum, extent

Interval = tuple[int, int]
Box = Mapping[str, Interval]  # by axis


def volume(box: Box) -> int:
    return prod(high - low for low, high in box.values())


def common(one: Box, other: Box) -> dict[str, Interval] | None:
    """Where two boxes of the same axes meet; None where they do not."""
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


class Part(NamedTuple):
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
    last, tail = divmod(high, inner)  # `last` is the first row not wholly inside
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
        fixed: axes that are not stored but known from the name (`layer`, `expert`).
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
    """Move a region from local to global indices and add the axes that the name fixes."""
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
