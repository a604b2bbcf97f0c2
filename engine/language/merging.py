"""Inheritance: `extends` names one parent; a child changes only the keys it writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import EngineError, Place, meant
from engine.language.documents import At, Document, KeyPath
from engine.language.keys import apart
from engine.language.loader import content_of, load_yaml
from engine.language.search import find_file, shown
from engine.language.validation import check_schema

_MAX_PARENTS = 8
_BY_KEY = frozenset(
    (
        "options",
        "variants",
        "dims",
        "config",
        "training_config",
        "expect",
        "tokenizer",
        "generation",
        "source",
        "target",
        "keys",
    )
)
_APPENDED = frozenset(("ignore", "refuse"))
_REMOVABLE = ("rules", "variants", "dims", "options")
_WHOLE = frozenset(("choices",))  # the order of choices is their meaning: replaced as a whole
_WHOLE_KEY = 3  # length of a path to what `keys` declares of one key: one statement


class Kept(NamedTuple):
    """A file as it was when it was read: its path, the name that messages have for it, and what it held."""

    path: Path
    name: str
    content: bytes


def chain_of(path: Path, named: Path | None = None) -> tuple[Kept, ...]:
    """The files that a mapping is merged of, family first.

    Args:
        named: a folder where parents that are given by name are looked for first.

    Raises:
        EngineError: E101, E102 for what cannot be read, E106 for parents that cannot be resolved.
    """
    chain: tuple[Kept, ...] = (_kept(path),)
    while (parent := _parent(chain, named)) is not None:
        chain = (_kept(parent), *chain)
    return chain


def merged(chain: Sequence[Kept]) -> Document:
    """A mapping merged over its parents.

    Rules become a mapping of name → rule, in the parent's order and then the child's.

    Raises:
        EngineError: E106 for what does not fit its parent.
    """
    return reduce(lambda base, own: _Merge(base, own).result(), (_read(*one) for one in chain))


def _parent(chain: Sequence[Kept], named: Path | None) -> Path | None:
    """The file that the first of a chain extends."""
    path, own = chain[0].path, _read(*chain[0])
    parent = own.data.get("extends")
    if parent is None:
        if own.data.get("remove"):
            raise EngineError(
                "E106",
                "`remove` without a parent",
                place=own.place("remove"),
                expected="`extends` beside it",
                fix="Name the parent with `extends`, or delete `remove`.",
            )
        return None
    place = own.place("extends")
    try:
        beside = path.parent / parent
        found = beside if os.path.isfile(beside) else find_file(parent, first=named)
    except EngineError as error:
        raise EngineError(
            "E106",
            f"the parent `{parent}` cannot be found",
            place=place,
            got=error.got,
            expected=error.expected,
            fix=error.fix,
        ) from None
    files = [one.path.resolve() for one in reversed(chain)]
    shape = " → ".join(p.name for p in (*files, found))
    if found.resolve() in files:
        raise EngineError("E106", "`extends` goes round in circles", place=place, got=shape, fix="Break the circle.")
    if len(files) >= _MAX_PARENTS:
        raise EngineError(
            "E106",
            f"`extends` goes through more than {_MAX_PARENTS} files",
            place=place,
            got=shape,
            fix="Shorten the chain: a family and a release are usually enough.",
        )
    return found


def _kept(path: Path) -> Kept:
    return Kept(path, shown(path), content_of(path))


@lru_cache(maxsize=64)
def _read(path: Path, name: str, content: bytes) -> Document:
    """One file by itself. A family is read once for all its releases, unless it changed."""
    document = load_yaml(path, name)
    check_schema(document, "mapping")
    return _named(apart(document))


def _named(document: Document) -> Document:
    """Give unnamed rules the name of their first source, and `rules` the form name → rule."""
    data = dict(document.data)
    places = {p: at for p, at in document.places.items() if p[:1] != ("rules",)}
    places["rules",] = document.at("rules")
    named: dict[str, Any] = {}
    names: list[str] = []
    for index, rule in enumerate(data.get("rules", [])):
        source = rule.get("source")
        name = rule.get("name") or (source[0] if isinstance(source, list) else source)
        place = document.place("rules", index)
        if name is None:
            raise EngineError(
                "E102",
                "a rule has neither `name` nor `source`",
                place=place,
                got=", ".join(rule) or "nothing",
                expected="source: the training tensor it reads, or name: the parent's rule it changes",
                fix="Name the training tensor it reads.",
            )
        if name in named:
            raise EngineError(
                "E102",
                f"two rules are named `{name}`",
                place=place,
                got=f"the first is at {places['rules', name].key}",
                expected="every rule its own name; unnamed rules are named after their first source",
                fix="Give one of them a `name`.",
            )
        named[name] = {**rule, "name": name}
        names.append(name)
        places["rules", name] = document.at("rules", index)
    for path, at in document.places.items():
        if path[:1] == ("rules",) and len(path) > 2:
            places["rules", names[int(path[1])], *path[2:]] = at
    if "rules" in data:
        data["rules"] = named
    return Document(document.file, data, places)


class _Merge:
    """One child over its resolved parent; places follow their values."""

    def __init__(self, base: Document, own: Document) -> None:
        self.own = own
        self.data: dict[str, Any] = dict(base.data)
        self.places: dict[KeyPath, At] = dict(base.places)

    def result(self) -> Document:
        for index, name in enumerate(self.own.data.get("remove") or []):
            self._remove(name, self.own.place("remove", index))
        for key, value in self.own.data.items():
            if key in ("extends", "remove"):
                continue
            if key == "rules":
                self.data[key] = self._rules(self.data.get(key) or {}, value)
            elif key in _BY_KEY:
                self.data[key] = self._keys(self.data.get(key), value, (key,))
            elif key in _APPENDED:
                self.data[key] = self._append(self.data.get(key) or [], value, key)
            else:
                self.data[key] = self._take((key,), value)
        self.places[()] = self.own.at()
        return Document(self.own.file, self.data, self.places)

    def _keys(self, base: Any, own: Any, path: KeyPath) -> Any:
        """Merge mappings by key, all the way down; anything else is the child's."""
        whole = path[-1] in _WHOLE or (path[0] == "keys" and len(path) == _WHOLE_KEY)
        if not isinstance(base, dict) or not isinstance(own, dict) or whole:
            return self._take(path, own)
        merged = dict(base)
        for key, value in own.items():
            merged[key] = self._keys(base.get(key), value, (*path, key))
        return merged

    def _rules(self, base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        merged = dict(base)
        for name, rule in own.items():
            if name not in base:
                merged[name] = self._take(("rules", name), rule)
                continue
            replaced = {"target", "targets"} if rule.keys() & {"target", "targets"} else set()
            merged[name] = {k: v for k, v in base[name].items() if k not in replaced}
            for key, value in rule.items():
                merged[name][key] = self._take(("rules", name, key), value)
            self.places["rules", name] = self.own.at("rules", name)
        return merged

    def _append(self, base: list[Any], own: list[Any], key: str) -> list[Any]:
        """The parent's entries, then the child's; an entry for the same names replaces the parent's."""
        merged = list(base)
        for index, entry in enumerate(own):
            same = [i for i, e in enumerate(merged) if all(e.get(s) == entry.get(s) for s in ("source", "target"))]
            at = same[0] if same else len(merged)
            merged[at : at + 1] = [entry]
            self._take((key, at), entry, (key, index))
        return merged

    def _take(self, path: KeyPath, value: Any, own_path: KeyPath | None = None) -> Any:
        """The child's value, with its places in stead of the parent's."""
        own_path = path if own_path is None else own_path
        length, size = len(path), len(own_path)
        for known in [p for p in self.places if p[:length] == path] if path in self.places else ():
            del self.places[known]
        self.places.update({(*path, *p[size:]): at for p, at in self.own.places.items() if p[:size] == own_path})
        return value

    def _remove(self, name: str, place: Place) -> None:
        """`name`, or `rules.name` and the like where a rule and a variant share a name."""
        kind, _, rest = name.partition(".")
        known = {k: list(self.data.get(k) or ()) for k in _REMOVABLE}
        found = [(k, name) for k in _REMOVABLE if name in known[k]]
        if not found and kind in _REMOVABLE and rest in known[kind]:
            found = [(kind, rest)]
        if not found:
            names = [n for k in _REMOVABLE for n in known[k]]
            raise EngineError(
                "E106",
                f"`remove` names `{name}`, which the parent does not have",
                place=place,
                got=name,
                expected="a rule, variant, dim or option of the parent",
                fix=meant(name, names, "Delete the entry."),
            )
        if len(found) > 1:
            kinds = [k for k, _ in found]
            raise EngineError(
                "E106",
                f"`remove` names `{name}`, which is more than one thing",
                place=place,
                got=f"`{name}` in {' and '.join(kinds)}",
                expected=" or ".join(f"`{k}.{name}`" for k in kinds),
                fix="Say which one, or both.",
            )
        table, entry = found[0]
        self.data[table] = {k: v for k, v in self.data[table].items() if k != entry}
