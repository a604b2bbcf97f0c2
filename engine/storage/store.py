"""Stores: where files lie. A folder, a prefix of a bucket, or memory; headers name a file of a store."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import EngineError, Place
from engine.storage.coalesce import Range

Fetched = Sequence[tuple[int, Future[memoryview]]]  # begin of a range, and its bytes once they are there


class State(Protocol):
    """What is told of a file: any write to it, and any other file in its place, changes it. Plain data."""

    @property
    def size(self) -> int: ...  # in bytes

    @property
    def links(self) -> object: ...  # equal for two names of one file; None where that cannot be told

    def unlike(self, other: Any) -> tuple[str, str]:
        """What differs between the two, in words: of this one, of the other."""

    def told(self) -> Mapping[str, Any]:
        """What a saved plan keeps of it, as JSON."""


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


class OpenFile(io.BufferedReader):
    """A file that is open for reading from any position, as readers of formats take it.

    Attributes:
        state: the file's when it was opened.
        at_hand: whether reading bytes from one position to another costs no request.
    """

    def __init__(self, raw: io.RawIOBase, state: State, at_hand: Callable[[int, int], bool] | None = None) -> None:
        super().__init__(raw)
        self.state = state
        self.at_hand = at_hand or (lambda start, end: True)


class Ranges(Protocol):
    """A file whose bytes are read by position. Belongs to one thread."""

    descriptor: int | None = None  # of a file of this machine

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill buffers one after the other; E301 when the file ends before, E305 when it cannot be read."""

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        """Begin to fetch bytes that will be read soon; what `hold` takes. Nothing where reading costs no request."""
        return ()

    def hold(self, fetched: Fetched) -> None:
        """Have these bytes at hand, and none that were held before; waits for them."""
        return None

    def close(self) -> None:
        """Read no more of it."""
        return None


class Sinks(AbstractContextManager["Sinks"], Protocol):
    """Files being written, by number. Not shared between threads."""

    def __exit__(self, *_: object) -> None:
        """Write no more to them."""
        return None

    def create(self, file: int, size: int) -> None:
        """Begin a file of so many bytes."""

    def write(self, file: int, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write buffers one after the other at a byte offset; OSError when that fails."""

    def read(self, file: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        """What was written, in blocks that are valid until the next one; OSError when it is not all there."""

    def whole(self, file: int, size: int) -> bool:
        """Whether an interrupted run of the same work left a file of so many bytes whole, where files are not parts."""
        return False

    def copy(self, file: int, offset: int, source: int, start: int, nbytes: int) -> int:
        """Have the system move bytes from an open descriptor; how many it moved, 0 where it cannot."""
        return 0

    def complete(self, file: int) -> None:
        """A file is written in full."""

    def sync(self, file: int) -> None:
        """Bring a file to stable storage."""
        return None


class Store(Protocol):
    """A folder, wherever it lies. Plain data: it can be pickled, and opens what it needs when it is asked."""

    def __str__(self) -> str:
        return self.place()

    @property
    def folder(self) -> Path | None:  # of this machine, if it is one
        return None

    @property
    def block(self) -> int:  # bytes that are worth reading ahead at once; 0 where reading costs no request
        return 0

    def place(self, name: str = "") -> str:
        """The path or URL of the store or of a file in it, for people."""

    def entries(self, inside: str = "") -> Mapping[str, State | None]:
        """What lies directly in it, or in a folder inside: the states of files, None for folders; as it is now."""

    def names(self, inside: str = "") -> list[str]:
        """What lies directly in it, or in a folder inside, sorted; OSError when it cannot be listed."""
        return sorted(self.entries(inside))

    def inside(self, name: str) -> Store:
        """A folder in it, as a store."""

    def has(self, name: str) -> bool:
        """Whether there is such a file, whatever it is."""

    def open(self, name: str) -> OpenFile:
        """Open a file for reading; E305 when it is none or cannot be read."""

    def ranges(self, name: str, state: State | None) -> Ranges:
        """Open a file for reading by position; E405 unless it is in that state, E305 when it cannot be read."""

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        """The states of files; E305 when one cannot be read."""


class Target(Protocol):
    """Where an output is written to: a folder of this machine, or uploads to a store."""

    @property
    def folder(self) -> Path | None: ...  # of this machine, if it is one

    @property
    def positioned(self) -> bool: ...  # writes go anywhere in a file, or else in order only

    def place(self, name: str = "") -> str:
        """The path or URL of the output or of a file in it, for people."""

    def buffer(self, files: int) -> int:
        """Bytes that writing so many files at the same time keeps in memory, for each of them."""

    def names(self) -> list[str]:
        """What was written to it, sorted."""

    def sinks(self, names: Sequence[str], users: int = 1) -> Sinks:
        """Files to write, numbered in this order; `users` write to some at the same time."""

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


_DEEPEST = 8  # folders in each other, some of which may be links upwards


def walk(store: Store, inside: str = "") -> Iterator[tuple[str, State]]:
    """Every file of a store, in folders inside too, by name."""
    for name, state in sorted(store.entries(inside).items(), key=lambda item: item[0]):
        path = f"{inside}/{name}" if inside else name
        if state is not None:
            yield path, state
        elif path.count("/") < _DEEPEST:
            yield from walk(store, path)


def check_state(name: str, now: State, then: State | None) -> None:
    """E405 unless a file is still the one that was planned."""
    if then is not None and now != then:
        raise has_changed(name, *now.unlike(then))


def has_changed(name: str, got: str, expected: str) -> EngineError:
    """E405 for a file that is not the one that was planned."""
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


def unreadable(place: str, why: str) -> EngineError:
    return EngineError(
        "E305",
        "a checkpoint file cannot be read",
        place=Place(place),
        got=why,
        fix="Check the file and its permissions, then run again.",
    )


def write_error(
    path: Path | str, error: OSError, then: str = "at the output, then run again with --resume"
) -> EngineError:
    """E403; `then` says where to look, and what to do."""
    fix = f"Check free space and permissions {then}; what was there before is untouched."
    return EngineError("E403", "writing failed", place=Place(str(path)), got=error.strerror or str(error), fix=fix)
