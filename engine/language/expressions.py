"""Expressions: a small, bounded part of Jinja, evaluated in an immutable sandbox.

The sandbox keeps Python out but bounds no work, so the syntax tree is checked against an
allow-list before Jinja compiles it (Jinja folds constants while compiling), and arithmetic is
intercepted: `2 ** 10 ** 9` and `"a" * 10 ** 9` are refused instead of computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from math import isfinite
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.environment import TemplateExpression
from jinja2.exceptions import TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.parser import Parser

from engine.errors import EngineError
from engine.language.model import Expression
from engine.language.sandbox import (
    ENVIRONMENT,
    FILTERS,
    FUNCTIONS,
    MAX_BITS,
    OMIT,
    TESTS,
    Omit,
    defined,
    kind_of,
)

__all__ = [
    "OMIT",
    "Compiled",
    "check_expression",
    "compile_expression",
    "evaluate",
    "names_in",
    "render_tree",
]

MAX_LENGTH = 2000
MAX_DEPTH = 40

_CALLS = frozenset(("present", "gcd", "min", "max", "default"))
_BUILTIN = frozenset((*FUNCTIONS, "present"))
_NODES: tuple[type[nodes.Node], ...] = (
    nodes.Const, nodes.Name, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.CondExpr,
    nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos,
    nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand,
    nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test, nodes.Call,
)  # fmt: skip


# What evaluating raises. Jinja writes constants that it folds into Python, and infinity as a name.
_EVALUATION = (
    TypeError, ValueError, ArithmeticError, LookupError, TemplateError, RecursionError, NameError, SyntaxError,
    MemoryError,
)  # fmt: skip


class _Refused(Exception):
    """Why an expression is not part of the language."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


@dataclass(frozen=True)
class Compiled:
    """An expression that passed the allow-list, with the names it reads.

    `names` are root names, `paths` whole dotted paths, `patterns` what `present` asks for,
    `defaulted` the root names whose absence the expression handles.
    """

    text: str
    tree: nodes.Expr
    names: frozenset[str]
    paths: frozenset[str]
    patterns: tuple[str, ...]
    defaulted: frozenset[str]
    calls: frozenset[str]

    def run(self, names: Mapping[str, Any]) -> Any:
        values = {name: names[name] for name in self.names | (self.calls & {"present"}) if name in names}
        return self._function(**{**values, **FUNCTIONS})

    @cached_property
    def _function(self) -> Callable[..., Any]:
        """What `Environment.compile_expression` makes, of the tree that was checked instead of its text."""
        result = nodes.Assign(nodes.Name("result", "store", lineno=1), self.tree, lineno=1)
        template = nodes.Template([result], lineno=1)
        template.set_environment(ENVIRONMENT)
        return TemplateExpression(ENVIRONMENT.from_string(template), undefined_to_none=False)


@lru_cache(maxsize=4096)
def _compiled(text: str) -> Compiled | _Refused:
    try:
        return _check(text)
    except _Refused as refused:
        return refused
    except TemplateSyntaxError as error:
        return _Refused(f"an expression cannot be read: {error.message}")
    except (RecursionError, ValueError):  # a number of thousands of digits is a ValueError
        return _Refused("an expression is nested too deeply or holds a number that is too long")


def _check(text: str) -> Compiled:
    if len(text) > MAX_LENGTH:
        raise _Refused(f"an expression is longer than {MAX_LENGTH} characters", "Split it over several dims.")
    if max(text.count("("), text.count("["), text.count("{"), text.count("not"), text.count("-")) > 200:
        raise _Refused("an expression is nested too deeply", "Split it over several dims.")
    parser = Parser(ENVIRONMENT, text, state="variable")
    tree = parser.parse_expression()
    if not parser.stream.eos:
        raise _Refused(f"an expression cannot be read: unexpected `{parser.stream.current.value}`")
    names: set[str] = set()
    paths: set[str] = set()
    patterns: list[str] = []
    defaulted: set[str] = set()
    calls: set[str] = set()
    stack: list[tuple[nodes.Node, int, bool]] = [(tree, 1, False)]
    while stack:
        node, depth, called = stack.pop()
        if depth > MAX_DEPTH:
            raise _Refused(f"an expression is nested deeper than {MAX_DEPTH} levels", "Split it over several dims.")
        _allow(node)
        if isinstance(node, nodes.Name):
            if called:
                calls.add(node.name)
            elif node.name not in _BUILTIN:
                names.add(node.name)
            elif node.name != "omit":
                raise _Refused(f"`{node.name}` is a function", f"Write {node.name}(...).")
        path = _path(node)
        if path is not None and path[0] not in _BUILTIN:
            paths.add(".".join(path))
        handled = _handled(node)
        if handled is not None:
            defaulted.add(handled)
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "present":
            if (
                len(node.args) != 1
                or not isinstance(node.args[0], nodes.Const)
                or not isinstance(node.args[0].value, str)
            ):
                raise _Refused("`present` takes one quoted name pattern")
            patterns.append(node.args[0].value)
        callee = node.node if isinstance(node, nodes.Call) else None
        stack.extend((child, depth + 1, child is callee) for child in node.iter_child_nodes())
    whole = frozenset(p for p in paths if not any(o.startswith(p + ".") for o in paths))
    return Compiled(text, tree, frozenset(names), whole, tuple(patterns), frozenset(defaulted), frozenset(calls))


def _allow(node: nodes.Node) -> None:
    if isinstance(node, nodes.Concat):
        raise _Refused("`~` is not part of the language", "Join texts with +.")
    if not isinstance(node, _NODES):
        raise _Refused(
            f"`{type(node).__name__.lower()}` is not part of the language",
            "Use arithmetic, comparisons, `if`.",
        )
    if isinstance(node, nodes.CondExpr) and node.expr2 is None:
        raise _Refused("an `if` has no `else`", "Write `a if condition else b`, or `else omit`.")
    if isinstance(node, nodes.Name) and node.name in ("self", "super"):
        raise _Refused(f"`{node.name}` is not part of the language")
    if isinstance(node, nodes.Filter | nodes.Call) and _is_default(node) and len(node.args) < _ARITY[type(node)]:
        raise _Refused("`default` says nothing to fall back on", "Write `x | default(value)`.")
    if isinstance(node, nodes.Filter):
        if node.node is None or node.name not in FILTERS:
            raise _Refused(f"there is no filter `{node.name}`", f"Filters are {', '.join(sorted(FILTERS))}.")
    elif isinstance(node, nodes.Test):
        if node.name not in TESTS:
            raise _Refused(f"there is no test `is {node.name}`", f"Tests are {', '.join(sorted(TESTS))}.")
    elif isinstance(node, nodes.Call):
        if not isinstance(node.node, nodes.Name) or node.node.name not in _CALLS:
            named = node.node.name if isinstance(node.node, nodes.Name) else "this"
            raise _Refused(f"`{named}` cannot be called", f"Functions are {', '.join(sorted(_CALLS))}.")
    elif isinstance(node, nodes.Getitem):
        index = node.arg.node if isinstance(node.arg, nodes.Neg) else node.arg
        if not isinstance(index, nodes.Const):
            raise _Refused("an index must be a constant", "Write x[0] or x['key'].")
    elif isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value.bit_length() > MAX_BITS:
        raise _Refused(f"a number of more than {MAX_BITS} bits")
    elif isinstance(node, nodes.Const) and isinstance(node.value, float) and not isfinite(node.value):
        raise _Refused("a number that is too large")
    if isinstance(node, nodes.Filter | nodes.Call | nodes.Test) and (
        node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None
    ):
        raise _Refused("named and starred arguments are not part of the language", "Give arguments in order.")


_ARITY: dict[type[nodes.Node], int] = {nodes.Filter: 1, nodes.Call: 2}


def _is_default(node: nodes.Filter | nodes.Call) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name == "default"
    return isinstance(node.node, nodes.Name) and node.node.name == "default"


def _path(node: nodes.Node | None) -> tuple[str, ...] | None:
    """The dotted path that a name or a chain of attributes reads, root first."""
    if isinstance(node, nodes.Name):
        return (node.name,)
    if isinstance(node, nodes.Getattr):
        below = _path(node.node)
        return None if below is None else (*below, node.attr)
    return None


def _handled(node: nodes.Node) -> str | None:
    """The root name whose absence this node handles, if it does."""
    inner: nodes.Node | None = None
    if isinstance(node, nodes.Filter | nodes.Call) and _is_default(node):
        inner = node.node if isinstance(node, nodes.Filter) else node.args[0]
    elif isinstance(node, nodes.Test) and node.name in ("defined", "undefined"):
        inner = node.node
    path = _path(inner)
    return None if path is None else path[0]


def compile_expression(expression: Expression) -> Compiled:
    """The expression read and checked, with the names it uses; E105 when it is not part of the language."""
    compiled = _compiled(expression.text)
    if isinstance(compiled, _Refused):
        raise EngineError(
            "E105", compiled.message, place=expression.place, got=_shown(expression.text), fix=compiled.fix
        )
    return compiled


def check_expression(expression: Expression) -> None:
    """Read an expression without evaluating it; E105 when it is not part of the language."""
    compile_expression(expression)


def names_in(expression: Expression) -> frozenset[str]:
    """The names an expression reads, functions aside.

    >>> from engine.errors import Place
    >>> sorted(names_in(Expression("num_kv_attention_heads | default(heads)", Place("x.yaml"))))
    ['heads', 'num_kv_attention_heads']
    """
    return compile_expression(expression).names


def evaluate(expression: Expression, names: Mapping[str, Any]) -> Any:
    """The value of an expression; E105 names what is missing or wrong.

    `names` may hold `present`, a function of a name pattern. Integers stay integers.

    >>> from engine.errors import Place
    >>> evaluate(Expression("((hidden * 8 / 3) | int + 255) // 256 * 256", Place("x.yaml")), {"hidden": 4096})
    11008
    >>> evaluate(Expression("training.pipeline.mode | default('1F1B')", Place("x.yaml")), {"training": {}})
    '1F1B'
    """
    compiled = compile_expression(expression)
    try:
        return _result(compiled.run(names), 0)
    except UndefinedError as error:
        _fail_missing(expression, str(error.message), compiled, names)
    except _EVALUATION as error:
        raise EngineError(
            "E105",
            f"an expression cannot be evaluated: {_reason(error)}",
            place=expression.place,
            got="\n".join([_shown(expression.text), *_seen(compiled, names)]),
            fix="Check the types of the values it reads.",
        ) from None


def render_tree(tree: Any, names: Mapping[str, Any]) -> Any:
    """Evaluate the expressions in a tree of literals; keys and items that are `omit` are left out.

    >>> from engine.errors import Place
    >>> place = Place("x.yaml")
    >>> render_tree({"a": Expression("2 * n", place), "b": Expression("omit", place), "c": "d"}, {"n": 21})
    {'a': 42, 'c': 'd'}
    """
    if isinstance(tree, Expression):
        return evaluate(tree, names)
    if isinstance(tree, Mapping):
        return {key: v for key, child in tree.items() if (v := render_tree(child, names)) is not OMIT}
    if isinstance(tree, list | tuple):
        return [v for child in tree if (v := render_tree(child, names)) is not OMIT]
    return tree


def _result(value: Any, depth: int) -> Any:
    """Only data leaves: no undefined value, no function, tuples as lists."""
    defined(value)
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return [_result(item, depth + 1) for item in value]
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        return {_result(key, depth + 1): _result(item, depth + 1) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str | Omit):
        return value
    raise TypeError(f"the value is {kind_of(value)}, not data")


def _fail_missing(expression: Expression, missing: str, compiled: Compiled, names: Mapping[str, Any]) -> NoReturn:
    known = [n for n in names if n != "present"] + sorted(_BUILTIN)
    full = next((p for p in sorted(compiled.paths) if p == missing or p.endswith("." + missing)), missing)
    near = [] if "." in missing else get_close_matches(missing, known, 3, 0.6)
    calls_present = missing == "present"
    raise EngineError(
        "E105",
        f"`{full}` has no value",
        place=expression.place,
        got=_shown(expression.text),
        expected="near names: " + ", ".join(near) if near and not calls_present else None,
        fix="`present` can only be used where a checkpoint's tensors are known."
        if calls_present
        else f"Give `{full}` a value in the configuration, or write `{full} | default(...)`.",
    )


def _seen(compiled: Compiled, names: Mapping[str, Any]) -> list[str]:
    shown = [(n, names[n]) for n in sorted(compiled.names) if n in names]
    return [f"{name} = {_shown(repr(value), 80)}" for name, value in shown[:8]]


def _reason(error: Exception) -> str:
    if isinstance(error, ZeroDivisionError):
        return "division by zero"
    return str(error) or type(error).__name__


def _shown(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"
