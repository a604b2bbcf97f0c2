"""Expressions: a small, bounded part of Jinja, evaluated in an immutable sandbox.

Arithmetic is intercepted: `2 ** 10 ** 9` and `"a" * 10 ** 9` are refused instead of computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError, UndefinedError

from engine.errors import EngineError, Lines, Place
from engine.language.allowed import BUILTIN, MAX_DEPTH, Compiled, Refused, read_expression
from engine.language.model import Expression
from engine.language.sandbox import OMIT, Omit, defined, kind_of

__all__ = ["OMIT", "Compiled", "compile_expression", "evaluate", "names_in", "render_tree", "whole_number"]

_PLAIN = (str, int, float, type(None), Omit)
# Errors of evaluation. NameError: Jinja folds constants and writes infinity into its Python code as a name.
_EVALUATION = (
    TypeError, ValueError, ArithmeticError, LookupError, TemplateError, RecursionError, NameError, SyntaxError,
    MemoryError,
)  # fmt: skip


def compile_expression(expression: Expression) -> Compiled:
    """Parse and check an expression, and find the names it uses; E105 when it is not part of the language."""
    compiled = read_expression(expression.text)
    if isinstance(compiled, Refused):
        raise EngineError(
            "E105", compiled.message, place=expression.place, got=_shown(expression.text), fix=compiled.fix
        )
    return compiled


def names_in(expression: Expression) -> frozenset[str]:
    """The names that an expression reads, without functions.

    >>> from engine.errors import Place
    >>> sorted(names_in(Expression("num_kv_attention_heads | default(heads)", Place("x.yaml"))))
    ['heads', 'num_kv_attention_heads']
    """
    return compile_expression(expression).names


def evaluate(expression: Expression, names: Mapping[str, Any]) -> Any:
    """The value of an expression; E105 says what is missing or wrong.

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
        reason = "division by zero" if isinstance(error, ZeroDivisionError) else str(error) or type(error).__name__
        read = [f"{name} = {_shown(repr(names[name]), 80)}" for name in sorted(compiled.names) if name in names]
        raise EngineError(
            "E105",
            f"an expression cannot be evaluated: {reason}",
            place=expression.place,
            got=Lines.of([_shown(expression.text), *read[:8]]),
            fix="Check the types of the values it reads.",
        ) from None


@contextmanager
def valued_in(file: str) -> Iterator[None]:
    """Let an E105 for a key without a value name the file that lacks the key."""
    try:
        yield
    except EngineError as error:
        if error.code != "E105" or not error.message.endswith("has no value"):
            raise
        raise EngineError(
            "E105",
            f"{error.message} in {file}",
            place=Place(file),
            got=f"{error.got} ({error.place})",
            expected=error.expected,
            fix=(error.fix or "").replace("in the configuration", f"in {file}"),
        ) from error


def whole_number(expression: Expression, names: Mapping[str, Any], what: str, below: int | None = None) -> int:
    """The value of an expression of a layout that counts or numbers something; E105 if it is no whole number.

    Args:
        what: its place in the layout, such as `layers.stage`.
        below: for a number from 0 on, the first that is too large.
    """
    value = evaluate(expression, names)
    if isinstance(value, int) and not isinstance(value, bool) and (below is None or 0 <= value < below):
        return value
    raise EngineError(
        "E105",
        f"`{what}` is not a whole number" + ("" if below is None else f" from 0 to {below - 1:,}"),
        place=expression.place,
        got="nothing" if value is OMIT else _shown(repr(value), 80),
        expected="a whole number",
        fix=f"Correct `{_shown(expression.text)}`.",
    )


def render_tree(
    tree: Any, names: Mapping[str, Any], value: Callable[[Expression, Mapping[str, Any]], Any] = evaluate
) -> Any:
    """Evaluate the expressions in a tree of literals; keys and items that are `omit` are left out.

    Args:
        value: evaluates an expression, given the names.

    >>> from engine.errors import Place
    >>> place = Place("x.yaml")
    >>> render_tree({"a": Expression("2 * n", place), "b": Expression("omit", place), "c": "d"}, {"n": 21})
    {'a': 42, 'c': 'd'}
    """
    if isinstance(tree, Expression):
        return value(tree, names)
    if isinstance(tree, Mapping):
        return {key: v for key, child in tree.items() if (v := render_tree(child, names, value)) is not OMIT}
    if isinstance(tree, list | tuple):
        return [v for child in tree if (v := render_tree(child, names, value)) is not OMIT]
    return tree


def _result(value: Any, depth: int) -> Any:
    """Only data is returned: no undefined value, no function, tuples as lists."""
    if isinstance(value, _PLAIN):
        return value
    defined(value)
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return [_result(item, depth + 1) for item in value]
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        return {_result(key, depth + 1): _result(item, depth + 1) for key, item in value.items()}
    raise TypeError(f"the value is {kind_of(value)}, not data")


def _fail_missing(expression: Expression, missing: str, compiled: Compiled, names: Mapping[str, Any]) -> NoReturn:
    known = [n for n in names if n != "present"] + sorted(BUILTIN)
    full = next((p for p in sorted(compiled.paths) if p == missing or p.endswith("." + missing)), missing)
    near = [] if "." in missing else _near(missing, tuple(known))
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


@lru_cache(maxsize=1024)  # proofs ask for the same missing names many times
def _near(name: str, known: tuple[str, ...]) -> list[str]:
    return get_close_matches(name, known, 3, 0.6)


def _shown(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"
