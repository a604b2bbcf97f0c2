"""What a Python configuration assigns, as far as its text tells. Parsed, never executed."""

from __future__ import annotations

import ast
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

MAX_SOURCE = 1 << 20  # characters
_DEEPEST = 50
_MOST_VALUES = 100_000  # of one name, counted as if nothing were shared
_LONGEST = 100_000  # characters of one text


_PARSING = threading.Lock()


def parsed(source: str | bytes) -> list[ast.stmt]:
    """The statements of a source, for any number of threads; errors as of `ast.parse`.

    Python 3.11 counts the depth of all trees that are made together, and ends in SystemError when two threads make one.
    """
    with _PARSING:
        return ast.parse(source).body


class _Unknown(Exception):
    """The value cannot be told from the text."""


_UNTOLD = (_Unknown, ArithmeticError, TypeError, ValueError, LookupError, AttributeError)


def literals(source: str) -> dict[str, Any]:
    """The names whose values can be told; a source that cannot be parsed has none.

    A name is left out as soon as something else may have changed it, since a wrong value is worse
    than none: a branch, a loop, a method call, an item that cannot be told.

    >>> literals("N = 2\\nparallel = dict(tensor=dict(size=N * 2), other=f())")
    {'N': 2, 'parallel': {'tensor': {'size': 4}}}
    >>> literals("tp = 1\\npp = 1\\nif cluster:\\n    tp = 8")
    {'pp': 1}
    """
    names: dict[str, Any] = {}
    if len(source) > MAX_SOURCE:
        return names
    try:
        body = parsed(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return names
    for statement in body:
        try:
            _perform(statement, names)
        except _UNTOLD:
            for name in _changed(statement):
                names.pop(name, None)
    return {name: value for name, value in names.items() if _is_small(value)}


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


def _changed(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement may change: those it binds, and those whose content or methods it uses."""
    for node in ast.walk(statement):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                yield name
            case ast.alias(name=name, asname=asname):
                yield asname or name.split(".")[0]
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Subscript(ctx=ast.Store() | ast.Del()) | ast.Attribute(ctx=ast.Store() | ast.Del()):
                yield from _base(node)
            case ast.Call(func=ast.Attribute() as method):
                yield from _base(method)


def _base(node: ast.expr) -> Iterator[str]:
    """The name at the start of `name.a["b"].c`."""
    inner = node
    while isinstance(inner, ast.Subscript | ast.Attribute):
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield inner.id


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
            return _UNARY[type(sign)](_value(inner, names, deeper))
        case ast.Subscript(value=base, slice=key):
            return _value(base, names, deeper)[_key(_value(key, names, deeper))]
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _value(left, names, deeper), _value(right, names, deeper))
        case ast.BoolOp(op=both, values=parts):
            result: Any = None
            for part in parts:
                result = _value(part, names, deeper)
                if bool(result) is isinstance(both, ast.Or):
                    break
            return result
        case ast.Compare(left=first, ops=comparisons, comparators=others):
            left_value = _value(first, names, deeper)
            for comparison, other in zip(comparisons, others, strict=True):
                right_value = _value(other, names, deeper)
                if not _COMPARE[type(comparison)](left_value, right_value):
                    return False
                left_value = right_value
            return True
        case ast.IfExp(test=test, body=yes, orelse=no):
            return _value(yes if _value(test, names, deeper) else no, names, deeper)
        case ast.JoinedStr(values=parts):
            return _joined([_value(part, names, deeper) for part in parts])
        case ast.FormattedValue(value=inner, conversion=-1, format_spec=None):
            return _joined([_value(inner, names, deeper)])
    raise _Unknown


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
                result.update(dict[Any, Any](_value(node, names, depth)))
                continue
            told = _key(_value(key, names, depth))
        except _UNTOLD:
            result.clear()
            continue
        try:
            result[told] = _value(node, names, depth)
        except _UNTOLD:
            result.pop(told, None)
    return result
