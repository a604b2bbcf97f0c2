"""Stores, the places of files: a folder, a bucket prefix, or memory. Headers name a file of a store."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import EngineError, Place

Range = tuple[int, int]  # begin and end
Fetched = Sequence[tuple[int, Future[memoryview]]]  # start of a range, and its bytes once they have arrived

_POINTER = b"version https://git-lfs.github.com/spec/"  # the start of a file of some 130 bytes
_MOST_POINTER = 1024


class State(Protocol):
    """The state of a file: any write to it, or another file in its place, changes it. Plain data."""

    @property
    def size(self) -> int: ...  # in bytes

    @property
    def links(self) -> object: ...  # equal for two names of one file; None if unknown

    def unlike(self, other: Any) -> tuple[str, str]:
        """What differs, in words: for this one, for the other."""

    def told(self) -> Mapping[str, Any]:
        """The state as JSON, for a saved plan."""


class Positioned(io.RawIOBase):
    """A file object that reads any position through a function."""

    def __init__(self, size: int, read: Callable[[int, memoryview], int]) -> None:
        """Args: read: fills a buffer from a byte offset inside the file; returns how many bytes, at least one."""
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
            raise OSError(f"negative position {at}")  # as for a file of the system
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(min(len(target), self._size - self._at), 0)]
        count = self._read(self._at, target) if len(target) else 0
        self._at += count
        return count


class OpenFile(io.BufferedReader):
    """A file that is open for reading from any position, for the readers of formats.

    Attributes:
        state: the state of the file when it was opened.
        at_hand: whether reading the bytes between two positions needs no request.
    """

    def __init__(self, raw: io.RawIOBase, state: State, at_hand: Callable[[int, int], bool] | None = None) -> None:
        super().__init__(raw)
        self.state = state
        self.at_hand = at_hand or (lambda start, end: True)


def no_pointer(file: OpenFile, place: str) -> OpenFile:
    """The file; E305 if it is a Git LFS pointer, as in a clone whose large files were not fetched."""
    if file.state.size > _MOST_POINTER or not file.peek(len(_POINTER)).startswith(_POINTER):
        return file
    file.close()
    raise EngineError(
        "E305",
        "a Git LFS pointer is in place of the file",
        place=Place(place),
        got=f"{file.state.size} bytes",
        fix="Fetch the file itself: `git lfs pull` in the clone that it is from.",
    )


class Ranges(Protocol):
    """A file whose bytes are read by position. Belongs to one thread."""

    descriptor: int | None = None  # of a local file

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill buffers one after the other; E301 when the file ends too early, E305 when it cannot be read."""

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        """Start fetching bytes that will be read soon; returns what `hold` takes, empty if reading needs no request."""
        return ()

    def hold(self, fetched: Fetched) -> None:
        """Wait for these bytes and keep them; drops those held before."""
        return None

    def close(self) -> None:
        """End reading."""
        return None


class Sinks(AbstractContextManager["Sinks"], Protocol):
    """Files that are being written, by number. Not shared between threads."""

    def __exit__(self, *_: object) -> None:
        """End writing."""
        return None

    def create(self, file: int, size: int) -> None:
        """Begin a file of this size in bytes."""

    def write(self, file: int, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write buffers one after the other at a byte offset; OSError when that fails."""

    def read(self, file: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        """The bytes written, in blocks that are valid until the next one; OSError when some are missing."""

    def whole(self, file: int, size: int) -> bool:
        """Whether an interrupted run of the same work left this file whole; a local folder never says so."""
        return False

    def copy(self, file: int, offset: int, source: int, start: int, nbytes: int) -> int:
        """Have the system copy bytes from an open descriptor; returns how many, 0 where it cannot."""
        return 0

    def complete(self, file: int) -> None:
        """End a file that is completely written."""

    def sync(self, file: int) -> None:
        """Flush a file to stable storage."""
        return None


class Store(Protocol):
    """A folder, local or remote. Plain data: it can be pickled, and opens what it needs on demand."""

    def __str__(self) -> str:
        return self.place()

    @property
    def folder(self) -> Path | None:  # the local folder, if it is one
        return None

    @property
    def block(self) -> int:  # bytes that are worth reading ahead at once; 0 if reading needs no request
        return 0

    def place(self, name: str = "") -> str:
        """The path or URL of the store or of a file in it, for people."""

    def entries(self, inside: str = "") -> Mapping[str, State | None]:
        """The current entries of the store or of a subfolder by name: states of files, None for folders."""

    def names(self, inside: str = "") -> list[str]:
        """The sorted names in the store or in a subfolder; OSError when it cannot be listed."""
        return sorted(self.entries(inside))

    def inside(self, name: str) -> Store:
        """A subfolder, as a store."""

    def has(self, name: str) -> bool:
        """Whether the name exists, as a file of any kind."""

    def open(self, name: str) -> OpenFile:
        """Open a file for reading; E305 when it is not a file or cannot be read."""

    def ranges(self, name: str, state: State | None) -> Ranges:
        """Open a file for reading by position; E405 when its state is another one, E305 when it cannot be read."""

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        """The states of files; E305 when one cannot be read."""


class Target(Protocol):
    """The place an output is written to: a local folder, or uploads to a store."""

    @property
    def folder(self) -> Path | None: ...  # the local folder, if it is one

    @property
    def positioned(self) -> bool: ...  # whether files can be written at any position, not only in order

    def place(self, name: str = "") -> str:
        """The path or URL of the output or of a file in it, for people."""

    def buffer(self, files: int) -> int:
        """Bytes that are buffered for each file when this many are written at the same time."""

    def names(self) -> list[str]:
        """The names written so far, sorted."""

    def sinks(self, names: Sequence[str], users: int = 1) -> Sinks:
        """Files to write, numbered in this order; `users` threads write at the same time."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole, to stable storage; E403 when that fails."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a store, by its name there."""

    store: Store
    name: str

    @property
    def place(self) -> str:
        return self.store.place(self.name)

    @property
    def exists(self) -> bool:
        return self.store.has(self.name)

    def open(self) -> OpenFile:
        return self.store.open(self.name)

    def beside(self, name: str) -> File:
        """Another file of the same store."""
        return File(self.store, name)


_DEEPEST = 8  # nested folders, some of which may be links upwards


def walk(store: Store, inside: str = "") -> Iterator[tuple[str, State]]:
    """Every file of a store and its subfolders, by name."""
    for name, state in sorted(store.entries(inside).items(), key=lambda item: item[0]):
        path = f"{inside}/{name}" if inside else name
        if state is not None:
            yield path, state
        elif path.count("/") < _DEEPEST:
            yield from walk(store, path)


def check_state(name: str, now: State, then: State | None) -> None:
    """E405 if a file has changed since it was planned."""
    if then is not None and now != then:
        raise has_changed(name, *now.unlike(then))


def has_changed(name: str, got: str, expected: str) -> EngineError:
    """E405 for a file that has changed since it was planned."""
    return EngineError(
        "E405",
        "a source file changed since it was planned",
        place=Place(name),
        got=got,
        expected=expected,
        fix="Wait until training has finished writing the checkpoint and nothing else touches it, then run again.",
    )


def ends_early(name: str, got: int, expected: int) -> EngineError:
    return EngineError(
        "E301",
        "a checkpoint file ends too early",
        place=Place(name),
        got=f"{got} bytes",
        expected=f"at least {expected} bytes",
        fix="Copy the file again from the training run.",
    )


def unreadable(place: Path | str, why: str | None) -> EngineError:
    """E305 for a file that the system does not let be read."""
    fix = "Check the file and its permissions."
    return EngineError("E305", "a file cannot be read", place=Place(str(place)), got=why, fix=fix)


def write_error(
    path: Path | str, error: OSError, then: str = "at the output, then run again with --resume"
) -> EngineError:
    """E403; `then` says where to look, and what to do."""
    fix = f"Check free space and permissions {then}; what was there before is untouched."
    return EngineError("E403", "writing failed", place=Place(str(path)), got=error.strerror or str(error), fix=fix)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """`write_error` for a failure of the system inside."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error
