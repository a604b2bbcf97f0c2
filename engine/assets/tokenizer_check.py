"""Does a converted tokenizer give SentencePiece's ids?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.assets.pieces import NORMAL, SPACE, USER_DEFINED, Pieces
from engine.errors import EngineError, Place


def _probes(pieces: Pieces) -> Iterator[str]:
    """Texts on which converted tokenizers are known to go wrong, and runs and joins of the model's own pieces."""
    yield from ("Hello", " Hello", "Hello  world ", "   ", "\n\n\t x\r\n", "1234567890", "a\x00b\x1f\x7f", "▁a ▁▁b")
    yield from (
        "你好，世界！ 書生·浦语",
        "naïve café e\u0301",
        "👩\u200d👩\u200d👧 🏳️\u200d🌈 \U0010fffd",
        "Ａ①ﬁ\u3000\xa0\u200b—",
    )
    texts = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind in (NORMAL, USER_DEFINED)]
    step = max(1, len(texts) // 997)
    some = [text.replace(SPACE, " ") for text in texts[::step]]
    yield "".join(some)
    yield "".join(left + right for left, right in zip(some, reversed(some), strict=True))
    for char in " -=\nae哈":
        yield from (char * count for count in (2, 3, 5, 7, 11, 23, 100, 301))


def compare(pieces: Pieces, theirs: Any, backend: str, place: Place) -> None:
    """Encode with SentencePiece and with the result; other ids are an error, not a surprise later."""
    from tokenizers import Tokenizer

    ours = Tokenizer.from_str(backend)
    # specials are matched in text on purpose, and a renamed piece has lost its old spelling
    known = {token.content: index for index, token in ours.get_added_tokens_decoder().items()}
    apart = {token for token, index in known.items() if pieces.types[index] != USER_DEFINED} | {
        text
        for text, kind in zip(pieces.texts, pieces.types, strict=True)
        if kind == USER_DEFINED and text not in known
    }
    for text in _probes(pieces):
        for token in apart:
            text = text.replace(token, " ")
        got, expected = ours.encode(text, add_special_tokens=False).ids, theirs.encode(text)
        if got != expected:
            at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), 0)
            raise EngineError(
                "E501",
                "the converted tokenizer would give other ids than SentencePiece",
                place=place,
                got=f"{got[at : at + 8]} at position {at} of {text[:40]!r}",
                expected=f"{expected[at : at + 8]}",
                fix="Report it with the tokenizer file; run without it to convert the weights.",
            )
