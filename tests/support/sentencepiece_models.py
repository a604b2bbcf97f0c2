"""Small SentencePiece models, trained on the spot with InternLM's flags."""

from __future__ import annotations

import io
from typing import Any

import sentencepiece

RESERVED = ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]", "——"]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "banana",
    "bandana",
    "aa",
    "aaa",
    "aaaa",
    "abab",
    "baba",
    "你好",
    "世界",
]
WORDS += ["def", "f(x):\n", "", "", "", "", "", "return", "", "x\n\n"]


def corpus() -> list[str]:
    def line(i: int) -> str:
        return " ".join(WORDS[i % len(WORDS) :] + WORDS[: i % 7]) + " " * (i % 19) + "x" + "-" * (i % 23)

    return [line(i) for i in range(300)]


def train(**changes: Any) -> bytes:
    """A small model with InternLM's flags."""
    model = io.BytesIO()
    flags: dict[str, Any] = {
        "sentence_iterator": iter(corpus()),
        "model_writer": model,
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "split_by_whitespace": False,
        "split_by_unicode_script": False,
        "user_defined_symbols": RESERVED,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(**(flags | changes))
    return model.getvalue()
