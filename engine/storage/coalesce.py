"""Byte ranges that are requested together: joined across small gaps, split if they are large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Range = tuple[int, int]  # begin and end

GAP = 64 << 10  # bytes: a gap up to this size is read rather than split into two requests
WINDOW = 16 << 20  # bytes of a tensor that are read ahead at once
LEAST_WINDOW = 4 << 20


def join(ranges: Iterable[Range], gap: int = GAP) -> list[Range]:
    """Sorted ranges, none within `gap` bytes of the next.

    >>> join([(30, 40), (0, 10), (12, 20)], 2)
    [(0, 20), (30, 40)]
    """
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def share(window: int, users: int) -> int:
    """Bytes that each of several users reads ahead at once: they share a window if it is smaller than usual.

    >>> share(16 << 20, 4) >> 20, share(8 << 20, 2) >> 20, share(8 << 20, 4) >> 20, share(1 << 20, 2) >> 20
    (16, 4, 4, 1)
    """
    return window if window >= WINDOW else max(window // users, min(window, LEAST_WINDOW))


def split(ranges: Sequence[Range], most: int) -> Iterator[Range]:
    """The same bytes in ranges of at most `most` bytes, of about equal size.

    >>> list(split([(0, 10)], 4))
    [(0, 3), (3, 6), (6, 10)]
    """
    for start, end in ranges:
        count = max(-(-(end - start) // most), 1)
        edges = [start + (end - start) * i // count for i in range(count + 1)]
        yield from pairwise(edges)
