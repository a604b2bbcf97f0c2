"""The assignments of a Python configuration that its text determines, in bounded time and memory. Never executes it."""

from __future__ import annotations

import ast
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

MAX_SOURCE = 1 << 20  # characters
UNTOLD, OTHERS = "untold", "others"  # keys of the result
_MOST_STATEMENTS = 2000
_DEEPEST = 50
_MOST_VALUES = 100_000  # of one name; shared values are counted each time
_LONGEST = 100_000  # characters of one text
_LARGEST = 1 << 64  # no number that is written out, or computed with, is larger
_ANY = "*"  # stands for every name
_LOST = object()  # the value of an item that is not known
_ANYTHING = frozenset(("exec", "eval", "globals", "locals", "vars", "setattr", "delattr", "modules"))  # reach all names
_LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.GeneratorExp)
_PARSING = threading.Lock()


def parsed(source: str) -> list[ast.stmt]:
    """The statements of a source, for any number of threads; errors as for `ast.parse`.

    Python 3.11 counts the depth of all trees being parsed, and raises SystemError if two threads parse at once.
    """
    with _PARSING:
        return ast.parse(source).body


def literals(source: str) -> dict[str, Any]:
    """The names with known values; a source that cannot be parsed has none.

    A name is left out as soon as something else may have changed it, since a wrong value is worse
    than none: a branch, a loop, a method call, an item that cannot be told, a function that is given it.
    `untold` has the names that are left out or may have more items, and by their keys the items that are left out;
    also whether `others` may be there, as from an import.

    >>> literals("N = 2\\nparallel = dict(tensor=dict(size=N * 2), other=f())")
    {'N': 2, 'parallel': {'tensor': {'size': 4}}, 'untold': {'parallel.other': True}}
    >>> literals("tp = 1\\nif cluster:\\n    tp = 8\\nfrom base import *\\npp = 1")
    {'pp': 1, 'untold': {'pp': False, 'tp': True, 'others': True}}
    """
    try:
        body = parsed(source) if len(source) <= MAX_SOURCE else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    if len(body) > _MOST_STATEMENTS:
        return {UNTOLD: {OTHERS: True}}
    program = _Program()
    for statement in body:
        program.perform(statement)
    # names that functions use may change on any call
    used = {name for one in body for node in ast.walk(one) if isinstance(node, _LATER) for name in program.reach(node)}
    if {"dict", _ANY} & used or "dict" in program.untold:
        return {UNTOLD: {OTHERS: True}}
    small = {name: value for name, value in program.names.items() if name not in {*used, UNTOLD} and _is_small(value)}
    lost: set[str] = set()
    told = {name: _without_lost(value, name, lost) for name, value in small.items()}
    left = (program.untold | used | program.names.keys()) - told.keys() | (program.lacking & told.keys()) | lost
    every = dict.fromkeys(sorted(told), False) if _ANY in left else {}
    every |= {OTHERS if name == _ANY else name: True for name in sorted(left, key=lambda name: (name == _ANY, name))}
    return {**told, **({UNTOLD: every} if every else {})}


def _without_lost(value: Any, path: str, lost: set[str]) -> Any:
    """A value without its unknown items; their dotted paths are added to `lost`."""
    if isinstance(value, list):
        return [_without_lost(one, path, lost) for one in value]
    if not isinstance(value, dict):
        return value
    lost |= {f"{path}.{key}" for key, item in value.items() if item is _LOST}
    return {key: _without_lost(item, f"{path}.{key}", lost) for key, item in value.items() if item is not _LOST}


class _Unknown(Exception):
    """Raised when the text does not determine a value."""


_FAILS = (_Unknown, ArithmeticError, TypeError, ValueError, LookupError, AttributeError)


class _Program:
    """The knowledge after some statements.

    Attributes:
        names: values by name; names that share a mapping or list share it here too.
        untold: names that were left out.
        lacking: names whose values may have more items.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.untold: set[str] = set()
        self.lacking: set[str] = set()
        self._sharing: dict[str, set[str]] = {}  # name → names whose values may hold the same mappings or lists

    def perform(self, statement: ast.stmt) -> None:
        """Process a statement; if its text does not determine what it does, forget all names that it may change."""
        value, held = _Value(self), self._held(statement)
        try:
            targets, result = _assigned(statement, value)
            if not _is_small(result):
                raise _Unknown
            for one in targets:
                _assign(one, result, value)
        except _FAILS:
            self.leave(self.reach(statement))
            return
        bound = {name for one in targets for name in _read(one)}
        self.lacking -= {one.id for one in targets if isinstance(one, ast.Name)}
        if isinstance(result, dict | list):
            self._share(bound | held)
        if value.lacks:
            self.lacking |= self._shared(bound)
        if value.fails:
            self.leave(held)

    def reach(self, node: ast.AST) -> set[str]:
        """The names that a part of the program may change: those that it binds, or whose mappings and lists it has."""
        return self._shared({*_bound(node), *self._held(node)})

    def _held(self, node: ast.AST) -> set[str]:
        """The names in a part of the program with mappings or lists, now or when it was called."""
        return _read(node) & self._sharing.keys()

    def _share(self, names: set[str]) -> None:
        every = self._shared(names)
        self._sharing |= dict.fromkeys(every, every)

    def _shared(self, names: Iterable[str]) -> set[str]:
        return {other for name in names for other in self._sharing.get(name, {name})}

    def leave(self, names: set[str]) -> None:
        lost = self._shared(names)
        self.untold |= lost
        for name in [*self.names] if _ANY in lost else lost:
            self.names.pop(name, None)


def _assigned(statement: ast.stmt, value: _Value) -> tuple[list[ast.expr], Any]:
    """The targets of an assignment, and the assigned value."""
    match statement:
        case ast.Assign(targets=targets, value=node):
            return targets, value.of(node)
        case ast.AnnAssign(target=target, value=ast.expr() as node):
            return [target], value.of(node)
        case ast.Expr(value=ast.Constant()) | ast.Pass():
            return [], None
    raise _Unknown


def _assign(target: ast.expr, result: Any, value: _Value) -> None:
    match target:
        case ast.Name(id=name):
            value.names[name] = result
        case ast.Subscript(value=base, slice=key):
            container = value.of(base)
            container[_key(value.of(key))] = result
            if not _is_small(container):  # it may contain itself now
                container.clear()
                raise _Unknown
        case _:
            raise _Unknown


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a part of the program may bind."""
    for one in ast.walk(node):
        match one:
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


def _read(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip


class _Value:
    """The value of a statement's expressions, given what the program did before.

    Attributes:
        lacks: whether it may have more items, whose keys the text does not tell.
        fails: whether something in it is made by what cannot be told.
    """

    def __init__(self, program: _Program) -> None:
        self._program, self.names = program, program.names
        self.lacks = self.fails = False

    def of(self, node: ast.expr, depth: int = 0) -> Any:
        """The value; raises one of `_FAILS` if the text does not determine it. `depth` is the nesting depth."""
        if depth > _DEEPEST:
            raise _Unknown
        deeper = depth + 1
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                if isinstance(value, int) and value >= _LARGEST:
                    raise _Unknown
                return value
            case ast.Name(id=name):
                self.lacks |= name in self._program.lacking
                return self.names[name]
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return [self.of(part, deeper) for part in parts]
            case ast.Dict(keys=keys, values=values):
                return self._mapping(list(zip(keys, values, strict=True)), deeper)
            case ast.Call(func=ast.Name(id="dict"), args=parts, keywords=keywords) if (
                "dict" not in self.names and len(parts) < 2
            ):
                pairs: list[tuple[ast.expr | None, ast.expr]] = [(None, part) for part in parts]
                pairs += [(None if k.arg is None else ast.Constant(k.arg), k.value) for k in keywords]
                return self._mapping(pairs, deeper)
            case ast.UnaryOp(op=sign, operand=inner) if isinstance(value := self.of(inner, deeper), int | float):
                return _UNARY[type(sign)](value)
            case ast.Subscript(value=base, slice=key):
                if (found := self.of(base, deeper)[_key(self.of(key, deeper))]) is _LOST:
                    raise _Unknown
                return found
            case ast.BinOp(left=left, op=op, right=right):
                return _arithmetic(op, self.of(left, deeper), self.of(right, deeper))
        raise _Unknown

    def _mapping(self, pairs: Sequence[tuple[ast.expr | None, ast.expr]], depth: int) -> dict[Any, Any]:
        """Items with unknown values are lost; so are all items before something that may replace them."""
        result: dict[Any, Any] = {}
        lacked = self.lacks
        for key, node in pairs:
            told, self.lacks = [], False
            try:
                told += [] if key is None else [_key(self.of(key, depth))]
                value = self.of(node, depth)
                more = {told[0]: value} if told else dict[Any, Any](value)
                result = more if self.lacks and not told else result | more
            except _FAILS:
                result = result | {told[0]: _LOST} if told else {}
                self.lacks, self.fails = not told, True
                for part in (node,) if key is None else (key, node):  # later expressions see its changes
                    self._program.leave(self._program.reach(part))
            lacked |= self.lacks
        self.lacks = lacked
        return result


def _key(value: Any) -> Any:
    """A value that can be a mapping's key."""
    if not isinstance(value, str | int | float | None):
        raise _Unknown
    return value


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    """The result of an operator on two numbers or texts, of bounded size."""
    if isinstance(left, str) and isinstance(right, str) and isinstance(op, ast.Add) and len(left + right) <= _LONGEST:
        return left + right
    if not all(isinstance(side, int | float) and abs(side) < _LARGEST for side in (left, right)):
        raise _Unknown
    if isinstance(op, ast.Pow) and not (0 <= right <= 64 and abs(left) <= 1024):
        raise _Unknown
    result = _BINARY[type(op)](left, right)
    if not isinstance(result, int | float):  # a root of a negative number
        raise _Unknown
    return result


def _is_small(value: Any) -> bool:
    """Whether a value, written out, has bounded size and depth: names can contain others many times."""
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        parts = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        count += 1
        if max(count, len(parts)) > _MOST_VALUES or depth > _DEEPEST:
            return False
        waiting.extend((part, depth + 1) for part in parts)
    return True
