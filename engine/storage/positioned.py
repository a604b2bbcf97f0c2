"""What reads bytes by position, as Python's files are."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class Positioned(io.RawIOBase):
    """A file that is read from any position, of a function that does."""

    def __init__(self, size: int, read: Callable[[int, memoryview], int]) -> None:
        """Args: read: fills a buffer from a byte offset on, which is in the file; how many bytes, at least one."""
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(f"negative position {at}")  # as of a file of the system
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(min(len(target), self._size - self._at), 0)]
        count = self._read(self._at, target) if len(target) else 0
        self._at += count
        return count
