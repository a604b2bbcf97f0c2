"""The values of Python expressions, as far as their text tells, in bounded time and memory. Never executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_DEEPEST = 50
_MOST_VALUES = 100_000  # of one name, counted as if nothing were shared
_LONGEST = 100_000  # characters of one text


class Unknown(Exception):
    """The value cannot be told from the text."""


class Partial(dict[Any, Any]):
    """A mapping of which the text does not tell every item."""


FAILS = (Unknown, ArithmeticError, TypeError, ValueError, LookupError, AttributeError)


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
        raise Unknown
    return left is right


def value_of(node: ast.expr, names: Mapping[str, Any], depth: int = 0) -> Any:
    """The value of an expression, of names whose values are told; one of `FAILS` where the text does not tell it.

    Args:
        depth: of the expression in another one.
    """
    if depth > _DEEPEST:
        raise Unknown
    deeper = depth + 1
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return [value_of(part, names, deeper) for part in parts]
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
            return value_of(base, names, deeper)[key_of(value_of(key, names, deeper))]
        case ast.BinOp(left=left, op=op, right=right):
            return arithmetic(op, value_of(left, names, deeper), value_of(right, names, deeper))
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
            return value_of(yes if _whole(test, names, deeper) else no, names, deeper)
        case ast.JoinedStr(values=parts):
            return _joined([value_of(part, names, deeper) for part in parts])
        case ast.FormattedValue(value=inner, conversion=-1, format_spec=None):
            return _joined([value_of(inner, names, deeper)])
    raise Unknown


def _whole(node: ast.expr, names: Mapping[str, Any], depth: int) -> Any:
    """A value of which every item is told."""
    value = value_of(node, names, depth)
    if lacks_items(containers(value)):
        raise Unknown
    return value


def key_of(value: Any) -> Any:
    """A value that a mapping may have as a key; Unknown for another."""
    if not isinstance(value, str | int | float | None):
        raise Unknown
    return value


def _joined(parts: Sequence[Any]) -> str:
    if not all(isinstance(part, str | int | float) for part in parts):
        raise Unknown
    return _bounded("".join(map(str, parts)))


def _bounded(text: str) -> str:
    if len(text) > _LONGEST:
        raise Unknown
    return text


def arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    """What an operator makes of two numbers or texts, of bounded size; Unknown, or what Python raises, if nothing."""
    if isinstance(left, str) and isinstance(right, str) and isinstance(op, ast.Add):
        return _bounded(left + right)
    if not all(isinstance(side, int | float) and abs(side) < 1 << 64 for side in (left, right)):
        raise Unknown
    if isinstance(op, ast.Pow) and not (0 <= right <= 64 and abs(left) <= 1024):
        raise Unknown
    result = _BINARY[type(op)](left, right)
    if not isinstance(result, int | float):  # a root of a negative number
        raise Unknown
    return result


def _mapping(pairs: Sequence[tuple[ast.expr | None, ast.expr]], names: Mapping[str, Any], depth: int) -> dict[Any, Any]:
    """Items whose value cannot be told are left out; so are all before something that may replace them."""
    result: dict[Any, Any] = {}
    for key, node in pairs:
        try:
            if key is None:
                more = value_of(node, names, depth)
                if isinstance(more, Partial):
                    result = Partial()
                result |= dict[Any, Any](more)
                continue
            told = key_of(value_of(key, names, depth))
        except FAILS:
            result = Partial()
            continue
        try:
            result[told] = value_of(node, names, depth)
        except FAILS:
            result = Partial((one, item) for one, item in result.items() if one != told)
    return result


def lacks_items(held: Iterable[Any]) -> bool:
    """Whether one of some mappings has items that the text does not tell."""
    return any(isinstance(one, Partial) for one in held)


def containers(value: Any) -> list[Any]:
    """The mappings and lists that a value is made of, each once, itself first."""
    found, waiting = {}, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list) and id(item) not in found:
            found[id(item)] = item
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return list(found.values())


def is_small(value: Any) -> bool:
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
