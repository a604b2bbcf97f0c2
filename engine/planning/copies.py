"""Copies: the intersection of two boxes, as one strided copy between two tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

from engine.planning.boxes import Part, common


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


def intersect(source: Part, target: Part) -> Copy | None:
    """The copy between two parts of the same piece, or None when their boxes do not meet."""
    a, b = source.region, target.region
    shared = common(b.box, a.box)
    if shared is None:
        return None
    at, to = (one.base + sum(one.strides[name] * low for name, (low, _) in shared.items()) for one in (a, b))
    axes = ((b.strides[name], a.strides[name], high - low) for name, (low, high) in shared.items())
    return Copy(source.tensor, target.tensor, at, to, *_merged(tuple(axis for axis in axes if axis[2] > 1)))


@lru_cache(maxsize=4096)  # layers are alike
def _merged(axes: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, source and target strides of axes (target stride, source stride, size), adjacent ones made one."""
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
    """The same copy seen from the other side: scatter is gather of the swapped plan."""
    axes = tuple(zip(copy.source_strides, copy.target_strides, copy.shape, strict=True))
    return Copy(copy.target, copy.source, copy.target_offset, copy.source_offset, *_merged(axes))


def clip(copy: Copy, low: int, high: int) -> Iterator[Copy]:
    """The parts of a copy that land in elements low..high of the target.

    At most 2·ndim - 1 copies: along each axis a partial head, the whole middle, a partial tail.

    >>> whole = Copy(0, 0, 0, 0, (3, 4), (10, 1), (4, 1))
    >>> [(c.target_offset, c.shape) for c in clip(whole, 2, 9)]
    [(2, (2,)), (4, (4,)), (8, ())]
    """
    spans = [0] * (len(copy.shape) + 1)  # elements of target reached by the axes from i on, minus one
    for i in range(len(copy.shape) - 1, -1, -1):
        spans[i] = spans[i + 1] + (copy.shape[i] - 1) * copy.target_strides[i]
    if copy.target_offset >= low and copy.target_offset + spans[0] < high:
        yield copy
        return
    if copy.target_offset >= high or copy.target_offset + spans[0] < low:
        return
    step, span, size = copy.target_strides[0], spans[1], copy.shape[0]
    # Rows i whose [start, start + span] lies wholly inside, and rows that merely touch.
    inside_low = max(0, -((copy.target_offset - low) // step))
    inside_high = min(size, (high - 1 - span - copy.target_offset) // step + 1)
    touch_low = max(0, -((copy.target_offset + span - low) // step))
    touch_high = min(size, (high - 1 - copy.target_offset) // step + 1)
    if inside_low >= inside_high:
        inside_low = inside_high = touch_high
    for i in range(touch_low, min(inside_low, touch_high)):
        yield from clip(row(copy, i), low, high)
    if inside_low < inside_high:
        yield _rows(copy, inside_low, inside_high)
    for i in range(max(inside_high, touch_low), touch_high):
        yield from clip(row(copy, i), low, high)


def row(copy: Copy, i: int) -> Copy:
    """The part of a copy at index i of its first axis."""
    return _rows(copy, i, i + 1)


def _rows(copy: Copy, low: int, high: int) -> Copy:
    drop = 1 if high - low == 1 else 0
    return copy._replace(
        source_offset=copy.source_offset + low * copy.source_strides[0],
        target_offset=copy.target_offset + low * copy.target_strides[0],
        shape=copy.shape[1:] if drop else (high - low, *copy.shape[1:]),
        source_strides=copy.source_strides[drop:],
        target_strides=copy.target_strides[drop:],
    )
