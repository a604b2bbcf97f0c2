"""The normal form of a conversion's plan: which training element goes where, sorted, layers folded.

Two plans mean the same exactly when their normal forms are equal, and where they differ the form
reads as a diff: one entry per target pattern, with the copies of one tensor that stands for all
layers. `planning.digest` is over the plan unfolded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.checkpoint.ranks import index_dims, stage_dims
from engine.explaining.describe import fold
from engine.language.names import pattern
from engine.language.rules import STORED
from engine.planning.copies import Copy
from engine.planning.groups import Cut, cut_of
from engine.planning.matching import is_active
from engine.planning.model import Output, Plan
from engine.planning.stored import Instance, instances, strip
from engine.proving.copy_text import Label, copy_texts


@dataclass(frozen=True, slots=True)
class _Origin:
    """A stored tensor as the outputs see that read it.

    Attributes:
        label: what tells it from the other shards and sources of the same output: `tp1`, `expert3`.
        home: where it lies otherwise: pipeline rank, chunk, number of the file.
        local: its layer within the stage.
    """

    source: str
    axes: str
    cut: str
    shape: tuple[int, ...]
    replicas: int
    label: Label
    home: Label
    local: int | None


@dataclass(slots=True)
class _Class:
    """Outputs of one pattern that differ in nothing but the values of its placeholders."""

    first: Output
    origins: tuple[_Origin, ...]
    copies: tuple[Copy, ...]
    values: list[Mapping[str, int]]
    homes: list[tuple[tuple[Label, int | None], ...]]


def normal_form(plan: Plan) -> dict[str, Any]:
    """What a plan that writes a Hugging Face checkpoint does, JSON-ready and without machine paths."""
    reader = _Reader(plan)
    classes: dict[tuple[object, ...], _Class] = {}
    for index, output in enumerate(plan.outputs):
        reader.add(classes, output, plan.copies(index))
    for tied in plan.tied:
        reader.add(classes, tied.output, tied.copies, f"left out, as tied to {plan.outputs[tied.same_as].name}")
    return {
        "mode": plan.grid.mode.name,
        "ranks": dict(plan.grid.sizes),
        "stages": _stages(plan),
        "tensors": [_entry(plan, key, one) for key, one in classes.items()],
        "ignored": sorted({reader.pattern_of(name) for name in plan.ignored}),
    }


class _Reader:
    """Looks up where the sources of a plan's copies come from."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        choices = {name: d.choice for name, d in plan.decisions.items()}
        self._active = [one for one in instances(plan.mapping) if is_active(one, choices)]
        self._stored = {(s.file, s.header.name): s for s in strip(plan.files, plan.layout)}
        self._replicas = {one.sources[0]: len(one.sources) for one in plan.replicas}
        self._found: dict[str, tuple[Instance, Mapping[str, int], str]] = {}
        self._cuts: dict[tuple[str, str], Cut] = {}
        layout = plan.layout
        local = [dim for axis in layout.indices for dim in index_dims(layout, axis)]
        self._homes = tuple(dict.fromkeys((*stage_dims(layout), "number", *local)))

    def add(
        self, classes: dict[tuple[object, ...], _Class], output: Output, copies: Sequence[Copy], note: str = ""
    ) -> None:
        """Put an output into its class."""
        values = pattern(output.pattern).match(output.name) or {}
        numbers = list(dict.fromkeys(c.source for c in copies))
        origins = tuple(self._origin(number, values) for number in numbers)
        steps = tuple(
            Copy(numbers.index(c.source), 0, c.source_offset, c.target_offset, c.shape, c.source_strides,
                 c.target_strides)
            for c in copies
        )  # fmt: skip
        facts = (output.pattern, output.rule, output.shape, output.dtype, output.read_dtype, output.transform, note)
        alike = tuple((o.source, o.axes, o.cut, o.shape, o.replicas, o.label) for o in origins)
        one = classes.setdefault((*facts, alike, steps), _Class(output, origins, steps, [], []))
        one.values.append(values)
        one.homes.append(tuple(dict.fromkeys((o.home, o.local) for o in origins)))

    def pattern_of(self, name: str) -> str:
        """The `ignore` entry that a tensor falls under."""
        for entry in self._plan.mapping.ignore:
            if entry.side == "source" and pattern(entry.pattern).match(name) is not None:
                return entry.pattern
        return name

    def _origin(self, number: int, target: Mapping[str, int]) -> _Origin:
        source = self._plan.sources[number]
        stored = self._stored[source.file, source.header.name]
        file = self._plan.grid.files[source.file]
        if stored.name not in self._found:
            self._found[stored.name] = self._match(stored.name)
        instance, values, text = self._found[stored.name]
        key = (instance.key, file.pattern.name)
        if key not in self._cuts:
            self._cuts[key] = cut_of(instance, file.pattern, self._plan.layout)
        cut = self._cuts[key]
        label = tuple((d, file.ranks[d]) for d in cut.rank_dims())
        if cut.boxes and source.header.part is not None:
            label += tuple((f"dim{dim}=", start) for dim, start in enumerate(source.header.starts))
        label += tuple((p, v) for p, v in values.items() if p not in target)
        home = tuple((d, file.ranks[d]) for d in self._homes if d in file.ranks)
        home += (("chunk", stored.chunk),) if self._plan.stages.chunks > 1 else ()
        return _Origin(
            text,
            str(instance.axes),
            cut_text(cut, self._plan.layout.lone_rank),
            source.header.shape,
            self._replicas.get(number, 1),
            label,
            home,
            values.get("layer"),
        )

    def _match(self, name: str) -> tuple[Instance, Mapping[str, int], str]:
        for instance in self._active:
            for source in instance.sources:
                values = source.match(name)
                if values is not None:
                    return instance, values, source.text
        raise ValueError(f"{name} is read by no active rule")


def cut_text(cut: Cut, lone_rank: Mapping[str, int]) -> str:
    """How a tensor is cut over ranks.

    >>> cut_text(Cut((("tp", "heads"),)), {}), cut_text(Cut(rows="wp"), {}), cut_text(Cut(), {})
    ('tp cuts heads', 'wp cuts rows', 'whole')
    """
    if cut.boxes:
        return "recorded boxes"
    if cut.rows is not None:
        return f"{cut.rows} cuts {STORED[cut.at]}"
    told = [f"{dim} cuts {axis}" for dim, axis in cut.dims]
    if cut.lone:
        told.append("only on " + ", ".join(f"{dim}{rank}" for dim, rank in lone_rank.items()))
    return ", ".join(told) or "whole"


def shape_text(shape: Sequence[int]) -> str:
    """
    >>> shape_text((4096, 64))
    '4096 × 64'
    """
    return " × ".join(map(str, shape)) or "scalar"


def _stages(plan: Plan) -> list[str]:
    """Which layers each stage holds, in the order of the model."""
    stages = plan.stages
    rows = []
    for stage, start in sorted(stages.starts.items(), key=lambda entry: (entry[1], entry[0])):
        held = range(start, start + stages.counts[stage])
        rows.append(f"{stages.name(stage)}: layers {fold(held) or 'none'}")
    return rows


def _entry(plan: Plan, key: tuple[object, ...], one: _Class) -> dict[str, Any]:
    name = one.first.pattern
    for placeholder in pattern(name).placeholders:
        folded = fold([v[placeholder] for v in one.values])
        name = name.replace(f"{{{placeholder}}}", f"{{{folded}}}")
    entry: dict[str, Any] = {
        "target": name,
        "rule": one.first.rule,
        "shape": shape_text(one.first.shape),
        "dtype": one.first.dtype,
        "sources": _sources(one.origins),
        "copies": copy_texts(one.copies, [o.label for o in one.origins], [o.source for o in one.origins]),
    }
    if one.first.read_dtype != one.first.dtype:
        entry["read as"] = one.first.read_dtype
    if one.first.transform is not None:
        entry["transform"] = ":".join(one.first.transform)
    if key[6]:
        entry["note"] = key[6]
    places = _places(plan, one)
    if places:
        entry["places"] = places
    return entry


def _sources(origins: Sequence[_Origin]) -> list[dict[str, Any]]:
    """One row per source pattern: its axes, its cut and the shapes of its shards."""
    rows: dict[tuple[str, str, str, int], list[_Origin]] = {}
    for origin in origins:
        rows.setdefault((origin.source, origin.axes, origin.cut, origin.replicas), []).append(origin)
    result: list[dict[str, Any]] = []
    for (source, axes, cut, replicas), held in rows.items():
        shards: list[str] = []
        for shape in dict.fromkeys(o.shape for o in held):
            labels = [o.label for o in held if o.shape == shape]
            told = " ".join(f"{dim}{fold([dict(label)[dim] for label in labels])}" for dim, _ in labels[0])
            shards.append(f"{told}: {shape_text(shape)}".removeprefix(": "))
        row: dict[str, Any] = {"source": source, "axes": axes, "cut": cut, "shards": shards}
        if replicas > 1:
            row["replicas"] = replicas
        result.append(row)
    return result


def _places(plan: Plan, one: _Class) -> list[str]:
    """Where the class's tensors lie, unless that is what the stages say."""
    stages = plan.stages
    rows: dict[Label, list[tuple[int, int]]] = {}
    plain = "layer" in pattern(one.first.pattern).placeholders
    for values, homes in zip(one.values, one.homes, strict=True):
        for home, local in homes:
            at = dict(home)
            stage = (at.get("chunk", 0), *(at.get(dim, 0) for dim in stages.dims))
            layer = values.get("layer")
            plain = plain and "number" not in at and layer is not None and local is not None
            if plain and layer is not None and local is not None:
                plain = layer == stages.starts[stage] + local and local < stages.counts[stage]
            rows.setdefault(home, []).append((-1 if layer is None else layer, -1 if local is None else local))
    if plain:
        return []
    result: list[str] = []
    for home, pairs in rows.items():
        where = " ".join(f"{dim}{value}" for dim, value in home) or "the only stage"
        told = [f"layers {fold([a for a, _ in pairs])}"] if pairs[0][0] >= 0 else []
        if pairs[0][1] >= 0:
            told.append(f"there {fold([b for _, b in pairs])}")
        result.append(f"{where}: {', '.join(told)}" if told else where)
    return result
