"""What both directions of reading a configuration share: inputs, and the result for given values, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from engine.errors import EngineError
from engine.language.declared import expressions_of, paths_in
from engine.language.expressions import OMIT, compile_expression, evaluate, render_tree
from engine.language.model import Expression, Layout, MappingFile
from engine.planning.config_keys import Side as Keys
from engine.planning.config_keys import read_config
from engine.planning.variants import options_of
from engine.proving.probes import Given, Outcome, grid_of, nested
from engine.proving.tiny import World, decided_by_names

_APART = ("options", "tensors", "there", "choice", "training", "given")  # inputs besides the configuration


class Direction:
    """The parts common to both directions.

    Args:
        world: gives sizes that agree.
        side: the declarations of the configuration that is read.
        reads: trees of the expressions that read it.
    """

    def __init__(self, mapping: MappingFile, layout: Layout, world: World, side: Keys, reads: Any) -> None:
        self.mapping, self.layout, self.world, self.side = mapping, layout, world, side
        self.expressions = list(expressions_of(reads))
        self.grid = grid_of(layout)
        self._ran: dict[str, Outcome] = {}

    @cached_property
    def base(self) -> dict[str, Any]:
        """All inputs with their usual values."""
        raise NotImplementedError

    @cached_property
    def paths(self) -> list[str]:
        """The names that expressions read."""
        return sorted(paths_in(self.expressions))

    @cached_property
    def told_by(self) -> dict[str, str]:
        """The tensors that variants read which names alone decide: pattern → variant."""
        every = (
            (name, expressions_of(dict(self.mapping.variants[name].choices))) for name in decided_by_names(self.mapping)
        )
        return {pattern: name for name, read in every for one in read for pattern in compile_expression(one).patterns}

    def closure(self, name: str) -> frozenset[str]:
        """The keys, options and tensors that a name depends on."""
        raise NotImplementedError

    def closure_of(self, expression: Expression) -> frozenset[str]:
        read = compile_expression(expression)
        single = (f"tensors.{self.told_by[n]}" if n in self.told_by else f"there.{n}" for n in read.patterns)
        return frozenset(p for name in read.paths for p in self.closure(name)).union(single)

    def required(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """Keys that must be present even if no expression reads them, with the values that the other side writes."""
        found: dict[str, Any] = {}
        for name, key in self.side.keys.items():
            if (key.default is None or key.allows(key.default)) and key.comes_with is None:
                continue
            for value in (written.get(name), key.default, *(key.only or ())):
                if value is not None and key.allows(value):
                    found[name] = value
                    break
        return found

    def edges(self, path: str) -> list[Any]:
        """More values to try for an input."""
        return []

    def whole(self) -> list[tuple[str, dict[str, Any]]]:
        """More sets of values to try, by name."""
        raise NotImplementedError

    def run(self, given: Given) -> Outcome:
        """The result of given values, or why they are refused."""
        key = repr(given)
        if key not in self._ran:
            try:
                self._ran[key] = self._run(given)
            except EngineError as error:
                self._ran[key] = {"refused": f"{error.code} {error.message}"}
        return self._ran[key]

    def _run(self, given: Given) -> Outcome:
        apart: dict[str, dict[str, Any]] = {root: {} for root in _APART}
        plain: dict[str, Any] = {}
        seen: dict[str, Any] = {}
        for path, value in given.items():
            root, dot, rest = path.partition(".")
            if dot and root in apart:
                apart[root][rest] = value
            elif path in self.grid:
                seen[path] = value
            else:
                plain[path] = value
        config = read_config(nested(plain), self.side).config
        options = options_of(self.mapping, {n: v for n, v in apart["options"].items() if v is not OMIT})
        return self.outcome({**config, "options": options, "given": nested(apart["given"]), **seen}, apart)

    def outcome(self, names: Mapping[str, Any], apart: Mapping[str, Mapping[str, Any]]) -> Outcome:
        """The result of a configuration that was read.

        Args:
            names: the names for expressions, from it, options and the grid.
            apart: choices that are set, those that tensors show, single tensors, and the trainer's settings.
        """
        raise NotImplementedError


def value_of(tree: Any, names: Mapping[str, Any]) -> Any:
    """A configuration's value, or the error in words if it cannot be computed."""
    return render_tree(tree, names, _value_or_why)


def _value_or_why(expression: Expression, names: Mapping[str, Any]) -> Any:
    try:
        return evaluate(expression, names)
    except EngineError as error:
        return f"no value: {error.code} {error.message}"
