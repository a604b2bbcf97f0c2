"""Local folders as stores, and their files: only regular ones.

A pipe or a device could block or never end.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.storage.sinks import SinkFiles, after
from engine.storage.store import (
    File,
    OpenFile,
    Ranges,
    State,
    Store,
    check_state,
    ends_early,
    no_pointer,
    unreadable,
    writing,
)


@dataclass(frozen=True, slots=True)
class FileState:
    """The state of a file as the system reports it: any write to the file, or another file in its place, changes it.

    Another file in its place has another `changed`. Its inode is not compared: many file systems in user space, as
    sshfs, exfat and those of buckets, number the same file anew after a while, or differently on each machine.

    Attributes:
        device, inode: which file it is, whatever its name, at the time when the system was asked.
        size: in bytes.
        modified, changed: nanoseconds since the epoch. `modified` can be set at will (`touch -d`, `cp -p`);
            `changed` (ctime) cannot.
    """

    device: int = field(compare=False)
    inode: int = field(compare=False)
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def links(self) -> tuple[int, int]:
        return self.device, self.inode

    def told(self) -> dict[str, Any]:
        return {"modified": self.modified, "changed": self.changed}

    def unlike(self, other: FileState) -> tuple[str, str]:
        """What differs, in words: for this one, for the other."""
        told: list[tuple[str, str]] = []
        if self.size != other.size:
            told.append((f"{self.size} bytes", f"{other.size} bytes"))
        if self.modified != other.modified:
            told.append((f"modified {_shown(self.modified)}", f"modified {_shown(other.modified)}"))
        if not told and self.changed != other.changed:
            told.append((f"changed {_shown(self.changed)}", f"changed {_shown(other.changed)}"))
        return ", ".join(one for one, _ in told), ", ".join(two for _, two in told)


def _shown(nanoseconds: int) -> str:
    """A time to the nanosecond.

    >>> _shown(1_500_000_000_000_000_001)
    '2017-07-14 02:40:00.000000001'
    >>> _shown(3 * 10**20)  # later than any date has a name
    '300000000000.000000000 s'
    """
    seconds, rest = divmod(nanoseconds, 10**9)
    if not -60_000_000_000 < seconds < 250_000_000_000:
        return f"{seconds}.{rest:09d} s"
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


class _Reading(FileIO):
    """A file whose read errors become E305, whoever reads it: a disk may fail at any byte."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor)
        self._path = path

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise unreadable(self._path, error.strerror) from error

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise unreadable(self._path, error.strerror) from error


def _descriptor(path: Path) -> int:
    """A regular file, open for reading; E305 for anything else, without blocking on a fifo."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # a name may hold NUL
        raise unreadable(path, error.strerror if isinstance(error, OSError) else str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise EngineError("E305", "not a regular file", place=Place(str(path)), fix="Put the checkpoint's file there.")
    return descriptor


def open_regular(path: Path) -> OpenFile:
    """Open a regular file for reading; E305 for anything else, without blocking on a fifo.

    A Git LFS pointer, as in a clone whose large files were not fetched, is E305 too.
    """
    descriptor = _descriptor(path)
    return no_pointer(OpenFile(_Reading(descriptor, path), FileState.of(os.fstat(descriptor))), str(path))


@dataclass(frozen=True, slots=True)
class LocalStore(Store):
    """A local folder, to read and to write; `named` is what the user gave, if that is not its path."""

    path: Path
    named: Path | None = field(default=None, compare=False)
    positioned = True

    @property
    def folder(self) -> Path:
        return self.path

    def place(self, name: str = "") -> str:
        return str((self.named or self.path) / name)

    def entries(self, inside: str = "") -> Mapping[str, State | None]:
        found: dict[str, State | None] = {}
        with os.scandir(self.path / inside) as listed:
            for entry in listed:
                with suppress(FileNotFoundError):  # just removed, or a dangling link
                    found[entry.name] = None if entry.is_dir() else FileState.of(entry.stat())
        return found

    def names(self, inside: str = "") -> list[str]:
        return sorted(os.listdir(self.path / inside))

    def inside(self, name: str) -> LocalStore:
        return LocalStore(self.path / name, self.named and self.named / name)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def open(self, name: str) -> OpenFile:
        return open_regular(self.path / name)

    def ranges(self, name: str, state: State | None) -> Ranges:
        path = self.path / name
        descriptor = _descriptor(path)  # it may have become a pipe since it was planned
        found = LocalRanges(descriptor, path)
        try:
            check_state(name, FileState.of(os.fstat(descriptor)), state)
        except BaseException:
            found.close()
            raise
        return found

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        found: dict[str, State] = {}
        for name in names:
            try:
                found[name] = FileState.of(os.stat(f"{self.path}/{name}"))
            except OSError as error:
                raise unreadable(self.place(name), error.strerror) from error
        return found

    def buffer(self, files: int) -> int:
        return 0

    def sinks(self, names: Sequence[str], users: int = 1) -> SinkFiles:
        return SinkFiles(self.path, names)

    def put(self, name: str, data: bytes) -> None:
        path = self.path / name
        coming = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with writing(path):
            with coming.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(coming, path)


class LocalRanges(Ranges):
    """An open file, read with preadv into the caller's buffers."""

    __slots__ = ("_path", "descriptor")

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor: int = descriptor
        self._path = path

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        nbytes = sum(map(len, parts))
        try:
            got = os.preadv(self.descriptor, parts, offset)
            while got < nbytes:
                more = os.preadv(self.descriptor, after(parts, got), offset + got)
                if more == 0:
                    raise ends_early(self._path.name, offset + got, offset + nbytes)
                got += more
        except OSError as error:
            raise unreadable(self._path, error.strerror) from error

    def close(self) -> None:
        os.close(self.descriptor)


def local_file(path: Path) -> File:
    """A local file, by its path."""
    return File(LocalStore(path.parent), path.name)
