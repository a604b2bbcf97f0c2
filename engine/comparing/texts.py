"""Texts by which two tokenizers are compared: of many kinds, and of what the two name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Files = Mapping[str, bytes]
MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MOST = 200  # merges, and strings, that are tried
_STEPS = ("normalizer", "pre_tokenizer", "decoder")


def named_texts(ours: Files, theirs: Files) -> list[str]:
    """Texts with the strings that steps of either tokenizer.json name, if these steps differ, and without them."""
    try:
        sides = [json.loads(files[MODELS[0]]) for files in (ours, theirs)]
        unlike = [side.get(step) for step in _STEPS for side in sides if sides[0].get(step) != sides[1].get(step)]
    except (KeyError, ValueError, AttributeError):
        return []
    named = dict.fromkeys(text for step in unlike for text in _strings(step))
    return [text for name in [*named][:_MOST] for text in (name, f"a{name}b", f"a {name} b")]


def _strings(step: Any) -> Iterator[str]:
    """
    >>> list(_strings({"type": "Replace", "pattern": {"String": "’"}, "content": "'"}))
    ['’', "'"]
    """
    for key, value in step.items() if isinstance(step, dict) else enumerate(step if isinstance(step, list) else ()):
        if isinstance(value, str) and key != "type":
            yield value
        elif not isinstance(value, str):
            yield from _strings(value)


def unlike_merges(ours: Files, theirs: Files) -> list[str]:
    """Texts of merges that differ or are in another order, also in combination with competing merges."""
    sides = []
    for files in (ours, theirs):
        try:
            merges = json.loads(files[MODELS[0]])["model"]["merges"]
            pairs = [(one, two) for one, two in (m if isinstance(m, list) else m.split(" ") for m in merges)]
            sides.append([*dict.fromkeys(reversed(pairs))][::-1])  # of a repeated merge, the last one counts
        except (KeyError, ValueError, TypeError, AttributeError):
            return []
    unlike = [pair for both in zip(*sides, strict=False) if both[0] != both[1] for pair in both]
    unlike += [pair for side in sides for pair in side[min(map(len, sides)) :]]
    every = [*dict.fromkeys(unlike)]
    pairs, first = every[:_MOST], {pair[0]: pair for pair in every}
    rivals = [one + two + first[two][1] for one, two in every if two in first][:_MOST]  # of two, the earlier is merged
    begins, ends = ({pair[at]: pair for pair in reversed(sides[0])} for at in (0, 1))
    beside = [one + two + begins[two][1] for one, two in pairs if two in begins]
    beside += [ends[one][0] + one + two for one, two in pairs if one in ends]
    words = [
        text.replace("▁", " ").replace("Ġ", " ") for text in [*("".join(pair) for pair in pairs), *beside, *rivals]
    ]
    return [text for word in words for text in (word, f"a{word}", f"{word}{word}")] + ["".join(words)]


def texts(names: Sequence[str], pieces: Sequence[str]) -> Iterator[str]:
    """Texts of many kinds, names of special tokens inside text, and joined pieces of a vocabulary.

    Args:
        names: special tokens of both sides.
        pieces: the tokens of a vocabulary.
    """
    yield from yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text("utf-8"))
    for name in names:
        yield from (name, f"a {name} b", f"a{name}b", f"{name}{name}")
    step = max(1, len(pieces) // 500)
    some = [piece.replace("▁", " ").replace("Ġ", " ") for piece in pieces[::step]]
    for start in range(0, len(some), 20):
        yield "".join(some[start : start + 20])
        yield " ".join(some[start : start + 20])
