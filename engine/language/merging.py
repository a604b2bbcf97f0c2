"""Inheritance: `extends` names one parent; a child changes only the keys it writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from engine.errors import EngineError, Place, meant
from engine.language.documents import Document, Items, KeyPath, Table
from engine.language.keys import names_apart
from engine.language.loader import content_of, load_bytes
from engine.language.search import find_file, shown
from engine.language.validation import check_schema

_MAX_PARENTS = 8
_BY_KEY = frozenset((
    "options", "variants", "dims", "config", "training_config", "expect", "tokenizer", "generation", "source", "target",
    "keys",
))  # fmt: skip
_APPENDED = frozenset(("ignore", "refuse"))
_REMOVABLE = ("rules", "variants", "dims", "options")
_WHOLE = frozenset(("choices", "answers"))  # the order of choices matters: replaced as a whole
_WHOLE_KEY = 3  # length of a path to the declaration of one key: replaced as a whole


class Kept(NamedTuple):
    """A file as it was when it was read: its path, its name in messages, and its content."""

    path: Path
    name: str
    content: bytes


def chain_of(path: Path, named: Path | None = None) -> tuple[Kept, ...]:
    """The files that a mapping is merged from, family first.

    Args:
        named: a folder to search first for parents that are given by name.

    Raises:
        EngineError: E101 or E102 for a file that cannot be read, E106 for parents that cannot be resolved.
    """
    chain: tuple[Kept, ...] = (_kept(path),)
    while (parent := _parent(chain, named)) is not None:
        chain = (_kept(parent), *chain)
    return chain


def merged(chain: Sequence[Kept]) -> Document:
    """A mapping merged over its parents.

    Rules become a mapping of name → rule, in the parent's order and then the child's.

    Raises:
        EngineError: E106 for entries that do not fit the parent.
    """
    return reduce(_over, map(_read, chain))


def family_in(chain: Sequence[Kept]) -> str:
    """The name of the family of a chain: of the last file before one that expects a release's sizes."""
    families = [*takewhile(lambda one: "expect" not in _read(one).data, chain)] or chain
    return families[-1].path.stem


def _parent(chain: Sequence[Kept], named: Path | None) -> Path | None:
    """The file that the first of a chain extends."""
    path, own = chain[0].path, _read(chain[0])
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
        raise EngineError("E106", "`extends` is circular", place=place, got=shape, fix="Break the circle.")
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
    name = shown(path)
    return Kept(path, name, content_of(path, name))


@lru_cache(maxsize=256)  # more than the bundled ones, which are looked through one after another
def _read(kept: Kept) -> Document:
    """One file by itself, cached until it changes: a family is read once for all its releases."""
    document = load_bytes(kept.content, kept.name)
    check_schema(document, "mapping")
    return _named(names_apart(document))


def _named(document: Document) -> Document:
    """Give unnamed rules the name of their first source, and `rules` the form name → rule."""
    rules, named = document.data.get("rules", Items()), Table()
    for index, rule in enumerate(rules):
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
                got=f"the first is at {named.at[name].key}",
                expected="every rule its own name; unnamed rules are named after their first source",
                fix="Give one of them a `name`.",
            )
        named.put(name, Table({**rule, "name": name}, rule.at), rules.at[index])
    if "rules" not in document.data:
        return document
    return Document(document.file, Table({**document.data, "rules": named}, document.data.at), document.start)


def _over(base: Document, own: Document) -> Document:
    """One child over its resolved parent."""
    data = Table(base.data, base.data.at)
    for index, name in enumerate(own.data.get("remove") or []):
        _remove(data, name, own.place("remove", index))
    for key, value in own.data.items():
        below = data.get(key)
        if key in ("extends", "remove"):
            continue
        if key == "rules" and below:
            data[key] = _rules(below, value)
        elif key in _BY_KEY and isinstance(below, Table) and isinstance(value, Table):
            data[key] = _by_key(below, value, (key,))
        elif key in _APPENDED and below:
            data[key] = _appended(below, value)
        else:
            data.put(key, value, own.data.at[key])
    return Document(own.file, data, own.start)


def _by_key(base: Table, own: Table, path: KeyPath) -> Table:
    """Merge keys recursively; anything else is taken from the child."""
    found = Table(base, base.at)
    for key, value in own.items():
        whole = key in _WHOLE or (path[0] == "keys" and len(path) + 1 == _WHOLE_KEY)
        if isinstance(base.get(key), Table) and isinstance(value, Table) and not whole:
            found[key] = _by_key(base[key], value, (*path, key))
        else:
            found.put(key, value, own.at[key])
    return found


def _rules(base: Table, own: Table) -> Table:
    """The parent's rules, with the keys that the child overrides, then the child's own rules."""
    found = Table(base, base.at)
    for name, rule in own.items():
        before = base.get(name, Table())
        replaced = {"target", "targets"} if rule.keys() & {"target", "targets"} else set()
        kept = {key: value for key, value in before.items() if key not in replaced}
        found.put(name, Table({**kept, **rule}, {**before.at, **rule.at}), own.at[name])
    return found


def _appended(base: Items, own: Items) -> Items:
    """The parent's entries, then the child's; an entry for the same names replaces the parent's."""
    found = Items(base, base.at)
    for index, entry in enumerate(own):
        same = [i for i, e in enumerate(found) if all(e.get(s) == entry.get(s) for s in ("source", "target"))]
        at = same[0] if same else len(found)
        found[at : at + 1] = [entry]
        found.at[at] = own.at[index]
    return found


def _remove(data: Table, name: str, place: Place) -> None:
    """Remove `name`, or `rules.name` and the like if a rule and a variant share a name."""
    kind, _, rest = name.partition(".")
    known = {k: list(data.get(k) or ()) for k in _REMOVABLE}
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
    data[table] = Table(data[table], data[table].at)
    del data[table][entry]
