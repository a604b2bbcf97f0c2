"""Stored tensors: names without prefixes, layer numbers of the whole model, matching rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from engine.errors import Place
from engine.formats.headers import FileHeader, TensorHeader
from engine.language.axes import Axes
from engine.language.model import Layout, MappingFile, Rule
from engine.language.names import PARAMS, Pattern, pattern

End = Literal["training", "whole"]  # of a mapping: rank files, or a Hugging Face checkpoint


class Stored(NamedTuple):
    """One tensor of one file: the file's index, in the plan and in the grid, its header, its name without prefix."""

    file: int
    header: TensorHeader
    name: str
    chunk: int = 0


@dataclass(frozen=True)
class Instance:
    """A rule for one parameter (weight, bias, or the whole when its names have no `{param}`).

    `key` identifies it on its side of a mapping; only the key is compared.
    """

    key: str
    rule: Rule = field(compare=False)
    param: str | None = field(compare=False)
    axes: Axes = field(compare=False)
    sources: tuple[Pattern, ...] = field(compare=False)
    targets: tuple[tuple[Pattern, Axes], ...] = field(compare=False)
    parts: tuple[Pattern, ...] = field(default=(), compare=False)  # names of its `pieces`

    def part(self, name: str) -> int | None:
        """Which of its `pieces` a tensor is; None for one that is whole."""
        return next((at for at, one in enumerate(self.parts) if one.match(name) is not None), None)

    @cached_property
    def axis_names(self) -> tuple[str, ...]:
        """The placeholders of the source name, a tensor for each of their values: axes of every piece."""
        return tuple(one for one in self.sources[0].placeholders if one not in self.axes.names())

    @cached_property
    def numbered(self) -> tuple[str, ...]:
        """Placeholders of the source name that are also axes: the number in the name is that of a slice."""
        return tuple(one for one in self.sources[0].placeholders if one in self.axes.names())

    @cached_property
    def pieces(self) -> tuple[frozenset[str], ...]:
        """The axes of each piece."""
        return tuple(frozenset((*piece, *self.axis_names)) for piece in self.axes.pieces())

    @cached_property
    def wholes(self) -> tuple[Instance, ...]:
        """Each target as a whole tensor, under its own name."""
        return tuple(Instance(name.text, self.rule, None, axes, (name,), ()) for name, axes in self.targets)

    def under(self, choices: Mapping[str, str]) -> Instance:
        """The instance under given choices: they may decide whether values are changed."""
        return replace(self, rule=self.rule.under(choices)) if self.rule.transform_when else self

    @property
    def stage_class(self) -> str:
        return "layers" if self.rule.stage is None else self.rule.stage


def instances(mapping: MappingFile) -> tuple[Instance, ...]:
    return _instances(mapping.rules)


@lru_cache(maxsize=64)  # with what each is asked for, plan after plan
def _instances(rules: tuple[Rule, ...]) -> tuple[Instance, ...]:
    result: list[Instance] = []
    for number, rule in enumerate(rules):
        for param in PARAMS if pattern(rule.sources[0], rule.place).has_param else (None,):
            side = Axes.bias if param == "bias" else Axes.weight
            sources, parts = (
                tuple(_of_param(name, rule.place, param) for name in names) for names in (rule.sources, rule.pieces)
            )
            targets = tuple((_of_param(t.name, t.place, param), side(t.axes)) for t in rule.targets)
            result.append(Instance(f"{number}.{param or ''}", rule, param, side(rule.axes), sources, targets, parts))
    return tuple(result)


def _of_param(name: str, place: Place, param: str | None) -> Pattern:
    compiled = pattern(name, place)
    return compiled.with_param(param) if param else compiled


def at_end(rules: Sequence[Instance], end: End) -> tuple[Instance, ...]:
    """The tensors of rules on one side: those read from training files, or each target as a whole tensor."""
    if end == "training":
        return tuple(rules)
    return tuple(whole for one in rules for whole in one.wholes)


def strip(files: Sequence[FileHeader], layout: Layout | None) -> tuple[Stored, ...]:
    """Strip the layout's prefixes from every name; the first match counts. None: there are no prefixes."""
    known: dict[str, tuple[str, int]] = {}
    result: list[Stored] = []
    for index, file in enumerate(files):
        for header in file.tensors:
            if header.name not in known:
                known[header.name] = (header.name, 0) if layout is None else without_prefix(header.name, layout)
            name, chunk = known[header.name]
            result.append(Stored(index, header, name, chunk))
    return tuple(result)


def without_prefix(name: str, layout: Layout) -> tuple[str, int]:
    """A name without the first layout prefix that it has, and the chunk that the prefix names."""
    for prefix in layout.prefixes:
        found = pattern(prefix.prefix).regex.match(name)
        if found is not None:
            return name[found.end() :], int(found.groupdict().get("chunk") or 0)
    return name, 0


def prefix_of(names: Sequence[str], layout: Layout) -> int | None:
    """Which of the layout's prefixes a checkpoint's names have: an index, or None when it has none."""
    prefixes = [pattern(p.prefix).regex for p in layout.prefixes]
    return next((index for name in names for index, regex in enumerate(prefixes) if regex.match(name)), None)
