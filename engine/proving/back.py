"""config.json, options, choices and the grid → the training configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from operator import gt, lt
from typing import Any

from engine.language.expressions import OMIT
from engine.planning.config_keys import as_declared, declared, leaves, target_side
from engine.proving.directions import Direction, value_of
from engine.proving.forth import Forth
from engine.proving.probes import Outcome, multiples_of, name_of, quotients_of


class Back(Direction):
    """The direction of `reverse`, of what the other gives."""

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
        base: dict[str, Any] = {}
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
        """Sizes that are rounded up to multiples: a multiple, and with what is tried of every number its neighbours."""
        usual = {one: value for one, value in self.base.items() if value is not OMIT}
        return [n for one in self.expressions for name, n in multiples_of(one, usual).items() if name == path]

    def whole(self) -> list[tuple[str, dict[str, Any]]]:
        """Sizes whose quotient, multiplied again, comes to a little less and to a little more."""
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
