"""The effect of settings on a model: which of them change its function, and how."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.errors import first_of
from engine.language.documents import changed
from engine.planning.config_keys import shown

Grade = Literal["function", "cast", "told"]  # changes the result; only its precision; neither


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between two checkpoints that is not in a tensor.

    Attributes:
        part: `config`, `generation`, `tokenizer`, `chat template` or `code`.
        what: the key, file or property.
        out, ref: what each side has, in words.
        effect: what the difference does to the model.
    """

    part: str
    what: str
    out: str
    ref: str
    effect: str
    grade: Grade = "function"

    def __str__(self) -> str:
        return f"{self.part}: {self.what} is {self.out}, the reference's is {self.ref}: {self.effect}"


@cache
def _effects() -> dict[str, tuple[str, Grade]]:
    """The last part of a key → the effect of another value, and its grade."""
    loaded: dict[Grade, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return {key: (effect, grade) for grade, effects in loaded.items() for key, effect in effects.items()}


def effect_of(key: str, *, scaled: bool = False, own: frozenset[str] | None = None) -> tuple[str, Grade]:
    """The effect of another value of a configuration key.

    Args:
        scaled: whether rotary angles are scaled, so that lengths matter.
        own: the keys that transformers' class has, if it is known.
    """
    last = key.rsplit(".", 1)[-1]
    if scaled and last == "max_position_embeddings":
        return _effects()["rope_type"]
    for part in reversed(key.split(".")):
        if part in _effects():
            return _effects()[part]
    if own is not None and key not in own and key.split(".")[0] not in own:
        return "transformers has no such key for this model, and does not read it", "told"
    return "it may change what the model computes", "function"


def differing(
    part: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], said: Callable[[str], tuple[str, Grade]]
) -> list[Difference]:
    """A difference for each key whose values differ; `said` takes a key, returns the effect and its grade."""
    unlike = sorted(changed(ours, theirs))  # by key
    return [Difference(part, key, worded(one), worded(two), *said(key)) for key, one, two in unlike]


def worded(value: Any) -> str:
    """A value as its file would write it; None is an absent key."""
    return "absent" if value is None else shown(value)


def presence(one: Any, two: Any) -> tuple[str, str]:
    """Which of two sides has something: what is not there is None."""
    return both(lambda side: "absent" if side is None else "there", one, two)


def both(show: Callable[[Any], str], one: Any, two: Any) -> tuple[str, str]:
    """The values of both sides, in words."""
    return show(one), show(two)


def keys_of(name: str, here: bytes | None, there: bytes | None) -> str:
    """A file and its keys that differ; empty if it is only the template, which is compared by what it renders.

    >>> keys_of("a.json", b'{"x": 1, "y": 2}', b'{"x": 1}'), keys_of("a.json", b'{"chat_template": "x"}', b"{}")
    ('a.json (y)', '')
    """
    try:
        one, two = json.loads(here or b""), json.loads(there or b"")
        keys = [key for key in one | two if one.get(key) != two.get(key)]
    except (ValueError, TypeError, AttributeError):
        return name
    told = [shown(key).strip('"') for key in keys if key != "chat_template"]
    return f"{name} ({first_of(told, 4)})" if told else name if not keys else ""
