"""Reads byte ranges of a plan's files: opened when first read, few open at a time.

Ranges that are requested together are joined across small gaps, and split if they are large.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Protocol, TypeVar

from engine.language.documents import grouped
from engine.storage.store import Fetched, File, Range, Ranges, State, check_state

T = TypeVar("T")

GAP = 64 << 10  # bytes: a gap up to this size is read rather than split into two requests
WINDOW = 16 << 20  # bytes of a tensor that are read ahead at once
LEAST_WINDOW = 4 << 20
AHEAD = 2  # items whose bytes are being fetched while one is processed
_OPEN_FILES = 128  # far below the usual limit of 1024 descriptors, for any number of ranks


class IndexedFile(Protocol):
    """A file as it was when its headers were read."""

    @property
    def file(self) -> File: ...

    @property
    def state(self) -> State | None: ...


class SourceFiles(AbstractContextManager["SourceFiles"]):
    """The files of one plan. Not shared between threads.

    Attributes:
        block: bytes that are worth reading ahead at once; 0 if reading needs no request.
    """

    def __init__(self, files: Sequence[IndexedFile], users: int = 1) -> None:
        """Args: users: how many threads read these files at the same time, each with its own `SourceFiles`."""
        self._files = files
        self._open: OrderedDict[int, Ranges] = OrderedDict()
        self.block = share(max((header.file.store.block for header in files), default=0), users)
        self._holding: set[int] = set()

    def __exit__(self, *_: object) -> None:
        for one in self._open.values():
            one.close()
        self._open.clear()

    def opened(self, file: int) -> Ranges:
        """An open file; E405 when it has changed since it was planned, E305 when it cannot be read."""
        found = self._open.get(file)
        if found is not None:
            self._open.move_to_end(file)
            return found
        if len(self._open) >= _OPEN_FILES and not self.block:  # objects need no descriptor, and hold fetched bytes
            self._open.popitem(last=False)[1].close()
        header = self._files[file]
        found = self._open[file] = header.file.store.ranges(header.file.name, header.state)
        return found

    def ahead(self, items: Iterable[tuple[T, Mapping[int, Sequence[Range]]]]) -> Iterator[T]:
        """Yield items in order, each once its bytes have been fetched, while those of the next are being fetched.

        Args:
            items: each item, with the byte ranges that it reads of each file.
        """
        coming: deque[tuple[T, Mapping[int, Fetched]]] = deque()
        for item, ranges in items:
            self._let_go()
            wanted = ranges if self.block else {}
            coming.append((item, {file: self.opened(file).fetch(join(r)) for file, r in wanted.items()}))
            if len(coming) > AHEAD:
                yield self._hold(*coming.popleft())
        while coming:
            yield self._hold(*coming.popleft())

    def _hold(self, item: T, fetched: Mapping[int, Fetched]) -> T:
        self._let_go()
        for file, one in fetched.items():
            self.opened(file).hold(one)
        self._holding = set(fetched)
        return item

    def _let_go(self) -> None:
        """Drop all fetched bytes before waiting for more."""
        for file in self._holding:
            self.opened(file).hold(())
        self._holding = set()

    def read_into(self, file: int, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill buffers one after the other with the bytes at `offset`; E301 when the file ends too early."""
        self.opened(file).read_into(offset, parts)


def check_unchanged(files: Iterable[IndexedFile]) -> None:
    """E405 unless every file is unchanged since it was planned: then all its bytes are from one state.

    Files whose state was never read are skipped.
    """
    for store, headers in grouped((file.file.store, file) for file in files if file.state is not None).items():
        now = store.states([header.file.name for header in headers])
        for header in headers:
            check_state(header.file.name, now[header.file.name], header.state)


def join(ranges: Iterable[Range], gap: int = GAP) -> list[Range]:
    """Sorted ranges, none within `gap` bytes of the next.

    >>> join([(30, 40), (0, 10), (12, 20), (13, 15)], 2)
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
