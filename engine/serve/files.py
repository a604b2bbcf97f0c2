"""A virtual file: bytes at any position, some fixed, some computed when they are read."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

_BUFFER = 1 << 20  # bytes
Fill = Callable[[int, memoryview], None]  # takes a byte offset in the stretch and a buffer to fill


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes `start` to `end` of a file, and what fills a buffer with some of them."""

    start: int
    end: int
    fill: Fill


@dataclass(frozen=True, slots=True)
class VirtualFile:
    """One file that a run would write.

    Attributes:
        size: in bytes.
        etag: hexadecimal digits that change when the bytes may have: a SHA-256 of small files' bytes, else 40 digits.
        stretches: in order, without overlaps; what lies between them is zeros.
    """

    name: str
    size: int
    etag: str
    stretches: tuple[Stretch, ...]

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill a buffer with the file's bytes from byte `start` on.

        Raises:
            EngineError: E402 when replicas differ, E405 when a source changed, E3xx when one cannot be read.
            ValueError: for bytes beyond the file's.
        """
        stop = start + len(target)
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"bytes {start} to {stop} of the {self.size} of {self.name}")
        at = start
        index = bisect_right(self.stretches, start, key=lambda one: one.end)
        while at < stop:
            one = self.stretches[index] if index < len(self.stretches) else None
            end = stop if one is None else min(stop, one.end)
            if one is None or at < one.start:
                end = stop if one is None else min(stop, one.start)
                target[at - start : end - start] = bytes(end - at)
            else:
                one.fill(at - one.start, target[at - start : end - start])
                index += 1
            at = end

    def open(self) -> BufferedReader:
        """The file as Python's files are, for reading from any position."""
        return BufferedReader(VirtualIO(self), _BUFFER)

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Some bytes of the file; fewer at its end."""
        start = min(start, self.size)
        buffer = bytearray(self.size - start if size is None else max(min(size, self.size - start), 0))
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)


class VirtualIO(io.RawIOBase):
    """A virtual file as Python's files are."""

    def __init__(self, file: VirtualFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if at < 0:
            raise ValueError(f"negative position {at}")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(min(len(target), self._file.size - self._at), 0)]
        self._file.read_into(min(self._at, self._file.size), target)
        self._at += len(target)
        return len(target)
