"""generation_config.json: the ids of bos, eos and padding tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.errors import EngineError, Place

GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_config(spec: Mapping[str, Any], config: Mapping[str, Any]) -> bytes:
    """The file's bytes: the mapping's `generation` block; ids that are missing or null come from config.json.

    Without the file, transformers would use the ids of config.json. These lack a chat model's end of turn,
    so generation would run past the answer.

    >>> generation_config({"eos_token_id": [2, 5]}, {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 8})
    b'{\\n  "bos_token_id": 1,\\n  "eos_token_id": [\\n    2,\\n    5\\n  ]\\n}\\n'

    Raises:
        EngineError: E502 if a token id is not one of the model's.
    """
    ids = {key: config[key] for key in TOKENS if config.get(key) is not None}
    settings = {**ids, **{key: value for key, value in spec.items() if value is not None}}
    check_tokens(settings, config.get("vocab_size"))
    return as_json(settings)


def check_tokens(settings: Mapping[str, Any], rows: int | None, place: Place | None = None) -> None:
    """E502 for the first bos, eos or pad id of generation settings that is not one of the model's."""
    for key in TOKENS:
        value = settings.get(key)
        for token in value if isinstance(value, list | tuple) else [value]:
            known = type(token) is int and token >= 0 and (rows is None or token < rows)
            if token is not None and not known:
                raise EngineError(
                    "E502",
                    f"`{key}` of the generation settings is not a token of this model",
                    place=place,
                    got=repr(token),
                    expected="a token id" if rows is None else f"an id from 0 to {rows - 1}",
                    fix="Correct `generation` in the mapping, or use the mapping of the model at hand."
                    if place is None
                    else "Correct the file, or give the model's own.",
                )


def within(generation: Mapping[str, Any], rows: int | None) -> tuple[dict[str, Any], list[str]]:
    """The generation settings without token ids beyond the embedding's rows, and a notice about those."""
    kept: dict[str, Any] = {}
    lost: list[int] = []
    for key, value in generation.items():
        ids = [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, int)]
        beyond = [t for t in ids if rows is not None and t >= rows] if key.endswith("_token_id") else []
        lost += beyond
        if not beyond:
            kept[key] = value
        elif left := [t for t in ids if t not in beyond]:
            kept[key] = left
    if not lost:
        return kept, []
    told = ", ".join(map(str, lost))
    return kept, [
        f"token ids {told} of the mapping's generation settings are beyond the vocabulary of {rows}; left out"
    ]


def as_json(data: Mapping[str, Any]) -> bytes:
    """JSON as transformers writes it: sorted keys, two spaces, a final newline; E502 for what JSON cannot hold."""
    try:
        return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise EngineError("E502", "a configuration value cannot be written as JSON", got=str(error),
                          fix="Check `config` and `generation` in the mapping.") from error  # fmt: skip
