"""The names of an unknown checkpoint as patterns: numbers that vary become placeholders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.errors import EngineError
from engine.language.documents import grouped
from engine.language.names import PARAMS, WILD, is_number, pattern, without_numbers
from engine.planning.stored import Stored

_LAYERS = re.compile(r"h|.*(layer|block)s?")


@dataclass(frozen=True, slots=True)
class Observed:
    """Tensors of one pattern, over all files. `text` ends in `.weight` or `.bias` if the names do."""

    text: str
    placeholders: tuple[str, ...]
    stored: tuple[Stored, ...]

    @property
    def stem(self) -> str:
        """The pattern with `{param}` in place of weight or bias."""
        head, _, last = self.text.rpartition(".")
        return f"{head}.{{param}}" if head and last in PARAMS else self.text

    @property
    def param(self) -> str | None:
        return self.text.rpartition(".")[2] if self.stem != self.text else None

    @property
    def layered(self) -> bool:
        return "layer" in self.placeholders


def observe(stored: Sequence[Stored]) -> tuple[list[Observed], list[str]]:
    """Patterns in order of appearance, and names that no pattern can express.

    The first integer after `layers` or `blocks` is `{layer}`, one after `experts` is `{expert}`. Any
    other that varies gets its own placeholder; one that does not vary stays as it is.

        layers.0.mlp.experts.3.w1.weight  →  layers.{layer}.mlp.experts.{expert}.w1.weight
    """
    by_name = grouped((one.name, one) for one in stored if one.header.shape and expressible(one.name))
    hopeless = dict.fromkeys(one.name for one in stored if not one.header.shape or one.name not in by_name)
    found: dict[str, tuple[tuple[str, ...], list[Stored]]] = {}
    for names in grouped((without_numbers(name), name) for name in by_name).values():
        for name, text, placeholders in _patterns(names):
            found.setdefault(text, (placeholders, []))[1].extend(by_name[name])
    return [Observed(text, ph, tuple(listed)) for text, (ph, listed) in found.items()], list(hopeless)


def expressible(name: str) -> bool:
    """Whether a name can stand in a mapping: no braces, no wildcards, and text that UTF-8 can encode."""
    if not name or any(character in name for character in "{}" + WILD):
        return False
    try:
        name.encode()
        return pattern(name).match(name) is not None
    except (UnicodeEncodeError, EngineError):
        return False


def _patterns(names: Sequence[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, pattern, placeholders) of names that differ only in integers."""
    split = [name.split(".") for name in names]
    first = split[0]
    called: dict[int, str] = {}
    for at, part in enumerate(first):
        if not is_number(part) or at == 0:
            continue
        before = first[at - 1].lower()
        varies = len({parts[at] for parts in split}) > 1
        if "layer" not in called.values() and _LAYERS.fullmatch(before):
            called[at] = "layer"
        elif "expert" in before and "expert" not in called.values():
            called[at] = "expert"
        elif varies:
            word = re.sub(r"[^a-z0-9_]", "_", before).strip("_0123456789") or "part"
            base = f"{word}_number"
            others = [name for name in called.values() if name.startswith(base)]
            called[at] = f"{base}_{len(others) + 1}" if others else base
    result = []
    for name, parts in zip(names, split, strict=True):
        text = ".".join(f"{{{called[at]}}}" if at in called else part for at, part in enumerate(parts))
        result.append((name, text, tuple(called.values())))
    return result


@lru_cache(maxsize=4096)
def tail(text: str) -> tuple[str, ...]:
    """The parts of a pattern that distinguish tensors of a layer: after `{layer}`, without the parameter.

    >>> tail("layers.{layer}.attention.wqkv.{param}"), tail("norm.weight")
    (('attention', 'wqkv'), ('norm',))
    """
    parts = text.rpartition("{layer}.")[2].split(".")
    if len(parts) > 1 and parts[-1] in (*PARAMS, "{param}"):
        parts.pop()
    return tuple(part for part in parts if not part.startswith("{")) or tuple(parts)
