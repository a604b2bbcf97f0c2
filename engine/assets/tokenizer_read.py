"""Reads a SentencePiece model, and makes the checks that need only its file.

This is done before a run writes anything; converting takes longer, and is done during the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.storage.local import open_regular
from engine.storage.store import File, Store

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
SPACE = "▁"  # stands for a space in pieces
OWN = "Give the model's own tokenizer with --tokenizer."
OTHER_IDS = f"{OWN} If it is, its ids belong under `config` and `generation` of a mapping of your own."
FOLDER = "a folder with its tokenizer.json and no tokenizer.model."
_LARGEST = 256 << 20  # bytes of a file; a longer one is not read further, and refused


@dataclass(frozen=True)
class Pieces:
    """A model's pieces by id, extracted once: attributes of a parsed message are slow."""

    texts: list[str]
    types: list[int]
    scores: list[float]

    def and_then(self, added: list[str]) -> Pieces:
        """With tokens behind the model's own."""
        more = len(added)
        return Pieces([*self.texts, *added], [*self.types, *[CONTROL] * more], [*self.scores, *[0.0] * more])

    @classmethod
    def of(cls, model: Any) -> Pieces:
        """The pieces of a parsed `ModelProto`."""
        return cls(*map(list, zip(*((piece.piece, piece.type, piece.score) for piece in model.pieces), strict=True)))


@dataclass(frozen=True, slots=True)
class Understood:
    """A SentencePiece model, with a mapping's `tokenizer` block applied.

    Attributes:
        data: the file's bytes.
        pieces: the model's, and behind them the tokens that files beside it add.
        names: pieces by id, after `rename`.
        bos, eos, pad, unk: the names of these tokens, if the mapping has them.
        beside: tokens of which files beside the model say more than it does, by id: their names, that they are special.
    """

    model: Any
    data: bytes
    pieces: Pieces
    names: list[str]
    bos: str | None
    eos: str | None
    pad: str | None
    unk: str
    beside: Mapping[int, Mapping[str, Any]]


def understand_tokenizer(model_file: Path, spec: Mapping[str, Any]) -> Understood:
    """Read a model and check what needs only its file: its kind, its pieces, the tokens that are named.

    Args:
        spec: as for `convert_tokenizer`; `beside` has tokens by id, as `tokens_beside` finds them.

    Raises:
        EngineError: E501 when it is not such a model, or cannot be expressed exactly.
    """
    model, data = _read(model_file)
    place = str(model_file)
    pieces = Pieces.of(model)
    if not all(isinstance(text, str) for text in pieces.texts):  # protobuf keeps invalid UTF-8 as bytes
        raise no_model(place, "a piece that is not text")
    refuse_kind(_reason(model, pieces), place)
    renamed, count = {int(key): name for key, name in (spec.get("rename") or {}).items()}, len(pieces.texts)
    beside = {index: token for index, token in (spec.get("beside") or {}).items() if index not in renamed}
    pieces = pieces.and_then([beside[index]["content"] for index in sorted(beside) if index >= count])
    names = _renamed(pieces, renamed, {index: token["content"] for index, token in beside.items()}, place)
    refuse_kind(_reason_of_symbols(model, pieces, names), place)
    bos, eos, pad = (_named(spec, key, pieces, names, place) for key in ("bos", "eos", "pad"))
    unk = names[pieces.types.index(UNKNOWN)]
    if spec.get("unk", unk) != unk:
        raise wrong(f"the unknown token is not `{spec['unk']}`", place, f"`{unk}`, by the model",
                    f"`{spec['unk']}`, by the mapping",
                    f"{OWN} If it is, correct `tokenizer.unk` in the mapping, or leave it out.")  # fmt: skip
    said = {index: token for index, token in beside.items() if token["content"] == names[index]}
    told = {
        index: token
        for index, token in said.items()
        if index >= count
        or pieces.texts[index] != names[index]
        or (token["special"] and pieces.types[index] == USER_DEFINED)
    }
    return Understood(model, data, pieces, names, bos, eos, pad, unk, told)


def check_tokenizer(
    model_file: Path, spec: Mapping[str, Any], rows: int | None, config: Mapping[str, Any]
) -> Understood:
    """`understand_tokenizer`, and check that the tokenizer belongs to a model.

    Args:
        rows: the rows of the model's embedding: a tokenizer has no more pieces.
        config: config.json, overridden by the generation settings: its `bos_token_id`, `eos_token_id` and
            `pad_token_id` must be, or contain, the ids of the tokens that the mapping names.
    """
    found, place = understand_tokenizer(model_file, spec), str(model_file)
    if rows is not None and len(found.names) > rows:
        raise wrong("the tokenizer is not this model's: it has more pieces than the embedding has rows", place,
                    f"{len(found.names)} pieces", f"at most {rows}, the vocabulary size")  # fmt: skip
    for key, token in (("bos", found.bos), ("eos", found.eos), ("pad", found.pad)):
        wanted = config.get(f"{key}_token_id")
        ids = wanted if isinstance(wanted, list) else [wanted]
        if token is not None and wanted is not None and found.names.index(token) not in ids:
            raise wrong(f"the tokenizer is not this model's: `{token}` has another id than config.json says", place,
                        f"{found.names.index(token)}", f"{wanted}, the `{key}_token_id`", OTHER_IDS)  # fmt: skip
    return found


def _read(model_file: Path) -> tuple[Any, bytes]:
    """The parsed model and the file's bytes."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    with open_regular(model_file) as file:
        data = file.read(_LARGEST)
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
        found = f"{len(model.pieces)} pieces"
    except DecodeError:
        found = f"{len(data)} bytes that start with {data[:12]!r}"
    if not model.HasField("trainer_spec") or all(piece.type != UNKNOWN for piece in model.pieces):
        raise no_model(str(model_file), found)
    return model, data


def wrong(told: str, place: str, got: str, expected: str, fix: str = OWN) -> EngineError:
    """E501 for a tokenizer that was given, or lies beside a checkpoint."""
    return EngineError("E501", told, place=Place(place), got=got, expected=expected, fix=fix)


def read_file(store: Store, name: str) -> bytes:
    """A file of a tokenizer; E501 if it is larger than any, E3xx if it cannot be read."""
    with File(store, name).open() as file:
        if file.state.size > _LARGEST:
            raise wrong(
                "a file of the tokenizer is too large", store.place(name), f"{file.state.size} bytes",
                f"at most {_LARGEST}", "Give the model's own tokenizer.",
            )  # fmt: skip
        return file.read()


def no_model(place: str, found: str, message: str = "the file is not a SentencePiece model") -> EngineError:
    """E501 for a file that SentencePiece did not write or cannot read."""
    return wrong(message, place, found, "a tokenizer.model that SentencePiece wrote",
                 f"Give the model's own tokenizer.model, copied whole; or {FOLDER}")  # fmt: skip


def _reason(model: Any, pieces: Pieces) -> str | None:
    """Why `tokenizers` cannot express a model exactly, as far as its file shows."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    types = pieces.types
    kind = MODEL_TYPES.get(trainer.model_type, str(trainer.model_type))
    characters = {text for text in pieces.texts if len(text) == 1}
    spelled = set("".join(text for text, kind in zip(pieces.texts, types, strict=True) if kind == NORMAL))
    found: str | None = None
    if kind != "BPE":
        found = f"a {kind} model"
    elif trainer.byte_fallback and types.count(BYTE) != 256:
        found = f"byte fallback with {types.count(BYTE)} byte pieces"
    elif spelled - characters:
        found = f"pieces with characters that are not pieces themselves: {' '.join(sorted(spelled - characters)[:8])}"
    elif trainer.treat_whitespace_as_suffix and normalizer.add_dummy_prefix:
        found = "a dummy suffix"
    elif normalizer.precompiled_charsmap:
        # `tokenizers` looks entries up by letter: several letters, and marks after one, would be lost
        found = f"characters that the normaliser {normalizer.name} replaces"
    elif not normalizer.escape_whitespaces:
        found = "spaces that are not escaped"
    return found


def changes_text(model: Any) -> bool:
    """Whether more than spaces that become `▁` happens to a text before it is cut into pieces."""
    return bool(model.normalizer_spec.add_dummy_prefix or model.normalizer_spec.remove_extra_whitespaces)


def _reason_of_symbols(model: Any, pieces: Pieces, names: list[str]) -> str | None:
    """Why texts cannot be cut at a model's symbols exactly, where cuts are needed (see `symbols.py`)."""
    if USER_DEFINED not in pieces.types or not changes_text(model):
        return None
    kinds = list(zip(pieces.texts, pieces.types, names, strict=True))
    symbols = [text for text, kind, _ in kinds if kind == USER_DEFINED]
    found: str | None = None
    if model.normalizer_spec.remove_extra_whitespaces and any(" " in text for text in symbols):
        found = "user-defined symbols with spaces in a model that removes spaces"
    elif any(SPACE in name for text, kind, name in kinds if kind in (UNKNOWN, CONTROL) or text != name):
        found = f"user-defined symbols, and special tokens with {SPACE}, in a model that changes text first"
    return found


def refuse_kind(found: str | None, place: str) -> None:
    if found is not None:
        raise wrong("this kind of SentencePiece model cannot be converted exactly", place, found,
                    "a BPE model as InternLM trains them",
                    f"Check that the file is this model's tokenizer. If it is, give {FOLDER}")  # fmt: skip


def _renamed(pieces: Pieces, mine: Mapping[int, str], beside: Mapping[int, str], place: str) -> list[str]:
    """The pieces' names by id, after `rename`, and what files beside the model say."""
    names = list(pieces.texts)
    for index, name in {**beside, **mine}.items():
        check = "Check names under `tokenizer.rename`."
        other = f"{OWN} If it is, correct the id under `tokenizer.rename` in the mapping."
        if index not in mine:
            check = other = (
                "Correct the files beside it; or give the model itself as --tokenizer, which takes it alone."
            )
            if index < len(names) and names[index] == name and names.index(name) == index:
                continue
        if not 0 <= index < len(names):
            told = f"id {index} is to be named `{name}` but the tokenizer ends before it"
            raise wrong(told, place, f"{len(names)} pieces", f"more than {index}", other)
        if pieces.types[index] not in (USER_DEFINED, CONTROL):
            told = f"id {index} is to be named `{name}` but is not a reserved piece"
            got = f"`{pieces.texts[index]}`, which ordinary text uses"
            raise wrong(told, place, got, "a reserved piece", other)
        if not name or any("\ud800" <= char <= "\udfff" for char in name):
            got = repr(name) if name else "an empty text"
            raise wrong(f"id {index} is to have no name", place, got, "the token's name", check)
        if name in names and names.index(name) != index:
            both = f"{names.index(name)} and {index}"
            raise wrong(f"two ids would be named `{name}`", place, both, "one id for a name", check)
        names[index] = name
    return names


def _named(spec: Mapping[str, Any], key: str, pieces: Pieces, names: list[str], place: str) -> str | None:
    token, fix = spec.get(key), f"{OWN} If it is, correct `tokenizer.{key}` in the mapping."
    if token is not None and token not in names:
        raise wrong(f"the {key} token `{token}` is not a piece of the tokenizer", place,
                    f"{len(names)} pieces, starting with {' '.join(names[:4])}", f"a piece `{token}`", fix)  # fmt: skip
    if token is not None and pieces.types[names.index(token)] == NORMAL:  # any text with it would contain the token
        raise wrong(f"the {key} token `{token}` is a piece of ordinary text", place,
                    f"`{token}`, id {names.index(token)}", "a piece that no text produces, such as a control piece",
                    fix)  # fmt: skip
    return None if token is None else str(token)
