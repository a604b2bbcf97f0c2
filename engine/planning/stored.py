"""Stored tensors: names without prefixes, layer numbers of the whole model, rules that match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoint.ranks import RankFile, RankGrid
from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader, TensorHeader
from engine.language.axes import Axes
from engine.language.expressions import evaluate
from engine.language.model import Layout, Rule
from engine.language.model import Mapping as MappingFile
from engine.language.names import PARAMS, Pattern, pattern


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor that is read: the file's index, in the plan and in the grid, and its header."""

    file: int
    header: TensorHeader


@dataclass(frozen=True, slots=True)
class Stored(SourceTensor):
    """One tensor of one rank file, under its name without prefix."""

    name: str
    chunk: int


@dataclass(frozen=True, slots=True)
class Instance:
    """A rule for one parameter (weight, bias, or the whole when its names have no `{param}`).

    `key` names it among those of its side of a mapping, and is all that is compared.
    """

    key: str
    rule: Rule = field(compare=False)
    param: str | None = field(compare=False)
    axes: Axes = field(compare=False)
    sources: tuple[Pattern, ...] = field(compare=False)
    targets: tuple[tuple[Pattern, Axes], ...] = field(compare=False)

    def axis_names(self) -> tuple[str, ...]:
        """The placeholders of the source name: axes of every piece."""
        return self.sources[0].placeholders

    @property
    def stage_class(self) -> str:
        return "layers" if self.rule.stage is None else self.rule.stage


def instances(mapping: MappingFile) -> tuple[Instance, ...]:
    result: list[Instance] = []
    for number, rule in enumerate(mapping.rules):
        compiled = [pattern(s, rule.place) for s in rule.sources]
        for param in PARAMS if compiled[0].has_param else (None,):
            side = Axes.bias if param == "bias" else Axes.weight
            result.append(
                Instance(
                    f"{number}.{param or ''}",
                    rule,
                    param,
                    side(rule.axes),
                    tuple(c.with_param(param) if param else c for c in compiled),
                    tuple(
                        (
                            pattern(t.name, t.place).with_param(param) if param else pattern(t.name),
                            side(t.axes),
                        )
                        for t in rule.targets
                    ),
                )
            )
    return tuple(result)


def strip(files: Sequence[FileHeader], layout: Layout) -> tuple[Stored, ...]:
    """Take the layout's prefixes off every name; the first that matches counts."""
    known: dict[str, tuple[str, int]] = {}
    result: list[Stored] = []
    for index, file in enumerate(files):
        for header in file.tensors:
            if header.name not in known:
                known[header.name] = without_prefix(header.name, layout)
            name, chunk = known[header.name]
            result.append(Stored(index, header, name, chunk))
    return tuple(result)


def without_prefix(name: str, layout: Layout) -> tuple[str, int]:
    """A name without the first of the layout's prefixes that it has, and the chunk that the prefix names."""
    for prefix in layout.prefixes:
        found = pattern(prefix.prefix).regex.match(name)
        if found is not None:
            return name[found.end() :], int(found.groupdict().get("chunk") or 0)
    return name, 0


def prefix_of(names: Sequence[str], layout: Layout) -> int | None:
    """Which of the layout's prefixes a checkpoint's names have: an index, or None when it has none."""
    prefixes = [pattern(p.prefix).regex for p in layout.prefixes]
    for name in names:
        for index, regex in enumerate(prefixes):
            if regex.match(name) is not None:
                return index
    return None


@dataclass(frozen=True, slots=True)
class Stages:
    """Where each (chunk, pp) stage's layers start in the whole model, and how many it has."""

    starts: Mapping[tuple[int, int], int]
    counts: Mapping[tuple[int, int], int]
    chunks: int

    @property
    def layers(self) -> int:
        return sum(self.counts.values())


def number_layers(
    local: Mapping[tuple[int, int], Mapping[int, int]],
    grid: RankGrid,
    layout: Layout,
    names: Mapping[str, Any],
    files: Sequence[RankFile],
) -> Stages:
    """Lay the stages end to end.

    Args:
        local: for each (chunk, pp), file index → number of local layers seen in that file.
    """
    pps = grid.sizes.get("pp", 1)
    chunks = 1 + max((chunk for chunk, _ in local), default=0)
    counts: dict[tuple[int, int], int] = {}
    for chunk in range(chunks):
        for pp in range(pps):
            seen = local.get((chunk, pp), {})
            if len(set(seen.values())) > 1:
                few = min(seen, key=lambda f: (seen[f], f))
                many = max(seen, key=lambda f: (seen[f], -f))
                raise EngineError(
                    "E211",
                    "files of one pipeline stage hold different numbers of layers",
                    place=Place(files[few].name),
                    got=f"{seen[few]} layers in {files[few].name}",
                    expected=f"{seen[many]} layers, as in {files[many].name}",
                    fix="One of the files is from another run or damaged; compare dates and sizes.",
                )
            counts[chunk, pp] = next(iter(seen.values()), 0)
    facts = {**names, **grid.names(), "chunks": chunks}
    order = sorted(counts, key=lambda s: evaluate(layout.layers.stage, {**facts, "chunk": s[0], "pp": s[1]}))
    starts: dict[tuple[int, int], int] = {}
    total = 0
    for stage in order:
        starts[stage] = total
        total += counts[stage]
    return Stages(starts, counts, chunks)


def number_experts(grid: RankGrid, stages: Stages, file: RankFile) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For an expert file: (chunk, local layer) → the (pp, global layer) its number can mean."""
    number = file.pattern.number
    if number is None:
        return {}
    pps = grid.sizes.get("pp", 1)
    result: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for pp in range(pps):
        nth = 0
        for chunk in range(stages.chunks):
            for local in range(stages.counts[chunk, pp]):
                facts = {"pp": pp, "pps": pps, "layers": stages.layers, "nth": nth, "chunks": stages.chunks}
                if evaluate(number, {**facts, **grid.names()}) == file.ranks["number"]:
                    result.setdefault((chunk, local), []).append((pp, stages.starts[chunk, pp] + local))
                nth += 1
    return result
