"""The subset of Jinja for expressions: they are parsed and checked against an allow-list before Jinja compiles them.

The sandbox keeps Python out but does not limit work, so the syntax tree itself is checked: its kinds of
nodes, length, depth and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context

from engine.language.sandbox import ENVIRONMENT, FILTERS, FUNCTIONS, MAX_BITS, TESTS

_N = TypeVar("_N", bound=nodes.Node)

MAX_LENGTH = 2000
MAX_DEPTH = 40

_CALLS = frozenset(("present", "gcd", "min", "max", "default"))
BUILTIN = frozenset((*FUNCTIONS, "present"))
_NODES: tuple[type[nodes.Node], ...] = (
    nodes.Const, nodes.Name, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.CondExpr,
    nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos,
    nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand,
    nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test, nodes.Call,
)  # fmt: skip


class Refused(Exception):
    """Why an expression is not part of the language."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class _Names(Context):
    """The context of an expression; making Jinja's own takes longer than evaluating most expressions."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.environment, self.eval_ctx = ENVIRONMENT, _EVALUATION
        self.parent, self.vars, self.exported_vars = names, {}, set()


_EVALUATION = EvalContext(ENVIRONMENT)


@dataclass(frozen=True)
class Compiled:
    """An expression that passed the allow-list, with the names it reads.

    `names` are root names, `paths` whole dotted paths, `patterns` the arguments of `present`.
    """

    tree: nodes.Expr
    names: frozenset[str]
    paths: frozenset[str]
    patterns: tuple[str, ...]
    calls: frozenset[str]

    def every(self, kind: type[_N]) -> list[_N]:
        """All nodes of the expression of one kind, outermost first."""
        return [*([self.tree] if isinstance(self.tree, kind) else []), *self.tree.find_all(kind)]

    def run(self, names: Mapping[str, Any]) -> Any:
        if isinstance(self.tree, nodes.Name) and self.tree.name in names and self.tree.name not in BUILTIN:
            return names[self.tree.name]  # most are just a name, or a value as below, for which Jinja is slow
        if isinstance(self.tree, nodes.Const):
            return self.tree.value
        read, root = self._compiled
        context = _Names({**FUNCTIONS, **{name: names[name] for name in read if name in names}})
        for _ in root(context):  # it yields no text; run it to its end
            pass
        return context.vars["result"]

    @cached_property
    def _compiled(self) -> tuple[frozenset[str], Callable[[Context], Iterable[str]]]:
        """The names that the checked tree reads, and what `Environment.compile_expression` would make of it."""
        result = nodes.Assign(nodes.Name("result", "store", lineno=1), self.tree, lineno=1)
        template = nodes.Template([result], lineno=1)
        template.set_environment(ENVIRONMENT)
        return self.names | (self.calls & {"present"}), ENVIRONMENT.from_string(template).root_render_func


@lru_cache(maxsize=4096)
def read_expression(text: str) -> Compiled | Refused:
    """Parse and check an expression; returns it, or why it is not part of the language."""
    try:
        return _check(text)
    except Refused as refused:
        return refused
    except TemplateSyntaxError as error:
        return Refused(
            f"an expression cannot be read: {_in_words(text, error.message or '')}",
            "An expression is Jinja: names, numbers, 'texts', and, or, not, and filters like | default(0).",
        )
    except (RecursionError, ValueError):  # ValueError: a number with thousands of digits
        return Refused("an expression is nested too deeply or holds a number that is too long")


def _in_words(text: str, told: str) -> str:
    """What is wrong with an invalid expression, without Jinja's words for templates and tokens.

    >>> _in_words("epsilon | default(1e-5", "unexpected end of template, expected ','.")
    'a `(` is not closed'
    """
    for opening, closing in ("()", "[]", "{}"):
        if text.count(opening) != text.count(closing):
            extra = text.count(closing) > text.count(opening)
            return f"there is a `{closing}` too many" if extra else f"a `{opening}` is not closed"
    for quote in "'\"":
        if text.count(quote) % 2:
            return f"a quote {quote} is not closed"
    if "end of template" in told or "end of print statement" in told:
        return "it ends where something should follow"
    strange = re.match(r"unexpected char '(.)'", told)
    return f"`{strange[1]}` is not part of the language" if strange else told.removesuffix(".")


def _check(text: str) -> Compiled:
    if len(text) > MAX_LENGTH:
        raise Refused(f"an expression is longer than {MAX_LENGTH} characters", "Split it over several dims.")
    if max(text.count("("), text.count("["), text.count("{"), text.count("not"), text.count("-")) > 200:
        raise Refused("an expression is nested too deeply", "Split it over several dims.")
    if text.startswith("{{"):
        raise Refused("this expression is written without braces", f"Write {text.strip('{} ')}.")
    parser = Parser(ENVIRONMENT, text, state="variable")
    tree = parser.parse_expression()
    if not parser.stream.eos:
        raise Refused(f"an expression cannot be read: unexpected `{parser.stream.current.value}`")
    names: set[str] = set()
    paths: set[str] = set()
    patterns: list[str] = []
    calls: set[str] = set()
    stack: list[tuple[nodes.Node, int, bool]] = [(tree, 1, False)]
    while stack:
        node, depth, called = stack.pop()
        if depth > MAX_DEPTH:
            raise Refused(f"an expression is nested deeper than {MAX_DEPTH} levels", "Split it over several dims.")
        _allow(node)
        if isinstance(node, nodes.Name):
            if called:
                calls.add(node.name)
            elif node.name not in BUILTIN:
                names.add(node.name)
            elif node.name != "omit":
                raise Refused(f"`{node.name}` is a function", f"Write {node.name}(...).")
        path = dotted(node)
        if path and path.split(".")[0] not in BUILTIN:
            paths.add(path)
        match node:
            case nodes.Call(node=nodes.Name(name="present"), args=[nodes.Const(value=str(asked))]):
                patterns.append(asked)
            case nodes.Call(node=nodes.Name(name="present")):
                told = "Write it like present('layers.{layer}.norm.weight')."
                raise Refused("`present` takes one quoted name pattern", told)
        callee = node.node if isinstance(node, nodes.Call) else None
        stack.extend((child, depth + 1, child is callee) for child in node.iter_child_nodes())
    whole = frozenset(p for p in paths if not any(o.startswith(p + ".") for o in paths))
    return Compiled(tree, frozenset(names), whole, tuple(patterns), frozenset(calls))


def _allow(node: nodes.Node) -> None:
    if isinstance(node, nodes.Concat):
        raise Refused("`~` is not part of the language", "Join texts with +.")
    if not isinstance(node, _NODES):
        raise Refused(
            f"`{type(node).__name__.lower()}` is not part of the language",
            "Use arithmetic, comparisons, `if`.",
        )
    if isinstance(node, nodes.CondExpr) and node.expr2 is None:
        raise Refused("an `if` has no `else`", "Write `a if condition else b`, or `else omit`.")
    if isinstance(node, nodes.Name) and node.name in ("self", "super"):
        raise Refused(f"`{node.name}` is not part of the language")
    if isinstance(node, nodes.Filter | nodes.Call) and _is_default(node) and len(node.args) < _ARITY[type(node)]:
        raise Refused("`default` says nothing to fall back on", "Write `x | default(value)`.")
    if isinstance(node, nodes.Filter):
        if node.node is None or node.name not in FILTERS:
            raise Refused(f"there is no filter `{node.name}`", f"Filters are {', '.join(sorted(FILTERS))}.")
    elif isinstance(node, nodes.Test):
        if node.name not in TESTS:
            raise Refused(f"there is no test `is {node.name}`", f"Tests are {', '.join(sorted(TESTS))}.")
    elif isinstance(node, nodes.Call):
        if not isinstance(node.node, nodes.Name) or node.node.name not in _CALLS:
            named = node.node.name if isinstance(node.node, nodes.Name) else "this"
            raise Refused(f"`{named}` cannot be called", f"Functions are {', '.join(sorted(_CALLS))}.")
    elif isinstance(node, nodes.Getitem):
        index = node.arg.node if isinstance(node.arg, nodes.Neg) else node.arg
        if not isinstance(index, nodes.Const):
            raise Refused("an index must be a constant", "Write x[0] or x['key'].")
    elif isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value.bit_length() > MAX_BITS:
        raise Refused(f"a number of more than {MAX_BITS} bits")
    elif isinstance(node, nodes.Const) and isinstance(node.value, float) and not isfinite(node.value):
        raise Refused("a number that is too large")
    if isinstance(node, nodes.Filter | nodes.Call | nodes.Test) and (
        node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None
    ):
        raise Refused("named and starred arguments are not part of the language", "Give arguments in order.")


_ARITY: dict[type[nodes.Node], int] = {nodes.Filter: 1, nodes.Call: 2}


def _is_default(node: nodes.Filter | nodes.Call) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name == "default"
    return isinstance(node.node, nodes.Name) and node.node.name == "default"


def dotted(node: nodes.Node) -> str:
    """A name with its attributes, as `options.size`; empty for anything else."""
    if isinstance(node, nodes.Getattr):
        above = dotted(node.node)
        return f"{above}.{node.attr}" if above else ""
    return node.name if isinstance(node, nodes.Name) else ""
