"""Data of mapping files, changed in one place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import delitem, setitem
from typing import Any

Data = dict[str, Any]
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One edit of a mapping's data: its kind, where, what is done, and the data afterwards."""

    kind: str
    where: str
    what: str
    data: Data


def misspelt(name: str) -> str:
    """A name with its longest word spelt wrongly.

    >>> misspelt("layers.{layer}.attention.wo.{param}")
    'layers.{layer}.attetnion.wo.{param}'
    """
    word = max(re.findall(r"(?<![{\w])[A-Za-z_0-9]+(?![}\w])", name), key=len)
    middle = len(word) // 2 + 1
    other = word[: middle - 1] + word[middle - 1 : middle + 1][::-1] + word[middle + 1 :]
    return name.replace(word, other if other != word else f"{word}x", 1)


def texts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def get(data: Any, at: Key) -> Any:
    for key in at:
        if isinstance(data, dict) and key not in data:
            return None
        data = data[key]
    return data


def _changed(data: Data, at: Key, change: Callable[[Any, Any], None]) -> Data:
    """A copy along the path, with its end changed."""
    result = dict(data)
    here: Any = result
    for key in at[:-1]:
        here[key] = dict(here[key]) if isinstance(here[key], dict) else list(here[key])
        here = here[key]
    change(here, at[-1])
    return result


def put(data: Data, at: Key, value: Any) -> Data:
    return _changed(data, at, lambda here, key: setitem(here, key, value))


def without(data: Data, at: Key) -> Data:
    return _changed(data, at, delitem)


def shown(value: Any) -> str:
    text = str(value)
    return f"`{text if len(text) <= 120 else text[:119] + '…'}`"
