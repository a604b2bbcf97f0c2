"""Reading byte ranges of the files of a plan: opened when first read, few open at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.storage.store import File, Ranges, State, check_state

_OPEN_FILES = 128  # far below the usual limit of 1024 descriptors, whatever the number of ranks


class IndexedFile(Protocol):
    """A file as it was when its headers were read."""

    @property
    def file(self) -> File: ...

    @property
    def state(self) -> State | None: ...


class SourceFiles:
    """The files of one plan. Not shared between threads."""

    def __init__(self, files: Sequence[IndexedFile]) -> None:
        self._files = files
        self._open: OrderedDict[int, Ranges] = OrderedDict()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._open.values():
            one.close()
        self._open.clear()

    def opened(self, file: int) -> Ranges:
        """An open file; E405 when it is not the one that was planned, E305 when it cannot be read."""
        found = self._open.get(file)
        if found is not None:
            self._open.move_to_end(file)
            return found
        if len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        header = self._files[file]
        found = self._open[file] = header.file.store.ranges(header.file.name, header.state)
        return found

    def descriptor(self, file: int) -> int | None:
        """The descriptor of an open file of this machine; errors as of `opened`."""
        return self.opened(file).descriptor

    def read_into(self, file: int, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill buffers one after the other with the bytes at `offset`; E301 when the file ends before."""
        self.opened(file).read_into(offset, parts)


def check_unchanged(files: Iterable[IndexedFile]) -> None:
    """E405 unless every file is still the one that was planned: what was read of it is of one state then."""
    by_store: dict[str, list[IndexedFile]] = {}
    for header in files:
        by_store.setdefault(header.file.store.place(), []).append(header)
    for headers in by_store.values():
        now = headers[0].file.store.states([header.file.name for header in headers])
        for header in headers:
            check_state(header.file.name, now[header.file.name], header.state)
