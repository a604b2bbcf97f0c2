"""The normal form of a plan: which element goes where, sorted, layers folded.

Two plans mean the same exactly when their normal forms are equal, and where they differ the form
reads as a diff: one entry per target pattern, with the copies of one tensor that stands for all
layers. `digest_of_plan` is over the plan unfolded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.checkpoint.ranks import index_dims, stage_dims
from engine.explaining.copy_text import Label, copy_texts
from engine.explaining.describe import fold, folded
from engine.explaining.words import shard_words
from engine.language.names import pattern
from engine.language.rules import STORED
from engine.planning.classes import Template, template_of
from engine.planning.copies import Copy
from engine.planning.groups import Cut, Group
from engine.planning.model import Output, Plan


@dataclass(frozen=True, slots=True)
class _Origin:
    """A stored tensor as the outputs see that read it.

    Attributes:
        shard: what tells it from the other shards of its tensor: `tp1`.
        fixed: the numbers in its name, in the whole model.
        home: where it lies otherwise: pipeline rank, chunk, number of the file.
        local: its layer within the stage; None where it has none, or lies in no rank file.
    """

    source: str
    axes: str
    cut: str
    shape: tuple[int, ...]
    replicas: int
    shard: Label
    fixed: Mapping[str, int]
    home: Label
    local: int | None

    def label(self, target: Mapping[str, int]) -> Label:
        """What tells it from other sources of an output: its shard, and numbers that the output's name has not."""
        return (*self.shard, *((axis, value) for axis, value in self.fixed.items() if axis not in target))


@dataclass(slots=True)
class _Class:
    """Outputs of one pattern that differ in nothing but the values of its placeholders."""

    first: Output
    shard: str
    note: str
    origins: tuple[_Origin, ...]
    labels: tuple[Label, ...]
    copies: tuple[Copy, ...]
    values: list[Mapping[str, int]]
    homes: list[tuple[tuple[Label, int | None], ...]]


def normal_form(plan: Plan) -> dict[str, Any]:
    """What a plan does, JSON-ready and without machine paths."""
    origins = _origins(plan)
    classes: dict[tuple[object, ...], _Class] = {}
    alike: dict[tuple[Copy, ...], int] = {}
    numbers: dict[int, int] = {}  # of templates, which the plan keeps: those of equal copies have one

    def add(output: Output, group: Group, shard: str, template: Template, used: Sequence[int], note: str = "") -> None:
        if id(template) not in numbers:
            numbers[id(template)] = alike.setdefault(template.copies, len(alike))
        held = tuple(origins[source] for source in used)
        labels = tuple(one.label(group.fixed) for one in held)
        facts = (output.pattern, output.rule, output.shape, output.dtype, output.read_dtype, output.transform)
        kinds = tuple((o.source, o.axes, o.cut, o.shape, o.replicas) for o in held)
        one = classes.setdefault(
            (*facts, shard, note, kinds, labels, numbers[id(template)]),
            _Class(output, shard, note, held, labels, template.copies, [], []),
        )
        one.values.append(group.fixed)
        one.homes.append(tuple(dict.fromkeys((o.home, o.local) for o in held)))

    target = plan.copies.target
    words: dict[tuple[object, int], str] = {}
    for index, output in enumerate(plan.outputs):
        group, position = plan.copies.outputs[index]
        place = (group.instance.key, position)
        if place not in words:
            words[place] = shard_words(group, target.shards(group)[position]) if len(group.shards) > 1 else ""
        add(output, group, words[place], *plan.copies.filled(index))
    groups = {group.name: group for group in target.groups}
    left_out = [template_of(tied.copies) for tied in plan.tied]
    for tied, template in zip(plan.tied, left_out, strict=True):
        note = f"left out, as tied to {plan.outputs[tied.same_as].name}"
        add(tied.output, groups[tied.output.name], "", template, template.used, note)
    return {
        "mode": plan.grid.mode.name,
        "ranks": dict(plan.grid.sizes),
        "stages": _stages(plan),
        "tensors": [_entry(plan, one) for one in classes.values()],
        "ignored": sorted({_ignored(plan, name) for name in plan.ignored}),
    }


def _origins(plan: Plan) -> list[_Origin]:
    """Every stored tensor, by its number."""
    side, found = plan.copies.source, list[_Origin]()
    layout, ranks = plan.layout, plan.reads == "training"
    local = [dim for axis in layout.indices for dim in index_dims(layout, axis)]
    homes = tuple(dict.fromkeys((*stage_dims(layout), "number", *local))) if ranks else ()
    for group in side.groups:
        cut, text = cut_text(group.cut, layout.lone_rank), _source_text(group)
        if group.cut.boxes and len(group.shards) == 1:
            cut = "whole"
        layer = group.fixed.get("layer") if ranks else None
        for key, replicas in group.shards.items():
            shard = _shard_label(group, key)
            for one in replicas:
                file = plan.grid.files[one.file] if ranks else None
                home = tuple((d, file.ranks[d]) for d in homes if d in file.ranks) if file is not None else ()
                home += (("chunk", one.chunk),) if ranks and plan.stages.chunks > 1 else ()
                found.append(
                    _Origin(
                        text, str(group.instance.axes), cut, one.header.shape, len(replicas), shard, group.fixed, home,
                        None if layer is None else plan.stages.find(layer)[1],
                    )
                )  # fmt: skip
    return found


def _source_text(group: Group) -> str:
    """The pattern of a group's name: of several historical ones, the one that it has."""
    sources = group.instance.sources
    return next((s.text for s in sources if len(sources) > 1 and s.match(group.name) is not None), sources[0].text)


def _shard_label(group: Group, key: tuple[int, ...]) -> Label:
    if group.cut.boxes:
        return tuple((f"dim{dim}=", start) for dim, start in enumerate(key)) if len(group.shards) > 1 else ()
    return tuple(zip(group.cut.rank_dims(), key, strict=True))


def _ignored(plan: Plan, name: str) -> str:
    """The `ignore` entry that a tensor falls under."""
    for entry in plan.mapping.ignore:
        if pattern(entry.pattern).match(name) is not None:
            return entry.pattern
    return name


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


def _entry(plan: Plan, one: _Class) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "target": folded(one.first.pattern, one.values),
        "rule": one.first.rule,
        "shape": shape_text(one.first.shape),
        "dtype": one.first.dtype,
        "sources": _sources(one.origins, one.labels),
        "copies": copy_texts(one.copies, one.labels, [o.source for o in one.origins]),
    }
    if one.first.read_dtype != one.first.dtype:
        entry["read as"] = one.first.read_dtype
    if one.first.transform is not None:
        entry["transform"] = ":".join(one.first.transform)
    if one.note:
        entry["note"] = one.note
    if one.shard:
        entry["shard"] = one.shard
    places = _places(plan, one) if plan.reads == "training" else []
    if places:
        entry["places"] = places
    return entry


def _sources(origins: Sequence[_Origin], labels: Sequence[Label]) -> list[dict[str, Any]]:
    """One row per source pattern: its axes, its cut and the shapes of its shards."""
    rows: dict[tuple[str, str, str, int], list[tuple[tuple[int, ...], Label]]] = {}
    for origin, label in zip(origins, labels, strict=True):
        key = (origin.source, origin.axes, origin.cut, origin.replicas)
        rows.setdefault(key, []).append((origin.shape, label))
    result: list[dict[str, Any]] = []
    for (source, axes, cut, replicas), held in rows.items():
        shards: list[str] = []
        for shape in dict.fromkeys(shape for shape, _ in held):
            alike = [dict(label) for other, label in held if other == shape]
            told = " ".join(f"{dim}{fold([label[dim] for label in alike])}" for dim in alike[0])
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
