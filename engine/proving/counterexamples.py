"""Counter-examples in words: elements that two tensors claim, or that none claims.

Computed only from the rules, element by element at tiny sizes, independently of the planner: each
rule's source and target regions give positions, and every position must occur exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod

import numpy as np

from engine.errors import EngineError
from engine.formats.headers import dense_strides
from engine.language.axes import Axes, extent
from engine.language.model import MappingFile
from engine.language.names import Pattern
from engine.planning.boxes import Copy, Holding, Region, intersect, regions
from engine.planning.stored import Instance, instances
from engine.proving.proof import Failure
from engine.proving.tiny import choices_text, guess_sizes, settle

# A claim on a tensor: its positions, and the tensor and positions that they are paired with.
Claim = tuple["np.ndarray", str, "np.ndarray"]


def counter_examples(mapping: MappingFile, combinations: Sequence[Mapping[str, str]]) -> list[Failure]:
    """The first element of each pair of tensors that is claimed twice or not at all, under any of these choices."""
    free = guess_sizes(mapping)
    found: dict[str, Failure] = {}
    for choices in combinations:
        active = [one for one in instances(mapping) if one.rule.active(choices)]
        try:
            sizes, _ = settle(mapping, choices, active, free)
            told = list(_unpaired(active, sizes))
        except (EngineError, KeyError):
            continue
        for message, place in told:
            found.setdefault(message, Failure(message, place, choices_text(choices) or None))
    return list(found.values())


def _unpaired(active: Sequence[Instance], sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, list[Claim]] = {}
    targets: dict[str, list[Claim]] = {}
    places: dict[str, str] = {}
    for instance in active:
        for name, axes in [(instance.sources[0], instance.axes), *instance.targets]:
            for called, shape, _ in _tensors(name, axes, sizes):
                shapes[called] = max(shapes.get(called, shape), shape, key=prod)  # of two rules
                places.setdefault(called, str(instance.rule.place))
                (sources if name is instance.sources[0] else targets).setdefault(called, [])
        for called, _, held in _tensors(instance.sources[0], instance.axes, sizes):
            sources[called] += _dropped(instance, held)
        for _, called, target, copy in moves_of(instance, sizes):
            at, to = positions(copy)
            sources[called].append((at, target, to))
            targets[target].append((to, called, at))
    yield from _told(targets, shapes, places, "comes from", "comes from nowhere")
    yield from _told(sources, shapes, places, "goes to", "goes nowhere")


def _tensors(
    name: Pattern, axes: Axes, sizes: Mapping[str, int]
) -> Iterator[tuple[str, tuple[int, ...], list[Region]]]:
    """(name, shape, regions) of every tensor of a pattern, only of the first layer."""
    shape = tuple(extent(dim, sizes) for dim in axes.dims)
    counts = [range(1 if p == "layer" else sizes[p]) for p in name.placeholders]
    for values in product(*counts):
        fixed = dict(zip(name.placeholders, values, strict=True))
        yield name.format(fixed), shape, regions(axes, sizes, dense_strides(shape), fixed=fixed)


def _copies(held: Sequence[Region], others: Sequence[Region]) -> Iterator[Copy]:
    for one in held:
        for other in others:
            if one.piece == other.piece:
                copy = intersect(Holding(0, one), Holding(0, other))
                if copy is not None:
                    yield copy


def moves_of(instance: Instance, sizes: Mapping[str, int]) -> Iterator[tuple[Pattern, str, str, Copy]]:
    """(target pattern, source name, target name, copy) of one rule's tensors, only of the first layer."""
    for called, _, held in _tensors(instance.sources[0], instance.axes, sizes):
        for name, axes in instance.targets:
            for target, _, others in _tensors(name, axes, sizes):
                copies = sorted(_copies(held, others), key=lambda copy: copy.target_offset)
                yield from ((name, called, target, copy) for copy in copies)


def _dropped(instance: Instance, held: Sequence[Region]) -> Iterator[Claim]:
    """Claims for the pieces that a rule drops on purpose."""
    for region in held:
        if any(axis in region.box for axis in instance.rule.drop):
            for copy in _copies([region], [region]):
                at, to = positions(copy)
                yield at, "", to


def positions(copy: Copy) -> tuple[np.ndarray, np.ndarray]:
    """The flat positions that a copy pairs: in the source, and in the target."""
    at, to = (copy.source_offset, copy.source_strides), (copy.target_offset, copy.target_strides)
    return strided(copy.shape, *at), strided(copy.shape, *to)


def strided(shape: Sequence[int], offset: int, strides: Sequence[int]) -> np.ndarray:
    """The flat positions of a strided part."""
    at = np.array([offset])
    for size, step in zip(shape, strides, strict=True):
        at = (at[:, None] + np.arange(size) * step).ravel()
    return at


def _told(
    claims: Mapping[str, list[Claim]],
    shapes: Mapping[str, tuple[int, ...]],
    places: Mapping[str, str],
    verb: str,
    nowhere: str,
) -> Iterator[tuple[str, str]]:
    def element(name: str, position: int) -> str:
        return f"{name}[{','.join(str(int(i)) for i in np.unravel_index(position, shapes[name]))}]"

    for name, held in claims.items():
        count = int(np.prod(shapes[name]))
        seen = np.zeros(count, np.int64)
        for at, _, _ in held:
            np.add.at(seen, at, 1)
        if (seen == 0).any():
            yield f"{element(name, int(np.flatnonzero(seen == 0)[0]))} {nowhere}", places[name]
        if (seen > 1).any():
            # The last one, as an index of zeros says little.
            position = int(np.flatnonzero(seen > 1)[-1])
            both = [element(other, int(to[at == position][0])) for at, other, to in held if other and position in at]
            if verb == "goes to":
                told = f"{both[0]} comes from {element(name, position)}, which {' and '.join(both[1:])} claims too"
            else:
                told = f"{element(name, position)} comes from {' and from '.join(both)}"
            yield told, places[name]
