"""Runs: a copy as byte ranges that are contiguous outside its block. No buffers, no I/O."""

from __future__ import annotations

from engine.formats.headers import span
from engine.planning.boxes import Copy, part_of

READ_THROUGH = 8 * 1024  # bytes: gaps smaller than this are read, not skipped
MOST_SPAN = 4 << 20  # bytes of a run with gaps: the most that the scratch buffer may take
LEAST_ROW = 2 * 1024  # bytes: many shorter rows move faster through a scratch buffer
FEW_ROWS = 64  # up to this many rows of any length move directly
MOST_ROWS = 1024  # rows and gaps that one system call takes (IOV_MAX)


def straight(copy: Copy) -> bool:
    """Whether a copy is one contiguous run on both sides."""
    return not copy.shape or (len(copy.shape) == 1 and copy.source_strides[0] == 1 and copy.target_strides[0] == 1)


def dense_parts(copy: Copy, gap: int, most: int) -> list[Copy]:
    """Split a copy along its largest source stride until no run skips or spans too many elements.

    Args:
        gap: the most elements that a run may skip at once.
        most: the most elements from the first to the last of a run that skips any.

    >>> rows = Copy(0, 0, 0, 0, (4, 8), (64, 1), (8, 1))
    >>> [part.shape for part in dense_parts(rows, 56, 1000)], [part.shape for part in dense_parts(rows, 56, 100)]
    ([(4, 8)], [(2, 8), (2, 8)])
    """
    if not copy.shape or straight(copy):
        return [copy]
    axis = max(range(len(copy.shape)), key=lambda i: copy.source_strides[i])
    rest = [i for i in range(len(copy.shape)) if i != axis]
    stride, size = copy.source_strides[axis], copy.shape[axis]
    inner = span([copy.shape[j] for j in rest], [copy.source_strides[j] for j in rest])
    whole = (size - 1) * stride + inner
    if stride - inner <= gap and whole <= most:
        return [copy]
    rows = max(1, (most - inner) // stride + 1) if stride - inner <= gap else 1
    parts: list[Copy] = []
    for start in range(0, size, rows):
        count = min(rows, size - start)
        part = part_of(copy, start, start + count, axis)
        parts.extend(dense_parts(part, gap, most) if count == 1 else [part])
    return parts


def runs(copy: Copy, gap: int) -> tuple[int, int]:
    """The number of runs that `dense_parts` gives on the source side, and of elements moved in all of them.

    >>> runs(Copy(0, 0, 0, 0, (4, 8), (64, 1), (8, 1)), 0), runs(Copy(0, 0, 0, 0, (4, 8), (64, 1), (8, 1)), 56)
    ((4, 32), (1, 200))
    """
    count, reach = 1, 1
    for stride, size in sorted(zip(copy.source_strides, copy.shape, strict=True)):
        if stride - reach <= gap and count == 1:
            reach += stride * (size - 1)
        else:
            count *= size
    return count, count * reach


def long_rows(copy: Copy, least: int) -> list[tuple[int, int, int]]:
    """All rows of a copy, as `rows` gives them; none if there are many, or if one has fewer than `least` elements.

    >>> long_rows(Copy(0, 0, 5, 7, (4,), (1,), (1,)), 9), long_rows(Copy(0, 0, 0, 0, (2, 4), (9, 1), (4, 1)), 4)
    ([(0, 0, 4)], [(0, 0, 4), (9, 4, 4)])
    """
    if straight(copy):
        return [(0, 0, copy.volume())]
    return (rows(copy, 0) or []) if copy.shape[-1] >= least else []


def rows(copy: Copy, item: int) -> list[tuple[int, int, int]] | None:
    """A run as rows that are contiguous inside the block too, in their outside order; None if there are too many.

    Args:
        copy: one of `dense_parts`.
        item: bytes of an element.

    Returns:
        For each row, in elements: its offset in the run, its offset from the copy's start in the block, its length.

    >>> rows(Copy(0, 0, 0, 0, (2, 2, 2048), (2048, 4096, 1), (8192, 2048, 1)), 2)
    [(0, 0, 2048), (2048, 8192, 2048), (4096, 2048, 2048), (6144, 10240, 2048)]
    >>> some, more = (Copy(0, 0, 0, 0, (count, 2048), (4096, 1), (2048, 1)) for count in (512, 513))
    >>> len(rows(some, 2)), rows(more, 2)  # with as many gaps, all that one call takes
    (512, None)
    """
    axes = sorted(zip(copy.source_strides, copy.target_strides, copy.shape, strict=True), reverse=True)
    outer, inner, length = axes.pop()
    count = copy.volume() // length
    most = MOST_ROWS // 2 if length * item >= LEAST_ROW else FEW_ROWS
    if outer != 1 or inner != 1 or count > most:
        return None
    found, reach = [(0, 0)], length
    for stride, _, size in reversed(axes):
        if stride < reach and size > 1:  # strides that overlap
            return None
        reach += stride * (size - 1)
    for stride, step, size in axes:
        found = [(at + i * stride, to + i * step) for at, to in found for i in range(size)]
    return [(at, to, length) for at, to in found]
