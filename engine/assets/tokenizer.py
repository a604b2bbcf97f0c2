"""A SentencePiece model as the files transformers loads without remote code.

Nothing is assumed that the model itself says: its normaliser, dummy prefix, whitespace rules,
byte fallback and user-defined symbols are read. The result is compared with SentencePiece before it
is handed out; a tokenizer that would give other ids is refused, because wrong ids are silent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from engine.assets.merges import ranked_merges
from engine.assets.pieces import BYTE, CONTROL, MODEL_TYPES, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Pieces
from engine.assets.tokenizer_check import compare
from engine.errors import EngineError, Place


def tokenizer_size(model_file: Path) -> int:
    """The number of pieces of a SentencePiece model: at most the rows of the embedding.

    Raises:
        EngineError: E501 if the file is not a SentencePiece model.
    """
    return len(_read(model_file)[0].pieces)


def convert_tokenizer(model_file: Path, spec: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files by name, whose ids equal SentencePiece's on any text.

    The names of `spec` and the model's control pieces become special tokens: written in a text they
    mean the token, where SentencePiece would spell them out.

    Args:
        model_file: a SentencePiece BPE model.
        spec: a mapping's `tokenizer` block: `bos`, `eos`, `pad` name pieces, `rename` gives reserved
            ids their names, `{92543: "<|im_start|>"}`; `add_bos` (default true) puts bos in front.

    Raises:
        EngineError: E501: not such a model, or it cannot be expressed exactly.
    """
    model, data = _read(model_file)
    place = Place(str(model_file))
    processor = _processor(data)
    pieces = Pieces.of(model)
    ids = range(len(pieces.texts))
    unused = set(compress(ids, processor.is_unused(list(ids))))
    _check_kind(model, pieces, unused, place)
    names = _renamed(pieces, spec, place)
    special = _special_ids(pieces, names)
    bos, eos, pad = (_named(spec, key, names, place) for key in ("bos", "eos", "pad"))
    special |= {names.index(token) for token in (bos, eos, pad) if token is not None}
    add_bos = bos is not None and bool(spec.get("add_bos", True))
    unk = names[pieces.types.index(UNKNOWN)]
    if spec.get("unk", unk) != unk:
        raise EngineError(
            "E501",
            f"the unknown token is not `{spec['unk']}`",
            place=place,
            got=f"`{unk}`, by the model",
            expected=f"`{spec['unk']}`, by the mapping",
            fix="Correct `tokenizer.unk` in the mapping, or leave it out.",
        )
    backend = _backend(model, pieces, names, special, unused, bos if add_bos else None, unk)
    text = json.dumps(backend, ensure_ascii=False, separators=(",", ":"))
    compare(pieces, processor, text, place)
    extra = [names[index] for index in sorted(special) if names[index] not in (bos, eos, pad, unk)]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    kept = {key: value for key, value in settings.items() if value is not None}
    mapped: dict[str, Any] = {
        key: kept[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if key in kept
    }
    return {
        "tokenizer.json": (text + "\n").encode(),
        "tokenizer.model": data,
        "tokenizer_config.json": _json(kept),
        "special_tokens_map.json": _json({**mapped, "additional_special_tokens": extra}),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read(model_file: Path) -> tuple[Any, bytes]:
    """The parsed model and the file's bytes."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    place = Place(str(model_file))
    try:
        data = model_file.read_bytes()
    except OSError as error:
        raise EngineError(
            "E501",
            "the tokenizer file cannot be read",
            place=place,
            got=error.strerror or str(error),
            fix="Check the path and its permissions.",
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
        found = f"{len(model.pieces)} pieces"
    except DecodeError:
        found = f"{len(data)} bytes that start with {data[:12]!r}"
    if not model.HasField("trainer_spec") or all(piece.type != UNKNOWN for piece in model.pieces):
        raise EngineError(
            "E501",
            "the file is not a SentencePiece model",
            place=place,
            got=found,
            expected="a tokenizer.model as SentencePiece writes it",
            fix="Give the model's own tokenizer.model; check that it was copied whole.",
        )
    return model, data


def _processor(data: bytes) -> Any:
    """SentencePiece itself, which knows better than the file which pieces it uses."""
    import sentencepiece

    sentencepiece.set_min_log_level(2)  # else it tells on stderr that a NUL piece is unused
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def _check_kind(model: Any, pieces: Pieces, unused: set[int], place: Place) -> None:
    """Refuse what `tokenizers` cannot express exactly."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    types = pieces.types
    kind = MODEL_TYPES.get(trainer.model_type, str(trainer.model_type))
    characters = {text for text in pieces.texts if len(text) == 1}
    spelled = set("".join(text for text, kind in zip(pieces.texts, types, strict=True) if kind == NORMAL))
    found: str | None = None
    if kind != "BPE":
        found = f"a {kind} model"
    elif any(_joins(pieces, pieces.texts[index]) for index in unused):
        found = f"{len(unused)} unused pieces that others are made of"
    elif unused and not trainer.byte_fallback:
        found = f"{len(unused)} unused pieces without byte fallback"
    elif trainer.byte_fallback and types.count(BYTE) != 256:
        found = f"byte fallback with {types.count(BYTE)} byte pieces"
    elif spelled - characters:
        found = f"pieces with characters that are no pieces themselves: {' '.join(sorted(spelled - characters)[:8])}"
    elif trainer.treat_whitespace_as_suffix and normalizer.add_dummy_prefix:
        found = "a dummy suffix"
    elif USER_DEFINED in types and (
        normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    ):
        # `tokenizers` would normalise the symbols' own names too
        found = f"user-defined symbols in a model that changes text first (normaliser {normalizer.name})"
    elif not normalizer.escape_whitespaces:
        found = "spaces that are not escaped"
    if found is not None:
        raise EngineError(
            "E501",
            "this kind of SentencePiece model cannot be expressed exactly",
            place=place,
            got=found,
            expected="a BPE model as InternLM trains them",
            fix="Check that the file is this model's tokenizer.",
        )


def _joins(pieces: Pieces, unused: str) -> bool:
    """Whether an unused piece can come up inside a join: only a lone character that no piece has cannot."""
    return len(unused) != 1 or any(unused in text and text != unused for text in pieces.texts)


def _renamed(pieces: Pieces, spec: Mapping[str, Any], place: Place) -> list[str]:
    """The pieces' names by id, after `rename`."""
    names = list(pieces.texts)
    for key, name in (spec.get("rename") or {}).items():
        index = int(key)
        if not 0 <= index < len(names):
            raise EngineError(
                "E501",
                f"id {index} is to be named `{name}` but the tokenizer ends before it",
                place=place,
                got=f"{len(names)} pieces",
                expected=f"more than {index}",
                fix="Give this model's tokenizer, or drop the id from `tokenizer.rename`.",
            )
        if pieces.types[index] not in (USER_DEFINED, CONTROL):
            raise EngineError(
                "E501",
                f"id {index} is to be named `{name}` but is not a reserved piece",
                place=place,
                got=f"`{pieces.texts[index]}`, which ordinary text uses",
                expected="a reserved piece",
                fix="Check the ids under `tokenizer.rename`.",
            )
        if name in names and names.index(name) != index:
            raise EngineError(
                "E501",
                f"two ids would be named `{name}`",
                place=place,
                got=f"{names.index(name)} and {index}",
                expected="one id for a name",
                fix="Check the names under `tokenizer.rename`.",
            )
        names[index] = name
    return names


def _special_ids(pieces: Pieces, names: list[str]) -> set[int]:
    """Unknown, control and renamed pieces."""
    return {
        index
        for index, (kind, text, name) in enumerate(zip(pieces.types, pieces.texts, names, strict=True))
        if kind in (UNKNOWN, CONTROL) or text != name
    }


def _named(spec: Mapping[str, Any], key: str, names: list[str], place: Place) -> str | None:
    token = spec.get(key)
    if token is not None and token not in names:
        raise EngineError(
            "E501",
            f"the {key} token `{token}` is not a piece of the tokenizer",
            place=place,
            got=f"{len(names)} pieces, of which the first are {' '.join(names[:4])}",
            expected=f"a piece `{token}`",
            fix=f"Correct `tokenizer.{key}` in the mapping.",
        )
    return None if token is None else str(token)


def _backend(
    model: Any, pieces: Pieces, names: list[str], special: set[int], unused: set[int], bos: str | None, unk: str
) -> dict[str, Any]:
    """What tokenizer.json holds."""
    # text never becomes an unused piece, but its id still means what it says: a name that no text
    # can reach (joins make pieces, and this is none), which the decoder spells out again
    spelled = {index: f"<unused {index}>" for index in sorted(unused)}
    vocab = {spelled.get(index, name): index for index, name in enumerate(names)}
    scores = {
        text: score
        for index, (text, score, kind) in enumerate(zip(pieces.texts, pieces.scores, pieces.types, strict=True))
        if kind == NORMAL and index not in unused
    }
    dummy = model.normalizer_spec.add_dummy_prefix
    back: dict[str, str] = {SPACE: " ", **{name: names[index] for index, name in spelled.items()}}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": name}, "content": content} for name, content in back.items()
    ]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if dummy:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": names[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                # SentencePiece looks for its symbols in normalised text, where a space is `▁`
                "normalized": index not in special,
                "special": index in special,
            }
            for index, kind in enumerate(pieces.types)
            if index in special or kind == USER_DEFINED
        ],
        "normalizer": _normalizer(model.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": _post_processor(bos, None if bos is None else names.index(bos)),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": ranked_merges(scores),
        },
    }


def _normalizer(spec: Any) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps}


def _post_processor(bos: str | None, bos_id: int | None) -> dict[str, Any]:
    """bos in front of each text, in the form transformers rebuilds from `add_bos_token`."""
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    if bos is None:
        return {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    begin, again = ({"SpecialToken": {"id": bos, "type_id": kind}} for kind in (0, 1))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, again, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
