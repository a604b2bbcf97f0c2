"""Configurations as a mapping reads them: every key is read, declared, reported or refused; none is lost.

`agreement.py` checks that the written configuration says the same again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from engine.errors import EngineError, Place, printable
from engine.formats.python_source import OTHERS, UNTOLD
from engine.language.declared import paths_in
from engine.language.documents import leaves, merged, prefixes, value_at
from engine.language.expressions import compile_expression
from engine.language.keys import Key, Limits, find_key, find_pattern
from engine.language.model import Layout, MappingFile

_FINITE = Limits()
_OTHERS = ("options", "training", "given")  # names that are not keys
_LONG = 256  # bits of a number that is not shown digit by digit


@dataclass(frozen=True, slots=True)
class Side:
    """A configuration to read: the declarations of its keys, which of them are read, and its file."""

    keys: Mapping[str, Key]
    read: frozenset[str]
    file: str
    written: frozenset[str] = frozenset()  # keys that are compared as a whole with what comes back
    spelt: Mapping[str, str] = field(default_factory=dict)  # path → its path in the file

    def reads(self, path: str) -> bool:
        return path in self.read or any(above in self.written for above in prefixes(path))


@dataclass(frozen=True, slots=True)
class Read:
    """A configuration that was read: without nulls, with declared values for absent keys; `noted` keys by path."""

    config: dict[str, Any]
    noted: dict[str, Any]
    side: Side


def source_side(mapping: MappingFile, layout: Layout) -> Side:
    """The training configuration, with the keys that dims, variants and config.json read."""
    variants = [dict(v.choices) for v in mapping.variants.values()]
    # a dimension that reads its own name means the key of that name
    dims = {name for name, size in mapping.dims.items() if name not in compile_expression(size).paths}
    own = {*dims, *mapping.variants, *_OTHERS}
    read = {path for path in paths_in([dict(mapping.dims), variants, mapping.config]) if path.split(".")[0] not in own}
    return Side(declared(mapping, layout, "source"), frozenset(read), layout.config_file)


def read_training(
    mapping: MappingFile, layout: Layout, config: Mapping[str, Any], *, expressed: bool = False
) -> dict[str, Any]:
    """The value of `training` in expressions; only declared keys are checked, as by `read_config`.

    An absent key has its default if there is a configuration whose text leaves no such key undetermined.
    """
    untold = config.get(UNTOLD, {})
    keys = declared(mapping, layout, "training")
    for name, key in keys.items():
        left_out = any(map(untold.get, prefixes(name)))
        if not config or left_out or (name.split(".")[0] not in untold and untold.get(OTHERS)):
            keys[name] = replace(key, default=None)
    side = Side(keys, frozenset(keys), layout.training_file or "the training config")
    return read_config(config, side, expressed=expressed).config


def target_side(mapping: MappingFile) -> Side:
    """config.json, as `training_config` reads it; keys written to it must come back equal, so they count as read."""
    written = frozenset(dict(leaves(mapping.config)))
    read = paths_in(mapping.training_config) | written
    return Side(dict(mapping.keys.get("target", {})), read, "config.json", written)


def whole_side(mapping: MappingFile, layout: Layout) -> Side:
    """config.json beside whole tensors; read as the training configuration if it is that too."""
    return source_side(mapping, layout) if layout.config_of_target else target_side(mapping)


def declared(mapping: MappingFile, layout: Layout, side: str) -> dict[str, Key]:
    """The layout's declarations of a side's keys, overridden by the mapping's."""
    return {**layout.keys.get(side, {}), **mapping.keys.get(side, {})}


def read_config(config: Mapping[str, Any], side: Side, *, expressed: bool = True) -> Read:
    """Read a configuration; every value must fit its declaration.

    Args:
        expressed: whether the model is written for the other side, which then must be able to express the keys.

    Raises:
        EngineError: E218 for a value of another type or range, E209 for one that the other side cannot
            express, E219 for a key that is neither read nor declared.
    """
    noted: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    once = _spelt_once(config, side, spelt)
    side = replace(side, spelt=spelt)
    deep = (known for known in (*side.keys, *side.read) if "." in known)
    holding = frozenset(above for known in deep for above in prefixes(known) if above != known)
    read = _read(once, side, "", noted, expressed, holding)
    for name, key in side.keys.items():
        # `once` has only one of two spellings of a key: only the file itself shows whether the other exists.
        there, beside = (read, once) if key.same_as is None else (config, config)
        if (key.comes_with is None and key.default is None) or value_at(there, name) is not None:
            continue
        if expressed and key.comes_with is not None and value_at(beside, key.comes_with) is not None:
            raise _missing(name, key, side)
        if key.default is not None:
            if expressed and not key.allows(key.default):
                raise _inexpressible(name, key.default, key, side, absent=True)
            _put(read, name, key.default, name, key, side)
    return Read(read, noted, side)


def _spelt_once(config: Mapping[str, Any], side: Side, spelt: dict[str, str]) -> dict[str, Any]:
    """The configuration with every other spelling of a key moved to that key; E218 if the two disagree."""
    result = merged(config)
    for path, key in side.keys.items():
        if key.same_as is None:
            continue
        *above, name = path.split(".")
        holder = value_at(result, ".".join(above)) if above else result
        if not isinstance(holder, dict) or name not in holder:
            continue
        value = holder.pop(name)
        if value is None:
            continue
        if not key.limits.fits(value):
            raise _misfit(path, value, str(key.limits), side, key)
        if isinstance(value, Mapping) and value:
            _check_whole(path, value, key, side, result, spelt)
        for written, item in leaves({path: value}) if value != {} else ():
            to = key.same_as + written.removeprefix(path)
            _put(result, to, item, written, key, side)
            spelt.setdefault(to, spelt.get(written, written))
    return result


def _check_whole(
    path: str, value: Mapping[str, Any], key: Key, side: Side, config: Mapping[str, Any], spelt: Mapping[str, str]
) -> None:
    """E218 for a key that exists only under another spelling: if `path` exists, programs read only that."""
    there = {_spelt_first(f"{key.same_as}.{name}", side) for name, item in leaves(value) if item is not None}
    other = value_at(config, key.same_as or "")
    for name, item in leaves(other if isinstance(other, Mapping) else {}):
        first = _spelt_first(f"{key.same_as}.{name}", side)
        known = side.keys.get(first)
        if item is None or first in there or first in spelt or (known is not None and known.default == item):
            continue
        expected = f"the same in `{path}`, which programs read in place of `{key.same_as}`"
        raise _misfit(f"{key.same_as}.{name}", item, expected, side, key)


def _spelt_first(path: str, side: Side) -> str:
    key = side.keys.get(path)
    return key.same_as if key is not None and key.same_as is not None else path


def _put(tree: dict[str, Any], to: str, value: Any, path: str, key: Key, side: Side) -> None:
    """Put a value in its place in a tree."""
    *above, last = to.split(".")
    for name in above:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise _misfit(name, tree, "keys and values", side, key)
    if tree.get(last) is None:
        tree[last] = value
    elif tree[last] != value:
        raise _misfit(path, value, f"{shown(tree[last])}, as `{to}` says", side, key)


def _read(
    values: Mapping[str, Any], side: Side, prefix: str, noted: dict[str, Any], expressed: bool, holding: frozenset[str]
) -> dict[str, Any]:
    """The values below a prefix; `holding` are the paths below which a key is known."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        plain = "." not in name  # a name with a dot is not a path
        inner = plain and path in holding
        reads = plain and side.reads(path)
        key = find_key(side.keys, path)
        if key is not None and not (plain and (key.decided or inner or reads)):
            general = find_pattern(side.keys, path)
            key = general if general is not None and general.decided else None  # a type alone is not enough
        if value is None and not _must_be(key, inner):
            continue
        if inner and (key is None or "*" in key.name) and not isinstance(value, Mapping):
            raise _misfit(path, value, "keys and values", side, None)
        if inner and isinstance(value, Mapping):
            result[name] = _read(value, side, f"{path}.", noted, expressed, holding)
            continue
        if key is None and not reads:
            if not expressed:
                result[name] = value
                continue
            raise _unknown(path, value, side)
        limits = _FINITE if key is None else key.limits
        free = key is not None and key.ignored is not None and limits == _FINITE
        if not free and not limits.fits(value):
            raise _misfit(path, value, str(limits), side, key)
        value = limits.taken(value)
        if key is not None and expressed:
            if not key.allows(value):
                raise _inexpressible(path, value, key, side)
            if key.noted is not None:
                noted[printable(path)] = value if isinstance(value, int | float) else printable(shown(value))
        result[name] = value
    return result


def _must_be(key: Key | None, inner: bool) -> bool:
    """Whether null is a value like any other there, not the same as an absent key."""
    if inner or key is None or key.ignored is not None or key.noted is not None:
        return False
    if key.only is not None:
        return None not in key.only
    return "null" not in key.limits.types


def shown(value: Any) -> str:
    """A value as a configuration file writes it.

    >>> shown(True), shown("gelu"), shown(None), shown({"type": "yarn"})
    ('true', '"gelu"', 'null', '{"type": "yarn"}')
    """
    if isinstance(value, int) and value.bit_length() > _LONG:
        return f"a number of {value.bit_length()} bits"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def _misfit(path: str, value: Any, expected: str, side: Side, key: Key | None) -> EngineError:
    path, file = side.spelt.get(path, path), side.file
    return EngineError(
        "E218",
        f"`{path}` of {file} cannot be {shown(value)}",
        place=Place(file),
        got=f"{path}: {shown(value)}",
        expected=expected + ("" if key is None else f" ({key.place})"),
        fix="Correct it in the configuration, or copy the configuration that belongs to the weights again.",
    )


def _missing(path: str, key: Key, side: Side) -> EngineError:
    spellings = " or ".join(f"`{name}`" for name in (path, *(n for n, k in side.keys.items() if k.same_as == path)))
    return EngineError(
        "E218",
        f"{spellings} is missing in {side.file}",
        place=Place(side.file),
        got=f"`{key.comes_with}` without it",
        expected=f"both, as they are written together ({key.place})",
        fix="Copy the configuration that belongs to the weights again.",
    )


def _inexpressible(path: str, value: Any, key: Key, side: Side, *, absent: bool = False) -> EngineError:
    path, file = side.spelt.get(path, path), side.file
    return EngineError(
        "E209",
        f"what `{path}` of {file} says cannot be expressed: {key.why}",
        place=Place(file),
        got=f"no {path}, which means {shown(value)}" if absent else f"{path}: {shown(value)}",
        expected=" or ".join(map(shown, key.only or ())) + f" ({key.place})",
        fix="Use a mapping that can express it. Where it does not change the model, a mapping that extends this one "
        f"can say so under `keys`: `{path}: {{ignored: why}}`.",
    )


def _unknown(path: str, value: Any, side: Side) -> EngineError:
    path = side.spelt.get(path, path)
    known = [name for name in (*side.keys, *sorted(side.read)) if "*" not in name and name != path]
    typed = find_key(side.keys, path)  # its type is declared, but not that its value does not matter
    near = get_close_matches(path, known, 1, 0.8)
    expected = "a key that the mapping reads or declares in its `keys`"
    if typed is not None:
        expected = f"an expression that reads it: its declaration only tells which values it may have ({typed.place})"
    return EngineError(
        "E219",
        f"nothing reads `{path}` of {side.file}",
        place=Place(side.file),
        got=f"{path}: {shown(value)}",
        expected=expected,
        fix=(f"Did you mean `{near[0]}`? " if near else "")
        + "It may change what the model computes, so it is not dropped. If it does not, a mapping that extends this "
        f"one can say so under `keys`: `{path}: {{ignored: why}}`.",
    )
