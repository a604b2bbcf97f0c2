"""One direction of reading configurations: what is read, with which usual values, and what comes of given ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from engine.errors import EngineError
from engine.language.declared import expressions_of
from engine.language.documents import tree_of
from engine.language.expressions import OMIT, compile_expression, evaluate, render_tree
from engine.language.model import Expression, Layout, MappingFile
from engine.language.names import pattern
from engine.planning.config_keys import Side as Keys
from engine.planning.config_keys import read_config
from engine.planning.variants import options_of
from engine.proving.probes import Given, Outcome
from engine.proving.tiny import World

_APART = ("options", "tensors", "there", "choice", "training", "given")  # what is given besides the configuration


class Direction:
    """What is common to both directions.

    Args:
        world: gives sizes that agree.
        side: what is declared of the configuration that is read.
        reads: trees of the expressions that read it.
    """

    def __init__(self, mapping: MappingFile, layout: Layout, world: World, side: Keys, reads: Any) -> None:
        self.mapping, self.layout, self.world, self.side = mapping, layout, world, side
        self.expressions = list(expressions_of(reads))
        self.grid = grid_of(layout)
        self._ran: dict[str, Outcome] = {}

    @cached_property
    def base(self) -> dict[str, Any]:
        """Every thing that is read, with its usual value."""
        raise NotImplementedError

    @cached_property
    def paths(self) -> list[str]:
        """What expressions read."""
        return sorted({path for one in self.expressions for path in compile_expression(one).paths})

    def closure(self, name: str) -> frozenset[str]:
        """What a name stands for, down to keys, options and tensors."""
        raise NotImplementedError

    def closure_of(self, expression: Expression) -> frozenset[str]:
        read = compile_expression(expression)
        single = (f"there.{name}" for name in read.patterns)
        return frozenset(p for name in read.paths for p in self.closure(name)).union(single)

    def edges(self, path: str) -> list[Any]:
        """More values to try of what is read."""
        return []

    def whole(self) -> list[tuple[str, dict[str, Any]]]:
        """More sets of values to try, by name."""
        raise NotImplementedError

    def run(self, given: Given) -> Outcome:
        """What comes of given values, or why they are refused."""
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
        """What comes of a configuration that was read.

        Args:
            names: what expressions see of it, of options and the grid.
            apart: choices that are set, those that tensors show, single tensors, and the trainer's settings.
        """
        raise NotImplementedError


def grid_of(layout: Layout) -> dict[str, list[Any]]:
    """What expressions see of the grid of ranks → its usual value, and others."""
    dims = {dim for mode in layout.modes for file in mode.files for dim in pattern(file.name).placeholders}
    found: dict[str, list[Any]] = {"dtype": ["torch.bfloat16", "torch.float32"], "chunks": [1, 2, 5], "layers": [4, 6]}
    found["mode"] = [mode.name for mode in layout.modes]
    found["model_type"] = ["ONE", "OTHER"]
    found |= {name: list(variant.choices) for name, variant in layout.layers.variants.items()}
    return found | {f"{dim}s": [11 + number, 31 + number] for number, dim in enumerate(sorted(dims))}


def value_of(tree: Any, names: Mapping[str, Any]) -> Any:
    """A configuration's value; what cannot be computed as words."""
    return render_tree(tree, names, _value_or_why)


def _value_or_why(expression: Expression, names: Mapping[str, Any]) -> Any:
    try:
        return evaluate(expression, names)
    except EngineError as error:
        return f"no value: {error.code} {error.message}"


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as a tree; what is absent is left out."""
    return tree_of({tuple(path.split(".")): value for path, value in flat.items() if value is not OMIT})
