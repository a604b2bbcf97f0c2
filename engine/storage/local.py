"""Folders of this machine as stores."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.storage.regular import FileState, check_regular, open_regular
from engine.storage.sinks import SinkFiles, after
from engine.storage.store import (
    File,
    OpenFile,
    Ranges,
    State,
    Store,
    check_state,
    ends_early,
    unreadable,
    write_error,
)


@dataclass(frozen=True, slots=True)
class LocalStore(Store):
    """A folder of this machine, to read and to write."""

    path: Path
    positioned = True

    @property
    def folder(self) -> Path:
        return self.path

    def place(self, name: str = "") -> str:
        return str(self.path / name)

    def entries(self, inside: str = "") -> Mapping[str, State | None]:
        found: dict[str, State | None] = {}
        with os.scandir(self.path / inside) as listed:
            for entry in listed:
                with suppress(FileNotFoundError):  # it was just removed, or is a link to nothing
                    found[entry.name] = None if entry.is_dir() else FileState.of(entry.stat())
        return found

    def names(self, inside: str = "") -> list[str]:
        return sorted(os.listdir(self.path / inside))

    def inside(self, name: str) -> LocalStore:
        return LocalStore(self.path / name)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def open(self, name: str) -> OpenFile:
        return open_regular(self.path / name)

    def ranges(self, name: str, state: State | None) -> Ranges:
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise unreadable(str(path), error.strerror or str(error)) from error
        check_regular(descriptor, path)  # it may have become a pipe since it was planned
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
                raise unreadable(self.place(name), error.strerror or str(error)) from error
        return found

    def buffer(self, files: int) -> int:
        return 0

    def sinks(self, names: Sequence[str], users: int = 1) -> SinkFiles:
        return SinkFiles([self.path / name for name in names])

    def put(self, name: str, data: bytes) -> None:
        path = self.path / name
        coming = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with coming.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(coming, path)
        except OSError as error:
            raise write_error(path, error) from error


class LocalRanges(Ranges):
    """An open file, read by preadv into the caller's buffers."""

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
            raise unreadable(str(self._path), error.strerror or str(error)) from error

    def close(self) -> None:
        os.close(self.descriptor)


def local_file(path: Path) -> File:
    """A file of this machine, by its path."""
    return File(LocalStore(path.parent), path.name)
