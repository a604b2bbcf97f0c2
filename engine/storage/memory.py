"""Files in memory as a store: for tests, and for checkpoints that need not outlive a function."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.storage.coalesce import Range
from engine.storage.store import Fetched, OpenFile, Ranges, Sinks, State, check_state, ends_early, unreadable


@dataclass(frozen=True, slots=True)
class Content:
    """The state of bytes in memory: their number and digest."""

    size: int
    digest: str
    links = None

    @classmethod
    def of(cls, data: bytes | bytearray) -> Content:
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def unlike(self, other: Content) -> tuple[str, str]:
        return f"{self.size} bytes, {self.digest[:12]}", f"{other.size} bytes, {other.digest[:12]}"

    def told(self) -> Mapping[str, Any]:
        return {"etag": self.digest}


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """Files in memory by name. Two stores are equal when they are of the same name."""

    name: str = "memory"
    files: dict[str, bytearray] = field(default_factory=dict, compare=False, repr=False)
    folder: Path | None = None
    positioned: bool = True
    block: int = 0
    buffer: int = 0

    def place(self, name: str = "") -> str:
        return f"{self.name}:{name}"

    def names(self, inside: str = "") -> list[str]:
        below = f"{inside}/" if inside else ""
        return sorted({name[len(below) :].split("/")[0] for name in self.files if name.startswith(below)})

    def has(self, name: str) -> bool:
        return name in self.files

    def _data(self, name: str) -> bytearray:
        if name not in self.files:
            raise unreadable(self.place(name), "no such file")
        return self.files[name]

    def open(self, name: str) -> OpenFile:
        data = self._data(name)
        return OpenFile(io.BytesIO(data), Content.of(data))  # type: ignore[arg-type]  # as good as raw

    def ranges(self, name: str, state: State | None) -> Ranges:
        data = self._data(name)
        if state is not None:
            check_state(name, Content.of(data), state)
        return _Ranges(name, data)

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        return {name: Content.of(self._data(name)) for name in names}

    def sinks(self, names: Sequence[str]) -> Sinks:
        return _Sinks(self.files, names)

    def put(self, name: str, data: bytes) -> None:
        self.files[name] = bytearray(data)


class _Ranges:
    descriptor = None

    def __init__(self, name: str, data: bytearray) -> None:
        self._name, self._data = name, memoryview(data)

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            if offset + len(part) > len(self._data):
                raise ends_early(self._name, len(self._data), offset + len(part))
            part[:] = self._data[offset : offset + len(part)]
            offset += len(part)

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        return ()

    def hold(self, fetched: Fetched) -> None:
        pass

    def close(self) -> None:
        self._data.release()


class _Sinks:
    def __init__(self, files: dict[str, bytearray], names: Sequence[str]) -> None:
        self._files, self._names = files, names

    def __enter__(self) -> _Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def create(self, file: int, size: int) -> None:
        self._files[self._names[file]] = bytearray(size)

    def write(self, file: int, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        data = self._files[self._names[file]]
        for part in parts:
            end = offset + len(part)
            data.extend(bytes(max(end - len(data), 0)))
            data[offset:end] = part
            offset = end

    def read(self, file: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        data = self._files.get(self._names[file], b"")
        if offset + nbytes > len(data):
            raise OSError("the file is shorter than what was written")
        yield memoryview(bytes(data[offset : offset + nbytes]))

    def whole(self, file: int, size: int) -> bool:
        return False

    def copy(self, file: int, offset: int, source: int, start: int, nbytes: int) -> int:
        return 0

    def complete(self, file: int) -> None:
        pass

    def sync(self, file: int) -> None:
        pass
