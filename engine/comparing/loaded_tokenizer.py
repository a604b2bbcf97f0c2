"""A tokenizer as functions, from copies of its files, by whichever library knows them.

Nothing of a checkpoint is run: what only its code could load is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.oracle.load_model import quiet

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_FEWEST = 2  # tokens of a vocabulary that was read


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Functions of a tokenizer, and what is set beside them.

    Attributes:
        spoken: ids as text without special tokens.
        pair: two texts as one sequence.
        added: tokens that were added to the vocabulary.
        named: special tokens by what they are for.
        other: settings that change batches or text, by name.
        whole: whether special tokens are put round text as the model's users have it.
    """

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[list[int]], str]
    vocabulary: dict[str, int]
    spoken: Callable[[list[int]], str] | None = None
    pair: Callable[[str, str], list[int]] | None = None
    added: tuple[str, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    whole: bool = True


def load_tokenizer(files: Mapping[str, bytes], folder: Path) -> Tokenizer | str:
    """A tokenizer from copies of its files; why it cannot be loaded, if so."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(_without_code(name, data))
    why = ""
    for load in (_by_transformers, _by_tokenizers, _by_sentencepiece):
        try:
            return load(folder)
        except Exception as error:  # whatever the files make these libraries raise
            why = why or " ".join(str(error).split())[:160] or type(error).__name__
    return why


def _without_code(name: str, data: bytes) -> bytes:
    """A configuration without the names of classes that only code of the checkpoint has."""
    if name not in ("tokenizer_config.json", "config.json"):
        return data
    try:
        settings = json.loads(data)
    except ValueError:
        return data
    if not isinstance(settings, dict) or "auto_map" not in settings:
        return data
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "tokenizer_class")}
    return json.dumps(kept).encode()


def _by_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    with quiet():
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if len(loaded.get_vocab()) < _FEWEST:
        raise ValueError("transformers loads it with an empty vocabulary")
    named = {name: getattr(loaded, name, None) for name in TOKENS}
    more = sorted({str(token) for token in loaded.all_special_tokens} - {str(t) for t in named.values()})
    whole = getattr(loaded, "backend_tokenizer", None)  # what programs do that use it without transformers
    kept = {name: getattr(whole, name, None) for name in ("truncation", "padding")}
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special)),
        lambda ids: str(loaded.decode(ids)),
        dict(loaded.get_vocab()),
        lambda ids: str(loaded.decode(ids, skip_special_tokens=True)),
        lambda one, two: list(loaded(one, two)["input_ids"]),
        tuple(map(str, loaded.added_tokens_decoder.values())),
        {
            **{name: None if token is None else str(token) for name, token in named.items()},
            "other special tokens": more,
        },
        {
            **kept,
            **{name: getattr(loaded, name, None) for name in ("padding_side", "truncation_side", "model_max_length")},
        },
    )


def _by_tokenizers(folder: Path) -> Tokenizer:
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special).ids),
        lambda ids: str(loaded.decode(ids, skip_special_tokens=False)),
        dict(loaded.get_vocab()),
    )


def _by_sentencepiece(folder: Path) -> Tokenizer:
    import sentencepiece

    loaded = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
    pieces = {loaded.id_to_piece(i): i for i in range(loaded.get_piece_size())}
    return Tokenizer(
        lambda text, _: list(loaded.encode(text)), lambda ids: str(loaded.decode(ids)), pieces, whole=False
    )
