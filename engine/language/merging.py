"""Inheritance: `extends` names one parent; a child changes only the keys it writes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.language.documents import Document, KeyPath, load_yaml
from engine.language.search import find_file, shown

_MAX_PARENTS = 8
_BY_KEY = ("options", "variants", "dims", "config", "training_config", "expect", "tokenizer", "generation", "source", "target")
_APPENDED = ("ignore", "refuse")
_NOT_INHERITED = ("extends", "remove", "name", "version", "description")


def load_resolved(path: Path) -> tuple[Document, tuple[str, ...]]:
    """A mapping file merged over its parents, and the files it came from, family first.

    Raises:
        EngineError: E101 for what cannot be read, E106 for parents that cannot be resolved.
    """
    return _load(path, ())


def _load(path: Path, children: tuple[Path, ...]) -> tuple[Document, tuple[str, ...]]:
    document = load_yaml(path, shown(path))
    resolved = path.resolve()
    if not isinstance(document.data, dict):
        raise EngineError("E102", "a mapping file is a mapping of keys", place=document.place(), got=type(document.data).__name__,
                          expected="mapping: 1, name: …, rules: …", fix="See an example in mappings/families.")  # fmt: skip
    own = _named(document)
    parent = own.data.get("extends")
    if parent is None:
        return own, (document.file,)
    place = document.place("extends")
    if not isinstance(parent, str):
        raise EngineError("E106", "`extends` names one file", place=place, got=str(parent), fix="Write one file name.")
    if len(children) >= _MAX_PARENTS or resolved in children:
        chain = " → ".join(p.name for p in (*children, resolved))
        raise EngineError("E106", "`extends` goes round in circles", place=place, got=chain, fix="Break the circle.")
    beside = path.parent / parent
    try:
        found = beside if beside.is_file() else find_file(parent)
    except EngineError as error:
        raise EngineError("E106", f"the parent `{parent}` cannot be found", place=place, got=error.got,
                          expected=error.expected, fix=error.fix) from None  # fmt: skip
    base, files = _load(found, (*children, resolved))
    return _merge(base, own), (*files, document.file)


def _named(document: Document) -> Document:
    """Give unnamed rules the name of their first source, and `rules` the form name → rule."""
    data = dict(document.data)
    rules = data.get("rules")
    if not isinstance(rules, list):
        return document
    places = {p: at for p, at in document.places.items() if p[:1] != ("rules",)}
    places.update({("rules",): document.place("rules")})
    named: dict[str, Any] = {}
    for index, rule in enumerate(rules):
        place = document.place("rules", index)
        if not isinstance(rule, dict):
            raise EngineError("E102", "a rule is a mapping of keys", place=place, got=str(rule)[:60], fix="Write {source: …, target: …, axes: …}.")
        source = rule.get("source")
        name = rule.get("name") or (source[0] if isinstance(source, list) and source else source)
        if not isinstance(name, str):
            raise EngineError("E102", "a rule needs a `source` or a `name`", place=place, fix="Name the training tensor it reads.")
        if name in named:
            raise EngineError("E102", f"two rules are named `{name}`", place=place, got=f"first at {places[('rules', name)]}",
                              fix="Give one of them a `name`.")  # fmt: skip
        named[name] = {**rule, "name": name}
        for path, at in document.places.items():
            if path[:2] == ("rules", index):
                places[("rules", name, *path[2:])] = at
    data["rules"] = named
    return Document(document.file, data, places)


def _merge(base: Document, own: Document) -> Document:
    data = {k: v for k, v in base.data.items() if k not in ("extends", "remove")}
    places = dict(base.places)
    _remove(data, own)
    for key, value in own.data.items():
        if key in ("extends", "remove"):
            continue
        if key == "rules" and isinstance(value, dict):
            data["rules"] = _merge_rules(data.get("rules") or {}, value, places, own)
        elif key in _BY_KEY and isinstance(value, dict) and isinstance(data.get(key), dict):
            data[key] = {**data[key], **value}
            for name in value:
                _replace(places, own, (key, name))
        elif key in _APPENDED and isinstance(value, list) and isinstance(data.get(key), list):
            start = len(data[key])
            data[key] = [*data[key], *value]
            for path, at in own.places.items():
                if path[:1] == (key,) and len(path) > 1:
                    places[(key, start + int(path[1]), *path[2:])] = at
        else:
            data[key] = value
            _replace(places, own, (key,))
    places[()] = own.place()
    return Document(own.file, data, places)


def _merge_rules(base: dict[str, Any], own: dict[str, Any], places: dict[KeyPath, Any], document: Document) -> dict[str, Any]:
    merged = dict(base)
    for name, rule in own.items():
        changed = dict(merged.get(name, {}))
        if "target" in rule:
            changed.pop("targets", None)
        if "targets" in rule:
            changed.pop("target", None)
        merged[name] = {**changed, **rule}
        if name not in base:
            _replace(places, document, ("rules", name))
        else:
            places[("rules", name)] = document.place("rules", name)
            for key in rule:
                _replace(places, document, ("rules", name, key))
    return merged


def _replace(places: dict[KeyPath, Any], own: Document, prefix: KeyPath) -> None:
    for path in [p for p in places if p[: len(prefix)] == prefix]:
        del places[path]
    places.update({p: at for p, at in own.places.items() if p[: len(prefix)] == prefix})


def _remove(data: dict[str, Any], own: Document) -> None:
    for index, name in enumerate(own.data.get("remove") or []):
        found = False
        for key in ("rules", "variants", "dims", "options"):
            table = data.get(key)
            if isinstance(table, dict) and name in table:
                data[key] = {k: v for k, v in table.items() if k != name}
                found = True
        if not found:
            known = [k for key in ("rules", "variants", "dims", "options") for k in (data.get(key) or {})]
            near = get_close_matches(str(name), known, 1)
            raise EngineError("E106", f"`remove` names `{name}`, which the parent does not have", place=own.place("remove", index),
                              fix=f"Did you mean `{near[0]}`?" if near else "Remove the entry.")  # fmt: skip
