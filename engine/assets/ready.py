"""A tokenizer that is in Hugging Face's form already: its files are checked, and copied byte for byte.

Only settings that transformers 5 saved are written so that transformers 4 reads them too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.assets.chat import check_template, unmarked
from engine.assets.generation import GENERATION, TOKENS, as_json, check_tokens
from engine.assets.ready_ids import SETTINGS, WHOLE, ids_of
from engine.assets.tokenizer_read import read_file, wrong
from engine.checkpoint.hf_folder import BESIDE
from engine.errors import EngineError, Place, first_of
from engine.formats.configs import json_object
from engine.language.model import Layout
from engine.storage.store import Store

TEMPLATES = ("chat_template.jinja", "chat_template.json")
MORE = "additional_chat_templates"  # a folder of named templates, for example one for tools
PER_BYTE = 32  # bytes of memory for each byte of tokenizer.json while it is checked
_INPUTS = ["input_ids", "attention_mask"]  # the default of 5; that of 4 has token_type_ids too
_BACKEND = "TokenizersBackend"  # the class that does what tokenizer.json says; PreTrainedTokenizerFast in 4
# Classes that add nothing to it in 5. In 4 they add bos and eos by flags that 5 does not save, or convert anew.
_PLAIN = (_BACKEND, "LlamaTokenizer", "GemmaTokenizer")


def names_of(store: Store, inside: str) -> list[str]:
    """The files of a tokenizer, template and generation settings in a folder of a store, by their names there."""
    found = [f"{inside}/{name}".lstrip("/") for name in store.names(inside) if BESIDE.fullmatch(name)]
    more = f"{inside}/{MORE}".lstrip("/")
    with suppress(OSError, EngineError):  # most have no such folder, and a web server does not list it
        found += [f"{more}/{name}" for name in store.names(more) if name.endswith(".jinja")]
    return found


def ready_beside(store: Store, layout: Layout) -> list[list[str]]:
    """`names_of` each folder of a training checkpoint that may hold some: of the weights, and of configurations."""
    found: list[list[str]] = []
    for folder in dict.fromkeys(["", *(one.file.rpartition("/")[0] for one in layout.configs if one.format == "json")]):
        with suppress(OSError, EngineError):  # the folder is missing, or a web server does not list it
            found.append(names_of(store, folder))
    return found


def is_ready(names: list[str]) -> bool:
    """Whether these files hold a whole tokenizer in Hugging Face's form."""
    return any(name.rpartition("/")[2] == WHOLE for name in names)


def read_ready(
    store: Store, names: list[str], rows: int | None, config: Mapping[str, Any], renamed: Mapping[str, str]
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files by their names without folders, once they are known to be whole and to fit the model; and its tokens.

    Args:
        names: as `names_of` gives them.
        rows: the rows of the model's embedding; a tokenizer has no ids beyond them.
        config: config.json: its `bos_token_id` and `eos_token_id` must be, or contain, the tokenizer's. Where neither
            it nor the generation settings say where generation stops, it stops at the tokenizer's eos.
        renamed: tokens by id that the mapping's chat template is written with.

    Raises:
        EngineError: E501 for a tokenizer that is not whole, that only its own code can load, or of another model; E502
            for generation settings or a template that are wrong; E3xx for files that cannot be read.
    """
    files: dict[str, bytes] = {}
    for name in names:
        files[_called(name)] = read_file(store, name)
    places = {_called(name): store.place(name) for name in names}
    objects = {
        name: json_object(data, places[name])
        for name, data in files.items()
        if name.endswith(".json") and (name == SETTINGS or not name.startswith("tokenizer"))  # others nobody reads
    }
    if WHOLE not in files:
        fix = "Load it once with AutoTokenizer of transformers, and give the folder that its save_pretrained writes."
        model = next((name for name in sorted(places) if name.endswith(".model") and name != "tokenizer.model"), None)
        raise wrong(
            f"the folder has no {WHOLE}", store.place(), first_of(sorted(files), 6) or "no file of a tokenizer",
            f"a tokenizer in Hugging Face's form, with {WHOLE}",
            fix if model is None else f"Give SentencePiece's model itself: --tokenizer {places[model]}. Or: {fix}",
        )  # fmt: skip
    if objects.get(SETTINGS, {}).get("auto_map"):
        raise wrong(
            "the tokenizer needs code of its own", places[SETTINGS], "auto_map", "a class of transformers",
            "Give the model's tokenizer as a transformers class saves it, or leave it out and add it yourself.",
        )  # fmt: skip
    if GENERATION in files:
        check_tokens(objects[GENERATION], rows, Place(places[GENERATION]))
    for name in files:
        if name.endswith(".jinja"):
            check_template(files[name], Place(places[name]))
    for name in (SETTINGS, TEMPLATES[1]):
        inside = objects.get(name, {}).get("chat_template")
        for one in inside if isinstance(inside, list) else [inside]:  # several have names
            if isinstance(text := one.get("template") if isinstance(one, Mapping) else one, str):
                check_template(text.encode(), Place(places[name]))
    ids, named = ids_of(files[WHOLE], places[WHOLE], rows, objects, config)
    said = objects.get(GENERATION, {})
    ends = [one.get(TOKENS[1]) for one in (said, config, *config.values()) if isinstance(one, Mapping)]
    if writes(config) and TOKENS[1] in named and not any(one is not None for one in ends):  # it would never stop
        files[GENERATION] = as_json({**said, TOKENS[1]: named[TOKENS[1]]})
    for number, token in renamed.items():
        if ids.get(token) != int(number):
            got = next((f"`{one}`" for one, index in ids.items() if index == int(number)), "no such token")
            raise wrong("the tokenizer lacks a token of the mapping's chat template", places[WHOLE],
                         f"{got} as id {number}", f"`{token}`", "Give the chat model's own tokenizer.")  # fmt: skip
    return files, ids


def together(copied: Mapping[str, bytes], own: Mapping[str, bytes], *, chat: bool) -> dict[str, bytes]:
    """The files of a tokenizer with the mapping's own.

    Args:
        chat: whether the mapping has a chat template, with which its own generation settings go; others come from the
            tokenizer's, and what these do not say from the mapping's.
    """
    more = {Path(name).stem: text.decode() for name, text in copied.items() if name.startswith(MORE)}
    made = {name: data for name, data in {**copied, **own}.items() if not name.startswith(MORE)}
    if GENERATION in copied and not chat:
        said = {key: value for key, value in json.loads(copied[GENERATION]).items() if value is not None}
        settings = {**json.loads(own.get(GENERATION, b"{}")), **said}
        made[GENERATION] = copied[GENERATION] if settings == said else as_json(settings)
    if WHOLE in copied:
        config, old = json.loads(own.get("config.json", b"{}")), json.loads(copied.get(SETTINGS, b"{}"))
        settings = {**old}
        if settings.get("tokenizer_class") is None:
            settings.pop("tokenizer_class", None)
            settings = {**_plain(copied[WHOLE], config), **settings}
        template = made[TEMPLATES[0]].decode() if TEMPLATES[0] in made else None
        if chat:
            settings.pop("chat_template", None)
        elif more:  # one list, since other versions look for the folder elsewhere, or not at all
            named = more if template is None else {"default": template, **more}
            settings["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
            made.pop(TEMPLATES[0], None)
            template = None
        written = for_each_release(settings, template)
        if written != old:
            made[SETTINGS] = as_json(written)
    return made


def for_each_release(settings: Mapping[str, Any], template: str | None) -> dict[str, Any]:
    """The settings of a tokenizer as transformers 4 and 5 read them alike.

    Without `chat_template` in them, releases before 4.50 have no template, take one of their own, or another.

    >>> for_each_release({"tokenizer_class": "GPT2Tokenizer", "extra_special_tokens": ["<a>"]}, "{{ 1 }}")
    {'tokenizer_class': 'GPT2Tokenizer', 'additional_special_tokens': ['<a>'], 'chat_template': '{{ 1 }}'}
    """
    made = dict(settings)
    by_5 = "backend" in made or made.get("tokenizer_class") == _BACKEND
    if by_5 and made.get("tokenizer_class") in _PLAIN:
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
        made.setdefault("model_input_names", _INPUTS)
    if isinstance(made.get("extra_special_tokens"), list):  # a mapping in 4
        made["additional_special_tokens"] = [
            *(made.get("additional_special_tokens") or []),
            *made.pop("extra_special_tokens"),
        ]
    if template is not None and made.get("chat_template") != template:  # newer ones read the file first
        made["chat_template"] = unmarked(template)
    return made


def template_of(files: Mapping[str, bytes]) -> str:
    """The chat template that transformers 5 reads, or nothing.

    >>> template_of({"tokenizer_config.json": b'{"chat_template": [{"name": "default", "template": "a"}]}'})
    'a'
    """
    if TEMPLATES[0] in files:
        return files[TEMPLATES[0]].decode()
    said = json.loads(files.get(SETTINGS, b"{}")).get("chat_template")
    several = [one for one in said if isinstance(one, Mapping)] if isinstance(said, list) else [{"template": said}]
    return next((str(one.get("template") or "") for one in several if one.get("name", "default") == "default"), "")


def _plain(data: bytes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a tokenizer.json that no class is named for: 4 takes that of a language model's type, which adds
    tokens of its own. Other models may need what their class knows."""
    if not writes(config):
        return {}
    special = {one["id"]: one["content"] for one in json.loads(data).get("added_tokens") or () if one.get("special")}
    named = {key.removesuffix("_id"): special.get(config[key]) for key in TOKENS[:2] if type(config.get(key)) is int}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": _INPUTS,
        **{key: name for key, name in named.items() if name is not None},
    }


def writes(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of a language model, which writes text."""
    return any(str(name).endswith("CausalLM") for name in config.get("architectures") or ())


def _called(name: str) -> str:
    """A file's name in the output.

    >>> _called("huggingface/tokenizer.json"), _called("huggingface/additional_chat_templates/tool_use.jinja")
    ('tokenizer.json', 'additional_chat_templates/tool_use.jinja')
    """
    folder, _, last = name.rpartition("/")
    return f"{MORE}/{last}" if folder.rpartition("/")[2] == MORE else last


def fewer(count: int, what: str, rows: int) -> list[str]:
    """A notice for a tokenizer with fewer ids than the embedding has rows.

    >>> fewer(90, "pieces", 92)
    ["the tokenizer has 90 pieces, fewer than the embedding's 92 rows; make sure that it is this model's"]
    """
    told = f"the tokenizer has {count} {what}, fewer than the embedding's {rows} rows"
    return [f"{told}; make sure that it is this model's"] if count < rows else []
