"""Blocks: an output tensor as intervals of about half a MiB, each with the copies that fill it.

A block's copies are computed once and then shifted: rows of a tensor repeat with a constant step on
both sides, so one template serves every block of a band.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.formats.headers import ITEM_SIZES, span
from engine.planning.boxes import Copy, clip, row
from engine.planning.model import Output

BLOCK_BYTES = 512 * 1024
MANY_RUNS = 16  # with at least this many runs in a block, larger blocks are faster
LARGE_BLOCK_BYTES = 4 * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Block:
    """Target elements low..high and the copies that fill them.

    The copies are those of the template. Copy `i` reads from its own offset plus `step` times
    `shifts[i]` source elements.
    """

    low: int
    high: int
    template: tuple[Copy, ...]  # target offsets relative to the block
    shifts: tuple[int, ...]
    step: int


def output_blocks(output: Output, copies: Sequence[Copy]) -> Iterator[Block]:
    """The blocks of an output, sized by the larger of the element types read and written.

    For a transform, each block holds whole rows of the last dimension.
    """
    item = max(ITEM_SIZES[output.dtype], ITEM_SIZES[output.read_dtype])
    quantum = output.shape[-1] if output.transform is not None else 1
    return blocks(copies, output.elements, block_bytes(len(copies)) // item, quantum, largest_block(item))


def block_bytes(runs: int) -> int:
    """The size in bytes of a block that this many copies fill."""
    return BLOCK_BYTES if runs < MANY_RUNS else LARGE_BLOCK_BYTES


def largest_block(item: int) -> int:
    """The most elements of a block, unless a transform's row is longer."""
    return LARGE_BLOCK_BYTES // item


def blocks(copies: Sequence[Copy], size: int, limit: int, quantum: int = 1, most: int = 0) -> Iterator[Block]:
    """Cut target elements 0..size into blocks of at most `limit` elements.

    Args:
        copies: disjoint copies that fill the target completely.
        quantum: blocks start and end at multiples of this many elements (whole rows for a
            transform), which may exceed `limit`.
        most: up to this many elements stay in one block, beyond `limit`, if their rows interleave in the source.

    >>> whole = Copy(0, 0, 7, 0, (8, 2), (10, 1), (2, 1))
    >>> [(b.low, b.high, b.step) for b in blocks([whole], 16, 6)]
    [(0, 6, 0), (6, 12, 3), (12, 16, 6)]
    """
    return _band(list(copies), 0, size, max(limit // quantum, 1) * quantum, quantum, most)


def _band(copies: list[Copy], low: int, high: int, limit: int, quantum: int, most: int) -> Iterator[Block]:
    if high - low <= limit:
        yield _one(copies, low, high)
        return
    rows = _common_rows(copies, low, high)
    if high - low <= most and any(_interleaves(copy) for copy in copies):
        yield _one(copies, low, high)
        return
    if rows is not None and rows[1] % quantum == 0:
        count, stride = rows
        together = stride <= most and any(_interleaves(row(copy, 0)) for copy in copies)
        if stride <= limit or together:
            yield from _repeat(copies, low, count, stride, max(limit // stride, 1))
        else:
            for i in range(count):
                inner = [row(c, i) for c in copies]
                yield from _band(inner, low + i * stride, low + (i + 1) * stride, limit, quantum, most)
        return
    if rows is not None and len(copies) == 1 and rows[1] == 1:
        yield from _repeat(copies, low, rows[0], 1, limit)
        return
    bands = _disjoint(copies, low, high, quantum)
    if len(bands) > 1:
        for band_copies, band_low, band_high in bands:
            yield from _band(band_copies, band_low, band_high, limit, quantum, most)
        return
    for start in range(low, high, limit):
        end = min(start + limit, high)
        yield block_of(copies, start, end)


def block_of(copies: Sequence[Copy], low: int, high: int) -> Block:
    """One block with the given bounds."""
    return _one([part for copy in copies for part in clip(copy, low, high)], low, high)


def _one(copies: list[Copy], low: int, high: int) -> Block:
    template = tuple(c._replace(target_offset=c.target_offset - low) for c in copies)
    return Block(low, high, template, (0,) * len(copies), 0)


def _common_rows(copies: list[Copy], low: int, high: int) -> tuple[int, int] | None:
    """(count, stride) when every copy has the same first axis and the rows tile low..high."""
    first = copies[0]
    if not first.shape:
        return None
    count, stride = first.shape[0], first.target_strides[0]
    if count * stride != high - low:
        return None
    for copy in copies:
        if not copy.shape or copy.shape[0] != count or copy.target_strides[0] != stride:
            return None
    return count, stride


def _repeat(copies: list[Copy], low: int, count: int, stride: int, per_block: int) -> Iterator[Block]:
    shifts = tuple(c.source_strides[0] for c in copies)
    full = tuple(_head(c, min(per_block, count), low) for c in copies)
    whole = count - count % per_block
    for start in range(0, whole, per_block):
        at = low + start * stride
        yield Block(at, at + per_block * stride, full, shifts, start)
    if whole < count:
        rest = tuple(_head(c, count - whole, low) for c in copies)
        yield Block(low + whole * stride, low + count * stride, rest, shifts, whole)


def _interleaves(copy: Copy) -> bool:
    """Whether its rows interleave in the source, so that reading one row reads across the others.

    >>> _interleaves(Copy(0, 0, 0, 0, (2, 64, 8), (8, 16, 1), (512, 8, 1)))
    True
    """
    return len(copy.shape) > 1 and copy.source_strides[0] < span(copy.shape[1:], copy.source_strides[1:])


def _head(copy: Copy, rows: int, low: int) -> Copy:
    return copy._replace(target_offset=copy.target_offset - low, shape=(rows, *copy.shape[1:]))


def _disjoint(copies: list[Copy], low: int, high: int, quantum: int) -> list[tuple[list[Copy], int, int]]:
    """Copies whose target spans do not interleave, as bands that start at multiples of `quantum`."""
    bands: list[tuple[list[Copy], int, int]] = []
    end = low
    for copy in sorted(copies, key=lambda c: c.target_offset):
        last = copy.target_offset + span(copy.shape, copy.target_strides)
        if copy.target_offset >= end and (copy.target_offset - low) % quantum == 0:
            bands.append(([copy], copy.target_offset, high))
            if len(bands) > 1:
                bands[-2] = (bands[-2][0], bands[-2][1], copy.target_offset)
        else:
            bands[-1][0].append(copy)
        end = max(end, last)
    return bands
