"""Compares all of two models except tensors: configuration, generation settings, tokenizer, chat template, code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from engine.assets.ready import MORE
from engine.comparing.effects import Difference, Grade, both, differing, effect_of, presence, worded
from engine.comparing.templates import compare_templates
from engine.comparing.texts import MODELS, Files
from engine.comparing.tokenizers import compare_tokenizers
from engine.formats.configs import json_object
from engine.language.documents import same
from engine.oracle.meaning import default_generation, full_config, full_generation, plain_config
from engine.planning.config_keys import shown
from engine.storage.folders import listing
from engine.storage.store import File, Store

CONFIG, GENERATION, SETTINGS = "config.json", "generation_config.json", "tokenizer_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json")
_LARGEST = 256 << 20  # bytes of a file that is read


def small_files(where: Store) -> dict[str, bytes]:
    """The files of a checkpoint folder that define the model besides its weights, and its Python files."""
    with listing(where):
        names = {*where.names()}
    wanted = [name for name in (CONFIG, GENERATION, *TOKENIZER, *TEMPLATES) if name in names]
    wanted += sorted(name for name in names if name.endswith(".py"))
    with suppress(OSError):  # of a file of that name
        wanted += [f"{MORE}/{name}" for name in (where.names(MORE) if MORE in names else ()) if name.endswith(".jinja")]
    found = {}
    for name in wanted:
        with File(where, name).open() as file:
            found[name] = file.read(_LARGEST)
    return found


def compare_settings(
    ours: Files, theirs: Files, *, dtypes: tuple[str | None, str | None] = (None, None)
) -> tuple[Difference, ...]:
    """The differences between two models other than in tensors, and their effects.

    Args:
        ours, theirs: files by name, as `small_files` reads them.
        dtypes: the element type of each side's weights, which is the meaning of an absent `dtype`.

    Raises:
        EngineError: E301 or E303 when a file is not JSON, or not an object.
    """
    configs = [_read(files, CONFIG) for files in (ours, theirs)]
    generations = [_read(files, GENERATION) for files in (ours, theirs)]
    found: list[Difference] = []
    if None in configs and configs != [None, None]:
        effect = "without it transformers does not load the model"
        found.append(Difference("config", CONFIG, *_presence(ours, theirs, CONFIG), effect))
    one, two = (config or {} for config in configs)
    if None not in configs:
        found += _configs(one, two, dtypes)
        found += _for_other_programs("config", CONFIG, one, two, found)
    found += _generations(generations[0], generations[1], one, two)
    found += compare_tokenizers(ours, theirs, TOKENIZER)
    if SETTINGS in theirs and ours.keys() & {*MODELS}:
        here, there = (_read(files, SETTINGS) or {} for files in (ours, theirs))
        found += _for_other_programs("tokenizer", SETTINGS, here, there, found)
        found += _added_tokens(here, there)
    found += compare_templates(ours, theirs)
    for name in sorted(name for name in ours.keys() | theirs.keys() if name.endswith(".py")):
        if ours.get(name) != theirs.get(name):
            effect = "with trust_remote_code, different code runs the weights"
            found.append(Difference("code", name, *_presence(ours, theirs, name, "different content"), effect))
    return tuple(found)


def _presence(ours: Files, theirs: Files, name: str, both: str = "there") -> tuple[str, str]:
    return (both, "its own") if name in ours and name in theirs else presence(ours.get(name), theirs.get(name))


def _read(files: Files, name: str) -> dict[str, Any] | None:
    return json_object(files[name], name) if name in files else None


# Keys that are only labels: their values do not affect the computation.
_LABELS = ("id2label", "label2id", "transformers_version", "_name_or_path", "_commit_hash", "name_or_path")
_OWN_WORDS = ("chat_template", "model_max_length", "tokenizer_class", "added_tokens_decoder", "tokenizer_file")


def _for_other_programs(
    part: str, file: str, one: Mapping[str, Any], two: Mapping[str, Any], found: Sequence[Difference]
) -> list[Difference]:
    """Keys that differ only for other programs or versions, as transformers reads the file alike; not those `found`."""
    told = {name for other in found if other.part == part for name in (*other.what.split("."), other.what)}
    keys = (one.keys() & two.keys()) | ({"auto_map"} & (one.keys() | two.keys())) | _lost(one, two)
    more = []
    for key in sorted(keys - told - {*_LABELS, *_OWN_WORDS}):
        here, there = ({key: side.get(key)} for side in (one, two))
        plain = plain_config(here), plain_config(there)
        names = [*(plain[0] | plain[1])]  # as transformers 5 spells it
        if not told.intersection(names) and (not same(*plain) or key not in one):
            effect = "other programs, or other versions of transformers, read it here"
            grade: Grade = effect_of(names[-1])[1] if part == "config" else "function"
            more.append(Difference(part, f"{key} of {file}", worded(here[key]), worded(there[key]), effect, grade))
    return more


_MEANT = ("add_prefix_space", "add_bos_token", "add_eos_token")  # llama.cpp has other defaults than tokenizer.json


def _lost(one: Mapping[str, Any], two: Mapping[str, Any]) -> set[str]:
    """Keys of the reference alone that others read: of tokenizers, and angles as transformers 4 spells them.

    The angles matter unless they are what the class takes without any.
    """
    gone = {key for key in (*_MEANT, "rope_theta", "rope_scaling") if key not in one and two.get(key) is not None}
    if gone and not gone & {*_MEANT}:
        plain = {key: value for key, value in one.items() if key != "rope_parameters"}
        return gone if full_config(plain) != full_config(one) else set()
    return gone


def _added_tokens(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Difference]:
    """Tokens of tokenizer_config.json with another id, or ids with another text or that are special on one side."""
    (here, here_at), (there, there_at) = (_named_tokens(side.get("added_tokens_decoder")) for side in (one, two))
    lost = sorted(there_at[token] for token in there_at.keys() - here_at.keys() if there[there_at[token]]["special"])
    moved = sorted(token for token in here_at.keys() & there_at.keys() if here_at[token] != there_at[token])
    other = sorted(number for number in here.keys() & there.keys() if here[number] != there[number])
    effect = "other programs, such as llama.cpp, take tokens from here"
    found: list[tuple[str, Any, Any]] = [
        (f"the id of {shown(one)} in {SETTINGS}", here_at[one], there_at[one]) for one in moved[:1]
    ] or [
        (f"added_tokens_decoder.{number} of {SETTINGS}", here.get(number), there[number])
        for number in (other or lost)[:1]
    ]
    return [Difference("tokenizer", what, worded(ours), worded(theirs), effect) for what, ours, theirs in found]


def _named_tokens(listed: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Id → text and whether the token is special; and text → id."""
    tokens = {k: v for k, v in listed.items() if isinstance(v, dict)} if isinstance(listed, dict) else {}
    said = {
        number: {"content": str(one.get("content")), "special": bool(one.get("special"))}
        for number, one in tokens.items()
    }
    return said, {str(one["content"]): number for number, one in said.items()}


def _configs(one: Mapping[str, Any], two: Mapping[str, Any], dtypes: tuple[str | None, str | None]) -> list[Difference]:
    """Compare two configurations by their meaning."""
    ours, theirs = plain_config(one), plain_config(two)
    if same(ours, theirs):
        return []
    full = [full_config(config) for config in (one, two)]
    own: frozenset[str] | None = None
    found: list[Difference] = []
    if one.get("model_type") == two.get("model_type") and (full[0] is None) != (full[1] is None):
        told = both(lambda side: "refused" if side is None else "loadable", *full)
        found.append(Difference("config", CONFIG, *told, "transformers does not load the model"))
    if full[0] is not None and full[1] is not None:
        (ours, mine), (theirs, other) = full[0], full[1]
        own = mine | other
    for side, dtype in zip((ours, theirs), dtypes, strict=True):
        if "dtype" not in side and dtype is not None:
            side["dtype"] = dtype
    scaled = any(side.get("rope_parameters.rope_type", "default") != "default" for side in (ours, theirs))

    def said(key: str) -> tuple[str, Grade]:
        return effect_of(key, scaled=scaled, own=own)

    return found + differing("config", ours, theirs, said)


def _generations(
    ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, one: Mapping[str, Any], two: Mapping[str, Any]
) -> list[Difference]:
    here, there = full_generation(ours, one), full_generation(theirs, two)
    if same(here, there) or (ours is None and theirs is None):
        return []
    defaults = default_generation()
    return differing("generation", {**defaults, **here}, {**defaults, **there}, _generating)


def _generating(key: str) -> tuple[str, Grade]:
    if key.endswith("_token_id"):
        return effect_of(key)
    if key in ("use_cache", "cache_implementation", "return_dict_in_generate") or key.startswith("output_"):
        return "only speed or additional results change", "told"
    return "generate() gives different text", "function"
