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

from engine.assets.tokenizer_read import NORMAL, USER_DEFINED, Pieces

_BYTE = "<(?=0x[0-9A-F]{2}>)"  # the start of a byte's name; a text that is such a name is cut behind it


def symbols_of(pieces: Pieces, names: list[str]) -> list[str]:
    """The symbols that SentencePiece finds in texts, longest first: not those that are renamed, or hold a space, which
    no normalised text does."""
    found = zip(pieces.texts, pieces.types, names, strict=True)
    texts = (text for text, kind, name in found if kind == USER_DEFINED and text == name and " " not in text)
    return sorted(texts, key=lambda text: (-len(text), text))


def never_made(backend: Mapping[str, Any], pieces: Pieces) -> set[int]:
    """Ordinary pieces that joins never make, since other joins come first."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(json.dumps({**backend, "added_tokens": [], "normalizer": None, "post_processor": None}))
    vocab = backend["model"]["vocab"]
    kinds = zip(pieces.texts, pieces.types, strict=True)
    ordinary = [(text, vocab.get(text)) for text, kind in kinds if kind == NORMAL]
    return {index for text, index in ordinary if index is not None and bare.encode(text).ids != [index]}


def cut_at(backend: Mapping[str, Any], symbols: list[str]) -> dict[str, Any]:
    """A tokenizer.json, in which symbols are added tokens, with cuts in their place."""
    cuts = [_split("|".join(map(re.escape, symbols)), "Isolated")] if symbols else []
    if backend["model"]["byte_fallback"]:
        cuts.append(_split(_BYTE, "MergedWithPrevious"))
    return {
        **backend,
        "added_tokens": [token for token in backend["added_tokens"] if not token["normalized"]],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "model": {**backend["model"], "ignore_merges": True},
    }


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
