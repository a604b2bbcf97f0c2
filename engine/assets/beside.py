"""What files beside a SentencePiece model say of its tokens.

transformers saves a slow tokenizer as the model, and the tokens that were added to it or have new names in other files:
without these a chat's tokens would be cut up. A fast tokenizer is saved with the model too, which some programs read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.assets.ready_ids import ADDED, MAP, SETTINGS, numbered
from engine.assets.tokenizer_read import read_file
from engine.formats.configs import json_object
from engine.storage.store import Store

_FLAGS = ("special", "lstrip", "rstrip", "single_word")


def tokens_beside(store: Store, names: Sequence[str]) -> tuple[dict[int, dict[str, Any]], dict[str, bytes]]:
    """The tokens with their flags by id, and the files that name them.

    Raises:
        EngineError: E501 for a file that is too large, E3xx for one that cannot be read.
    """
    files: dict[str, bytes] = {}
    for name in (MAP, SETTINGS, ADDED):
        if name in names:
            files[name] = read_file(store, name)
    objects = {name: json_object(data, store.place(name)) for name, data in files.items()}
    settings = {**objects.get(MAP, {}), **objects.get(SETTINGS, {})}
    table = settings.get("added_tokens_decoder")
    flags = dict(table) if isinstance(table, Mapping) else {}
    roles = numbered({key: value for key, value in settings.items() if key != "added_tokens_decoder"}, {})
    found: dict[int, dict[str, Any]] = {}
    for token, number in numbered(settings, objects.get(ADDED, {})).items():
        if number is not None:
            own = flags.get(str(number))
            said = {"special": token in roles, **(own if isinstance(own, Mapping) else {})}
            found[number] = {"content": token, **{flag: said.get(flag) is True for flag in _FLAGS}}
    return found, files


def other_ids(model: bytes, ids: Mapping[str, int]) -> list[str]:
    """A notice if a model gives tokens other ids than the tokenizer.json beside it."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        pieces = [piece.piece for piece in ModelProto.FromString(model).pieces]
    except DecodeError:
        return []  # of another kind, such as Llama 3's
    found = [(piece, index) for index, piece in enumerate(pieces) if ids.get(piece, index) != index]
    told = f"`{found[0][0]}` is {found[0][1]} and not {ids[found[0][0]]}" if found else ""
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    why = "programs that read it first, such as llama.cpp, would give other ids than transformers"
    return [f"tokenizer.model disagrees with tokenizer.json ({told}{more}): {why}; take one out"] if found else []
