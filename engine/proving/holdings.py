"""Where the elements of every target come from, and which of them each rank of small grids holds.

This is taken from plans that write a tiny model for each grid, so only the effect of a rule counts, not how
it is written: other names of axes give the same result.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.errors import EngineError
from engine.explaining.describe import copy_texts
from engine.language.axes import Axes, extent
from engine.language.documents import grouped
from engine.language.model import Layout, MappingFile
from engine.language.names import Pattern
from engine.language.rules import STORED, said
from engine.planning.boxes import Copy, swap
from engine.planning.facts import render_known
from engine.planning.model import Plan
from engine.planning.stored import Instance, instances
from engine.proving.counterexamples import moves_of, strided
from engine.proving.matrix import Case, cases, combinations_of
from engine.proving.proof import Failure
from engine.proving.symbolic import reverse_of
from engine.proving.tiny import DIVISIBLE, EVEN, World, Worlds, guess_sizes

Coordinates = tuple[tuple[str, int], ...]


def origins(mapping: MappingFile) -> dict[str, Any]:
    """Tiny sizes, and for each target the source and order of its elements."""
    sizes = _sizes(mapping, guess_sizes(mapping, DIVISIBLE, EVEN))
    return {
        "sizes": {axis: sizes[axis] for axis in sorted(sizes)},
        "tensors": {key: _entry(one, target, axes, sizes) for key, one, target, axes in _targets(mapping)},
    }


def holdings(mapping: MappingFile, layout: Layout, worlds: Worlds) -> dict[str, Any]:
    """How each small grid cuts layers, and the elements of each target on its ranks; equal grids are listed once."""
    mapping = replace(mapping, expect={})  # tiny sizes match no release
    free = guess_sizes(mapping, DIVISIBLE, EVEN)
    grids: dict[str, str] = {}
    ranks: dict[str, dict[str, str]] = {key: {} for key, *_ in _targets(mapping)}
    listed = small_cases(layout)
    for world in _covering(mapping, worlds, free, listed):
        known = _first_tensors(mapping, world)
        for case in listed:
            if not case.takes(world.choices):
                continue
            try:
                plan = reverse_of(mapping, layout, world, case)
            except EngineError as error:
                grids.setdefault(case.label, f"refused: {Failure.of(error).message}")
                continue
            grids[case.label] = _stages(plan)
            for key, held in _held(plan, known).items():
                usual = plan.grid.mode.files[0].name
                file = f" in {held[0][1]}" if held[0][1] != usual else ""
                ranks[key][case.label] = _ranks(held, plan) + file
    alike = {key: grouped((said, grid) for grid, said in held.items()) for key, held in ranks.items()}
    told = {key: {", ".join(grids): said for said, grids in held.items()} for key, held in alike.items()}
    return {"layers": grids, "ranks": {key: held or "in no plan" for key, held in told.items()}}


def _targets(mapping: MappingFile) -> Iterator[tuple[str, Instance, Pattern, Axes]]:
    """Every entry: its name, its rule, its target and the target's axes."""
    for one in instances(mapping):
        for name, axes in one.targets:
            yield key_of(name.text, one.sources[0].text, one.rule.when), one, name, axes


def _sizes(mapping: MappingFile, free: Mapping[str, int]) -> dict[str, int]:
    """Sizes that follow from the free ones, independent of a configuration."""
    sizes: dict[str, int] = dict(free)
    for axis, expression in mapping.dims.items():
        if axis not in sizes and isinstance(value := render_known(expression, sizes), int):
            sizes[axis] = value
    return sizes


def _entry(one: Instance, target: Pattern, axes: Axes, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A rule's facts about a target, and the order of elements on one rank."""
    rule = one.rule
    told: dict[str, Any] = {"axes": f"{one.axes} → {axes}" if one.axes != axes else str(axes)}
    told["split"] = (
        " ".join(axis for axis in rule.split if axis in (*one.axes.names(), *one.axis_names, *STORED)) or "no"
    )
    if rule.stage is not None:
        told["stage"] = rule.stage
    try:
        shapes = (" × ".join(str(extent(dim, sizes)) for dim in both.dims) or "1" for both in (one.axes, axes))
        told["shape"] = " → ".join(shapes)
        told["order"] = _order([(a, b, copy) for name, a, b, copy in moves_of(one, sizes) if name == target])
    except KeyError as error:
        told["order"] = f"not known: axis {error} has no size"
    more = {
        "also read as": [source.text for source in one.sources[1:]],
        "also read in pieces": [part.text for part in one.parts],
        "changed": rule.transform and said(rule.transform) + _under(rule.transform_when),
        "dropped": sorted(rule.drop),
        "written as zeros": sorted(rule.zeros),
        "own dtype": rule.keep_dtype,
        "optional": rule.optional,
        "tied to": rule.tied_to,
    }
    return told | {name: fact for name, fact in more.items() if fact}


def _under(when: Mapping[str, Sequence[str]]) -> str:
    """Choices in parentheses, to append; nothing if there are none."""
    told = ", ".join(f"{name}={'|'.join(allowed)}" for name, allowed in sorted(when.items()))
    return f" ({told})" if told else ""


def small_cases(layout: Layout) -> list[Case]:
    """The cases to describe: all of the first mode, and one of each other mode."""
    found: list[Case] = []
    for case in cases(layout):
        first = not found or case.mode == found[0].mode
        plain = all(value is not True for value in case.settings.values())
        if plain and (first or all(case.mode != one.mode for one in found)):
            found.append(case)
    return found


def key_of(target: str, source: str, when: Mapping[str, Sequence[str]]) -> str:
    """The name of an entry: `model.norm.weight ← norm.weight`, with choices if it depends on them."""
    return f"{target} ← {source}{_under(when)}"


def _covering(mapping: MappingFile, worlds: Worlds, free: Mapping[str, int], listed: Sequence[Case]) -> Iterator[World]:
    """A few worlds, found by a greedy search, that together make every rule active in every mode that writes it."""
    every: list[tuple[Mapping[str, str], set[tuple[str, str]]]] = []
    for choices in (choices for choices, most in combinations_of(mapping) if most):
        modes = {case.mode for case in listed if case.takes(choices)}
        used = worlds.used(choices, most=True) if modes else None
        every.append((choices, {(one.key, mode) for one in used or () for mode in modes}))
    left = {pair for _, pairs in every for pair in pairs}
    while every:
        choices, pairs = max(every, key=lambda one: len(one[1] & left))
        if not pairs & left:
            return
        left -= pairs
        world = worlds.make(choices, free)
        if world is not None:
            yield world


def _first_tensors(mapping: MappingFile, world: World) -> dict[tuple[str, str], str]:
    """Source pattern, and name of the target's first tensor (0 for every placeholder) → entry."""
    active = (entry for entry in _targets(mapping) if entry[1].rule.active(world.choices))
    return {(one.sources[0].text, name.sample()): key for key, one, name, _ in active}


Held = list[tuple[Coordinates, str, tuple[int, ...], list[Copy]]]


def _held(plan: Plan, known: Mapping[tuple[str, str], str]) -> dict[str, Held]:
    """Entry → rank, file pattern, shape of the target, copies into it."""
    assert plan.written is not None
    found: dict[str, Held] = defaultdict(list)
    for file, shard in zip(plan.written.files, plan.shards, strict=True):
        rank = tuple((dim, file.ranks[dim]) for dim in plan.written.sizes if dim in file.ranks)
        for index in shard.outputs:
            output = plan.outputs[index]
            by_source = grouped((copy.source, swap(copy)) for copy in plan.copies(index))
            for header, copies in ((plan.sources[number].header, held) for number, held in by_source.items()):
                if (key := known.get((output.pattern, header.name))) is not None:
                    found[key].append((rank, file.pattern.name, header.shape, copies))
    return found


def _order(moves: Sequence[tuple[str, str, Copy]]) -> str | list[str]:
    """The order of elements in a target's first tensor; several source tensors may fill it."""
    first = min((target for _, target, _ in moves), default="")
    listed = [(source, copy) for source, target, copy in moves if target == first]
    names = list(dict.fromkeys(source for source, _ in listed))
    copies = [copy._replace(source=names.index(source)) for source, copy in listed]
    labels = [(("tensor", n),) if len(names) > 1 else () for n in range(len(names))]
    told = copy_texts(copies, labels, [""] * len(names))
    return told[0] if len(told) == 1 else told


def _ranks(held: Held, plan: Plan) -> str:
    """The elements of the target on each rank: `tp0 [0:24, :]; tp1 [24:48, :]`."""
    assert plan.written is not None
    dims = [dim for dim, count in plan.written.sizes.items() if count > 1]
    files = [file for file in plan.written.files if any(file.pattern.name == one[1] for one in held)]
    ranks = (tuple((dim, file.ranks[dim]) for dim in dims if dim in file.ranks) for file in files)
    masks = {rank: np.zeros(held[0][2], bool) for rank in ranks}
    for rank, _, _, copies in held:
        mask = masks[tuple((dim, number) for dim, number in rank if dim in dims)].reshape(-1)
        for copy in copies:
            mask[strided(copy.shape, copy.target_offset, copy.target_strides)] = True
    told = {at: _box(mask) if mask.any() else "" for at, mask in masks.items()}
    while fewer := [less for dim in dims if (less := _without(told, dim))]:
        told = min(fewer, key=len)
    return "; ".join(f"{' '.join(f'{d}{n}' for d, n in at)} {box}".strip() for at, box in told.items() if box)


def _without(told: Mapping[Coordinates, str], dim: str) -> dict[Coordinates, str] | None:
    """Drop a rank dimension if ranks that differ only in it hold the same; None if they do not."""
    found: dict[Coordinates, str] = {}
    for at, box in told.items():
        rest = tuple(one for one in at if one[0] != dim)
        if rest == at or found.setdefault(rest, box) != box:
            return None
    return found


def _box(mask: np.ndarray) -> str:
    """A set of elements as ranges along each dimension, or as ranges of flat indices."""
    if mask.all():
        return "all"
    along = [mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)) for axis in range(mask.ndim)]
    whole = np.ones(mask.shape, bool)
    for axis, held in enumerate(along):
        whole &= held.reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
    if not (whole == mask).all():
        return f"elements {_ranges(mask.ravel())}"
    return f"[{', '.join(':' if held.all() else _ranges(held) for held in along)}]"


def _ranges(held: Any) -> str:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], held.astype(np.int8), [0]))))
    return "+".join(f"{int(low)}:{int(high)}" for low, high in edges.reshape(-1, 2))


def _stages(plan: Plan) -> str:
    """The layers of each stage, in order."""
    stages = plan.stages
    alone = stages.chunks == 1 and not stages.dims
    listed = sorted(stages.starts.items(), key=lambda one: one[1])
    told = ((f"{start}:{start + stages.counts[one]}", stages.name(one)) for one, start in listed)
    return ", ".join(layers if alone else f"{layers} at {name}" for layers, name in told)


_KEY = re.compile(r"(.*) ← (.*?)(?: \((.*)\))?")


def parts_of(key: str) -> tuple[str, str, str]:
    """Target, source and choices of an entry.

    >>> parts_of("lm_head.weight ← output.weight (head=plain)")
    ('lm_head.weight', 'output.weight', 'head=plain')
    """
    found = _KEY.fullmatch(key)
    return (key, "", "") if found is None else (found[1], found[2], found[3] or "")
