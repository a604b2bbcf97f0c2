"""How a mapping reads configurations: each key's value, sizes and choices, for a handful of inputs.

Both directions are tables: the results of the usual values, and those that differ when one value is absent or
unusual, or when two switches are set together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from operator import gt, lt
from typing import Any

from engine.errors import EngineError
from engine.language.documents import leaves
from engine.language.expressions import OMIT, compile_expression
from engine.language.keys import as_declared
from engine.language.model import Layout, MappingFile
from engine.planning.config_keys import declared, target_side
from engine.planning.variants import decide
from engine.proving.direction import Direction, value_of
from engine.proving.forth import Forth
from engine.proving.probes import (
    Outcome,
    constants,
    multiples_of,
    name_of,
    named_beside,
    others,
    quotients_of,
    rows,
    scenarios,
)
from engine.proving.tiny import World, Worlds, decided_by_names

_GIVEN = 40  # a size in a given config.json
_APART = ("training", "options.")  # not compared with each other's numbers: a file of its own, a user's choice


def readings(mapping: MappingFile, layout: Layout, worlds: Worlds, world: World) -> Iterator[dict[str, Any]]:
    """Both tables of a mapping, row by row; `world` gives sizes that agree."""
    forth = Forth(mapping, layout, worlds, world)
    yield from ({"reading": row} for row in _rows(forth))
    if asked := sorted({p for one in forth.expressions for p in compile_expression(one).patterns}):
        yield {"tensors there": _presence(mapping, asked)}
    if mapping.training_config:
        yield from ({"writing": row} for row in _rows(Back(forth)))


def _rows(side: Direction) -> Iterator[dict[str, Any]]:
    base, every, grid = side.base, side.expressions, side.grid
    compared = constants(every, side.closure)
    for pair in (pair for one in every for pair in named_beside(one)):
        paths, beside = (sorted(p for p in side.closure(n) & base.keys() if not p.startswith(_APART)) for n in pair)
        for path in paths:
            compared[path] += [base[other] for other in beside if type(base[other]) is int]
    options = side.mapping.options
    tried: dict[str, Sequence[Any]] = {}
    for path, usual in base.items():
        kind, _, name = path.partition(".")
        if kind == "options" and not name.startswith("."):
            option = options[name]
            tried[path] = [c for c in option.choices or () if c != usual] if option.choices else [option.default]
        elif kind == "there":
            tried[path] = [not usual]
        elif kind in ("tensors", "choice"):
            tried[path] = [choice for choice in side.mapping.variants[name].choices if choice != usual]
        elif path in grid:
            near = [n for one in compared.get(path, ()) for n in _near(one)]
            tried[path] = [one for one in dict.fromkeys([*grid[path][1:], *near]) if one != usual]
        elif kind == "given":
            tried[path] = [_GIVEN]
        else:
            held: list[Any] = [{}] if any(other.startswith(f"{path}.") for other in base) else []
            held += [_GIVEN] if kind == "training" and not held else []
            tried[path] = others(path, usual, side.side.keys, [*compared.get(path, ()), *side.edges(path), *held])
    few = {
        path: path.startswith(("tensors.", "choice.", "training."))
        or path in grid
        or isinstance(base[path], bool | str)
        or any(isinstance(value, bool | str | dict) for value in values)
        for path, values in tried.items()
    }
    together = [side.closure_of(expression) & base.keys() for expression in every]
    listed = ((name_of(one), one) for one in scenarios(tried, together, few))
    return rows(base, side.run, chain(side.whole(), listed))


def _near(compared: Any) -> Sequence[Any]:
    """Values to try for a name of the grid that is compared with this one: a number and the next, or a text."""
    return (compared, compared + 1) if type(compared) is int else (compared,) if isinstance(compared, str) else ()


def _presence(mapping: MappingFile, asked: Sequence[str]) -> dict[str, dict[str, str]]:
    """The choices that tensors show: with all tensors that expressions ask for, all but one, and only one."""
    found: dict[str, dict[str, str]] = {}
    sets = [("all", set(asked)), *((f"without {p}", set(asked) - {p}) for p in asked)]
    for name, there in [*sets, *((f"only {p}", {p}) for p in asked)]:
        shown: dict[str, str] = {}
        for variant in decided_by_names(mapping):
            try:
                names = {"present": there.__contains__}
                shown[variant] = decide({variant: mapping.variants[variant]}, {}, names)[variant].choice
            except EngineError as error:
                shown[variant] = f"refused: {error.code}"
        found[name] = shown
    return found


class Back(Direction):
    """The direction of `reverse`, which reads what `Forth` gives."""

    def __init__(self, forth: Forth) -> None:
        mapping = forth.mapping
        super().__init__(mapping, forth.layout, forth.world, target_side(mapping), mapping.training_config)
        self.forth = forth

    def closure(self, name: str) -> frozenset[str]:
        return frozenset([f"choice.{name}" if name in self.mapping.variants else name])

    @cached_property
    def base(self) -> dict[str, Any]:
        made = self.forth.run(self.forth.base)
        config = {p.removeprefix("config.json "): v for p, v in made.items() if p.startswith("config.json ")}
        base = self.required(config)
        for path in self.paths:
            root = path.split(".")[0]
            if root in self.mapping.variants:
                base[f"choice.{root}"] = self.world.choices[root]
            elif root == "options":
                base[path] = self.mapping.options[path.partition(".")[2]].default
            elif path in self.grid:
                base[path] = self.grid[path][0]
            elif root == "given":
                base[path] = OMIT
            elif root not in self.world.sizes:
                base[path] = config.get(path, OMIT)
        return base

    def edges(self, path: str) -> list[Any]:
        """A multiple, for sizes that are rounded up to multiples; its neighbours are tried too, as for every number."""
        usual = {one: value for one, value in self.base.items() if value is not OMIT}
        return [n for one in self.expressions for name, n in multiples_of(one, usual).items() if name == path]

    def whole(self) -> list[tuple[str, dict[str, Any]]]:
        """Sizes whose floating-point quotient, multiplied again, is slightly too small or too large."""
        base = self.base
        found: dict[str, dict[str, Any]] = {}
        for one in self.expressions:
            for above, below in quotients_of(one):
                if isinstance(base.get(above), int) and isinstance(base.get(below), int):
                    for pair in _inexact(base[below]):
                        given = dict(zip((above, below), pair, strict=True))
                        found[name_of(given)] = given
        return list(found.items())

    def outcome(self, names: Mapping[str, Any], apart: Mapping[str, Mapping[str, Any]]) -> Outcome:
        names = {**names, **self.world.sizes, **apart["choice"]}
        made = {key: value_of(tree, names) for key, tree in self.mapping.training_config.items()}
        kept = {key: value for key, value in made.items() if value is not OMIT}
        kept = as_declared(kept, declared(self.mapping, self.layout, "source"))
        return {f"{self.layout.config_file} {path}": value for path, value in leaves(kept)}


def _inexact(least: int) -> Iterator[tuple[int, int]]:
    """Two whole numbers whose quotient, times the second, is less than the first; and two where it is more.

    >>> [(a, b, b * (a / b)) for a, b in _inexact(11)]
    [(15, 11, 14.999999999999998), (25, 11, 25.000000000000004)]
    """
    for inexact in (lt, gt):
        pairs = ((a, b) for b in range(least, least + 200) for a in range(b + 1, 3 * b))
        yield from islice(((a, b) for a, b in pairs if inexact(b * (a / b), a)), 1)
