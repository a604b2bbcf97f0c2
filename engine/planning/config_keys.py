"""Configurations as a mapping reads them: every key is read, declared, told or refused; none vanishes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from engine.errors import EngineError, Place, printable
from engine.language.declared import expressions_of
from engine.language.expressions import compile_expression
from engine.language.keys import Key, Limits, find_key, find_pattern
from engine.language.model import Expression, Layout
from engine.language.model import Mapping as MappingFile

_FINITE = Limits()
_LONG = 256  # bits of a number that is not shown digit by digit


@dataclass(frozen=True, slots=True)
class Side:
    """A configuration to read: what is declared of its keys, which of them are read, and its file."""

    keys: Mapping[str, Key]
    read: frozenset[str]
    file: str


@dataclass(frozen=True, slots=True)
class Read:
    """A configuration that was read: without nulls, absent keys as declared; `noted` keys by path."""

    config: dict[str, Any]
    noted: dict[str, Any]


def source_side(mapping: MappingFile, layout: Layout) -> Side:
    """The training configuration, as dims, variants and config.json read it."""
    variants = [dict(v.choices) for v in mapping.variants.values()]
    own = {*mapping.dims, *mapping.variants, "options", "training"}  # names that stand for something else
    read = {path for path in _paths([dict(mapping.dims), variants, mapping.config]) if path.split(".")[0] not in own}
    return Side(declared(mapping, layout, "source"), frozenset(read), layout.config_file)


def training_side(mapping: MappingFile, layout: Layout) -> Side:
    """What expressions see as `training`; only what is declared is looked at."""
    return Side(declared(mapping, layout, "training"), frozenset(), layout.training_file or "the training config")


def target_side(mapping: MappingFile) -> Side:
    """config.json, as `training_config` reads it; what is written in it must come back equal, so it counts as read."""
    read = _paths(mapping.training_config) | dict(leaves(mapping.config)).keys()
    return Side(dict(mapping.keys.get("target", {})), frozenset(read), "config.json")


def declared(mapping: MappingFile, layout: Layout, side: str) -> dict[str, Key]:
    """What the layout says of a side's keys, and over it what the mapping says."""
    return {**layout.keys.get(side, {}), **mapping.keys.get(side, {})}


def _paths(tree: Any) -> frozenset[str]:
    return frozenset(path for one in expressions_of(tree) for path in compile_expression(one).paths)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is not a mapping, empty ones aside.

    >>> list(leaves({"a": {"b": 1}, "c": 2}))
    [('a.b', 1), ('c', 2)]
    """
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_config(config: Mapping[str, Any], side: Side, *, expressed: bool = True) -> Read:
    """A configuration whose every value fits what is declared of it.

    Args:
        expressed: whether the model is written for the other side, so that keys must be expressible there.

    Raises:
        EngineError: E218 for a value of another type or range, E209 for one that the other side cannot
            express, E219 for a key that is neither read nor declared.
    """
    noted: dict[str, Any] = {}
    read = _read(config, side, "", noted, expressed)
    for path, key in side.keys.items():
        value, other = _below(read, path), None if key.same_as is None else _below(read, key.same_as)
        if value is not None and other is not None and value != other:
            raise _misfit(path, value, f"{shown(other)}, as `{key.same_as}` says", side.file, key)
    for name, key in side.keys.items():
        if key.default is not None and name not in read and "." not in name:
            read[name] = key.default
    return Read(read, noted)


def _read(values: Mapping[str, Any], side: Side, prefix: str, noted: dict[str, Any], expressed: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        inner = any(known.startswith(f"{path}.") for known in (*side.keys, *side.read))
        key = find_key(side.keys, path)
        if key is not None and not (key.decided or inner or path in side.read):
            key = find_pattern(side.keys, path)  # its type is declared, and nothing reads it
        if value is None and not _must_be(key, path, side, inner):
            continue
        if inner and (key is None or "*" in key.name) and not isinstance(value, Mapping):
            raise _misfit(path, value, "keys and values", side.file, None)
        if inner and isinstance(value, Mapping):
            result[name] = _read(value, side, f"{path}.", noted, expressed)
            continue
        if key is None and path not in side.read:
            if not expressed:
                result[name] = value
                continue
            raise _unknown(path, value, side)
        limits = _FINITE if key is None else key.limits
        free = key is not None and key.ignored is not None and limits == _FINITE
        if not free and not limits.fits(value):
            raise _misfit(path, value, str(limits), side.file, key)
        value = limits.taken(value)
        if key is not None and expressed:
            if not key.allows(value):
                raise _inexpressible(path, value, key, side.file)
            if key.noted is not None:
                noted[printable(path)] = value if isinstance(value, int | float) else printable(shown(value))
        result[name] = value
    return result


def _must_be(key: Key | None, path: str, side: Side, inner: bool) -> bool:
    """Whether null is a value like any other there, and not as good as an absent key."""
    if inner:
        return False
    if key is None or key.ignored is not None or key.noted is not None:
        return False
    if key.only is not None:
        return None not in key.only
    return "null" not in key.limits.types


def as_declared(config: Mapping[str, Any], keys: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """A configuration to be written, each value in the type that is declared of its key."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        key = find_key(keys, path)
        if isinstance(value, Mapping):
            result[name] = as_declared(value, keys, f"{path}.")
        else:
            result[name] = value if key is None else key.limits.written(value)
    return result


def shown(value: Any) -> str:
    """A value of a configuration as its file would write it.

    >>> shown(True), shown("gelu"), shown(None), shown({"type": "yarn"})
    ('true', '"gelu"', 'null', '{"type": "yarn"}')
    """
    if isinstance(value, int) and value.bit_length() > _LONG:
        return f"a number of {value.bit_length()} bits"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def _misfit(path: str, value: Any, expected: str, file: str, key: Key | None) -> EngineError:
    return EngineError(
        "E218",
        f"`{path}` of {file} cannot be {shown(value)}",
        place=Place(file),
        got=f"{path}: {shown(value)}",
        expected=expected + ("" if key is None else f" ({key.place})"),
        fix="Correct it in the configuration, or copy the configuration that belongs to the weights again.",
    )


def _inexpressible(path: str, value: Any, key: Key, file: str) -> EngineError:
    return EngineError(
        "E209",
        f"what `{path}` of {file} says cannot be expressed: {key.why}",
        place=Place(file),
        got=f"{path}: {shown(value)}",
        expected=" or ".join(map(shown, key.only or ())) + f" ({key.place})",
        fix="Use a mapping that can express it. Where it does not change the model, a mapping that extends this one "
        f"can say so under `keys`: `{path}: {{ignored: why}}`.",
    )


def _unknown(path: str, value: Any, side: Side) -> EngineError:
    known = [name for name in (*side.keys, *sorted(side.read)) if "*" not in name]
    near = get_close_matches(path, known, 1, 0.8)
    return EngineError(
        "E219",
        f"nothing reads `{path}` of {side.file}",
        place=Place(side.file),
        got=f"{path}: {shown(value)}",
        expected="a key that the mapping reads, or that its `keys` say something of",
        fix=(f"Did you mean `{near[0]}`? " if near else "")
        + "It may change what the model computes, so it is not dropped. If it does not, a mapping that extends this "
        f"one can say so under `keys`: `{path}: {{ignored: why}}`.",
    )


def check_returns(given: Mapping[str, Any], forth: Mapping[str, Any], side: Side, mapping: MappingFile) -> None:
    """E209 for the first key of a configuration that the other side does not give back.

    Args:
        given: the configuration as read.
        forth: what is made, by the same mapping and options, of what is to be written.
    """
    written = dict(leaves(mapping.config))
    back = dict(leaves(forth))
    for path, value in leaves(given):
        tree = next((written[p] for p in _above(path) if p in written), None)
        key = find_key(side.keys, path)
        if tree is None or (key is not None and key.ignored is not None):
            continue
        found = back.get(path, _below(forth, path))
        if found is None and key is not None:
            found = key.default
        if _plain(found) == _plain(value):
            continue
        told = sorted({p.split(".")[1] for one in expressions_of(tree) for p in compile_expression(one).paths
                       if p.startswith("options.")})  # fmt: skip
        raise EngineError(
            "E209",
            f"`{path}` of {side.file} would be lost",
            place=Place(side.file),
            got=f"{path}: {shown(value)}",
            expected="no such key" if found is None else f"{shown(found)}, as what is written would be read",
            fix=(f"Training files do not hold it. If it is only how the model is served, say so with --set: "
                 f"{', '.join(told)}." if told else
                 "The configuration contradicts itself or the weights, or training files cannot express it: it is "
                 "another model's, or the mapping is not the one for it."),
        )  # fmt: skip


def _above(path: str) -> Iterator[str]:
    """The path and those it lies below, longest first."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def _below(tree: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def undeclared(mapping: MappingFile, layout: Layout) -> Iterator[tuple[Expression, str, str, Mapping[str, Key]]]:
    """Keys that expressions read and nothing declares: expression, side, path, what is declared there."""
    from engine.language.names import pattern

    axes = {name for rule in mapping.rules for name in rule.axes.names()}
    axes |= {name for rule in mapping.rules for target in rule.targets for name in target.axes.names()}
    axes |= {name for rule in mapping.rules for s in rule.sources for name in pattern(s).placeholders}
    dims = {d for mode in layout.modes for file in mode.files for d in pattern(file.name).placeholders}
    own = {*axes, *mapping.dims, *mapping.variants, "options", "training"}
    grid = {"dtype", "chunks", "mode", "layers", "model_type", *layout.layers.variants, *(f"{dim}s" for dim in dims)}
    forth = [dict(mapping.dims), [dict(v.choices) for v in mapping.variants.values()], mapping.config]
    for side, tree, known in (("source", forth, own), ("target", mapping.training_config, own | grid)):
        keys = declared(mapping, layout, side) if side == "source" else mapping.keys.get("target", {})
        for expression in expressions_of(tree):
            for path in sorted(compile_expression(expression).paths):
                root, _, rest = path.partition(".")
                if root == "training" and rest:
                    training = declared(mapping, layout, "training")
                    if not any(p in training for p in _above(rest)):
                        yield expression, "training", rest, training
                elif root not in known and not _is_declared(path, keys):
                    yield expression, side, path, keys


def _is_declared(path: str, keys: Mapping[str, Key]) -> bool:
    return path in keys or any(name.startswith(f"{path}.") for name in keys)
