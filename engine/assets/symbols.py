"""User-defined symbols in a SentencePiece model that changes text first: a dummy prefix, spaces that it removes.

`tokenizers` finds added tokens in normalised text by their normalised names, and would put the prefix before these
too. So the text is cut at the symbols after it is normalised, and a symbol that was cut out is found whole in the
vocabulary (`ignore_merges`). All else that is cut out must then be found there only if joins would make it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.assets.tokenizer_read import BYTE, NORMAL, USER_DEFINED, Pieces

_BYTE = ("<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">")  # the name of a byte's piece, which a text may be too


def symbols_of(pieces: Pieces, names: list[str]) -> list[str]:
    """The symbols that SentencePiece finds in texts, longest first: not those that are renamed, or hold a space, which
    no normalised text does."""
    found = zip(pieces.texts, pieces.types, names, strict=True)
    texts = (text for text, kind, name in found if kind == USER_DEFINED and text == name and " " not in text)
    return sorted(texts, key=lambda text: (-len(text), text))


def with_cuts(backend: Mapping[str, Any], symbols: list[str], seam: int) -> dict[str, Any]:
    """A tokenizer.json, in which symbols are added tokens, with cuts in their place.

    Args:
        seam: see `Joins.seam`.
    """
    cuts = [_split("|".join(map(re.escape, symbols)), "Isolated")] if symbols else []
    if backend["model"]["byte_fallback"]:
        cuts.append(_split(rf"\A{''.join(_BYTE[:seam])}(?={''.join(_BYTE[seam:])}\z)", "MergedWithPrevious"))
    return {
        **backend,
        "added_tokens": [token for token in backend["added_tokens"] if not token["normalized"]],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "model": {**backend["model"], "ignore_merges": True},
    }


class Joins:
    """What the joins of a tokenizer.json make of texts, with nothing before or after them."""

    def __init__(self, backend: Mapping[str, Any], pieces: Pieces) -> None:
        from tokenizers import Tokenizer

        plain = {**backend, "added_tokens": [], "normalizer": None, "post_processor": None}
        self._made = Tokenizer.from_str(json.dumps(plain))
        self._vocab, self._pieces = backend["model"]["vocab"], pieces

    def never(self) -> set[int]:
        """Ordinary pieces that joins never make, since other joins come first."""
        ids = {text: self._vocab[text] for text in self._of(NORMAL) if text in self._vocab}
        return {index for text, index in ids.items() if self._made.encode(text).ids != [index]}

    def seam(self) -> int:
        """Where a text that is the name of a byte's piece can be cut, so that it is not taken for the piece: no join
        crosses this place in any of them. 0 if there is no such place."""
        seams = set(range(1, len(_BYTE)))
        for text in self._of(BYTE):
            seams &= {end for _, end in self._made.encode(text).offsets}
        return min(seams, default=0)

    def _of(self, wanted: int) -> list[str]:
        return [text for text, kind in zip(self._pieces.texts, self._pieces.types, strict=True) if kind == wanted]


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
