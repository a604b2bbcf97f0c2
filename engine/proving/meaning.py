"""The meaning of a mapping in one readable form, for reviews, proofs, comparisons and mutation tests.

For every target tensor: where its elements come from, their order, and what each rank of small grids holds.
For every configuration: the values of its keys if others are as usual, absent or unusual. The text of rules, the
names of axes and the order of rules are not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import yaml

from engine.assets.chat import chat_template, unmarked
from engine.assets.generation import generation_config
from engine.errors import EngineError
from engine.language.documents import flat, grouped, plain, tree_of
from engine.language.keys import Key, Limits
from engine.language.layout_file import load_layout
from engine.language.model import Layout, MappingFile
from engine.proving.holdings import holdings, origins
from engine.proving.matrix import Combination, combinations_of
from engine.proving.proof import Failure
from engine.proving.readings import readings
from engine.proving.tiny import World, Worlds, guess_sizes

Meaning = dict[str, Any]
Path = tuple[str, ...]
Fact = tuple[Path, Any]

VERSION = 1
_SAID = frozenset((
    "mapping", "name", "version", "description", "extends", "options", "keys", "variants", "dims", "even", "rules",
    "ignore", "refuse", "config", "training_config", "tokenizer", "generation", "chat_template", "expect",
))  # fmt: skip
_ORDER = (
    "about", "release", "options", "variants", "divided evenly", "sizes", "tensors", "layers", "ranks", "ignored",
    "values of ignored", "refused", "tensors there", "reading", "writing", "keys", "tokenizer",
    "generation_config.json", "chat",
)  # fmt: skip
# Sections that places of tensors and readings of configurations depend on; the latter depend on options too.
_SHARED = ("rules", "dims", "even", "variants", "config", "training_config", "keys", "source", "target")
_WIDTH = 118
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
_KNOWN: dict[str, dict[Path, Any]] = {}  # parts that mappings share, by their inputs
_MOST_KNOWN = 64


def meaning_of(mapping: MappingFile) -> Meaning:
    """The meaning of a mapping, plain data.

    Raises:
        EngineError: for a layout that cannot be read. Errors of the mapping itself are part of its meaning.
    """
    found = tree_of(dict(facts_of(mapping)))
    return {name: found[name] for name in _ORDER if found.get(name) not in ({}, [], None)}


def facts_of(mapping: MappingFile) -> Iterator[Fact]:
    """Every value of the meaning with its path, part by part, the fastest parts first."""
    layout = load_layout(mapping.layout)
    data = mapping.resolved
    worlds = Worlds(mapping)
    quick: Meaning = {
        "about": _about(mapping),
        "options": {name: _option(one) for name, one in (data.get("options") or {}).items()},
        "variants": {
            name: {"choices": list(v.choices), "decided by": v.decide, "written by default": v.default}
            for name, v in mapping.variants.items()
        },
        "divided evenly": sorted(mapping.even),
        "ignored": sorted(f"{one.side} {one.pattern}" for one in mapping.ignore),
        "values of ignored": {f"{e.side} {e.pattern}": e.values.text for e in mapping.ignore if e.values is not None},
        "refused": sorted(f"{one.side} {one.pattern}" for one in mapping.refuse),
        "keys": {side: _keys(keys) for side, keys in mapping.keys.items()},
        "tokenizer": dict(mapping.tokenizer or {}),
        "chat": _chat(mapping),
        "release": dict(mapping.expect),
    }
    yield from flat(plain(quick))
    yield from flat(plain(origins(mapping)))
    parts = [*(data.get(part) for part in _SHARED), layout.digest]
    gives: dict[str, Any] = {}
    for path, value in _once("reading", [*parts, data.get("options")], lambda: _readings(mapping, layout, worlds)):
        if path[:2] == ("reading", "gives") and len(path) == 3:
            gives[path[2]] = value
        yield path, value
    yield from flat(plain({"generation_config.json": _generation(mapping, gives)}))
    yield from _once("ranks", parts, lambda: iter([holdings(mapping, layout, worlds)]))


def _once(kind: str, parts: list[Any], make: Callable[[], Iterator[Meaning]]) -> Iterator[Fact]:
    """A part, computed once for all mappings with the same inputs; or its error."""
    key = json.dumps([kind, parts], default=str, sort_keys=False)
    if key in _KNOWN:
        yield from _KNOWN[key].items()
        return
    found: dict[Path, Any] = {}
    try:
        for bit in make():
            for path, value in flat(plain(bit)):
                found[path] = value
                yield path, value
    except EngineError as error:
        told = f"refused: {Failure.of(error).message}"
        found = {path: value for path, value in found.items() if path[0] != kind} | {(kind,): told}
        yield (kind,), told
    while len(_KNOWN) >= _MOST_KNOWN:
        del _KNOWN[next(iter(_KNOWN))]
    _KNOWN[key] = found


def _readings(mapping: MappingFile, layout: Layout, worlds: Worlds) -> Iterator[Meaning]:
    world = usual_world(mapping, worlds)
    if world is None:
        return iter([{"reading": "no set of tensors shows any combination of choices"}])
    return readings(mapping, layout, worlds, world)


def usual_world(mapping: MappingFile, worlds: Worlds, sizes: Mapping[str, int] | None = None) -> World | None:
    """The world of the default choices, or of the nearest that some tensors show; of tiny sizes, or a release's."""
    default = {v.name: v.default or list(v.choices)[-1] for v in mapping.variants.values()}

    def unusual(combination: Combination) -> int:
        choices, most = combination
        return 2 * sum(choices[name] != choice for name, choice in default.items()) + most

    near = sorted(combinations_of(mapping), key=unusual)
    found = next((one for one in near if worlds.used(one[0], most=one[1]) is not None), None)
    return None if found is None else worlds.make(found[0], guess_sizes(mapping, stated=sizes), most=found[1])


def _about(mapping: MappingFile) -> Meaning:
    about: Meaning = {"layout": mapping.layout, "source model types": list(mapping.model_types)}
    about |= {"target": f"{mapping.architecture}, model type {mapping.model_type}"}
    about |= {"also model types": dict(mapping.also)} if mapping.also else {}
    versions = mapping.resolved["target"].get("transformers")
    about |= {} if versions is None else {"transformers": versions}
    about |= {key: value for key, value in mapping.resolved.items() if key not in (*_SAID, "source", "target")}
    return about


def _option(body: Mapping[str, Any]) -> str:
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in body.items() if key not in ("help", "type"))
    return f"{body.get('type')}, {told}"


def _keys(keys: Mapping[str, Key]) -> dict[str, list[str]]:
    """Declaration, without reasons → the names of the keys that have it."""

    def declared(key: Key) -> str:
        told = [] if key.limits == Limits() else [str(key.limits)]
        told += [f"only {json.dumps(list(key.only))}"] if key.only is not None else []
        told += ["ignored"] if key.ignored is not None else ["noted"] if key.noted is not None else []
        told += [f"counts where {json.dumps(key.unless)}"] if key.unless else []
        told += [f"adds {json.dumps(key.added)}"] if key.added is not None else []
        told += [f"default {json.dumps(key.default)}"] if key.default is not None else []
        told += [f"another name of {key.same_as}"] if key.same_as is not None else []
        told += [f"never absent beside {key.comes_with}"] if key.comes_with is not None else []
        return ", ".join(told) or "anything"

    found = grouped((declared(key), name) for name, key in keys.items())
    return {told: sorted(names) for told, names in sorted(found.items())}


def _generation(mapping: MappingFile, gives: Mapping[str, Any]) -> Meaning:
    """generation_config.json, with missing token ids taken from config.json."""
    if mapping.generation is None:
        return {}
    config = {p.removeprefix("config.json "): v for p, v in gives.items() if p.endswith("_token_id")}
    try:
        made: Meaning = json.loads(generation_config(mapping.generation, config))
    except EngineError as error:
        return {"refused": f"{error.code} {error.message}"}
    return made


def _chat(mapping: MappingFile) -> Meaning:
    """A conversation as the template renders it, with and without a system message, and the template's digest."""
    if mapping.chat_template is None:
        return {}
    tokens = {f"{name}_token": str((mapping.tokenizer or {}).get(name, "")) for name in ("bos", "eos")}
    try:
        text = chat_template(mapping.chat_template)
    except EngineError as error:
        return {"template": mapping.chat_template, "written": f"cannot be written: {error.message}"}
    return {"template": mapping.chat_template, "its SHA-256": sha256(text.encode()).hexdigest(), **spoken(text, tokens)}


def spoken(text: str, tokens: Mapping[str, str]) -> Meaning:
    """A conversation as a template renders it, line by line."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found: Meaning = {}
    for name, talk in (("written", _TALK), ("written without a system", _TALK[1:])):
        try:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]
            )
            template = environment.from_string(unmarked(text))
            found[name] = template.render(messages=talk, add_generation_prompt=True, **tokens).split("\n")
        except Exception as error:  # a template raises its own errors
            found[name] = f"cannot be written: {' '.join(str(error).split())[:200]}"
    return found


# -- as text, and back


class _Text(yaml.SafeDumper):
    """YAML in block form; what fits on a line in flow form."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_data(self, data: Any) -> Any:
        node = super().represent_data(data)
        if isinstance(node, yaml.CollectionNode):
            node.flow_style = _short(data)
        return node


def _short(data: Any) -> bool:
    if isinstance(data, list):
        return not any(isinstance(one, dict | list) and one for one in data)
    return not any(isinstance(one, dict | list) and one for one in data.values()) and len(str(data)) < _WIDTH - 20


def text_of(data: Mapping[str, Any]) -> str:
    """Data as YAML that reads as a diff."""
    return yaml.dump(dict(data), Dumper=_Text, sort_keys=False, allow_unicode=True, width=_WIDTH)
