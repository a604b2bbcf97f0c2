"""What a Python configuration assigns, as far as its text tells. Parsed, never executed."""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engine.formats.python_values import (
    FAILS,
    Unknown,
    arithmetic,
    containers,
    is_small,
    key_of,
    lacks_items,
    value_of,
)

MAX_SOURCE = 1 << 20  # characters
_MOST_STATEMENTS = 2000
UNTOLD, OTHERS = "untold", "others"  # keys of what is told


_PARSING = threading.Lock()


def parsed(source: str | bytes) -> list[ast.stmt]:
    """The statements of a source, for any number of threads; errors as of `ast.parse`.

    Python 3.11 counts the depth of all trees that are made together, and ends in SystemError when two threads make one.
    """
    with _PARSING:
        return ast.parse(source).body


def literals(source: str) -> dict[str, Any]:
    """The names whose values can be told; a source that cannot be parsed has none.

    A name is left out as soon as something else may have changed it, since a wrong value is worse
    than none: a branch, a loop, a method call, an item that cannot be told, a function that is given it.
    `untold` has the names that are left out or lack an item; also whether `others` may be there, as from an import.

    >>> literals("N = 2\\nparallel = dict(tensor=dict(size=N * 2), other=f())")
    {'N': 2, 'parallel': {'tensor': {'size': 4}}, 'untold': {'parallel': True}}
    >>> literals("tp = 1\\nif cluster:\\n    tp = 8\\nfrom base import *\\npp = 1")
    {'pp': 1, 'untold': {'pp': False, 'tp': True, 'others': True}}
    """
    names: dict[str, Any] = {}
    untold: set[str] = set()
    if len(source) > MAX_SOURCE:
        return names
    try:
        body = parsed(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return names
    if len(body) > _MOST_STATEMENTS:
        return {UNTOLD: {OTHERS: True}}
    for statement in body:
        changed: set[str] = set()
        given = [*_given(statement, names, False)]
        try:
            _perform(statement, names)
        except FAILS:
            changed.update(_bound(statement))
            given += _given(statement, names, True)
        changed.update(_sharing(given, names))
        untold |= changed
        for name in [*names] if _ANY in changed else changed:
            names.pop(name, None)
    # what functions use may change whenever one is called
    later = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inner = [node for one in body for node in ast.walk(one) if isinstance(node, later)]
    used = {name for node in inner for name in _bound(node)}
    used |= {name for node in inner for name in _sharing(_given(node, names, True), names)}
    if {"dict", _ANY} & used or "dict" in untold:
        return {UNTOLD: {OTHERS: True}}
    told = {name: value for name, value in names.items() if name not in {*used, UNTOLD} and is_small(value)}
    lacking = {name for name, value in told.items() if lacks_items(containers(value))}
    left = (untold | used | names.keys()) - told.keys() | lacking
    every = dict.fromkeys(sorted(told), False) if _ANY in left else {}
    every |= {OTHERS if name == _ANY else name: True for name in sorted(left, key=lambda name: (name == _ANY, name))}
    return {**told, **({UNTOLD: every} if every else {})}


def _perform(statement: ast.stmt, names: dict[str, Any]) -> None:
    targets: list[ast.expr]
    match statement:
        case ast.Assign(targets=targets, value=node):
            value = value_of(node, names)
        case ast.AnnAssign(target=target, value=ast.expr() as node):
            targets, value = [target], value_of(node, names)
        case ast.AugAssign(target=ast.Name(id=name) as counter, op=op, value=node):
            targets, value = [counter], arithmetic(op, names[name], value_of(node, names))
        case ast.Expr(value=ast.Constant()) | ast.Pass():
            return
        case _:
            raise Unknown
    if not is_small(value):
        raise Unknown
    for one in targets:
        _assign(one, value, names)


def _assign(target: ast.expr, value: Any, names: dict[str, Any]) -> None:
    match target:
        case ast.Name(id=name):
            names[name] = value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            if not isinstance(value, list) or len(value) != len(parts):
                raise Unknown
            for part, item in zip(parts, value, strict=True):
                _assign(part, item, names)
        case ast.Subscript(value=base, slice=key):
            container = value_of(base, names)
            container[key_of(value_of(key, names))] = value
            if not is_small(container):  # it may hold itself now
                container.clear()
                raise Unknown
        case _:
            raise Unknown


_ANY = "*"
_ANYTHING = frozenset(
    ("exec", "eval", "globals", "locals", "vars", "setattr", "delattr", "modules")
)  # reach every name


def _bound(statement: ast.AST) -> Iterator[str]:
    """Names that a statement may bind."""
    for node in ast.walk(statement):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in _ANYTHING:
                yield _ANY
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                yield name
            case ast.Global(names=names):
                yield from names
            case ast.alias(name=name, asname=asname):
                yield asname or name.split(".")[0]
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name
            case ast.MatchMapping(rest=str(name)):
                yield name


def _given(node: ast.AST, names: Mapping[str, Any], passed: bool) -> Iterator[Any]:
    """The mappings and lists that what cannot be told may change or keep; `passed` if the node is part of that."""
    changed = isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.expr) and not changed:
        try:
            held = containers(value_of(node, names))
        except FAILS:
            passed = True
        else:
            if passed:
                yield from held
            if not lacks_items(held):
                return
    for inner in ast.iter_child_nodes(node):
        yield from _given(inner, names, passed)


def _sharing(given: Iterable[Any], names: Mapping[str, Any]) -> Iterator[str]:
    """The names whose values hold one of these mappings or lists."""
    held = {id(one) for one in given}
    return (n for n, value in (names.items() if held else ()) if any(id(one) in held for one in containers(value)))
