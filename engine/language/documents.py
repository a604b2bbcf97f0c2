"""Documents: plain data with places by path, as merging and building need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import Place

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class At:
    """Where a value stands, and where its key does (the value's own place in lists)."""

    key: Place
    value: Place


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data of one file, or of several merged; `places` is by path: `("rules", 3, "axes")`."""

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
