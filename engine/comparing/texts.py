"""Two tokenizers by the ids they give, and two chat templates by what they render.

Nothing of a checkpoint is run: tokenizers are data, and templates are rendered in Jinja's sandbox.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.comparing.corpus import CONVERSATIONS, texts
from engine.comparing.effects import Difference

Files = Mapping[str, bytes]
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MOST = 200  # merges that are tried
_FEWEST = 2  # tokens of a vocabulary that was read
_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """A tokenizer as functions.

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


def compare_tokenizers(ours: Files, theirs: Files, names: Sequence[str]) -> list[Difference]:
    """What two tokenizers, given by the folders' files, make differently.

    Args:
        names: the files that belong to a tokenizer.
    """
    if all(ours.get(name) == theirs.get(name) for name in names):
        return []
    ours, theirs = (
        {name: files[name] for name in ("config.json", *names) if name in files} for files in (ours, theirs)
    )
    there = [any(name in files for name in _MODELS) for files in (ours, theirs)]
    if not all(there):
        if not any(there):
            return []
        told = tuple("there" if one else "absent" for one in there)
        return [Difference("tokenizer", "a tokenizer", told[0], told[1], "without it, text cannot be turned into ids")]
    with tempfile.TemporaryDirectory(prefix="engine-") as made:
        one, two = (_load(files, Path(made) / str(side)) for side, files in enumerate((ours, theirs)))
        if isinstance(one, str) or isinstance(two, str):
            shown = _both(lambda side: f"not loadable: {side}" if isinstance(side, str) else "loadable", one, two)
            return [Difference("tokenizer", "a tokenizer", *shown, "its ids could not be compared")]
        found = list(_tokenizers(one, two, _unlike_merges(ours, theirs)))
    if not found:
        unlike = [name for name in names if ours.get(name) != theirs.get(name)]
        effect = "ids, text and special tokens are still equal for all texts tried"
        found = [Difference("tokenizer", ", ".join(unlike), "other bytes", "its own", effect, "told")]
    return found


def _unlike_merges(ours: Files, theirs: Files) -> list[str]:
    """Texts of the merges that differ, or stand in another order."""
    both = []
    for files in (ours, theirs):
        try:
            merges = json.loads(files[_MODELS[0]])["model"]["merges"]
            both.append(["".join(one if isinstance(one, list) else one.split(" ")) for one in merges])
        except (KeyError, ValueError, TypeError, AttributeError):
            return []
    unlike = [piece for pair in zip(*both, strict=False) if pair[0] != pair[1] for piece in pair]
    unlike += [piece for side in both for piece in side[min(map(len, both)) :]]
    words = [piece.replace("▁", " ").replace("Ġ", " ") for piece in dict.fromkeys(unlike[: 4 * _MOST])][:_MOST]
    return [text for word in words for text in (word, f"a{word}", f"{word}{word}")] + ["".join(words)]


def _vocabularies(one: _Tokenizer, two: _Tokenizer) -> Iterator[Difference]:
    """Tokens whose ids differ, and ids whose tokens do."""
    moved = [token for token, number in one.vocabulary.items() if two.vocabulary.get(token, number) != number]
    if moved:
        more = f" and {len(moved) - 1} more tokens" if len(moved) > 1 else ""
        shown = _both(lambda side: str(side.vocabulary[moved[0]]), one, two)
        effect = "the model reads other tokens than it was trained on"
        yield Difference("tokenizer", f"the id of {_shown(moved[0])}{more}", *shown, effect)
    names = [{number: token for token, number in side.vocabulary.items()} for side in (one, two)]
    other = [
        i for i, token in names[0].items() if token not in two.vocabulary and names[1].get(i) not in one.vocabulary
    ]
    other = [i for i in other if i in names[1]]
    if other:
        more = f" and {len(other) - 1} more ids" if len(other) > 1 else ""
        shown = _both(lambda side: _shown(side[other[0]]), *names)
        yield Difference("tokenizer", f"the token of id {other[0]}{more}", *shown, "text is written otherwise")
    ids = [one.vocabulary[token] for token in one.added if token in one.vocabulary and token in two.vocabulary]
    if one.spoken is not None and two.spoken is not None:
        for number in ids:
            here, there = one.spoken([number]), two.spoken([number])
            if here != there:
                effect = "it is left out of text on one side only, as a special token is"
                yield Difference("tokenizer", f"the text of id {number}", _shown(here), _shown(there), effect)
                break
    if one.pair is not None and two.pair is not None and one.encode("a", True) == two.encode("a", True):
        both = one.pair("one text", "and another"), two.pair("one text", "and another")
        if both[0] != both[1]:
            effect = "pairs of texts are joined otherwise"
            yield Difference("tokenizer", "the ids of two texts together", str(both[0][:8]), str(both[1][:8]), effect)


def _tokenizers(one: _Tokenizer, two: _Tokenizer, others: Sequence[str]) -> Iterator[Difference]:
    if len(one.vocabulary) != len(two.vocabulary):
        sizes = _both(lambda side: f"{len(side.vocabulary):,} tokens", one, two)
        yield Difference("tokenizer", "the vocabulary", *sizes, "some ids exist on one side only")
    yield from _vocabularies(one, two)
    for name in sorted(one.named.keys() | two.named.keys()):
        if one.named.get(name) != two.named.get(name):
            shown = _both(_shown, one.named.get(name), two.named.get(name))
            yield Difference("tokenizer", name, *shown, "text begins, ends or is padded with a different token")
    special = [str(name) for side in (one, two) for value in (*side.named.values(), list(side.added))
               for name in (value if isinstance(value, list) else [value]) if name]  # fmt: skip
    with_special = [True, False] if one.whole and two.whole else [False]
    pieces = [*one.vocabulary, *two.vocabulary]
    unlike: dict[str, tuple[str, list[int], list[int]]] = {}
    counts: dict[str, int] = {}
    for text in (*texts(list(dict.fromkeys(special)), pieces), *others):
        for wrapped in with_special:
            ids = one.encode(text, wrapped), two.encode(text, wrapped)
            kind = "ids with special tokens" if wrapped else "ids"
            if ids[0] != ids[1]:
                counts[kind] = counts.get(kind, 0) + 1
                unlike.setdefault(kind, (text, *ids))
            elif not wrapped and one.decode(ids[0]) != two.decode(ids[1]):
                counts["text from ids"] = counts.get("text from ids", 0) + 1
                unlike.setdefault("text from ids", (text, *ids))
    if "ids" in unlike:
        unlike.pop("ids with special tokens", None)
    for kind, (text, here, there) in unlike.items():
        what = f"{kind} of {_shown(text[:30])} and {counts[kind] - 1} more texts" if counts[kind] > 1 else (
            f"{kind} of {_shown(text[:30])}")  # fmt: skip
        if kind == "text from ids":
            shown = _shown(one.decode(here)[:40]), _shown(two.decode(there)[:40])
            yield Difference("tokenizer", what, *shown, "generated text is decoded differently")
        else:
            effect = "the model sees different tokens than in training" if kind == "ids" else (
                "special tokens are added to text differently")  # fmt: skip
            yield Difference("tokenizer", what, str(here[:8]), str(there[:8]), effect)
    for name in sorted(one.other.keys() | two.other.keys()):
        if one.other.get(name) != two.other.get(name):
            shown = _both(_shown, one.other.get(name), two.other.get(name))
            if name == "model_max_length":
                yield Difference("tokenizer", name, *shown, "only a warning for long text changes", "told")
            else:
                yield Difference("tokenizer", name, *shown, "batches or texts are assembled differently")


def _load(files: Files, folder: Path) -> _Tokenizer | str:
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
    if name not in (_SETTINGS, "config.json"):
        return data
    try:
        settings = json.loads(data)
    except ValueError:
        return data
    if not isinstance(settings, dict) or "auto_map" not in settings:
        return data
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "tokenizer_class")}
    return json.dumps(kept).encode()


def _by_transformers(folder: Path) -> _Tokenizer:
    from transformers import AutoTokenizer

    with _quiet():
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if len(loaded.get_vocab()) < _FEWEST:
        raise ValueError("transformers loads it with an empty vocabulary")
    named = {name: getattr(loaded, name, None) for name in _TOKENS}
    more = sorted({str(token) for token in loaded.all_special_tokens} - {str(t) for t in named.values()})
    whole = getattr(loaded, "backend_tokenizer", None)  # what programs do that use it without transformers
    kept = {name: getattr(whole, name, None) for name in ("truncation", "padding")}
    return _Tokenizer(
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


def _by_tokenizers(folder: Path) -> _Tokenizer:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _Tokenizer(
        lambda text, special: list(loaded.encode(text, add_special_tokens=special).ids),
        lambda ids: str(loaded.decode(ids, skip_special_tokens=False)),
        dict(loaded.get_vocab()),
    )


def _by_sentencepiece(folder: Path) -> _Tokenizer:
    import sentencepiece

    loaded = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
    pieces = {loaded.id_to_piece(i): i for i in range(loaded.get_piece_size())}
    return _Tokenizer(
        lambda text, _: list(loaded.encode(text)), lambda ids: str(loaded.decode(ids)), pieces, whole=False
    )


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _both(show: Callable[[Any], str], one: Any, two: Any) -> tuple[str, str]:
    return show(one), show(two)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"


def compare_templates(ours: Files, theirs: Files) -> list[Difference]:
    """What two chat templates, given by the folders' files, render differently."""
    one, two = (_templates(files) for files in (ours, theirs))
    found: list[Difference] = []
    for name in sorted(one.keys() | two.keys()):
        called = "the template" if name == "default" else f"template `{name}`"
        if name not in one or name not in two:
            told = _both(lambda side: "there" if side is not None else "absent", one.get(name), two.get(name))
            found.append(Difference("chat template", called, *told, "chat() works on one side only"))
        elif one[name] != two[name]:
            found += _rendered(called, (one[name], _named(ours)), (two[name], _named(theirs)))
    return found


def _rendered(
    called: str, one: tuple[str, Mapping[str, Any]], two: tuple[str, Mapping[str, Any]]
) -> Iterator[Difference]:
    unlike = []
    for conversation in CONVERSATIONS:
        here, there = (_render(template, named, conversation) for template, named in (one, two))
        if here != there:
            unlike.append((conversation, here, there))
    if not unlike:
        effect = f"it renders {len(CONVERSATIONS)} conversations alike all the same"
        yield Difference("chat template", called, "other text", "its own", effect, "told")
        return
    conversation, here, there = unlike[0]
    at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    low = max(at - 10, 0)
    more = f" and {len(unlike) - 1} more conversations" if len(unlike) > 1 else ""
    effect = "the model sees prompts in a different form than in training"
    shown = _both(lambda text: _shown(text[low : low + 50]), here, there)
    yield Difference("chat template", f"what it renders of {conversation}{more}", *shown, effect)


def _templates(files: Files) -> dict[str, str]:
    """A folder's templates by name, as transformers finds them."""
    if _TEMPLATE in files:
        return {"default": files[_TEMPLATE].decode("utf-8", "replace")}
    for name in ("chat_template.json", _SETTINGS):
        found = _settings(files, name).get("chat_template")
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):
            return {str(one.get("name")): str(one.get("template")) for one in found if isinstance(one, dict)}
    return {}


def _settings(files: Files, name: str) -> dict[str, Any]:
    try:
        data = json.loads(files.get(name, b"{}"))
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _named(files: Files) -> dict[str, Any]:
    """Special tokens, which templates write."""
    settings = _settings(files, "special_tokens_map.json") | _settings(files, _SETTINGS)
    return {name: token.get("content") if isinstance(token, dict) else token
            for name in _TOKENS if (token := settings.get(name)) is not None}  # fmt: skip


def _render(template: str, named: Mapping[str, Any], conversation: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, tools, speaking = CONVERSATIONS[conversation]
    try:
        texts, _ = render_jinja_template(
            [messages], tools=tools, chat_template=template, add_generation_prompt=speaking, **named
        )
    except Exception as error:  # a template refuses what it does not know in its own words
        return f"refused: {' '.join(str(error).split())[:120]}"
    return str(texts[0])
