"""Documents: plain data with places by path, as merging and building need them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import Place
from engine.language import loader

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Data of one file, or of several merged; `places` is by path: `("rules", 3, "axes")`."""

    file: str
    data: Any
    places: dict[KeyPath, Place]

    def place(self, *path: str | int) -> Place:
        """The nearest known place at or above a path."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return Place(self.file)


def load_yaml(path: Path, shown: str) -> Document:
    """Read a file; errors and places show it as `shown`."""
    document = loader.load_yaml(path)
    places = {at: Place(shown, p.line, p.column) for at, p in {**document.places, **document.keys}.items()}
    return Document(shown, document.data, places)
