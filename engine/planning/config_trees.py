"""Configurations as trees: the values at dotted paths, and trees laid over each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.language.documents import flat


def leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is not a mapping, empty ones aside.

    >>> list(leaves({"a": {"b": 1}, "c": 2}))
    [('a.b', 1), ('c', 2)]
    """
    return ((".".join(path), value) for path, value in flat(tree))


def value_at(tree: Any, path: str, otherwise: Any = None) -> Any:
    """What a tree has at a dotted path; `otherwise` where it has nothing."""
    for part in path.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return otherwise
        tree = tree[part]
    return tree


def prefixes(path: str) -> Iterator[str]:
    """The path and those it lies below, longest first."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Trees in one, of its own; what the last says counts.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    result: dict[str, Any] = {}
    for name, value in (entry for tree in trees for entry in tree.items()):
        below = result.get(name, {})
        result[name] = merged(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return result


def completed(tree: Mapping[str, Any], absent: Mapping[str, Any]) -> dict[str, Any]:
    """A tree, with what stands for each entry that is absent or null.

    >>> completed({"a": {"b": 1}, "d": None}, {"a": {"b": 2, "c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    result = dict(tree)
    for name, value in absent.items():
        there = result.get(name)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            result[name] = completed(there, value)
        elif there is None:
            result[name] = value
    return result
