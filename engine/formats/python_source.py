"""What a Python configuration assigns, as far as its text tells. Parsed, never executed."""

from __future__ import annotations

import ast
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_SOURCE = 1 << 20  # characters
_DEEPEST = 50
_MOST_VALUES = 100_000  # of one name, counted as if nothing were shared
_LONGEST = 100_000  # characters of one text
_MOST_STATEMENTS = 2000
UNTOLD, OTHERS = "untold", "others"  # keys of what is told


_PARSING = threading.Lock()


def parsed(source: str | bytes) -> list[ast.stmt]:
    """The statements of a source, for any number of threads; errors as of `ast.parse`.

    Python 3.11 counts the depth of all trees that are made together, and ends in SystemError when two threads make one.
    """
    with _PARSING:
        return ast.parse(source).body


class _Unknown(Exception):
    """The value cannot be told from the text."""


class _Partial(dict[Any, Any]):
    """A mapping of which the text does not tell every item."""


_FAILS = (_Unknown, ArithmeticError, TypeError, ValueError, LookupError, AttributeError)


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
        except _FAILS:
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
    told = {name: value for name, value in names.items() if name not in {*used, UNTOLD} and _is_small(value)}
    lacking = {name for name, value in told.items() if _partial(_containers(value))}
    left = (untold | used | names.keys()) - told.keys() | lacking
    every = dict.fromkeys(sorted(told), False) if _ANY in left else {}
    every |= {OTHERS if name == _ANY else name: True for name in sorted(left, key=lambda name: (name == _ANY, name))}
    return {**told, **({UNTOLD: every} if every else {})}


def _perform(statement: ast.stmt, names: dict[str, Any]) -> None:
    targets: list[ast.expr]
    match statement:
        case ast.Assign(targets=targets, value=node):
            value = _value(node, names, 0)
        case ast.AnnAssign(target=target, value=ast.expr() as node):
            targets, value = [target], _value(node, names, 0)
        case ast.AugAssign(target=ast.Name(id=name) as counter, op=op, value=node):
            targets, value = [counter], _arithmetic(op, names[name], _value(node, names, 0))
        case ast.Expr(value=ast.Constant()) | ast.Pass():
            return
        case _:
            raise _Unknown
    if not _is_small(value):
        raise _Unknown
    for one in targets:
        _assign(one, value, names)


def _assign(target: ast.expr, value: Any, names: dict[str, Any]) -> None:
    match target:
        case ast.Name(id=name):
            names[name] = value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            if not isinstance(value, list) or len(value) != len(parts):
                raise _Unknown
            for part, item in zip(parts, value, strict=True):
                _assign(part, item, names)
        case ast.Subscript(value=base, slice=key):
            container = _value(base, names, 0)
            container[_key(_value(key, names, 0))] = value
            if not _is_small(container):  # it may hold itself now
                container.clear()
                raise _Unknown
        case _:
            raise _Unknown


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
            held = _containers(_value(node, names, 0))
        except _FAILS:
            passed = True
        else:
            if passed:
                yield from held
            if not _partial(held):
                return
    for inner in ast.iter_child_nodes(node):
        yield from _given(inner, names, passed)


def _partial(held: Iterable[Any]) -> bool:
    return any(isinstance(one, _Partial) for one in held)


def _sharing(given: Iterable[Any], names: Mapping[str, Any]) -> Iterator[str]:
    """The names whose values hold one of these mappings or lists."""
    held = {id(one) for one in given}
    return (n for n, value in (names.items() if held else ()) if any(id(one) in held for one in _containers(value)))


def _containers(value: Any) -> list[Any]:
    """The mappings and lists that a value is made of, each once, itself first."""
    found, waiting = {}, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list) and id(item) not in found:
            found[id(item)] = item
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return list(found.values())


def _is_small(value: Any) -> bool:
    """Whether a value, written out, is of bounded size and depth: names can hold others many times over."""
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            return False
        if isinstance(item, dict | list):
            inner = item.values() if isinstance(item, dict) else item
            if len(item) > _MOST_VALUES:
                return False
            waiting.extend((part, depth + 1) for part in inner)
    return True


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: _none(a, b), ast.IsNot: lambda a, b: not _none(a, b),
}  # fmt: skip


def _none(left: Any, right: Any) -> bool:
    """`is`, where it does not depend on the interpreter: beside None."""
    if left is not None and right is not None:
        raise _Unknown
    return left is right


def _value(node: ast.expr, names: Mapping[str, Any], depth: int) -> Any:
    if depth > _DEEPEST:
        raise _Unknown
    deeper = depth + 1
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return [_value(part, names, deeper) for part in parts]
        case ast.Dict(keys=keys, values=values):
            return _mapping(list(zip(keys, values, strict=True)), names, deeper)
        case ast.Call(func=ast.Name(id="dict"), args=parts, keywords=keywords) if (
            "dict" not in names and len(parts) < 2
        ):
            pairs: list[tuple[ast.expr | None, ast.expr]] = [(None, part) for part in parts]
            pairs += [(None if k.arg is None else ast.Constant(k.arg), k.value) for k in keywords]
            return _mapping(pairs, names, deeper)
        case ast.UnaryOp(op=sign, operand=inner):
            return _UNARY[type(sign)](_whole(inner, names, deeper))
        case ast.Subscript(value=base, slice=key):
            return _value(base, names, deeper)[_key(_value(key, names, deeper))]
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _value(left, names, deeper), _value(right, names, deeper))
        case ast.BoolOp(op=both, values=parts):
            result: Any = None
            for part in parts:
                result = _whole(part, names, deeper)
                if bool(result) is isinstance(both, ast.Or):
                    break
            return result
        case ast.Compare(left=first, ops=comparisons, comparators=others):
            left_value = _whole(first, names, deeper)
            for comparison, other in zip(comparisons, others, strict=True):
                right_value = _whole(other, names, deeper)
                if not _COMPARE[type(comparison)](left_value, right_value):
                    return False
                left_value = right_value
            return True
        case ast.IfExp(test=test, body=yes, orelse=no):
            return _value(yes if _whole(test, names, deeper) else no, names, deeper)
        case ast.JoinedStr(values=parts):
            return _joined([_value(part, names, deeper) for part in parts])
        case ast.FormattedValue(value=inner, conversion=-1, format_spec=None):
            return _joined([_value(inner, names, deeper)])
    raise _Unknown


def _whole(node: ast.expr, names: Mapping[str, Any], depth: int) -> Any:
    """A value of which every item is told."""
    value = _value(node, names, depth)
    if _partial(_containers(value)):
        raise _Unknown
    return value


def _key(value: Any) -> Any:
    if not isinstance(value, str | int | float | None):
        raise _Unknown
    return value


def _joined(parts: Sequence[Any]) -> str:
    if not all(isinstance(part, str | int | float) for part in parts):
        raise _Unknown
    return _bounded("".join(map(str, parts)))


def _bounded(text: str) -> str:
    if len(text) > _LONGEST:
        raise _Unknown
    return text


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str) and isinstance(op, ast.Add):
        return _bounded(left + right)
    if not all(isinstance(side, int | float) and abs(side) < 1 << 64 for side in (left, right)):
        raise _Unknown
    if isinstance(op, ast.Pow) and not (0 <= right <= 64 and abs(left) <= 1024):
        raise _Unknown
    result = _BINARY[type(op)](left, right)
    if not isinstance(result, int | float):  # a root of a negative number
        raise _Unknown
    return result


def _mapping(pairs: Sequence[tuple[ast.expr | None, ast.expr]], names: Mapping[str, Any], depth: int) -> dict[Any, Any]:
    """Items whose value cannot be told are left out; so are all before something that may replace them."""
    result: dict[Any, Any] = {}
    for key, node in pairs:
        try:
            if key is None:
                more = _value(node, names, depth)
                if isinstance(more, _Partial):
                    result = _Partial()
                result |= dict[Any, Any](more)
                continue
            told = _key(_value(key, names, depth))
        except _FAILS:
            result = _Partial()
            continue
        try:
            result[told] = _value(node, names, depth)
        except _FAILS:
            result = _Partial((one, item) for one, item in result.items() if one != told)
    return result
