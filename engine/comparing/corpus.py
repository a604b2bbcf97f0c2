"""Texts and conversations on which two tokenizers, or two chat templates, are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_FILE = Path(__file__).with_suffix(".yaml")


@cache
def _corpus() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(_FILE.read_text("utf-8"))
    return loaded


def texts(names: Sequence[str], pieces: Sequence[str]) -> Iterator[str]:
    """Texts of many kinds, the names of special tokens inside text, and joins of a vocabulary's own pieces.

    Args:
        names: of special tokens, of both sides.
        pieces: a vocabulary.
    """
    yield from _corpus()["texts"]
    for name in names:
        yield from (name, f"a {name} b", f"a{name}b", f"{name}{name}")
    step = max(1, len(pieces) // 500)
    some = [piece.replace("▁", " ").replace("Ġ", " ") for piece in pieces[::step]]
    for start in range(0, len(some), 20):
        yield "".join(some[start : start + 20])
        yield " ".join(some[start : start + 20])


def conversations() -> dict[str, dict[str, Any]]:
    """By name: `messages`, `tools`, and whether the assistant is `speaking` next."""
    found: dict[str, dict[str, Any]] = _corpus()["conversations"]
    return found
