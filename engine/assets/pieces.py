"""The words of a SentencePiece model file, and its pieces as plain lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # what a piece is
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
SPACE = "▁"  # how a space is written in pieces


@dataclass(frozen=True)
class Pieces:
    """A model's pieces by id, taken out once: an attribute of a parsed message is slow to ask for."""

    texts: list[str]
    types: list[int]

    @classmethod
    def of(cls, model: Any) -> Pieces:
        """The pieces of a parsed `ModelProto`."""
        return cls([piece.piece for piece in model.pieces], [piece.type for piece in model.pieces])
