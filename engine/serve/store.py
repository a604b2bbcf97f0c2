"""Virtual files as a store: what a plan would write is the source of another plan, without a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.serve.files import VirtualFile, VirtualIO
from engine.storage.coalesce import Range
from engine.storage.store import Fetched, OpenFile, Ranges, Sinks, State, check_state, ends_early, unreadable


@dataclass(frozen=True, slots=True)
class VirtualState:
    """The state of a virtual file: its size and etag. That its sources do not change, each read sees to."""

    size: int
    etag: str
    links = None

    def unlike(self, other: VirtualState) -> tuple[str, str]:
        return f"{self.size} bytes, {self.etag[:12]}", f"{other.size} bytes, {other.etag[:12]}"

    def told(self) -> Mapping[str, Any]:
        return {"etag": self.etag}


class VirtualStore:
    """A read-only store of virtual files; whatever reads it goes on as long as their folder is open."""

    folder: Path | None = None
    positioned = False
    block = 0
    buffer = 0

    def __init__(self, files: Mapping[str, VirtualFile], place: str) -> None:
        """Args: place: what is read, for people."""
        self._files, self._place = files, place

    def __str__(self) -> str:
        return self._place

    def place(self, name: str = "") -> str:
        return f"{self._place}/{name}" if name else self._place

    def names(self, inside: str = "") -> list[str]:
        below = f"{inside}/" if inside else ""
        return sorted({name[len(below) :].split("/")[0] for name in self._files if name.startswith(below)})

    def has(self, name: str) -> bool:
        return name in self._files

    def open(self, name: str) -> OpenFile:
        file = self._file(name)
        return OpenFile(VirtualIO(file), VirtualState(file.size, file.etag))

    def ranges(self, name: str, state: State | None) -> Ranges:
        file = self._file(name)
        check_state(name, VirtualState(file.size, file.etag), state)
        return _Ranges(file)

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        return {name: VirtualState(self._file(name).size, self._file(name).etag) for name in names}

    def sinks(self, names: Sequence[str]) -> Sinks:
        raise self._read_only()

    def put(self, name: str, data: bytes) -> None:
        raise self._read_only()

    def _file(self, name: str) -> VirtualFile:
        if name not in self._files:
            raise unreadable(self.place(name), "no such file")
        return self._files[name]

    def _read_only(self) -> EngineError:
        return EngineError("E403", "virtual files cannot be written", place=Place(self._place), fix="Choose a folder.")


class _Ranges:
    descriptor = None

    def __init__(self, file: VirtualFile) -> None:
        self._file = file

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            if offset + len(part) > self._file.size:
                raise ends_early(self._file.name, self._file.size, offset + len(part))
            self._file.read_into(offset, part)
            offset += len(part)

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        return ()

    def hold(self, fetched: Fetched) -> None:
        pass

    def close(self) -> None:
        pass
