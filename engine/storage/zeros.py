"""A store of files that are all zeros and take no room: what padding is written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.storage.coalesce import Range
from engine.storage.store import Fetched, OpenFile, Ranges, Sinks, State, unreadable


@dataclass(frozen=True, slots=True)
class Nothing:
    """The state of zeros, which never changes."""

    size: int = 0
    links = None

    def unlike(self, other: Any) -> tuple[str, str]:
        return "zeros", "something else"

    def told(self) -> Mapping[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class ZeroStore:
    """Files of zeros, of any name and as long as is asked. Nothing is written there."""

    folder: Path | None = None
    positioned: bool = True
    block: int = 0
    buffer: int = 0

    def place(self, name: str = "") -> str:
        return name or "zeros"

    def names(self, inside: str = "") -> list[str]:
        return []

    def has(self, name: str) -> bool:
        return True

    def open(self, name: str) -> OpenFile:
        raise unreadable(self.place(name), "it is not a file")

    def ranges(self, name: str, state: State | None) -> Ranges:
        return _Zeros()

    def states(self, names: Sequence[str]) -> Mapping[str, State]:
        return dict.fromkeys(names, Nothing())

    def sinks(self, names: Sequence[str]) -> Sinks:
        raise OSError("zeros cannot be written")

    def put(self, name: str, data: bytes) -> None:
        raise OSError("zeros cannot be written")


class _Zeros:
    descriptor = None

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            flat = part.cast("B")
            flat[:] = bytes(len(flat))

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        return ()

    def hold(self, fetched: Fetched) -> None:
        pass

    def close(self) -> None:
        pass
