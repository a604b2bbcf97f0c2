"""Documents: data whose keys and items know their places in a file, so that values keep them wherever they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.errors import Place

KeyPath = tuple[str | int, ...]  # `("rules", 3, "axes")`
K = TypeVar("K")
V = TypeVar("V")
_LEAF = (str, int, float, type(None))  # tested first: `isinstance(value, Mapping)` is slow


@dataclass(frozen=True, slots=True)
class At:
    """The place of a value and of its key (in a list, the value's own place)."""

    key: Place
    value: Place


class Table(dict[Any, Any]):
    """Keys and values; `at` holds the place of each."""

    __slots__ = ("at",)

    def __init__(self, values: Mapping[Any, Any] | None = None, at: Mapping[Any, At] | None = None) -> None:
        super().__init__(values or {})
        self.at: dict[Any, At] = dict(at or {})

    def put(self, key: Any, value: Any, at: At) -> None:
        self[key], self.at[key] = value, at


class Items(list[Any]):
    """A list; `at` holds the place of each item."""

    __slots__ = ("at",)

    def __init__(self, values: Iterable[Any] = (), at: Mapping[int, At] | None = None) -> None:
        super().__init__(values)
        self.at: dict[int, At] = dict(at or {})


@dataclass(frozen=True, slots=True)
class Document:
    """Data of one file, or of several merged; `start` is the beginning of the last of them."""

    file: str
    data: Any
    start: At | None = None

    def part(self, *path: str | int) -> Document:
        """The value at a path, with the nearest known place at or above it; the data is None if there is no value."""
        data, start = self.data, self.start
        for key in path:
            start = getattr(data, "at", {}).get(key, start)
            data = data[int(key)] if isinstance(data, list) else data.get(key) if isinstance(data, dict) else None
        return Document(self.file, data, start)

    def parts(self, *path: str | int) -> dict[Any, Document]:
        """Every value or item of the value at a path, by its key or index."""
        held = self.part(*path)
        keys = held.data if isinstance(held.data, dict) else range(len(held.data or ()))
        return {key: held.part(key) for key in keys}

    def place(self, *path: str | int) -> Place:
        """The place of a key, or of a list item."""
        start = self.part(*path).start
        return Place(self.file) if start is None else start.key

    def value_place(self, *path: str | int) -> Place:
        """The place where the text of a value begins."""
        start = self.part(*path).start
        return Place(self.file) if start is None else start.value


def values_in(tree: Any) -> Iterator[Any]:
    """All values in nested mappings and sequences that are neither.

    >>> list(values_in({"a": [1, {"b": "c"}], "d": ()}))
    [1, 'c']
    """
    if isinstance(tree, _LEAF) or not isinstance(tree, Mapping | list | tuple):
        yield tree
        return
    for child in tree.values() if isinstance(tree, Mapping) else tree:
        yield from values_in(child)


def flat(tree: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value with its path; lists and empty mappings are values.

    >>> list(flat({"a": {"b": 1}, "c": [2]}))
    [(('a', 'b'), 1), (('c',), [2])]
    """
    for name, value in tree.items():
        if not isinstance(value, _LEAF) and isinstance(value, Mapping) and value:
            yield from flat(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value


def leaves(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is not a mapping; empty mappings are skipped.

    >>> list(leaves({"a": {"b": 1}, "c": 2}))
    [('a.b', 1), ('c', 2)]
    """
    return ((".".join(path), value) for path, value in flat(tree))


def value_at(tree: Any, path: str, otherwise: Any = None) -> Any:
    """The value at a dotted path of a tree; `otherwise` if there is none."""
    for part in path.split("."):
        if not isinstance(tree, (dict, Mapping)) or part not in tree:
            return otherwise
        tree = tree[part]
    return tree


def prefixes(path: str) -> Iterator[str]:
    """The path and its parents, longest first."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree, merged from several; later trees override earlier ones.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    result: dict[str, Any] = {}
    for name, value in (entry for tree in trees for entry in tree.items()):
        below = result.get(name, {})
        inside = not isinstance(value, _LEAF) and isinstance(value, Mapping) and isinstance(below, Mapping)
        result[name] = merged(below, value) if inside else value
    return result


def completed(tree: Mapping[str, Any], absent: Mapping[str, Any]) -> dict[str, Any]:
    """A tree, with defaults for entries that are absent or null.

    >>> completed({"a": {"b": 1}, "d": None, "e": 0}, {"a": {"b": 2, "c": 3}, "d": 4, "e": 5})
    {'a': {'b': 1, 'c': 3}, 'd': 4, 'e': 0}
    """
    result = dict(tree)
    for name, value in absent.items():
        there = result.get(name)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            result[name] = completed(there, value)
        elif there is None:
            result[name] = value
    return result


def tree_of(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The tree of values by path; a value below another one replaces it."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        at = found
        for name in path[:-1]:
            if not isinstance(at.get(name), dict):
                at[name] = {}
            at = at[name]
        at[path[-1]] = value
    return found


def same(one: Any, two: Any) -> bool:
    """Whether two values are equal as JSON, where true is not 1.

    >>> same([1, 2], [1.0, 2]), same([1], [1, 2]), same({"a": [1]}, {"a": [True]})
    (True, False, False)
    """
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return one == two and isinstance(one, bool) == isinstance(two, bool)


def changed(before: Mapping[K, Any], after: Mapping[K, Any], missing: Any = None) -> Iterator[tuple[K, Any, Any]]:
    """The keys whose values differ between two mappings, with both values."""
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, missing), after.get(key, missing)
        if not same(old, new):
            yield key, old, new


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """The values of each key, in order.

    >>> grouped((len(word), word) for word in ("a", "to", "i"))
    {1: ['a', 'i'], 2: ['to']}
    """
    found: dict[K, list[V]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def portions(items: Iterable[tuple[V, int]], most: int | None, count: int | None = None) -> Iterator[list[V]]:
    """Items with their sizes, in groups of at most `most` in all and at most `count` items; a larger one is alone.

    >>> list(portions([("a", 2), ("b", 2), ("c", 5), ("d", 1), ("e", 1)], 4))
    [['a', 'b'], ['c'], ['d', 'e']]
    """
    held: list[V] = []
    total = 0
    for item, size in items:
        if held and ((most is not None and total + size > most) or len(held) == count):
            yield held
            held, total = [], 0
        held.append(item)
        total += size
    if held:
        yield held


def even_runs(count: int, step: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """The longest stretches (start, end) of items that differ by equal steps.

    Args:
        step: how the item after this one differs from it; None: such two are in no stretch together.

    >>> numbers = [1, 2, 3, 7, 9]
    >>> list(even_runs(5, lambda at: numbers[at + 1] - numbers[at]))
    [(0, 3), (3, 5)]
    """
    start = 0
    while start < count:
        first, end = step(start) if start + 1 < count else None, start + 1
        while first is not None and end < count and step(end - 1) == first:
            end += 1
        yield start, end
        start = end


def plain(data: Any) -> Any:
    """Mappings and sequences of any kind as dicts and lists, ready for JSON."""
    if isinstance(data, _LEAF):
        return data
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return data


def text_of(value: Any) -> str:
    """A value as a mapping file writes it, on one line.

    >>> text_of({"rotary": ["pairs", "halves"]}), text_of(True), text_of("vocab hidden")
    ('{rotary: [pairs, halves]}', 'true', 'vocab hidden')
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {text_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
