"""Tiny models of a mapping: small sizes, a combination of choices, and an index tensor for every target.

Every element is a different number, so a result shows where each element came from. Sizes are chosen so
that all divisions of a mapping are exact, and so that no two axes have the same size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from jinja2 import nodes

from engine.errors import EngineError
from engine.language.declared import axes_of
from engine.language.documents import merged
from engine.language.expressions import OMIT, compile_expression, evaluate, names_in, render_tree
from engine.language.keys import Key, find_key
from engine.language.layout_file import load_layout
from engine.language.model import Expression, MappingFile
from engine.language.names import pattern
from engine.language.rules import loses
from engine.planning.attempts import claims
from engine.planning.config_keys import declared
from engine.planning.facts import present_in, render_known
from engine.planning.pieces import Pieces, match_pieces
from engine.planning.stored import Instance, instances
from engine.planning.variants import options_of
from engine.planning.whole_outputs import whole_groups

_LAYERS, NAMED, _SHARED = 4, 3, 3  # layers; experts and other placeholders; divisors
DIVISIBLE = 6  # a size that 2 and 3 ranks divide
APART = (36, 45, 28, 60, 52, 20, 44, 68)  # sizes of axes without other constraints
NESTED = (768, 384, 192, 96, 48, 24, 12, 6)  # the same, if classes want some to be multiples of others
EVEN = (36, 54, 30, 66, 42, 78, 90, 102)  # the same, if 2 and 3 ranks must divide them
_MAX_OPTIONAL = 8


def choices_text(choices: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={choice}" for name, choice in choices.items())


@dataclass(frozen=True, slots=True)
class World:
    """A tiny Hugging Face checkpoint for one combination of a mapping's choices.

    Attributes:
        shapes: target name → shape, including tied targets.
        tied: target name → the target whose elements it has.
        lossy: rules that cannot be inverted but are written anyway.
    """

    choices: Mapping[str, str]
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    pieces: Pieces
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    lossy: tuple[str, ...]

    @property
    def label(self) -> str:
        return choices_text(self.choices) or "no variants"

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.tied)

    def arrays(self) -> dict[str, np.ndarray]:
        """Target name → its numbers, which count all elements in the order of the model."""
        found: dict[str, np.ndarray] = {}
        start = 0
        for name, shape in self.shapes.items():
            if name not in self.tied:
                count = math.prod(shape)
                found[name] = np.arange(start, start + count, dtype=np.float32).reshape(shape)
                start += count
        return found


def guess_sizes(
    mapping: MappingFile,
    even: int = _SHARED,
    apart: Sequence[int] = APART,
    *,
    numbered: int = NAMED,
    stated: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """A small size for every axis that the configuration or the tensors decide.

    A dividend becomes a multiple of its divisor: `heads // groups` and `hidden // heads`, whose result is
    halved again, give groups 3, heads 6, hidden 24.

    Args:
        even: the size of axes that training divides evenly, if nothing else decides it.
        apart: sizes of axes without other constraints.
        numbered: how many experts, or whatever else placeholders number.
        stated: given sizes, such as a release's; divisors of these axes divide them.
    """
    divisions = {name: _divisions(e) for name, e in mapping.dims.items()}
    pairs = [(a, b) for found in divisions.values() for a, b in found]
    axes = dict.fromkeys([*axes_of(mapping), *(name for pair in pairs for name in pair if name in mapping.dims)])
    named = {p for i in instances(mapping) for p in (*i.axis_names, *(p for n, _ in i.targets for p in n.placeholders))}
    known = {*mapping.dims, *mapping.options, *mapping.variants}
    free = [a for a, e in mapping.dims.items() if a in axes and not names_in(e) <= known]
    free += [a for a in axes if a not in mapping.dims]
    others = iter(tuple(apart) * 8)
    values: dict[str, int] = {}

    def parts(axis: str) -> int:
        """A number of which the size of `axis`, a result of a division, must be a multiple."""
        return 2 * math.lcm(1, *(int(b) for a, b in pairs if a == axis and b.isdigit()))

    def value(axis: str, depth: int = 0) -> int:
        if axis in values:
            return values[axis]
        multiples: list[int] = []
        for a, b in pairs:
            if a == axis and depth < 16:
                quotients = [d for d, e in mapping.dims.items() if divisions[d][:1] == [(a, b)] and _is_division(e)]
                whole = int(b) if b.isdigit() else value(b, depth + 1) if b in axes else 1
                multiples.append(whole * max((parts(d) for d in quotients), default=1))
        if multiples:
            values[axis] = math.lcm(*multiples)
        elif axis == "layer":
            values[axis] = _LAYERS
        elif axis in named:
            values[axis] = numbered
        elif axis in mapping.even:
            values[axis] = even
        else:
            values[axis] = _SHARED if any(b == axis for _, b in pairs) else next(others)
        return values[axis]

    for axis in free:
        value(axis)
    sizes = {axis: values[axis] for axis in free} | dict(stated or {})
    follows = set(stated or ())
    for a, b in 2 * pairs:  # twice, as a later pair may change an earlier one
        if a in follows and b in sizes and b not in (stated or {}):
            sizes[b] = math.gcd(sizes[a], sizes[b])
            follows.add(b)
    return sizes


def _divisions(expression: Expression) -> list[tuple[str, str]]:
    """(dividend, divisor) of an expression's divisions of names by names or numbers."""
    found: list[tuple[str, str]] = []
    for one in compile_expression(expression).every(nodes.FloorDiv):
        right = one.right.name if isinstance(one.right, nodes.Name) else getattr(one.right, "value", None)
        if isinstance(one.left, nodes.Name) and isinstance(right, str | int):
            found.append((one.left.name, str(right)))
    return found


def _is_division(expression: Expression) -> bool:
    """Whether a size is a quotient, always or as a default for a missing key."""
    tree: nodes.Node = compile_expression(expression).tree
    if isinstance(tree, nodes.Filter) and tree.name == "default" and tree.args:
        tree = tree.args[0]
    return isinstance(tree, nodes.FloorDiv)


class Worlds:
    """Makes worlds of a mapping."""

    def __init__(self, mapping: MappingFile) -> None:
        self._mapping = mapping
        self._instances = instances(mapping)
        self._shown = [mapping.variants[name] for name in decided_by_names(mapping)]
        asked = {p for v in self._shown for e in v.choices.values() if e for p in compile_expression(e).patterns}
        names = {one.sources[0] for one in self._instances}
        # pattern in `present` → the source names that match it
        self._asked = {p: {one.text for one in names if pattern(p).match(one.sample()) is not None} for p in asked}
        self._known: dict[frozenset[str], tuple[str | None, ...]] = {}
        self._absent: dict[object, dict[tuple[str | None, ...], tuple[str, ...]]] = {}

    def make(self, choices: Mapping[str, str], sizes: Mapping[str, int], *, most: bool = True) -> World | None:
        """The world of a combination of choices; None if no set of tensors shows them.

        Args:
            sizes: sizes of the free axes; the others follow.
            most: with every bias and optional tensor that the choices allow, or with as few as they allow.

        Raises:
            EngineError: E107, or E204 for a size that does not follow.
        """
        used = self.used(choices, most=most)
        if used is None:
            return None
        pieces = match_pieces(used)
        fixed = {**sizes, **{axis: 0 for one in used for axis in one.rule.drop}}
        solved, config = settle(self._mapping, choices, used, fixed)
        listed = whole_groups(pieces, solved, {})
        shapes = {group.name: group.first.header.shape for group in listed}
        tied: dict[str, str] = {}
        for group in listed:
            to = group.instance.rule.tied_to
            if to in shapes and config.get("tie_word_embeddings"):
                tied[group.name] = str(to)
        lossy = dict.fromkeys(
            one.rule.name for one in used if loses(one.rule.transform) or {*one.rule.drop} - {*one.rule.zeros}
        )
        return World(dict(choices), solved, config, pieces, shapes, tied, tuple(lossy))

    def used(self, choices: Mapping[str, str], *, most: bool) -> list[Instance] | None:
        """Tensors of active rules whose names together show these choices; None if no set of them does."""
        active = [one.under(choices) for one in self._instances if one.rule.active(choices)]
        loose = {one.sources[0].text: one for one in active if one.param == "bias" or one.rule.optional}
        key = tuple(one.sources[0].text for one in active), tuple(loose), most
        if key not in self._absent:
            found: dict[tuple[str | None, ...], tuple[str, ...]] = {}
            asked = {p: names.intersection(key[0]) for p, names in self._asked.items()}
            for absent in _subsets(tuple(loose), most=most):
                there = frozenset(p for p, names in asked.items() if not names.issubset(absent))
                if there not in self._known:
                    present = {"present": there.__contains__}
                    self._known[there] = tuple(_first(v.choices, present) for v in self._shown)
                found.setdefault(self._known[there], absent)
            self._absent[key] = found
        left = self._absent[key].get(tuple(choices[v.name] for v in self._shown))
        return None if left is None else [one for one in active if one.sources[0].text not in left]


def settle(
    mapping: MappingFile, choices: Mapping[str, str], used: Sequence[Instance], sizes: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes and a config.json that agree: `dims` compute these sizes from the configuration made of them."""
    present = present_in(training_names(used))
    options = {name: value for name, value in options_of(mapping, {}).items() if value is not None}
    fixed = {"options": options, "present": present, "training": {}, "given": {}, **choices}
    made_up = partial(_made_up, declared(mapping, load_layout(mapping.layout, mapping.layout_place), "source"))
    current = dict(sizes)
    config: dict[str, Any] = {}
    for _ in range(6):
        fixed["given"] = config
        scope: dict[str, Any] = {**fixed, **current}
        for axis, expression in mapping.dims.items():
            if axis not in current and (value := render_known(expression, scope)) is not OMIT:
                scope[axis] = value
        derived = {a: n for a, n in scope.items() if a in mapping.dims and isinstance(n, int)}
        config = render_tree(mapping.config, {**scope, **derived}, made_up)
        training = render_known(mapping.training_config, {**config, **fixed, "dtype": "torch.float32", "chunks": 1})
        facts, _ = claims(mapping, {**training, **fixed}, "the training configuration")
        found = {**current, **derived, **{axis: fact.value for axis, fact in facts.items()}}
        if all(current.get(axis) == size for axis, size in found.items()):
            break
        current = found
    return current, config


def _made_up(keys: Mapping[str, Key], expression: Expression, names: Mapping[str, Any]) -> Any:
    """The value of an expression; missing keys of the training configuration get a value that they may have.

    Such a key is not a size: an epsilon, for example, gets 1e-6, as it cannot be 1.
    """
    missing: dict[str, Any] = {}
    for path in sorted(compile_expression(expression).paths):
        key = find_key(keys, path)
        value: Any = next((v for v in (1e-6, 2, True) if key is None or key.limits.fits(v)), 1e-6)
        for part in reversed(path.split(".")):
            value = {part: value}
        missing = merged(missing, value)
    for more in ({}, missing):
        try:
            return evaluate(expression, {**more, **names})
        except EngineError:
            continue
    return OMIT


def training_names(used: Sequence[Instance]) -> set[str]:
    return {one.sources[0].sample() for one in used}


def decided_by_names(mapping: MappingFile) -> tuple[str, ...]:
    """Variants that only the names of tensors decide."""
    return tuple(
        name
        for name, variant in mapping.variants.items()
        if variant.decide == "expression" and not any(names_in(e) for e in variant.choices.values() if e is not None)
    )


def _subsets(loose: Sequence[str], *, most: bool) -> Iterator[tuple[str, ...]]:
    """Sets of tensors to leave out: small ones first if `most` should stay, else large ones first."""
    counts = list(range(len(loose) + 1)) if len(loose) <= _MAX_OPTIONAL else [0, len(loose)]
    for count in counts if most else reversed(counts):
        yield from combinations(loose, count)


def _first(choices: Mapping[str, Expression | None], names: Mapping[str, Any]) -> str | None:
    """The first choice that holds."""
    return next((name for name, e in choices.items() if e is None or evaluate(e, names)), None)
