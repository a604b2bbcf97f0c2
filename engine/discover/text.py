"""YAML as a scaffold writes it: scalars that no name can break out of, comments of one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_PROSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,._/-]* [A-Za-z0-9_-]+")
_AXES = re.compile(r"[a-z(][a-z0-9_ ()|+]* [a-z0-9_()]+")
_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "otherwise"))
_WIDTH = 108


def scalar(value: Any) -> str:
    r"""A value in one line of ASCII; text is quoted unless it is a plain word.

    >>> print(scalar("norm.weight"), scalar("a: b\n# c"), scalar("layers.{layer}.w1.{param}"), scalar("ö"), scalar(3))
    norm.weight "a: b\n# c" "layers.{layer}.w1.{param}" "\xf6" 3
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    if _AXES.fullmatch(text):
        return text
    return f'"{"".join(_escaped(c) for c in text)}"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if " " <= char <= "~":
        return char
    code = ord(char)
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char)
    return known or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")


def shown(text: str) -> str:
    r"""A name as a comment may show it: one line, nothing that a terminal would act on.

    >>> print(shown("evil\nmapping: 2"))
    evil\nmapping: 2
    """
    escaped = "".join("\\" if c == "\\" else '"' if c == '"' else _escaped(c) for c in text)
    return escaped if len(escaped) <= 200 else escaped[:199] + "…"


def flow(value: Any) -> str:
    """A value in flow style.

    >>> flow({"mlp_letters": ["a", "b"]})
    '{mlp_letters: [a, b]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def block(key: str, value: Any, indent: str = "") -> list[str]:
    """`key: value`, in flow style where it is short, else as a block."""
    if isinstance(value, str) and _PROSE.fullmatch(value):
        return [f"{indent}{scalar(key)}: {value}"]
    line = f"{indent}{scalar(key)}: {flow(value)}"
    if len(line) <= _WIDTH or not isinstance(value, (Mapping, list, tuple)):
        return [line]
    lines = [f"{indent}{scalar(key)}:"]
    if isinstance(value, Mapping):
        for name, item in value.items():
            lines += block(name, item, indent + "  ")
    else:
        lines += [f"{indent}  - {flow(item)}" for item in value]
    return lines


def comment(text: str, indent: str = "") -> list[str]:
    """Comment lines of bounded width; the words must be safe already."""
    width = _WIDTH + 1 - len(indent)
    first, *rest = wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {first}", *(f"{indent}#   {line}" for line in rest)]


def list_of(names: Sequence[str]) -> str:
    """
    >>> list_of(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{shown(name)}`" for name in names)
