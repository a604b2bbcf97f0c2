"""Values that a JSON or YAML file, or an argument, should never hold: put in place of every entry in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from tests.support.depth import SOAK

# As JSON text, since some of them cannot be written by Python's own encoder.
VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "list": "[]",
    "nested list": "[[null]]",
    "object": "{}",
    "text": '"x"',
    "empty text": '""',
    "zero": "0",
    "negative": "-1",
    "fraction": "0.5",
    "400 digits": "9" * 400,
    "5,000 digits": "9" * 5000,
    "infinite": "1e999",
    "not a number": "NaN",
    "large": "1e300",
    "NUL": '"a\\u0000b"',
    "half a character": '"\\ud800"',
    "escapes": '"\\u001b[31m\\u009b2J\\u202e"',
    "deep": "[" * 3000 + "]" * 3000,
}

_MARK = "@@ here @@"


def paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in JSON data; of lists only the first entry, of objects of more than 12 only some."""
    yield at
    if isinstance(data, dict):
        for key in list(data)[:12]:
            yield from paths(data[key], (*at, key))
    elif isinstance(data, list) and data:
        yield from paths(data[0], (*at, 0))


def put(data: Any, at: tuple[Any, ...], marked: str = _MARK) -> Any:
    if not at:
        return marked
    data = copy.deepcopy(data)
    here = data
    for step in at[:-1]:
        here = here[step]
    here[at[-1]] = marked
    return data


def without(data: Any, at: tuple[Any, ...]) -> Any:
    data = copy.deepcopy(data)
    here = data
    for step in at[:-1]:
        here = here[step]
    del here[at[-1]]
    return data


EVERY = 2 if SOAK else 40  # of so many values one, another in each place


def mutated(data: Any) -> Iterator[tuple[str, bytes]]:
    """JSON texts, each with one value in the place of one entry, or without that entry."""
    import json

    for number, at in enumerate(paths(data)):
        marked = json.dumps(put(data, at))
        for name, text in VALUES.items():
            if at and (number + len(name)) % EVERY:  # all at the root
                continue
            yield f"{'.'.join(map(str, at)) or 'root'} {name}", marked.replace(json.dumps(_MARK), text).encode()
        if at:
            yield f"{'.'.join(map(str, at))} gone", json.dumps(without(data, at)).encode()
    text = json.dumps(data)
    for name, raw in (("empty", b""), ("not UTF-8", b"\xff\xfe{}"), ("cut", text.encode()[: len(text) // 2])):
        yield name, raw


ARGUMENTS = (
    "0", "-1", "99999999", "9" * 400, "9" * 5000, "1e999", "nan", "inf", "x", "\x1b[31mred", "\u202e", "\udcff",
    "a\0b", "", "/", ".", "..", "=", "=1", "a", "a=b=c", "[", "{", "x" * 100_000, "²", "٣", "1_000", "0x10", "--", "-",
)  # fmt: skip
