"""Inputs for trying a mapping's expressions: every key usual, absent and changed, and pairs of switches.

Values come from a key's declaration and from the constants that expressions compare it with.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from jinja2 import nodes

from engine.language.allowed import dotted
from engine.language.documents import tree_of
from engine.language.expressions import OMIT, compile_expression
from engine.language.keys import Key, find_key
from engine.language.model import Expression, Layout
from engine.language.names import pattern

ABSENT = "(absent)"
Given = Mapping[str, Any]  # input → its value; OMIT if it is absent
Outcome = Mapping[str, Any]
_UNUSUAL = (0.0625, 12345.5, 0.375, 3.25, 17.5, 0.015625, 260.25)  # exact in binary, all different
_MOST_PAIRS = 24  # for one expression


def grid_of(layout: Layout) -> dict[str, list[Any]]:
    """Names of the rank grid in expressions → the usual value, then others."""
    dims = {dim for mode in layout.modes for file in mode.files for dim in pattern(file.name).placeholders}
    found: dict[str, list[Any]] = {"dtype": ["torch.bfloat16", "torch.float32"], "chunks": [1, 2, 5], "layers": [4, 6]}
    found["mode"] = [mode.name for mode in layout.modes]
    found["model_type"] = ["ONE", "OTHER"]
    found |= {name: list(variant.choices) for name, variant in layout.layers.variants.items()}
    return found | {f"{dim}s": [11 + number, 31 + number] for number, dim in enumerate(sorted(dims))}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as a tree, without absent values."""
    return tree_of({tuple(path.split(".")): value for path, value in flat.items() if value is not OMIT})


def constants(expressions: Sequence[Expression], reads: Callable[[str], frozenset[str]]) -> dict[str, list[Any]]:
    """Input → the constants that expressions compare it with."""
    found: dict[str, list[Any]] = defaultdict(list)
    for expression in expressions:
        for compare in compile_expression(expression).every(nodes.Compare):
            values = [const.value for const in compare.find_all(nodes.Const)]
            for path in sorted({p for name in _paths(compare) for p in reads(name)}):
                found[path] += [value for value in values if value not in found[path]]
    return found


def named_beside(expression: Expression) -> Iterator[tuple[str, str]]:
    """(name, the name that it is compared with), both ways: `chosen <= num_experts`."""
    for compare in compile_expression(expression).every(nodes.Compare):
        one, other = _bare(compare.expr), _bare(compare.ops[0].expr)
        if one and other:
            yield from ((one, other), (other, one))


def divisors_of(expression: Expression) -> frozenset[str]:
    """Names that are divisors of an integer division."""
    every = compile_expression(expression).every(nodes.FloorDiv)
    return frozenset(path for one in every for path in _paths(one.right))


def multiples_of(expression: Expression, values: Mapping[str, Any]) -> dict[str, int]:
    """Names that an expression divides by an integer, as in rounding to a multiple: name → the integer."""
    found: dict[str, int] = {}
    for one in compile_expression(expression).every(nodes.FloorDiv):
        number = _number(one.right, values)
        if number is not None and number > 1:
            found |= dict.fromkeys(_paths(one.left), number)
    return found


def _number(node: nodes.Node, values: Mapping[str, Any]) -> int | None:
    """The value of a product of names and numbers."""
    if isinstance(node, nodes.Mul):
        one, two = _number(node.left, values), _number(node.right, values)
        return None if one is None or two is None else one * two
    value = node.value if isinstance(node, nodes.Const) else values.get(dotted(node))
    return value if isinstance(value, int) else None


def quotients_of(expression: Expression) -> list[tuple[str, str]]:
    """(dividend, divisor) of divisions with `/`."""
    every = compile_expression(expression).every(nodes.Div)
    return [(a, b) for one in every for a in _paths(one.left) for b in _paths(one.right)]


def plain_name(expression: Expression) -> str | None:
    """The single name that is an expression's value, always or if it exists or a condition holds."""
    tree = compile_expression(expression).tree
    name = _bare(tree.expr1 if isinstance(tree, nodes.CondExpr) else tree)
    return name if name and "." not in name else None


def _bare(node: nodes.Node) -> str | None:
    """The name that a value is, with or without a default."""
    if isinstance(node, nodes.Filter) and node.name == "default" and node.node is not None:
        node = node.node
    return dotted(node)


def _paths(tree: nodes.Node) -> Iterator[str]:
    """Every name in an expression, with its attributes: `options` and `options.size`."""
    for node in [tree, *tree.find_all((nodes.Name, nodes.Getattr))]:
        if path := dotted(node):
            yield path


def unusual(number: int, key: Key | None) -> float:
    """A number that nobody would write, within the declared range."""
    for value in (*_UNUSUAL[number % len(_UNUSUAL) :], *_UNUSUAL):
        if key is None or key.limits.fits(value):
            return value
    return 0.5


def others(path: str, usual: Any, keys: Mapping[str, Key], compared: Sequence[Any]) -> list[Any]:
    """Values to try besides the usual one: absent, the other truth value, other sizes, compared constants."""
    key = find_key(keys, path)
    types = () if key is None else key.limits.types
    values: list[Any] = [OMIT]
    if "null" in types:
        values.append(None)
    if "boolean" in types or isinstance(usual, bool):
        values += [False, True]
    elif isinstance(usual, int):
        values += [usual + 1, 2 * usual]
    elif isinstance(usual, float):
        values += [2 * usual]
    for one in compared:
        if isinstance(one, bool) or not isinstance(one, int | float):
            values.append(one)
        else:
            values += [one - 1, one, one + 1]
    if any(isinstance(one, str) for one in compared):
        values += ["another", *(one for one in (key.only if key else None) or () if isinstance(one, str))]
    if isinstance(usual, list) or any(isinstance(one, list) for one in compared) or "list" in types:
        values += [[one] for one in compared if isinstance(one, str)]
    kept: list[Any] = []
    for value in values:
        fits = value is OMIT or key is None or not types or key.limits.fits(value)
        if fits and not _same(value, usual) and not any(_same(value, one) for one in kept):
            kept.append(value)
    return kept


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def scenarios(
    tried: Mapping[str, Sequence[Any]], together: Sequence[frozenset[str]], few: Mapping[str, bool]
) -> Iterator[dict[str, Any]]:
    """Inputs that differ from the usual: one at a time; then pairs of switches that one expression reads, and a
    switch together with another absent input.

    Args:
        tried: input → the values to try.
        together: the inputs of each expression.
        few: whether an input is a switch, with few values.
    """
    for path, values in tried.items():
        for value in values:
            yield {path: value}
    seen: set[tuple[str, str]] = set()
    for read in together:
        switches = sorted(path for path in read if few.get(path))
        rest = sorted(path for path in read if not few.get(path) and OMIT in tried[path])
        count = 0
        for one, two in [*combinations(switches, 2), *product(switches, rest)]:
            if (one, two) in seen:
                continue
            seen.add((one, two))
            for a, b in product(tried[one], [OMIT] if two in rest else tried[two]):
                count += 1
                if count <= _MOST_PAIRS:
                    yield {one: a, two: b}


def told(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values for display, with a word for absent ones."""
    return {path: ABSENT if value is OMIT else value for path, value in given.items()}


def changes(before: Outcome, after: Outcome) -> dict[str, Any]:
    """The results that differ."""
    if "refused" in after and "refused" not in before:
        return {"refused": after["refused"]}
    paths = [*before, *(path for path in after if path not in before)]
    return {p: after.get(p, ABSENT) for p in paths if not _same(before.get(p, OMIT), after.get(p, OMIT))}


def name_of(given: Mapping[str, Any]) -> str:
    """An input in words: `rope_base: (absent)`."""
    return ", ".join(f"{path}: {_shown(value)}" for path, value in given.items())


def rows(base: Given, run: Callable[[Given], Outcome], tried: Iterable[tuple[str, Given]]) -> Iterator[dict[str, Any]]:
    """The rows of a table, lazily: the results for the usual values, and for other inputs the results that differ."""
    usual = run(base)
    yield {"given": told({p: v for p, v in base.items() if v is not OMIT}), "gives": dict(usual)}
    without: list[str] = []
    with_: list[str] = []
    for name, one in tried:
        if row := changes(usual, run({**base, **one})):
            yield {"otherwise": {name: row}}
        (with_ if row else without).append(name)
    yield {**({} if with_ else {"otherwise": {}}), "no difference": without}


def _shown(value: Any) -> str:
    return ABSENT if value is OMIT else json.dumps(value, ensure_ascii=False)
