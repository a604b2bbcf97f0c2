"""Documents: plain data with places by path, as merging and building need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import Place
from engine.language import loader

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class At:
    """Where a value stands, and where its key does (the value's own place in lists)."""

    key: Place
    value: Place


@dataclass(frozen=True, slots=True)
class Document:
    """Data of one file, or of several merged; `places` is by path: `("rules", 3, "axes")`."""

    file: str
    data: Any
    places: dict[KeyPath, At]

    def at(self, *path: str | int) -> At:
        """The nearest known place at or above a path."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return At(Place(self.file), Place(self.file))

    def place(self, *path: str | int) -> Place:
        """The place of a key, or of a list's item."""
        return self.at(*path).key

    def value_place(self, *path: str | int) -> Place:
        """The place where the text of a value begins."""
        return self.at(*path).value


def content_of(path: Path) -> bytes:
    """What a file holds now, which tells whether what was made of it still holds; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(loader.MAX_BYTES + 1)
    except OSError:
        return b""  # loading it tells why


def load_yaml(path: Path, shown: str) -> Document:
    """Read a file; errors and places show it as `shown`."""
    return _document(loader.load_yaml(path, shown), shown)


def load_text(text: str, shown: str) -> Document:
    """The same for text in memory."""
    return _document(loader.load_text(text, shown), shown)


def _document(document: loader.Document, shown: str) -> Document:
    keys = document.keys
    return Document(shown, document.data, {path: At(keys[path], at) for path, at in document.places.items()})


def values_in(tree: Any) -> Iterator[Any]:
    """Everything in mappings and sequences, however deep, that is neither.

    >>> list(values_in({"a": [1, {"b": "c"}], "d": ()}))
    [1, 'c']
    """
    if isinstance(tree, Mapping | list | tuple):
        for child in tree.values() if isinstance(tree, Mapping) else tree:
            yield from values_in(child)
    else:
        yield tree


def plain(data: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists, as JSON can hold them."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return data
