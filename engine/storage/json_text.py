"""Reads all JSON from outside: accepts only what can be written again, shown, and computed with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

_MOST_DIGITS = 64  # a float holds any such number; transformers itself writes 31 digits
_DEEPEST = 100  # levels: Python since 3.12 reads ten thousand, and no function that calls itself follows them
_LONG = b"0" * (_MOST_DIGITS + 1)
_DIGITS = bytes(48 if 48 <= byte <= 57 else byte for byte in range(256))  # each digit → 0


def parse_json(raw: bytes, *, own: bool = False) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        own: for a file that only the engine writes: also refuse a text with NUL or half a character.

    Raises:
        ValueError: for invalid JSON, a key that occurs twice or holds half a character, a number of more
            than 64 digits or too large for a float, and too deep nesting. Its text says which.
    """
    long = _number if _LONG in raw.translate(_DIGITS) else None
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=long, parse_float=_finite)
        if raw.count(b"[") + raw.count(b"{") > _DEEPEST:
            _check_depth(value)
        if own and b"\\u" in raw:
            _check_text(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if not "".join(result).isascii():
        "".join(result).encode()  # half a character is a ValueError
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _number(text: str) -> int:
    if len(text.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is beyond what a float holds")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST + 1):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [value for values in inside for value in values]
    if level:
        raise RecursionError


def _check_text(value: Any) -> None:
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict):
            stack += one
            stack += one.values()
        elif isinstance(one, list):
            stack += one
        elif isinstance(one, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in one):
            raise ValueError("a text holds NUL or half a character")


def as_data(value: Any) -> Any:
    """A dataclass and its contents as JSON-ready data: a number that is not finite becomes None.

    >>> as_data((1.5, float("inf")))
    [1.5, None]
    """
    if is_dataclass(value):
        return {one.name: as_data(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compact_json(data: Any, width: int = 120) -> str:
    """JSON with a line for each value, except lists and objects that fit on one; ends with a newline.

    >>> print(compact_json({"a": [1, 2], "b": {}}, 8), end="")
    {
     "a": [
      1,
      2
     ],
     "b": {}
    }
    """

    def put(value: Any, indent: int, room: int) -> str:
        flat = json.dumps(value, ensure_ascii=False)
        if not isinstance(value, (dict, list)) or not value or (len(flat) <= room and indent > 0):
            return flat
        pad, end = "\n" + " " * (indent + 1), "\n" + " " * indent
        if isinstance(value, list):
            return "[" + ",".join(pad + put(item, indent + 1, width - indent - 2) for item in value) + end + "]"
        keys = [json.dumps(str(key), ensure_ascii=False) + ": " for key in value]
        items = zip(keys, value.values(), strict=True)
        body = ",".join(pad + key + put(item, indent + 1, width - indent - 2 - len(key)) for key, item in items)
        return "{" + body + end + "}"

    return put(data, 0, width) + "\n"
