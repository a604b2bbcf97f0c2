"""Writes byte ranges of checkpoint files: created at full size, filled with pwritev, few descriptors open."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from engine.storage.store import Sinks

_OPEN_FILES = 128
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def after(parts: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The buffers without their first bytes.

    >>> [part.tolist() for part in after([memoryview(b"ab"), memoryview(b"cd")], 3)]
    [[100]]
    """
    left = []
    for part in parts:
        if nbytes < part.nbytes:
            left.append(part[nbytes:])
        nbytes = max(nbytes - part.nbytes, 0)
    return left


@dataclass(slots=True)
class Checksum:
    """The CRC-32 of bytes that arrive as intervals, in any order."""

    value: int = 0
    end: int = 0
    later: list[tuple[int, int, int]] | None = None

    def add(self, start: int, data: memoryview) -> None:
        if start == self.end:
            self.value = isal_zlib.crc32(data, self.value)
            self.end += len(data)
        else:
            self.later = self.later or []
            self.later.append((start, len(data), isal_zlib.crc32(data)))

    def result(self) -> int:
        """The CRC-32 of all bytes added, which must form one interval from 0."""
        for start, length, value in sorted(self.later or ()):
            if start != self.end:
                raise ValueError(f"bytes {self.end} to {start} were not written")
            self.value = isal_zlib.crc32_combine(self.value, value, length)
            self.end += length
        self.later = None
        return self.value


class SinkFiles(Sinks):
    """Files that are being written, opened when first needed. Not shared between threads."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        self._open: OrderedDict[int, int] = OrderedDict()

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _descriptor(self, file: int) -> int:
        descriptor = self._open.get(file)
        if descriptor is not None:
            self._open.move_to_end(file)
            return descriptor
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        path = self._folder / self._names[file]
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            raise OSError(errno.EMLINK, "the file has a second name, a hard link, whose content would change")
        self._open[file] = descriptor
        return descriptor

    def create(self, file: int, size: int) -> None:
        """Set a file's size and allocate its blocks, where that is cheap.

        Only on a block device: in memory, allocating takes as long as writing; and on a file system
        that cannot do it (mostly network file systems), the C library writes to every block instead.
        """
        folder = (self._folder / self._names[file]).parent
        if not folder.is_dir():  # a subfolder; the output itself must exist already
            folder.mkdir(exist_ok=True)
        descriptor = self._descriptor(file)
        if os.major(os.fstat(descriptor).st_dev):  # 0 for a file system without a device
            try:
                os.posix_fallocate(descriptor, 0, max(size, 1))
            except OSError as error:
                if error.errno in _NO_ROOM:  # else it cannot allocate: whether it can write is seen then
                    raise
        os.ftruncate(descriptor, size)

    def complete(self, file: int) -> None:
        """Start flushing it, so that `sync` need not wait long."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice only
                os.posix_fadvise(self._descriptor(file), 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self, file: int) -> None:
        os.fsync(self._descriptor(file))

    def read(self, file: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(nbytes, 1 << 20)))
        descriptor = self._descriptor(file)
        while nbytes:
            count = os.preadv(descriptor, [buffer[: min(nbytes, len(buffer))]], offset)
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            yield buffer[:count]
            offset += count
            nbytes -= count

    def copy(self, file: int, offset: int, source: int, start: int, nbytes: int) -> int:
        """Some file systems share the bytes instead."""
        copy_range = getattr(os, "copy_file_range", None)  # Linux only
        if copy_range is None:
            return 0
        try:
            moved: int = copy_range(source, self._descriptor(file), nbytes, start, offset)
        except OSError:
            return 0
        return moved

    def write(self, file: int, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        descriptor = self._descriptor(file)
        left: Sequence[bytes | memoryview] = parts
        nbytes = sum(len(part) for part in parts)
        while nbytes:
            written = os.pwritev(descriptor, left, offset)
            nbytes -= written
            offset += written
            if nbytes:
                left = after([memoryview(part) for part in left], written)
