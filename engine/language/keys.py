"""Types and ranges of values, and the declarations of configuration keys in a mapping or layout.

Options and configuration keys use the same words for types and ranges. A key is written once, as a dotted
path; names with the same declaration may share an entry: `use_cache auto_map: {ignored: …}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from engine.errors import EngineError, Place
from engine.language.documents import Document, Table, leaves, same

_AS_WRITTEN = ("why", "ignored", "noted", "default", "same_as", "comes_with", "unless", "added")


@dataclass(frozen=True, slots=True)
class Limits:
    """The allowed values: of one of `types`, and, for a number, in the range. No types: anything finite."""

    types: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    above: float | None = None

    def __str__(self) -> str:
        """The allowed values, in words.

        >>> str(Limits(("integer", "null"), min=1)), str(Limits(("number",), above=0))
        ('a whole number or null, at least 1', 'a number, above 0')
        """
        words = [" or ".join(WORDS[kind] for kind in self.types) or "a finite value"]
        told = (("at least", self.min), ("above", self.above), ("at most", self.max))
        return ", ".join(words + [f"{word} {number}" for word, number in told if number is not None])

    def fits(self, value: Any) -> bool:
        """Whether a value has an allowed type and is in the range.

        >>> limits = Limits(("number",), above=0)
        >>> [limits.fits(v) for v in (1e6, 10000, 0, -1, float("nan"), float("inf"), "1e6", True, None)]
        [True, True, False, False, False, False, False, False, False]
        """
        if not _finite(value):
            return False
        if self.types and not any(_CHECKS[kind](value) for kind in self.types):
            return False
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        low = (self.min is None or value >= self.min) and (self.above is None or value > self.above)
        return low and (self.max is None or value <= self.max)

    def taken(self, value: Any) -> Any:
        """The value for expressions: 0 and 1 become false and true if only a boolean is allowed."""
        logical = "boolean" in self.types and "integer" not in self.types
        return bool(value) if logical and _CHECKS["boolean"](value) else value

    def written(self, value: Any) -> Any:
        """The value for a file, with the types that strict readers expect: 1.0 for a number, and true for a boolean.

        >>> number, either = Limits(("number", "null")), Limits(("number", "integer"))
        >>> number.written(10000), number.written(None), either.written(2), Limits(("boolean",)).written(1)
        (10000.0, None, 2, True)
        """
        numeric = "number" in self.types and "integer" not in self.types
        return float(value) if numeric and _whole(value) and _finite(value) else self.taken(value)


def _finite(value: Any) -> bool:
    """Whether no number in a value is infinite, NaN or too large to be a float."""
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:
        return False


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "integer": _whole,  # the programs that read it refuse 4096.0, too
    "number": lambda value: _whole(value) or isinstance(value, float),
    "boolean": lambda value: isinstance(value, int) and value in (0, 1),  # trainers only test its truth
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, Mapping),
    "list": lambda value: isinstance(value, list | tuple),
    "integers": lambda value: isinstance(value, list | tuple) and all(map(_whole, value)),
    "null": lambda value: value is None,
}
WORDS = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a text",
    "mapping": "keys and values", "list": "a list", "integers": "a list of whole numbers", "null": "null",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Key:
    """The declaration of one configuration key, or of all keys that a pattern with `*` matches.

    Attributes:
        only: the values that can be expressed; any other is refused, because of `why`. A list of such values, for
            example one for each layer, is allowed too.
        ignored: why the value does not matter; it does matter if one of the keys of `unless` has one of its
            values.
        noted: why the key is only reported to the user.
        default: the value of an absent key.
        same_as: the key that this one is another spelling of.
        comes_with: a key that is never present without this one.
        added: the values that training adds where its own text lacks the key, unless a key of `unless` has one of its
            values; None: any.
    """

    name: str
    limits: Limits
    place: Place
    only: tuple[Any, ...] | None = None
    why: str = ""
    ignored: str | None = None
    noted: str | None = None
    default: Any = None
    same_as: str | None = None
    comes_with: str | None = None
    unless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    added: tuple[Any, ...] | None = None

    def ignores(self, config: Mapping[str, Any]) -> bool:
        """Whether its value does not matter in a configuration."""
        return self.ignored is not None and not self._counts(config)

    def adds(self, value: Any, config: Mapping[str, Any]) -> bool:
        """Whether training may add a value to the configuration that its text gives."""
        return self.added is None or any(same(value, one) for one in self.added) or self._counts(config)

    def _counts(self, config: Mapping[str, Any]) -> bool:
        return bool(self.unless) and any(value in self.unless.get(path, ()) for path, value in leaves(config))

    @property
    def decided(self) -> bool:
        """Whether nothing needs to read the key."""
        return self.only is not None or self.ignored is not None or self.noted is not None

    def allows(self, value: Any) -> bool:
        if self.only is None or any(same(value, one) for one in self.only):
            return True
        listed = isinstance(value, list | tuple) and bool(value) and None not in value
        return listed and all(map(self.allows, value))


def find_key(keys: Mapping[str, Key], path: str) -> Key | None:
    """The declaration of a path: its own, or that of a pattern."""
    return keys.get(path) or find_pattern(keys, path)


def find_pattern(keys: Mapping[str, Key], path: str) -> Key | None:
    """The declaration of the longest pattern that matches a path."""
    patterns = [name for name in keys if "*" in name and path.startswith(_start(name)) and fnmatchcase(path, name)]
    return keys[max(patterns, key=len)] if patterns else None


@cache
def _start(pattern: str) -> str:
    """The prefix of all keys that a pattern matches.

    >>> _start("id2label.[0-9]*")
    'id2label.'
    """
    return re.split(r"[*?[]", pattern, maxsplit=1)[0]


def as_declared(config: Mapping[str, Any], keys: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """A configuration to be written, each value in the type declared for its key."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        key = find_key(keys, path)
        if isinstance(value, Mapping):
            result[name] = as_declared(value, keys, f"{path}.")
        else:
            result[name] = value if key is None else key.limits.written(value)
    return result


def read_limits(body: Mapping[str, Any]) -> Limits:
    types = body.get("type", [])
    listed = types if isinstance(types, list) else [types]
    return Limits(
        tuple("null" if t is None else t for t in listed), body.get("min"), body.get("max"), body.get("above")
    )


def read_keys(document: Document) -> dict[str, dict[str, Key]]:
    """The declarations of a document with separate names (see `names_apart`), by side and path."""
    return {
        side: {
            name: Key(
                name,
                read_limits(body),
                document.place("keys", side, name),
                None if "only" not in body else tuple(body["only"]),
                **{word: body[word] for word in _AS_WRITTEN if word in body},
            )
            for name, body in (entries or {}).items()
        }
        for side, entries in (document.data.get("keys") or {}).items()
    }


def names_apart(document: Document) -> Document:
    """The document with a separate entry for every name of `keys`; E102 for a name that is declared twice."""
    data: Table = document.data
    sides = Table(at=data["keys"].at) if data.get("keys") else Table()
    for side, entries in (data.get("keys") or {}).items():
        sides[side] = found = Table()
        for names, body in (entries or {}).items():
            for name in str(names).split():
                if name in found:
                    raise EngineError(
                        "E102",
                        f"key `{name}` of `keys.{side}` is declared twice",
                        place=document.place("keys", side, names),
                        got=f"also at {found.at[name].key}",
                        fix="Keep one of them.",
                    )
                found.put(name, body, entries.at[names])
    return Document(document.file, Table({**data, "keys": sides}, data.at), document.start) if sides else document
