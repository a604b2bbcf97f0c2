"""Mutants of values: constants, names and operators of expressions, keys and their declarations, options.

An edit is made in data of mapping files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import delitem, setitem
from typing import Any

from engine.language.documents import values_in

Data = dict[str, Any]
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One edit of a mapping's data: its kind, its place, what it does, and the data afterwards."""

    kind: str
    where: str
    what: str
    data: Data


def misspelt(name: str) -> str:
    """A name with its longest word misspelt.

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
    """A copy of `data` with the value at a path changed; unchanged parts are shared."""
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


def of_values(data: Data) -> Iterator[Change]:
    """Every edit of values that are written, read, declared or decided, except in rules."""
    for kind, part in (
        ("dim", "dims"),
        ("config expression", "config"),
        ("training-config expression", "training_config"),
    ):
        yield from _tree(data, kind, (part,))
    for name, variant in (data.get("variants") or {}).items():
        yield from _variant(data, name, variant)
    for name, option in (data.get("options") or {}).items():
        yield from _option(data, name, option)
    yield from _tree(data, "tokenizer", ("tokenizer",))
    yield from _tree(data, "generation", ("generation",))
    for part in ("even", "ignore", "refuse"):
        for number, entry in enumerate(data.get(part) or ()):
            yield Change(part, part, f"without {shown(entry)}", without(data, (part, number)))
    for side, keys in (data.get("keys") or {}).items():
        yield from _keys(data, side, keys)
    for at in (("target", "model_type"), ("target", "architecture"), ("source", "layout"), ("source", "model_types"),
               ("target", "remote_code")):  # fmt: skip
        yield from _tree(data, "about", at)
    yield from _tree(data, "chat template", ("chat_template",))
    yield from _tree(data, "expected size", ("expect",))


def _tree(data: Data, kind: str, at: Key) -> Iterator[Change]:
    """Edits that change each value of a tree, or leave out a key that is present."""
    value = get(data, at)
    where = ".".join(map(str, at))
    if isinstance(value, dict):
        for key, below in value.items():
            if below != "{{ omit }}":
                yield Change(kind, f"{where}.{key}", "left out", without(data, (*at, key)))
            yield from _tree(data, kind, (*at, key))
        return
    if isinstance(value, list):
        for number, _ in enumerate(value):
            if len(value) > 1:
                yield Change(kind, where, f"without {shown(value[number])}", without(data, (*at, number)))
            yield from _tree(data, kind, (*at, number))
        return
    expression = isinstance(value, str) and ("{{" in value or at[0] in ("dims", "variants"))
    for other in _expressions(value, _siblings(data, at)) if expression else _others(value):
        yield Change(kind, where, f"{shown(other)} instead of {shown(value)}", put(data, at, other))


def _others(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield value * 2
    elif isinstance(value, str) and value:
        yield misspelt(value) if re.search(r"[A-Za-z_0-9]", value) else value + "x"


_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|\d+\.?\d*(?:e[-+]?\d+)?|[A-Za-z_][\w.]*|==|!=|<=|>=|//|[-+*/<>|]""")
_OPERATORS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "==": "!=", "!=": "==", "<": ">=", ">": "<=", "<=": ">",
    ">=": "<", "and": "or", "or": "and", "true": "false", "false": "true", "not": "", "max": "min", "min": "max",
}  # fmt: skip
_WORDS = frozenset(
    ("if", "else", "is", "in", "defined", "none", "omit", "default", "int", "float", "string", "abs", "length", "round",
     "gcd", "present", "mapping", "sequence", "number", "integer", "boolean", "otherwise")
)  # fmt: skip


def _expressions(text: Any, names: Sequence[str]) -> Iterator[str]:
    """An expression with one token changed: another constant, operator or name, or a lost default."""
    text = str(text)
    for token in _TOKEN.finditer(text):
        for other in _tokens(token[0], names):
            yield text[: token.start()] + other + text[token.end() :]
    for default in re.finditer(r"\s*\|\s*(default\((?:[^()]|\([^()]*\))*\)|int\b)", text):
        yield text[: default.start()] + text[default.end() :]


def _tokens(word: str, names: Sequence[str]) -> Iterator[str]:
    if word[0] in "'\"":
        yield f"{word[0]}{misspelt(word[1:-1]) if word[1:-1] else 'x'}{word[0]}"
    elif word[0].isdigit():
        yield str(int(word) + 1) if word.isdigit() else repr(float(word) * 2)
    elif word in _OPERATORS:
        yield _OPERATORS[word]
    elif word[0].isalpha() and word not in _WORDS:
        yield misspelt(word)
        others = [name for name in names if name != word]
        if others:
            yield others[sum(map(ord, word)) % len(others)]


def _siblings(data: Data, at: Key) -> list[str]:
    """Names that the expressions of the same part read."""
    found: dict[str, None] = {}
    for text in values_in(get(data, at[:1])):
        if isinstance(text, str) and ("{{" in text or at[0] in ("dims", "variants")):
            words = (token[0] for token in _TOKEN.finditer(text))
            found.update(dict.fromkeys(w for w in words if w[0].isalpha() and w not in _WORDS and w not in _OPERATORS))
    return sorted(found)


def _variant(data: Data, name: str, variant: Data) -> Iterator[Change]:
    at: Key = ("variants", name)
    choices = variant["choices"]
    if "default" in variant:
        for choice in choices:
            if choice != variant["default"]:
                yield Change("variant", name, f"default {choice}", put(data, (*at, "default"), choice))
        yield Change("variant", name, "without a default", without(data, (*at, "default")))
    if isinstance(choices, dict):
        for choice, text in choices.items():
            if text == "otherwise":
                continue
            for other in _expressions(text, _siblings(data, at)):
                yield Change("variant", name, f"{choice}: {other}", put(data, (*at, "choices", choice), other))
        if len(choices) > 1:
            turned_ = dict(reversed(list(choices.items())))
            yield Change("variant", name, "its choices in another order", put(data, (*at, "choices"), turned_))


def _option(data: Data, name: str, option: Data) -> Iterator[Change]:
    at: Key = ("options", name)
    yield Change("option", name, "removed", without(data, at))
    for key, value in option.items():
        if key == "help":
            continue
        if key == "type":
            others: list[Any] = [one for one in ("integer", "number", "string", "boolean") if one != value]
        elif key == "choices":
            others = [[one for one in value if one != left] for left in value]
        elif key == "default" and option.get("choices"):
            others = [one for one in option["choices"] if one != value]
        else:
            others = [*_others(value), *([str(value)] if not isinstance(value, str) else [])]
        for other in others:
            yield Change("option", name, f"{key} {shown(other)}", put(data, (*at, key), other))


def _keys(data: Data, side: str, keys: Mapping[str, Data]) -> Iterator[Change]:
    for name, body in keys.items():
        at: Key = ("keys", side, name)
        yield Change("configuration key", f"keys.{side}.{name}", "removed", without(data, at))
        for key, value in body.items():
            if key in ("why", "noted") or (key == "ignored" and len(body) == 1):
                continue
            changed = [None] if key == "ignored" else _limits(key, value)
            for other in changed:
                new = without(data, (*at, key)) if other is None else put(data, (*at, key), other)
                yield Change("configuration key", f"keys.{side}.{name}", f"{key} {shown(other)}", new)


def _limits(key: str, value: Any) -> list[Any]:
    if key == "type":
        listed = texts(value)
        return [[one for one in listed if one != left] for left in listed] if len(listed) > 1 else ["list", "null"]
    if key == "only":
        return [[*value, "another"]]
    return list(_others(value))
