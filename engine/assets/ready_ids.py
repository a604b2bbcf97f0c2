"""The ids that transformers gives the tokens of a tokenizer in Hugging Face's form: those of its tokenizer.json, and
of tokens that only its settings name, which are added after these when it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from engine.assets.generation import GENERATION, TOKENS
from engine.assets.tokenizer_read import OTHER_IDS, OWN, wrong

WHOLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SIDES = (lambda value: value in ("left", "right")), "left or right"
_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "padding_side": _SIDES,
    "truncation_side": _SIDES,
    "split_special_tokens": (lambda value: isinstance(value, bool), "true or false"),
    "tokenizer_class": (lambda value: value is None or isinstance(value, str), "the name of a class"),
    "model_max_length": (lambda value: value is None or isinstance(value, int | float), "a number"),
    "model_input_names": (lambda value: isinstance(value, list), "a list of names"),
    "added_tokens_decoder": (
        lambda value: (
            isinstance(value, Mapping)
            and all(re.fullmatch(r"-?\d{1,20}", key) and isinstance(one, Mapping) for key, one in value.items())
        ),
        "tokens as objects, by their ids",
    ),
    "chat_template": (
        lambda value: (
            not isinstance(value, list)
            or all(isinstance(one, Mapping) and {"name", "template"} <= one.keys() for one in value)
        ),
        "text, or a list of objects with `name` and `template`",
    ),
}

Objects = Mapping[str, Mapping[str, Any]]


def ids_of(
    data: bytes, place: str, rows: int | None, objects: Objects, config: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """The tokens' ids, and its bos and eos.

    Args:
        data: tokenizer.json.
        objects: the other files that are JSON, by their names.

    Raises:
        EngineError: E501 unless the library loads it, ids are embedding rows, and bos and eos the model's.
    """
    from tokenizers import Tokenizer

    given, added = objects.get(SETTINGS, {}), objects.get(ADDED, {})
    said = {name: value for name, value in given.items() if value is not None}
    older = objects.get(MAP, {})
    settings = {**older, **said}
    without = ((key, value, "has no id", "a number") for key, value in added.items() if type(value) is not int)
    damaged = {MAP: _damaged(older), SETTINGS: (*_damaged(said), *_of_no_use(given)), ADDED: without}
    for name, (key, value, told, expected) in ((name, one) for name, every in damaged.items() for one in every):
        raise wrong(f"the tokenizer's settings are damaged: `{key}` {told}", place.removesuffix(WHOLE) + name,
                    f"{value!r:.60}", expected)  # fmt: skip
    named = numbered(settings, added)
    try:
        check_prefix(data)
        with panics_caught():
            tokenizer = Tokenizer.from_str(data.decode())
            own = tokenizer.get_vocab(with_added_tokens=True)
            tokenizer.add_tokens([token for token in named if token not in own])
            ids = tokenizer.get_vocab(with_added_tokens=True)
            tokenizer.no_padding()  # which may be endless
            encoded = tokenizer.encode("")  # of any text, some tokenizers do not have the letters
    except Exception as error:  # a library's own
        got = " ".join(str(error).split())[:160]
        raise wrong("the tokenizer cannot be loaded", place, got, "a tokenizer.json that `tokenizers` reads") from error
    if not own:
        raise wrong("the tokenizer has no token", place, "an empty vocabulary", "the model's tokens")
    most = max(ids, key=lambda token: ids[token])
    if rows is not None and ids[most] >= rows:
        got, fix = f"ids up to {ids[most]}", OWN
        if most not in own:
            got += f": `{most}`, which only its settings name, is added when it is loaded"
            fix += " If the model has no such token, take it out of the settings."
        raise wrong("the tokenizer is not this model's: it has ids beyond the embedding's rows", place, got,
                    f"at most {rows} ids, the vocabulary size", fix)  # fmt: skip
    for token, index, special in zip(encoded.tokens, encoded.ids, encoded.special_tokens_mask, strict=True):
        if special and index != ids.get(token):
            raise wrong(f"the tokenizer is not whole: `{token}` is put into texts as another id than it has", place,
                        f"{index}, says `post_processor`", f"{ids.get(token, 'no such token')}")  # fmt: skip
    for token, number in named.items():
        if number is not None and token not in own and number != ids[token]:
            raise wrong(f"the tokenizer does not give `{token}` the id that its settings say", place,
                        f"{ids[token]}, since {WHOLE} lacks it", f"{number}")  # fmt: skip
    ends: dict[str, int] = {}
    for key in TOKENS[:2]:
        text = _content(settings.get(key.removesuffix("_id")))
        if text in ids:
            ends[key] = ids[text]
        found = [one for one in (config.get(key), objects.get(GENERATION, {}).get(key)) if one is not None]
        known = {i for one in found for i in (one if isinstance(one, list) else [one])}
        if known and key in ends and ends[key] not in known:
            raise wrong(f"the tokenizer is not this model's: `{text}` has another id than the configuration says",
                        place, f"{ends[key]}", f"{json.dumps(found[0])}, the `{key}`", OTHER_IDS)  # fmt: skip
    return ids, ends


def _damaged(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, str]]:
    """Keys of tokens at whose values transformers fails to load a tokenizer, these values, and what is wrong."""
    told = "names no token", "text, or an object with `content`"
    for key in _ROLES:
        if settings.get(key) is not None and not _is_token(settings[key]):
            yield key, settings[key], *told
    for key in _LISTS:
        value = settings.get(key)
        inside = [*value.values()] if isinstance(value, Mapping) else value
        if inside is not None and not (isinstance(inside, list) and all(map(_is_token, inside))):
            yield key, value, *told


def _of_no_use(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, str]]:
    """The same for its other settings."""
    for key, (fits, expected) in _FORMS.items():
        if key in settings and not fits(settings[key]):
            yield key, settings[key], "is none that transformers takes", expected


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


def numbered(settings: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, int | None]:
    """Tokens that settings name, in the order in which transformers adds them, with their ids if these are said.

    >>> numbered({"pad_token": "<p>", "added_tokens_decoder": {"7": {"content": "<x>"}}}, {"<y>": 6})
    {'<y>': 6, '<x>': 7, '<p>': None}
    """
    table = settings.get("added_tokens_decoder")
    listed = [*added.items()]
    listed += [(_content(one), number) for number, one in table.items()] if isinstance(table, Mapping) else []
    numbers = {token: int(number) for token, number in listed if token and re.fullmatch(r"\d{1,9}", str(number))}
    found: dict[str, int | None] = {token: numbers[token] for token in sorted(numbers, key=lambda one: numbers[one])}
    tokens = [value for key, value in settings.items() if key.endswith("_token")]
    for key in _LISTS:
        value = settings.get(key)
        tokens += value if isinstance(value, list) else value.values() if isinstance(value, Mapping) else []
    return found | {text: None for one in tokens if (text := _content(one)) and text not in found}


def _content(token: Any) -> str:
    """The text of a token, which may be written with its flags."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""


def check_prefix(data: bytes) -> None:
    """ValueError for merges without the prefix that tokenizer.json names.

    `tokenizers` cuts that many bytes off each; a cut inside a character ends the process, which nothing can catch.
    """
    if re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]|\\u00[2-7]', data) is None:
        return  # a letter of the key may be escaped
    model = json.loads(data)["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in (model.get("merges") or ()) if prefix else ():
        second = merge[1] if isinstance(merge, list) else merge.partition(" ")[2]
        if not second.startswith(prefix):
            raise ValueError(f"merge {merge} does not have the prefix {prefix}")


@contextmanager
def panics_caught() -> Iterator[None]:
    """Turn a panic in a library's Rust code, which is not an `Exception`, into one."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None
