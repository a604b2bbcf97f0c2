"""Compares two tokenizers by the ids they give; each is loaded from copies of its files by a library that knows them.

No code of a checkpoint is run: a tokenizer that only its code could load is left out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.assets.ready_ids import check_prefix, panics_caught
from engine.comparing.effects import Difference, Grade, both, differing, keys_of, presence
from engine.comparing.texts import MODELS, Files, named_texts, texts, unlike_merges
from engine.oracle.load_model import quiet
from engine.planning.config_keys import shown

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_FEWEST = 2  # tokens; a smaller vocabulary was not read


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The functions of a tokenizer, and its settings.

    Attributes:
        spoken: ids → text without special tokens.
        pair: two texts → the ids of one sequence.
        added: tokens that were added to the vocabulary.
        named: special tokens by purpose.
        other: settings that affect batches or text, by name.
        whole: whether it adds special tokens around text as it does for users of the model.
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
    """A tokenizer from copies of its files, or the reason why it cannot be loaded."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(_without_code(name, data))
    why = ""
    # with tokenizer.json, nothing reads tokenizer.model instead
    for load in (_by_transformers, _by_tokenizers if MODELS[0] in files else _by_sentencepiece):
        try:
            with panics_caught():
                check_prefix(files.get(MODELS[0], b""))
                loaded = load(folder)
                for text in texts([], []):
                    loaded.encode(text, loaded.whole)
                return loaded
        except Exception as error:  # the files may make these libraries raise anything
            why = why or " ".join(str(error).split())[:160] or type(error).__name__
    return why


def _without_code(name: str, data: bytes) -> bytes:
    """A configuration without names of classes that only the checkpoint's code defines."""
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
    named = {name: None if token is None else str(token) for name, token in named.items()}
    more = sorted({*map(str, loaded.all_special_tokens)}.difference(named.values()))
    whole = getattr(loaded, "backend_tokenizer", None)  # as programs without transformers use it
    other = {name: getattr(whole, name, None) for name in ("truncation", "padding")}
    other |= {name: getattr(loaded, name, None) for name in ("padding_side", "truncation_side", "model_max_length")}
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special)),
        lambda ids: str(loaded.decode(ids)),
        dict(loaded.get_vocab()),
        lambda ids: str(loaded.decode(ids, skip_special_tokens=True)),
        lambda one, two: list(loaded(one, two)["input_ids"]),
        tuple(map(str, loaded.added_tokens_decoder.values())),
        {**named, "other special tokens": more},
        other,
    )


def _by_tokenizers(folder: Path) -> Tokenizer:
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special).ids),
        lambda ids: str(loaded.decode(ids, skip_special_tokens=False)),
        dict(loaded.get_vocab()),
        lambda ids: str(loaded.decode(ids)),
        lambda one, two: list(loaded.encode(one, two).ids),
        tuple(str(token.content) for token in loaded.get_added_tokens_decoder().values()),
    )


def _by_sentencepiece(folder: Path) -> Tokenizer:
    import sentencepiece

    loaded = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
    pieces = {loaded.id_to_piece(i): i for i in range(loaded.get_piece_size())}
    return Tokenizer(
        lambda text, _: list(loaded.encode(text)), lambda ids: str(loaded.decode(ids)), pieces, whole=False
    )


def compare_tokenizers(ours: Files, theirs: Files, names: Sequence[str]) -> list[Difference]:
    """The differences between two tokenizers, given by the folders' files; `names` are those that belong to one."""
    there = [any(name in files for name in MODELS) for files in (ours, theirs)]
    if all(ours.get(name) == theirs.get(name) for name in names) or not any(there):
        return []
    ours, theirs = (
        {name: files[name] for name in ("config.json", *names) if name in files} for files in (ours, theirs)
    )
    if not all(there):
        told = presence(*(one or None for one in there))
        return [Difference("tokenizer", "a tokenizer", *told, "without it, text cannot be turned into ids")]
    with tempfile.TemporaryDirectory(prefix="engine-") as made:
        one, two = (load_tokenizer(files, Path(made) / str(side)) for side, files in enumerate((ours, theirs)))
        if isinstance(one, str) or isinstance(two, str):
            told = both(lambda side: f"not loadable: {side}" if isinstance(side, str) else "loadable", one, two)
            return [Difference("tokenizer", "a tokenizer", *told, "its ids could not be compared")]
        merges = [*unlike_merges(ours, theirs), *named_texts(ours, theirs)]
        try:
            with panics_caught():
                found = list(_tokenizers(one, two, merges)) or list(_alone(ours, theirs, Path(made), merges))
        except Exception as error:  # a text may make these libraries raise anything
            why = f"one of the two fails on a text: {' '.join(str(error).split())[:160]}"
            return [Difference("tokenizer", "a tokenizer", why, why, "its ids could not be compared")]
    unlike = [keys_of(name, ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)]
    if not found and any(unlike):
        effect = "ids, text and special tokens are still equal for all texts tried"
        found = [Difference("tokenizer", ", ".join(filter(None, unlike)), "other bytes", "its own", effect, "told")]
    return found


def _alone(ours: Files, theirs: Files, made: Path, merges: Sequence[str]) -> Iterator[Difference]:
    """Differences for programs that read one file alone. transformers overrides `tokenizer.json` with tokens of
    other files, and does not read `tokenizer.model` beside it."""
    for name, load in zip(MODELS[:2], (_by_tokenizers, _by_sentencepiece), strict=True):
        texts = [files.get(name) for files in (ours, theirs)]
        if None not in texts and texts[0] != texts[1]:
            with suppress(Exception), panics_caught():  # whatever the files make the library raise
                for one in _tokenizers(load(made / "0"), load(made / "1"), merges):
                    yield replace(one, what=f"{one.what}, if {name} alone is read")


def _vocabularies(one: Tokenizer, two: Tokenizer) -> Iterator[Difference]:
    """Tokens whose ids differ, and ids whose tokens do."""
    moved = [token for token, number in one.vocabulary.items() if two.vocabulary.get(token, number) != number]
    if moved:
        more = f" and {len(moved) - 1} more tokens" if len(moved) > 1 else ""
        told = both(lambda side: str(side.vocabulary[moved[0]]), one, two)
        effect = "the model reads different tokens than in training"
        yield Difference("tokenizer", f"the id of {shown(moved[0])}{more}", *told, effect)
    names = [{number: token for token, number in side.vocabulary.items()} for side in (one, two)]
    alone = (one.vocabulary.keys() ^ two.vocabulary.keys()).issuperset
    if other := [i for i in names[0] if i in names[1] and alone((names[0][i], names[1][i]))]:
        more = f" and {len(other) - 1} more ids" if len(other) > 1 else ""
        told = both(lambda side: shown(side[other[0]]), *names)
        yield Difference("tokenizer", f"the token of id {other[0]}{more}", *told, "ids are decoded to different text")
    ids = [one.vocabulary[token] for token in one.added if token in one.vocabulary and token in two.vocabulary]
    if one.spoken is not None and two.spoken is not None:
        for number in ids:
            here, there = one.spoken([number]), two.spoken([number])
            if here != there:
                effect = "it is left out of text on one side only, like a special token"
                yield Difference("tokenizer", f"the text of id {number}", shown(here), shown(there), effect)
                break
    if one.pair is not None and two.pair is not None and one.encode("a", True) == two.encode("a", True):
        pairs = one.pair("one text", "and another"), two.pair("one text", "and another")
        if pairs[0] != pairs[1]:
            effect = "pairs of texts are joined differently"
            yield Difference("tokenizer", "the ids of two texts together", str(pairs[0][:8]), str(pairs[1][:8]), effect)


def _tokenizers(one: Tokenizer, two: Tokenizer, others: Sequence[str]) -> Iterator[Difference]:
    if len(one.vocabulary) != len(two.vocabulary):
        sizes = both(lambda side: f"{len(side.vocabulary):,} tokens", one, two)
        yield Difference("tokenizer", "the vocabulary", *sizes, "some ids exist on one side only")
    yield from _vocabularies(one, two)
    token: tuple[str, Grade] = ("text begins, ends or is padded with a different token", "function")
    yield from differing("tokenizer", one.named, two.named, lambda _: token)
    special = [str(name) for side in (one, two) for value in (*side.named.values(), list(side.added))
               for name in (value if isinstance(value, list) else [value]) if name]  # fmt: skip
    with_special = [True, False] if one.whole and two.whole else [False]
    pieces = [*one.vocabulary, *two.vocabulary]
    unlike: dict[str, list[tuple[str, list[int], list[int]]]] = {}
    for text in (*texts(list(dict.fromkeys(special)), pieces), *others):
        for wrapped in with_special:
            here, there = one.encode(text, wrapped), two.encode(text, wrapped)
            if here != there:
                unlike.setdefault("ids with special tokens" if wrapped else "ids", []).append((text, here, there))
            elif not wrapped and one.decode(here) != two.decode(there):
                unlike.setdefault("text from ids", []).append((text, here, there))
    for name in others:
        ids = [one.vocabulary[name]] if name in one.vocabulary else []
        if ids == [two.vocabulary.get(name)] and one.decode(ids) != two.decode(ids):
            unlike.setdefault("text from ids", []).append((name, ids, ids))
    if "ids" in unlike:
        unlike.pop("ids with special tokens", None)
    for kind, found in unlike.items():
        text, here, there = found[0]
        what = f"{kind} of {shown(text[:30])}" + (f" and {len(found) - 1} more texts" if len(found) > 1 else "")
        told = str(here[:8]), str(there[:8])
        if kind == "text from ids":
            told = shown(one.decode(here)[:40]), shown(two.decode(there)[:40])
        yield Difference("tokenizer", what, *told, _EFFECTS[kind])
    yield from differing("tokenizer", one.other, two.other, _setting)


def _setting(name: str) -> tuple[str, Grade]:
    if name == "model_max_length":
        return "only a warning for long text changes", "told"
    return "batches or texts are assembled differently", "function"


_EFFECTS = {
    "ids": "the model sees different tokens than in training",
    "ids with special tokens": "special tokens are added to text differently",
    "text from ids": "generated text is decoded differently",
}
