"""What a mapping makes of configurations: each key's value, sizes and choices, for a handful of given ones.

Both directions are tables: what the usual values give, and what comes out otherwise when one of them is absent or
unusual, or when two switches are set together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import gt, lt
from typing import Any

from engine.errors import EngineError
from engine.language.declared import expressions_of
from engine.language.expressions import OMIT, compile_expression, evaluate
from engine.language.keys import Key, find_key
from engine.language.model import Expression, Layout
from engine.language.model import Mapping as MappingFile
from engine.language.names import pattern
from engine.planning.attempts import claims
from engine.planning.config_keys import as_declared, declared, leaves, read_config, source_side, target_side
from engine.planning.facts import present_in, render_known
from engine.planning.variants import decide, options_of
from engine.proving.probes import (
    Given,
    Outcome,
    constants,
    divisors_of,
    name_of,
    others,
    plain_name,
    quotients_of,
    scenarios,
    table,
    unusual,
)
from engine.proving.tiny import World, Worlds, of_files, training_names

LEAST = "nothing but what is needed, and no option set"
_WORSE = ("refused", "no value", "read off")
_GIVEN = 40  # a size that a user's config.json gives


def readings(mapping: MappingFile, layout: Layout, worlds: Worlds, world: World) -> dict[str, Any]:
    """Both tables of a mapping; `world` gives sizes that agree."""
    forth = _Forth(mapping, layout, worlds, world)
    found = {"reading": _table(forth)}
    if asked := sorted({p for one in _forth_expressions(mapping) for p in compile_expression(one).patterns}):
        found["tensors there"] = _presence(mapping, asked)
    if mapping.training_config:
        found["writing"] = _table(_Back(mapping, layout, world, forth))
    return found


def _table(side: _Forth | _Back) -> dict[str, Any]:
    base = side.base()
    every = [*side.expressions()]
    compared = constants(every, side.closure)
    options = side.mapping.options
    tried: dict[str, Sequence[Any]] = {}
    grid = grid_of(side.layout)
    for path, usual in base.items():
        kind, _, name = path.partition(".")
        if kind == "options" and not name.startswith("."):
            option = options[name]
            tried[path] = [c for c in option.choices or () if c != usual] if option.choices else [option.default]
        elif kind in ("tensors", "choice"):
            tried[path] = [choice for choice in side.mapping.variants[name].choices if choice != usual]
        elif path in grid:
            tried[path] = grid[path][1:]
        elif kind == "given":
            tried[path] = [_GIVEN]
        else:
            tried[path] = others(path, usual, side.keys, [*compared.get(path, ()), *side.edges(path)])
    few = {
        path: path.startswith(("tensors.", "choice."))
        or isinstance(base[path], bool | str)
        or any(isinstance(value, bool | str) for value in values)
        for path, values in tried.items()
    }
    together = [side.closure_of(expression) & base.keys() for expression in every]
    listed = [(name_of(one), one) for one in scenarios(base, tried, together, few)]
    return table(base, side.run, [*side.whole(), *listed])


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


@dataclass(frozen=True, slots=True)
class _Forth:
    """A training configuration, options and tensors → sizes, choices and config.json."""

    mapping: MappingFile
    layout: Layout
    worlds: Worlds
    world: World

    @property
    def keys(self) -> dict[str, Key]:
        return declared(self.mapping, self.layout, "source")

    def expressions(self) -> list[Expression]:
        return _forth_expressions(self.mapping)

    def own(self) -> set[str]:
        axes = {axis for rule in self.mapping.rules for axis in rule.axes.names()}
        return {*self.mapping.dims, *self.mapping.variants, *self.world.sizes, *axes}

    def closure(self, name: str) -> frozenset[str]:
        """What a name stands for, down to keys, options and tensors."""
        mapping = self.mapping
        if name in mapping.dims:
            read = compile_expression(mapping.dims[name]).paths
        elif name in mapping.variants:
            variant = mapping.variants[name]
            if name in of_files(mapping):
                return frozenset([f"tensors.{name}"])
            read = frozenset(p for e in expressions_of(dict(variant.choices)) for p in compile_expression(e).paths)
        else:
            return frozenset([name])
        return frozenset(p for one in read if one != name for p in self.closure(one))

    def closure_of(self, expression: Expression) -> frozenset[str]:
        return frozenset(p for name in compile_expression(expression).paths for p in self.closure(name))

    def base(self) -> dict[str, Any]:
        """Every key that is read, with a value that tells it from the others; options likewise."""

        grid = {name: values[0] for name, values in grid_of(self.layout).items()}
        names = {**self.world.config, **self.world.choices, **self.world.sizes, **grid, "options": {}}
        written = dict(leaves(render_known(self.mapping.training_config, names)))
        sized = {p for e in self.mapping.dims.values() for p in compile_expression(e).paths}
        direct = {path: self.world.sizes[d] for d, e in self.mapping.dims.items()
                  if d in self.world.sizes and (path := plain_name(e)) is not None}  # fmt: skip
        base: dict[str, Any] = {}
        paths = sorted({path for one in self.expressions() for path in compile_expression(one).paths})
        number = 0
        for path in paths:
            root = path.split(".")[0]
            if root in self.own() or root == "options":
                continue
            if root == "given":
                base[path] = OMIT
                continue
            if path in grid:
                base[path] = grid[path]
                continue
            key = find_key(self.keys, path)
            types = () if key is None else key.limits.types
            fits = path in written and (key is None or key.limits.fits(written[path]))
            if path in direct:
                base[path] = direct[path]
            elif path in sized and fits:
                base[path] = written[path]
            elif "integer" in types and not fits:
                base[path] = 8192 + number
            elif "number" in types and path not in sized:
                base[path] = unusual(number, key)
            elif fits:
                base[path] = written[path]
            else:
                base[path] = OMIT
            number += 1
        for number, option in enumerate(self.mapping.options.values()):
            value = option.default
            if option.type == "integer":
                value = 4099 + number
            elif option.type == "number":
                value = unusual(number + 3, None) if option.limits.fits(unusual(number + 3, None)) else 6.5
            base[f"options.{option.name}"] = value
        return base | {f"tensors.{name}": self.world.choices[name] for name in of_files(self.mapping)}

    def edges(self, path: str) -> list[Any]:
        """Sizes less one, where sizes are rounded up to multiples of what is read."""
        divisors = {name for one in self.mapping.dims.values() for name in divisors_of(one)}
        rounded = any(path in self.closure(name) for name in divisors)
        below = [one for name, one in self.mapping.dims.items() if name in divisors]
        direct = any(path in compile_expression(one).paths for one in below)
        return [max(self.world.sizes.values())] if rounded and (direct or path in divisors) else []

    def whole(self) -> list[tuple[str, dict[str, Any]]]:
        """Everything that may be absent absent at once, with the options' own defaults."""
        base = self.base()
        needed = _needed(self, base)
        free = {path: OMIT for path in base if path not in needed and "." not in path}
        free |= {f"options.{name}": option.default for name, option in self.mapping.options.items()}
        return [(LEAST, free)]

    def run(self, given: Given) -> dict[str, Any]:
        try:
            return self._run(given)
        except EngineError as error:
            return {"refused": f"{error.code} {error.message}"}

    def _run(self, given: Given) -> dict[str, Any]:
        mapping = self.mapping
        options = {p.partition(".")[2]: v for p, v in given.items() if p.startswith("options.") and v is not OMIT}
        grid = grid_of(self.layout)
        apart = ("options.", "tensors.", "training.", "given.")
        plain = {p: v for p, v in given.items() if not p.startswith(apart) and p not in grid}
        training = {p.partition(".")[2]: v for p, v in given.items() if p.startswith("training.")}
        config = read_config(nested(plain), source_side(mapping, self.layout)).config
        shown = {p.partition(".")[2]: v for p, v in given.items() if p.startswith("tensors.")}
        used = self.worlds.used({**self.world.choices, **shown}, most=True)
        if used is None:
            return {"refused": "no set of tensors shows it"}
        names: dict[str, Any] = {**config, "options": options_of(mapping, options), "training": nested(training)}
        names["given"] = nested({p.partition(".")[2]: v for p, v in given.items() if p.startswith("given.")})
        names |= {p: v for p, v in given.items() if p in grid}
        names["present"] = present_in(training_names(used))
        choices = {name: decision.choice for name, decision in decide(mapping.variants, {}, names).items()}
        open_ = {name: self.world.choices[name] for name in mapping.variants if name not in choices}
        facts, _ = claims(mapping, {**names, **choices, **open_}, "the training configuration")
        sizes = {axis: fact.value for axis, fact in facts.items()}
        found: dict[str, Any] = {f"size {axis}": size for axis, size in sizes.items()}
        found |= {f"size {axis}": "read off the tensors" for axis in mapping.dims if axis not in sizes}
        found |= {f"choice {name}": choice for name, choice in choices.items()}
        names |= {**self.world.sizes, **sizes, **choices, **open_}
        made = {key: _value(tree, names) for key, tree in mapping.config.items()}
        made = as_declared({k: v for k, v in made.items() if v is not OMIT}, mapping.keys.get("target", {}))
        found |= {f"config.json {path}": value for path, value in leaves(made)}
        if mapping.remote_code is not None:
            auto = {key: _value(tree, names) for key, tree in mapping.remote_code.auto_map.items()}
            found |= {f"auto_map {key}": value for key, value in auto.items() if value is not OMIT}
        return found


@dataclass(frozen=True, slots=True)
class _Back:
    """config.json, options, choices and the grid → the training configuration."""

    mapping: MappingFile
    layout: Layout
    world: World
    forth: _Forth

    @property
    def keys(self) -> Mapping[str, Key]:
        return self.mapping.keys.get("target", {})

    def expressions(self) -> list[Expression]:
        return list(expressions_of(self.mapping.training_config))

    def closure(self, name: str) -> frozenset[str]:
        return frozenset([f"choice.{name}" if name in self.mapping.variants else name])

    def closure_of(self, expression: Expression) -> frozenset[str]:
        return frozenset(p for name in compile_expression(expression).paths for p in self.closure(name))

    def base(self) -> dict[str, Any]:
        made = self.forth.run(self.forth.base())
        config = {p.removeprefix("config.json "): v for p, v in made.items() if p.startswith("config.json ")}
        read = {path for one in self.expressions() for path in compile_expression(one).paths}
        grid = grid_of(self.layout)
        base: dict[str, Any] = {}
        for path in sorted(read):
            root = path.split(".")[0]
            if root in self.mapping.variants:
                base[f"choice.{root}"] = self.world.choices[root]
            elif root == "options":
                base[path] = self.mapping.options[path.partition(".")[2]].default
            elif path in grid:
                base[path] = grid[path][0]
            elif root == "given":
                base[path] = OMIT
            elif root not in self.world.sizes:
                base[path] = config.get(path, OMIT)
        return base

    def edges(self, path: str) -> list[Any]:
        return []

    def whole(self) -> list[tuple[str, dict[str, Any]]]:
        """Sizes whose quotient, multiplied again, comes to a little less and to a little more."""
        base = self.base()
        found: dict[str, dict[str, Any]] = {}
        for one in self.expressions():
            for above, below in quotients_of(one):
                if isinstance(base.get(above), int) and isinstance(base.get(below), int):
                    for pair in _inexact(base[below]):
                        given = dict(zip((above, below), pair, strict=True))
                        found[name_of(given)] = given
        return list(found.items())

    def run(self, given: Given) -> Outcome:
        try:
            return self._run(given)
        except EngineError as error:
            return {"refused": f"{error.code} {error.message}"}

    def _run(self, given: Given) -> dict[str, Any]:
        grid = grid_of(self.layout)
        apart = ("choice.", "options.", "given.")
        plain = {p: v for p, v in given.items() if not p.startswith(apart) and p not in grid}
        config = read_config(nested(plain), target_side(self.mapping)).config
        options = {p.partition(".")[2]: v for p, v in given.items() if p.startswith("options.")}
        names: dict[str, Any] = {**config, "options": options_of(self.mapping, options), **self.world.sizes}
        names |= {p.partition(".")[2]: v for p, v in given.items() if p.startswith("choice.")}
        names |= {p: v for p, v in given.items() if p in grid}
        names["given"] = nested({p.partition(".")[2]: v for p, v in given.items() if p.startswith("given.")})
        made = {key: _value(tree, names) for key, tree in self.mapping.training_config.items()}
        kept = {key: value for key, value in made.items() if value is not OMIT}
        kept = as_declared(kept, declared(self.mapping, self.layout, "source"))
        return {f"{self.layout.config_file} {path}": value for path, value in leaves(kept)}


def _forth_expressions(mapping: MappingFile) -> list[Expression]:
    variants = [dict(v.choices) for v in mapping.variants.values()]
    remote = mapping.remote_code.auto_map if mapping.remote_code is not None else {}
    return list(expressions_of([dict(mapping.dims), variants, mapping.config, dict(remote)]))


def _inexact(least: int) -> Iterator[tuple[int, int]]:
    """Two whole numbers whose quotient, times the second, is less than the first; and two where it is more.

    >>> [(a, b, b * (a / b)) for a, b in _inexact(11)]
    [(15, 11, 14.999999999999998), (25, 11, 25.000000000000004)]
    """
    for inexact in (lt, gt):
        pairs = ((a, b) for b in range(least, least + 200) for a in range(b + 1, 3 * b))
        yield from islice(((a, b) for a, b in pairs if inexact(b * (a / b), a)), 1)


def grid_of(layout: Layout) -> dict[str, list[Any]]:
    """What expressions see of the grid of ranks → its usual value, and others."""
    dims = {dim for mode in layout.modes for file in mode.files for dim in pattern(file.name).placeholders}
    found: dict[str, list[Any]] = {"dtype": ["torch.bfloat16", "torch.float32"], "chunks": [1, 2], "layers": [4, 6]}
    found["mode"] = [mode.name for mode in layout.modes]
    found["model_type"] = ["ONE", "OTHER"]
    found |= {name: list(variant.choices) for name, variant in layout.layers.variants.items()}
    return found | {f"{dim}s": [2 + number, 8 + number] for number, dim in enumerate(sorted(dims))}


def _needed(side: _Forth, base: Given) -> set[str]:
    """Keys without which something has no value, or is read off the tensors."""
    usual = side.run(base)
    found: set[str] = set()
    for path in base:
        after = side.run({**base, path: OMIT}) if "." not in path else usual
        worse = (p for p, v in after.items() if str(v).startswith(_WORSE) and usual.get(p) != v)
        if any(p not in after for p in usual) or any(worse):
            found.add(path)
    return found


def _value(tree: Any, names: Mapping[str, Any]) -> Any:
    """A configuration's value; what cannot be computed as words."""
    if isinstance(tree, Expression):
        try:
            return evaluate(tree, names)
        except EngineError as error:
            return f"no value: {error.code} {error.message}"
    if isinstance(tree, Mapping):
        return {key: v for key, child in tree.items() if (v := _value(child, names)) is not OMIT}
    if isinstance(tree, list | tuple):
        return [v for child in tree if (v := _value(child, names)) is not OMIT]
    return tree


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as a tree; what is absent is left out."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        if value is OMIT:
            continue
        *above, last = path.split(".")
        at = tree
        for name in above:
            below = at.setdefault(name, {})
            if not isinstance(below, dict):
                below = at[name] = {}
            at = below
        at[last] = value
    return tree
