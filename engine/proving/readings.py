"""What a mapping makes of configurations: each key's value, sizes and choices, for a handful of given ones.

Both directions are tables: what the usual values give, and what comes out otherwise when one of them is absent or
unusual, or when two switches are set together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from engine.errors import EngineError
from engine.language.expressions import compile_expression
from engine.language.model import Layout, MappingFile
from engine.planning.variants import decide
from engine.proving.back import Back
from engine.proving.directions import Direction
from engine.proving.forth import Forth
from engine.proving.probes import constants, name_of, others, rows, scenarios
from engine.proving.tiny import World, Worlds, of_files

_GIVEN = 40  # a size that a user's config.json gives


def readings(mapping: MappingFile, layout: Layout, worlds: Worlds, world: World) -> Iterator[dict[str, Any]]:
    """Both tables of a mapping, bit by bit; `world` gives sizes that agree."""
    forth = Forth(mapping, layout, worlds, world)
    yield from ({"reading": row} for row in _rows(forth))
    if asked := sorted({p for one in forth.expressions for p in compile_expression(one).patterns}):
        yield {"tensors there": _presence(mapping, asked)}
    if mapping.training_config:
        yield from ({"writing": row} for row in _rows(Back(forth)))


def _rows(side: Direction) -> Iterator[dict[str, Any]]:
    base, every, grid = side.base, side.expressions, side.grid
    compared = constants(every, side.closure)
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
            near = [n for one in compared.get(path, ()) if type(one) is int for n in (one, one + 1)]
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
    listed = ((name_of(one), one) for one in scenarios(base, tried, together, few))
    return rows(base, side.run, chain(side.whole(), listed))


def _presence(mapping: MappingFile, asked: Sequence[str]) -> dict[str, dict[str, str]]:
    """Which choices the tensors show that expressions ask for: with all of them, all but one, and one alone."""
    found: dict[str, dict[str, str]] = {}
    sets = [("all", set(asked)), *((f"without {p}", set(asked) - {p}) for p in asked)]
    for name, there in [*sets, *((f"only {p}", {p}) for p in asked)]:
        shown: dict[str, str] = {}
        for variant in of_files(mapping):
            try:
                names = {"present": there.__contains__}
                shown[variant] = decide({variant: mapping.variants[variant]}, {}, names)[variant].choice
            except EngineError as error:
                shown[variant] = f"refused: {error.code}"
        found[name] = shown
    return found
