"""Parses values from users and programs: element types, sizes, ranks, and the types of keywords."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from engine.errors import EngineError

T = TypeVar("T")
DTYPES = ("auto", "bfloat16", "float16", "float32")
_ALSO = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16", "fp32": "float32",
         "f32": "float32", "float": "float32"}  # fmt: skip
_MOST_BYTES = 1 << 62
_MOST_BITS = 63  # of a number; Python writes none of more than 4300 digits


def dtype_name(value: object) -> str:
    """One of `DTYPES`, from a name in any common spelling, or from a torch dtype.

    >>> dtype_name("bf16"), dtype_name("torch.float16"), dtype_name("FP32")
    ('bfloat16', 'float16', 'float32')

    Raises:
        ValueError: for any other.
    """
    name = str(value).removeprefix("torch.").lower()
    name = _ALSO.get(name, name)
    if name not in DTYPES:
        near = get_close_matches(name, [*DTYPES, *_ALSO], 1)
        raise ValueError(f"there is no dtype `{value}`; there are {', '.join(DTYPES)}"
                         + (f"; did you mean `{near[0]}`?" if near else ""))  # fmt: skip
    return name


def parse_size(value: str | int) -> int:
    """Bytes from `5GB` (powers of 1000), `2GiB` (powers of 1024) or a plain number.

    >>> parse_size("5GB"), parse_size("1.5 GiB"), parse_size("500"), parse_size(500)
    (5000000000, 1610612736, 500, 500)

    Raises:
        ValueError: for anything that is not a size.
    """
    text = str(value).strip()
    match = None if isinstance(value, bool) else re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text, re.I)
    if match is None:
        raise ValueError(f"`{value}` is not a size; write it like 5GB, 2GiB, 500MB or plain bytes")
    number, letter, binary = match.groups()
    exact = float(number) * (1024 if binary else 1000) ** (" kmgt".index(letter.lower()) if letter else 0)
    if exact > _MOST_BYTES:
        raise ValueError(f"`{text[:40]}` is larger than any file can be")
    if exact < 1 or exact != int(exact):
        raise ValueError(f"`{text}` is not a file size; it must be a positive number of bytes")
    return int(exact)


def amount(nbytes: float) -> str:
    """A number of bytes for people, in powers of 1000 as is usual for file sizes.

    >>> amount(999), amount(14_482_000_000)
    ('999 B', '14.5 GB')
    """
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    units = ["kB", "MB", "GB", "TB"]
    nbytes /= 1000
    while nbytes >= 999.5 and len(units) > 1:
        nbytes /= 1000
        units.pop(0)
    return f"{nbytes:.3g} {units[0]}"


def ranks_given(ranks: Mapping[str, int] | str | None) -> dict[str, int]:
    """Ranks per dimension, from a mapping or text; E001 for anything else.

    >>> ranks_given("tp=2,pp=4")
    {'tp': 2, 'pp': 4}
    """
    if isinstance(ranks, str):
        found: dict[str, int] = {}
        for one in ranks.split(","):
            dim, _, text = (part.strip() for part in one.partition("="))
            if not dim.isidentifier() or not text.isascii() or not text.isdecimal() or len(text) > 9 or dim in found:
                raise EngineError(
                    "E001",
                    "ranks are given as a dimension and a number, each dimension once",
                    got=ranks[:100],
                    expected="tp=2,pp=4",
                    fix="The dimensions are those of the layout: `engine inspect` shows a checkpoint's.",
                )
            found[dim] = int(text)
        return found
    for dim, count in (ranks or {}).items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise EngineError(
                "E001", f"ranks of `{dim}` must be a whole number", got=repr(count)[:100], expected="1 or more"
            )
    return dict(ranks or {})


def check_keywords(options: Mapping[str, Any], takes: type) -> None:
    """TypeError for an unknown keyword, E001 for a value of the wrong type.

    Keywords with their own parser are left to it.
    """
    hints = _hints(takes)
    for name, value in options.items():
        if name not in hints:
            near = get_close_matches(name, hints, 1)
            raise TypeError(f"there is no option `{name}`" + (f"; did you mean `{near[0]}`?" if near else ""))
        if value is not None and name not in _PARSED:
            check_type(name, value, hints[name], _WANTED.get(name))
        for key, one in value.items() if isinstance(value, Mapping) else ((name, value),):
            if isinstance(one, int) and one.bit_length() > _MOST_BITS:
                raise EngineError(
                    "E001",
                    f"`{key}` cannot be used as given",
                    got=f"a number of {one.bit_length()} bits",
                    expected=f"a number of at most {_MOST_BITS} bits",
                    fix="Correct it: no size, count or setting of a model is as large.",
                )


_hints = cache(get_type_hints)


def listed(names: T | Sequence[T]) -> list[T]:
    """Several names, or one by itself."""
    return list(names) if isinstance(names, list | tuple | set | frozenset) else [cast(T, names)]


def check_type(name: str, value: object, hint: Any, wanted: str | None = None) -> None:
    """E001 for a value of another type; `wanted` describes the type in words."""
    if not _fits(value, hint):
        wanted = wanted or _in_words(hint)
        raise EngineError(
            "E001",
            f"`{name}` cannot be used as given",
            got=f"{value!r:.80}, of type {type(value).__name__}",
            expected=wanted,
            fix=f"Give `{name}` as {wanted}.",
        )


_PARSED = ("dtype", "max_shard_size", "max_memory", "workers")
_WANTED = {
    "settings": "a dict, like {'rotary': 'halves'}",
    "ranks": "a dict, like {'tp': 8}, or text like tp=8,pp=2",
    "lossy": "a list of rule names",
}


def _in_words(hint: Any) -> str:
    """
    >>> _in_words(int | None), _in_words(str | Path)
    ('a number', 'text or a path')
    """
    words = {int: "a number", bool: "True or False", str: "text", Path: "a path"}
    kinds = [one for one in get_args(hint) or (hint,) if one is not NoneType]
    return " or ".join(words.get(get_origin(one) or one, "a function" if callable(one) else str(one)) for one in kinds)


def _fits(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if kind is Any or (kind is Callable and callable(value)):
        return True
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is int) and not (
        isinstance(value, str) and kind is Sequence
    )  # fmt: skip
