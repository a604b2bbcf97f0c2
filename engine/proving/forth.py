"""The direction of `run`: a training configuration, options and tensors → sizes, choices and config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from engine.language.declared import expressions_of, paths_in
from engine.language.documents import leaves
from engine.language.expressions import OMIT, compile_expression, names_in
from engine.language.keys import as_declared, find_key
from engine.language.model import Layout, MappingFile
from engine.planning.attempts import claims
from engine.planning.config_keys import source_side
from engine.planning.facts import present_in, render_known
from engine.planning.variants import decide
from engine.proving.direction import Direction, value_of
from engine.proving.probes import Given, Outcome, constants, divisors_of, nested, plain_name, unusual
from engine.proving.tiny import World, Worlds, decided_by_names, training_names

LEAST = "nothing but what is needed"
_WORSE = ("refused", "no value", "read off")


class Forth(Direction):
    """The direction of `run`."""

    def __init__(self, mapping: MappingFile, layout: Layout, worlds: Worlds, world: World) -> None:
        reads = [mapping.dims, [v.choices for v in mapping.variants.values()], mapping.config, mapping.remote_code]
        super().__init__(mapping, layout, world, source_side(mapping, layout), reads)
        self.worlds = worlds

    def closure(self, name: str) -> frozenset[str]:
        mapping = self.mapping
        itself: frozenset[str] = frozenset()
        if name in mapping.dims:
            read = compile_expression(mapping.dims[name]).paths
            itself = frozenset([name]) & read  # a key of that name
        elif name in mapping.variants:
            variant = mapping.variants[name]
            if name in decided_by_names(mapping):
                return frozenset([f"tensors.{name}"])
            asked = [compile_expression(one) for one in expressions_of(dict(variant.choices))]
            read = frozenset(path for one in asked for path in one.paths)
            itself = frozenset(f"there.{name}" for one in asked for name in one.patterns)
        else:
            return frozenset([name, *_holders(name)])
        return frozenset(p for one in read if one != name for p in self.closure(one)) | itself

    @cached_property
    def base(self) -> dict[str, Any]:
        """Every key and option that is read, each with a distinct value."""
        grid = {name: values[0] for name, values in self.grid.items()}
        names = {**self.world.config, **self.world.choices, **self.world.sizes, **grid, "options": {}}
        written = dict(leaves(render_known(self.mapping.training_config, names)))
        sized = paths_in(dict(self.mapping.dims))
        direct = {path: self.world.sizes[d] for d, e in self.mapping.dims.items()
                  if d in self.world.sizes and (path := plain_name(e)) is not None}  # fmt: skip
        base: dict[str, Any] = {}
        axes = {axis for rule in self.mapping.rules for axis in rule.axes.names()}
        own = {*self.mapping.dims, *self.mapping.variants, *self.world.sizes, *axes}
        own -= {axis for axis, one in self.mapping.dims.items() if axis in names_in(one)}  # a key of that name
        number = 0
        made_up: list[str] = []  # whole numbers that may be too large
        for path in self.paths:
            root = path.split(".")[0]
            if root in own or root == "options":
                continue
            if root == "given":
                base[path] = OMIT
                continue
            if path in grid:
                base[path] = grid[path]
                continue
            key = find_key(self.side.keys, path)
            types = () if key is None else key.limits.types
            fits = path in written and (key is None or key.limits.fits(written[path]))
            if path in direct:
                base[path] = direct[path]
            elif path in sized and fits:
                base[path] = written[path]
            elif "integer" in types and not fits:
                base[path] = 8192 + number
                made_up.append(path)
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
        base = {**self.required(written), **base}
        base |= dict.fromkeys((holder for path in base for holder in _holders(path)), OMIT)
        base |= {f"tensors.{name}": self.world.choices[name] for name in decided_by_names(self.mapping)}
        there = present_in(training_names(self.worlds.used(self.world.choices, most=True) or ()))
        base |= {f"there.{name}": there(name) for name in self._asked()}
        return base if "refused" not in self.run(base) else self._answered(base, made_up)

    def _answered(self, base: dict[str, Any], made_up: Sequence[str]) -> dict[str, Any]:
        """Values that are accepted: made-up numbers become 1 if they are too large, others what a variant asks for."""
        for path in made_up:  # one may be too large for another, which is small if all are 1
            if "refused" not in self.run(alone := {**base, path: 1}):
                return alone
        found = {**base, **dict.fromkeys(made_up, 1)}
        for path, values in constants(self.expressions, self.closure).items():
            if values and isinstance(found.get(path), float) and "refused" in self.run(found):
                found[path] = values[-1]
        for path in made_up:
            found[path] = 1 if "refused" in self.run({**found, path: base[path]}) else base[path]
        return found

    def _asked(self) -> list[str]:
        """Tensors that only variants ask for which keys also decide."""
        asked = (one for variant in self.mapping.variants.values() for one in expressions_of(dict(variant.choices)))
        return sorted({name for one in asked for name in compile_expression(one).patterns} - self.told_by.keys())

    def edges(self, path: str) -> list[Any]:
        """A large value to try for an input that sizes are rounded up to multiples of."""
        divisors = {name for one in self.mapping.dims.values() for name in divisors_of(one)}
        rounded = any(path in self.closure(name) for name in divisors)
        below = [one for name, one in self.mapping.dims.items() if name in divisors]
        direct = any(path in compile_expression(one).paths for one in below)
        return [max(self.world.sizes.values())] if rounded and (direct or path in divisors) else []

    def whole(self) -> list[tuple[str, dict[str, Any]]]:
        """All optional keys absent at once, with the options' defaults; the same with one switch on."""
        plain = self._least({})
        found = [(LEAST, plain)]
        for path, usual in self.base.items():
            key = find_key(self.side.keys, path)
            logical = key is not None and key.limits.types == ("boolean",) and key.allows(True)
            if (logical and plain.get(path) is OMIT) or (path.startswith("there.") and usual is False):
                on = self._least({path: True}, plain)
                if self.run({**self.base, **on}) != self.run({**self.base, **plain}):
                    found.append((f"{LEAST}, and {path}", on))
        return found

    def _least(self, given: Given, guess: Given | None = None) -> dict[str, Any]:
        """Leave out as many keys as possible besides the given ones, so that nothing is refused or read from tensors.

        If the keys of a `guess` can be left out, the search starts from there.
        """
        defaults = {f"options.{name}": option.default for name, option in self.mapping.options.items()}
        least, before = dict(given), -1
        usual = self.run({**self.base, **given})
        if guess is not None and self._fine(usual, fewer := {**guess, **given}):
            least = fewer
        while before < (before := len(least)):  # a key may be needed only while another is present
            for path in self.base:
                if path not in least and (path in defaults or "." not in path):
                    fewer = {**least, path: defaults.get(path, OMIT)}
                    if self._fine(usual, fewer):
                        least = fewer
        return least

    def _fine(self, usual: Outcome, given: Given) -> bool:
        """Whether the given values are accepted, and no more is read from tensors than usual."""
        after = self.run({**self.base, **given})
        worse = (p for p, v in after.items() if str(v).startswith(_WORSE) and usual.get(p) != v)
        return "refused" not in after and not any(worse)

    def outcome(self, names: Mapping[str, Any], apart: Mapping[str, Mapping[str, Any]]) -> Outcome:
        mapping = self.mapping
        used = self.worlds.used({**self.world.choices, **apart["tensors"]}, most=True)
        if used is None:
            return {"refused": "no set of tensors shows it"}
        there, single = present_in(training_names(used)), apart["there"]
        names = {
            **names,
            "training": nested(apart["training"]),
            "present": lambda name: single[name] if name in single else there(name),
        }
        choices = {name: decision.choice for name, decision in decide(mapping.variants, {}, names).items()}
        open_ = {name: self.world.choices[name] for name in mapping.variants if name not in choices}
        facts, _ = claims(mapping, {**names, **choices, **open_}, "the training configuration")
        sizes = {axis: fact.value for axis, fact in facts.items()}
        found: dict[str, Any] = {f"size {axis}": size for axis, size in sizes.items()}
        found |= {f"size {axis}": "read off the tensors" for axis in mapping.dims if axis not in sizes}
        found |= {f"choice {name}": choice for name, choice in choices.items()}
        names |= {**self.world.sizes, **sizes, **choices, **open_}
        made = {key: value_of(tree, names) for key, tree in mapping.config.items()}
        made = as_declared({k: v for k, v in made.items() if v is not OMIT}, mapping.keys.get("target", {}))
        found |= {f"config.json {path}": value for path, value in leaves(made)}
        auto = {key: value_of(tree, names) for key, tree in (mapping.remote_code or {}).items()}
        return found | {f"auto_map {key}": value for key, value in auto.items() if value is not OMIT}


def _holders(path: str) -> list[str]:
    """The sections that may exist without a trainer setting that is read in them.

    >>> _holders("training.moe.top_k"), _holders("training.seed"), _holders("hidden_size")
    (['training.moe'], [], [])
    """
    above = path.rpartition(".")[0]
    return [above] if path.startswith("training.") and above != "training" else []
