"""Virtual files: bytes at any position, some in memory, some computed when read; and a store of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from io import BufferedReader
from typing import Any

from engine.storage.store import OpenFile, Positioned, Ranges, State, Store, check_state, ends_early, unreadable

_BUFFER = 1 << 20  # bytes
Fill = Callable[[int, memoryview], None]  # arguments: a byte offset in the stretch and a buffer to fill


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes `start` to `end` of a file, and a function that fills a buffer with some of them."""

    start: int
    end: int
    fill: Fill


@dataclass(frozen=True, slots=True)
class VirtualFile:
    """A file that is stored nowhere.

    Attributes:
        size: in bytes.
        etag: hexadecimal digits that change whenever the bytes may: the SHA-256 of a small file, else 40 digits.
        stretches: in order, without overlaps; gaps between them are zeros.
    """

    name: str
    size: int
    etag: str
    stretches: tuple[Stretch, ...] = ()

    @classmethod
    def of(cls, name: str, data: bytes | bytearray) -> VirtualFile:
        """A file of these bytes."""
        stretches = (Stretch(0, len(data), partial(copied, data)),) if data else ()
        return cls(name, len(data), sha256(data).hexdigest(), stretches)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill a buffer with the file's bytes from byte `start` on.

        Raises:
            EngineError: E402 when replicas differ, E405 when a source changed, E3xx when one cannot be read.
            ValueError: for bytes beyond the end of the file.
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

    def raw(self) -> Positioned:
        """An unbuffered Python file. A read ends where a stretch ends, so that reading a header computes no tensor."""

        def read(at: int, target: memoryview) -> int:
            index = bisect_right(self.stretches, at, key=lambda one: one.end)
            if index < len(self.stretches):
                one = self.stretches[index]
                target = target[: (one.start if at < one.start else one.end) - at]
            self.read_into(at, target)
            return len(target)

        return Positioned(self.size, read)

    def open(self) -> BufferedReader:
        """The file as a buffered Python file, for reading from any position."""
        return BufferedReader(self.raw(), _BUFFER)

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Some bytes of the file; fewer at its end."""
        start = min(start, self.size)
        buffer = bytearray(self.size - start if size is None else max(min(size, self.size - start), 0))
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)


def copied(data: bytes | bytearray, at: int, target: memoryview) -> None:
    """A `Fill` from bytes in memory."""
    target[:] = memoryview(data)[at : at + len(target)]


@dataclass(frozen=True, slots=True)
class VirtualState:
    """The state of a virtual file: its size and etag. Each read checks that its sources have not changed."""

    size: int
    etag: str
    links = None

    @classmethod
    def of(cls, file: VirtualFile) -> VirtualState:
        return cls(file.size, file.etag)

    def unlike(self, other: VirtualState) -> tuple[str, str]:
        return f"{self.size} bytes, {self.etag[:12]}", f"{other.size} bytes, {other.etag[:12]}"

    def told(self) -> Mapping[str, Any]:
        return {"etag": self.etag}


@dataclass(frozen=True, slots=True)
class VirtualStore(Store):
    """A read-only store of virtual files; stores with the same name are equal.

    Attributes:
        name: describes what is read, for people.
    """

    name: str
    files: Mapping[str, VirtualFile] = field(default_factory=dict, compare=False, repr=False)

    def place(self, name: str = "") -> str:
        return f"{self.name}/{name}" if name else self.name

    def entries(self, inside: str = "") -> Mapping[str, State | None]:
        below = f"{inside}/" if inside else ""
        found: dict[str, State | None] = {}
        for path, file in self.files.items():
            if path.startswith(below):
                name, deeper, _ = path[len(below) :].partition("/")
                found[name] = None if deeper else VirtualState.of(file)
        return found

    def inside(self, name: str) -> VirtualStore:
        files = {path[len(name) + 1 :]: file for path, file in self.files.items() if path.startswith(f"{name}/")}
        return VirtualStore(self.place(name), files)

    def has(self, name: str) -> bool:
        return name in self.files

    def open(self, name: str) -> OpenFile:
        file = self._file(name)
        return OpenFile(file.raw(), VirtualState.of(file))

    def ranges(self, name: str, state: State | None) -> Ranges:
        file = self._file(name)
        check_state(name, VirtualState.of(file), state)
        return _Ranges(file)

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        return {name: VirtualState.of(self._file(name)) for name in names}

    def _file(self, name: str) -> VirtualFile:
        if name not in self.files:
            raise unreadable(self.place(name), "no such file")
        return self.files[name]


class _Ranges(Ranges):
    def __init__(self, file: VirtualFile) -> None:
        self._file = file

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            if offset + len(part) > self._file.size:
                raise ends_early(self._file.name, self._file.size, offset + len(part))
            self._file.read_into(offset, part)
            offset += len(part)
