"""Converts a SentencePiece model to the files that transformers loads without remote code.

Nothing that the model itself says is assumed: its normaliser, dummy prefix, whitespace rules,
byte fallback and user-defined symbols are read. The result is compared with SentencePiece before it
is returned. A tokenizer that would give other ids is refused, because wrong ids cause no error.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from engine.assets.generation import as_json
from engine.assets.merges import ranked_merges
from engine.assets.symbols import Joins, symbols_of, with_cuts
from engine.assets.tokenizer_read import (
    CONTROL,
    FOLDER,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    Understood,
    changes_text,
    no_model,
    refuse_kind,
    understand_tokenizer,
    wrong,
)

_ALL = 1 << 30  # spaces, more than any text has


def convert_tokenizer(model_file: Path, spec: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files by name; on any text, their ids equal SentencePiece's.

    The names of `spec` and the model's control pieces become special tokens: in a text they stand for
    the token, where SentencePiece would split them into ordinary pieces.

    Args:
        model_file: a SentencePiece BPE model.
        spec: a mapping's `tokenizer` block: `bos`, `eos`, `pad` name pieces, `rename` gives names to reserved
            ids, `{92543: "<|im_start|>"}`; `add_bos` (default true) puts bos in front.

    Raises:
        EngineError: E501 when it is not such a model, or cannot be expressed exactly.
    """
    return convert_understood(understand_tokenizer(model_file, spec), spec, str(model_file))


def convert_understood(found: Understood, spec: Mapping[str, Any], place: str) -> dict[str, bytes]:
    """As `convert_tokenizer`, for a model that has been read."""
    model, data, pieces, names = found.model, found.data, found.pieces, found.names
    bos, eos, pad, unk = found.bos, found.eos, found.pad, found.unk
    processor = _processor(data, place)
    own, ids = range(processor.get_piece_size()), range(len(pieces.texts))
    unused = set(compress(own, processor.is_unused(list(own))))
    refuse_kind(_reason_of_unused(model, pieces, unused), place)
    special = {names.index(token) for token in (bos, eos, pad) if token is not None}
    special |= {i for i in ids if pieces.types[i] in (UNKNOWN, CONTROL) or pieces.texts[i] != names[i]}
    special |= found.beside.keys()
    add_bos = bos is not None and bool(spec.get("add_bos", True))
    backend = _backend(model, pieces, names, special, unused, bos if add_bos else None, unk)
    if USER_DEFINED in pieces.types and changes_text(model):
        joins = Joins(backend, pieces)
        seam = joins.seam()
        refuse_kind(None if seam else "pieces that join the names of bytes, and user-defined symbols", place)
        unused |= joins.never()
        backend = _backend(model, pieces, names, special, unused, bos if add_bos else None, unk)
        backend = with_cuts(backend, symbols_of(pieces, names), seam)
    for token in backend["added_tokens"]:
        token |= found.beside.get(token["id"], {})
    text = json.dumps(backend, ensure_ascii=False, separators=(",", ":"))
    _compare(pieces, names, processor, text, place)
    extra = [t["content"] for t in backend["added_tokens"] if t["special"] and t["content"] not in (bos, eos, pad, unk)]
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
        # llama.cpp's converter reads these two here, and not in tokenizer.json
        "add_prefix_space": bool(model.normalizer_spec.add_dummy_prefix),
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in backend["added_tokens"]
        },
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": spec.get("chat_template"),
    }
    kept = {key: value for key, value in settings.items() if value is not None}
    mapped: dict[str, Any] = {
        key: kept[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if key in kept
    }
    return {
        "tokenizer.json": (text + "\n").encode(),
        "tokenizer.model": data,
        "tokenizer_config.json": as_json(kept),
        "special_tokens_map.json": as_json({**mapped, "additional_special_tokens": extra}),
    }


def _processor(data: bytes, place: str) -> Any:
    """SentencePiece itself: unlike the file, it knows which pieces it uses."""
    import sentencepiece

    sentencepiece.set_min_log_level(2)  # else it reports on stderr that a NUL piece is unused
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise no_model(place, str(error)[:200], "SentencePiece refuses the tokenizer") from None


def _reason_of_unused(model: Any, pieces: Pieces, unused: set[int]) -> str | None:
    """Why `tokenizers` cannot express a model exactly, by the pieces that SentencePiece does not use."""
    texts = [pieces.texts[index] for index in unused]
    joined = {text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind in (NORMAL, UNUSED)}
    # what no join makes, and a single character that is in no other piece, cannot appear inside a join
    if any(one[:cut] in joined and one[cut:] in joined for one in texts for cut in range(1, len(one))) or any(
        one in text and text != one for one in texts if len(one) == 1 for text in pieces.texts
    ):
        return f"{len(unused)} unused pieces that others are made of"
    if unused and not model.trainer_spec.byte_fallback:
        return f"{len(unused)} unused pieces without byte fallback"
    return None


def _backend(
    model: Any, pieces: Pieces, names: list[str], special: set[int], unused: set[int], bos: str | None, unk: str
) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    # Text never becomes an unused piece, but its id must still decode. So it gets a name that no text can
    # reach (joins make pieces, and this is not one), which the decoder turns back into the piece.
    spelled = {index: f"<unused {index}>" for index in sorted(unused)}
    vocab = {spelled.get(index, name): index for index, name in enumerate(names)}
    scores = {
        text: score
        for index, (text, score, kind) in enumerate(zip(pieces.texts, pieces.scores, pieces.types, strict=True))
        if kind == NORMAL and index not in unused
    }
    spec = model.normalizer_spec
    back = {SPACE: " ", **{name: names[index].replace(SPACE, " ") for index, name in spelled.items()}}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": name}, "content": content} for name, content in back.items()
    ]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:  # SentencePiece strips its prefix, or all leading spaces
        start = _ALL if spec.remove_extra_whitespaces else 1
        decoders.append({"type": "Strip", "content": " ", "start": start, "stop": 0})
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
            if index not in unused and (index in special or (kind == USER_DEFINED and " " not in names[index]))
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
            "merges": written_merges(ranked_merges(scores)),
        },
    }


def written_merges(merges: list[tuple[str, str]]) -> list[str] | list[tuple[str, str]]:
    """Merges in the form that every `tokenizers` reads; only newer ones (0.20) read pairs, which may hold spaces."""
    joined = [f"{left} {right}" for left, right in merges]
    return joined if all(text.count(" ") == 1 for text in joined) else merges


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    if spec.remove_extra_whitespaces:  # `▁` in the text is stripped too, with the prefix before it
        steps.append({"type": "Replace", "pattern": {"Regex": rf"{SPACE}+\z"}, "content": ""})
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


def _probes(pieces: Pieces) -> Iterator[str]:
    """Texts on which converted tokenizers are known to fail, and runs and joins of the model's own pieces."""
    yield from ("Hello", " Hello", "Hello  world ", "   ", "\n\n\t x\r\n", "1234567890", "a\x00b\x1f\x7f")
    yield from ("▁a ▁▁b", "a▁▁", "▁")
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
    symbols = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == USER_DEFINED]
    yield from (text for one in symbols[:300] for text in (one, f"a{one}{one} <0x41>{one}b", f" {one} "))
    # For equal scores the position in the text decides, which ranks cannot express: long joins find where that matters.
    alike = _alike(pieces) or some
    draw = random.Random(0)
    if some:
        yield from ("".join(draw.choices(alike, k=9) + draw.choices(some, k=9)) for _ in range(500))
        yield from ("".join(draw.choice(draw.choice((alike, some))) for _ in range(9)) for _ in range(2000))
    for char in " -=\nae哈":
        yield from (char * count for count in (2, 3, 5, 7, 11, 23, 100, 301))


def _compare(pieces: Pieces, names: list[str], theirs: Any, backend: str, place: str) -> None:
    """Encode with SentencePiece and with the result; E501 if the ids differ."""
    from tokenizers import Tokenizer

    ours = Tokenizer.from_str(backend)
    # special tokens are matched in text on purpose, and a renamed piece no longer has its old spelling
    apart = {token.content for token in ours.get_added_tokens_decoder().values() if not token.normalized}
    apart |= {text for text, name in zip(pieces.texts, names, strict=True) if text != name}
    for text in _probes(pieces):
        for token in apart:
            text = text.replace(token, " ")
        got, expected = ours.encode(text, add_special_tokens=False).ids, theirs.encode(text)
        if got != expected:
            at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), 0)
            fix = "Report it with the tokenizer file; run without it to convert the weights."
            if _alike(pieces):  # of joins that compete, the position decides, which no ranks express
                fix = f"It has pieces of equal scores, whose order tokenizer.json cannot express: give {FOLDER}"
            raise wrong("the converted tokenizer would give other ids than SentencePiece", place,
                        f"{got[at : at + 8]} at position {at} of {text[:40]!r}", f"{expected[at : at + 8]}",
                        fix)  # fmt: skip


def _alike(pieces: Pieces) -> list[str]:
    """Pieces that share their score with another one, as text."""
    ordinary = [
        (text, score)
        for text, kind, score in zip(pieces.texts, pieces.types, pieces.scores, strict=True)
        if kind == NORMAL
    ]
    count = Counter(score for _, score in ordinary)
    return [text.replace(SPACE, " ") for text, score in ordinary if count[score] > 1]
