"""Tokens that files beside a SentencePiece model name: those that were added to it, and pieces that have new names.

They are what transformers saves of a slow tokenizer with the model. Without them a chat's tokens would be cut up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.assets.ready_ids import ADDED, MAP, SETTINGS, numbered
from engine.formats.configs import json_object
from engine.storage.store import File, Store

_FLAGS = ("special", "lstrip", "rstrip", "single_word")


def tokens_beside(store: Store, names: Sequence[str]) -> tuple[dict[int, dict[str, Any]], dict[str, bytes]]:
    """The tokens with their flags by id, and the files that name them.

    Raises:
        EngineError: E3xx for a file that cannot be read.
    """
    files: dict[str, bytes] = {}
    for name in (MAP, SETTINGS, ADDED):
        if name in names:
            with File(store, name).open() as file:
                files[name] = file.read()
    objects = {name: json_object(data, store.place(name)) for name, data in files.items()}
    settings = {**objects.get(MAP, {}), **objects.get(SETTINGS, {})}
    table = settings.get("added_tokens_decoder")
    flags = {int(key): one for key, one in table.items() if key.isdecimal()} if isinstance(table, Mapping) else {}
    roles = numbered({key: value for key, value in settings.items() if key != "added_tokens_decoder"}, {})
    found: dict[int, dict[str, Any]] = {}
    for token, number in numbered(settings, objects.get(ADDED, {})).items():
        if number is not None:
            said = {"special": token in roles, **flags.get(number, {})}
            found[number] = {"content": token, **{flag: said.get(flag) is True for flag in _FLAGS}}
    return found, files
