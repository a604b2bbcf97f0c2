"""Reading byte ranges of checkpoint files: pread into a caller's buffer, few descriptors open."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from engine.errors import EngineError, Place
from engine.storage.buffers import after
from engine.storage.regular import FileState, check_regular

_OPEN_FILES = 128  # far below the usual limit of 1024 descriptors, whatever the number of ranks


class IndexedFile(Protocol):
    """A file as it was when its headers were read."""

    @property
    def path(self) -> Path: ...

    @property
    def state(self) -> FileState | None: ...


class SourceFiles:
    """The files of one plan, opened when first read. Not shared between threads."""

    def __init__(self, files: Sequence[IndexedFile]) -> None:
        self._files = files
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def descriptor(self, file: int) -> int:
        """An open descriptor; E405 when the file is not the one that was planned, E305 when it cannot be read."""
        descriptor = self._open.get(file)
        if descriptor is not None:
            self._open.move_to_end(file)
            return descriptor
        if len(self._open) >= _OPEN_FILES:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        header = self._files[file]
        try:
            descriptor = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _unreadable(header.path, error) from error
        check_regular(descriptor, header.path)  # it may have become a pipe since it was planned
        self._open[file] = descriptor
        _check_state(header, os.fstat(descriptor))
        return descriptor

    def read_into(self, file: int, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill buffers one after the other with the bytes at `offset`; E301 when the file ends before."""
        descriptor = self.descriptor(file)
        nbytes = sum(map(len, parts))
        try:
            got = os.preadv(descriptor, parts, offset)
            while got < nbytes:
                more = os.preadv(descriptor, after(parts, got), offset + got)
                if more == 0:
                    raise EngineError(
                        "E301",
                        "a checkpoint file ends too early",
                        place=Place(self._files[file].path.name),
                        got=f"{offset + got} bytes",
                        expected=f"at least {offset + nbytes} bytes",
                        fix="Copy the file again from the training run.",
                    )
                got += more
        except OSError as error:
            raise _unreadable(self._files[file].path, error) from error


def check_unchanged(files: Iterable[IndexedFile]) -> None:
    """E405 unless every file is still the one that was planned: what was read of it is of one state then."""
    for header in files:
        try:
            _check_state(header, os.stat(header.path))
        except OSError as error:
            raise _unreadable(header.path, error) from error


def _check_state(header: IndexedFile, found: os.stat_result) -> None:
    now, then = FileState.of(found), header.state
    if then is not None and now != then:
        got, expected = now.unlike(then)
        raise EngineError(
            "E405",
            "a source file changed since it was planned",
            place=Place(header.path.name),
            got=got,
            expected=expected,
            fix="Wait until training has finished writing the checkpoint and nothing else touches it, then run again.",
        )


def _unreadable(path: Path, error: OSError) -> EngineError:
    return EngineError(
        "E305",
        "a checkpoint file cannot be read",
        place=Place(str(path)),
        got=error.strerror or str(error),
        fix="Check the file and its permissions, then run again.",
    )
