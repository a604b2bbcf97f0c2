"""Recorded boxes: shards that record which box of a larger tensor they hold.

If a layout has ranks, the record is checked against their order: trusting only the record would accept a file of
another run; trusting only the order, a renamed file. If files do not name ranks, the boxes must make up the tensor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod

from engine.checkpoint.ranks import RankFile
from engine.errors import EngineError, Place, shape_text
from engine.language.documents import grouped
from engine.planning.stored import Stored

_MOST_STEPS = 1 << 24  # a hundred thousand boxes in a grid take a few steps each

Ranks = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # an interval of each dimension
Shards = Mapping[Ranks, tuple[Stored, ...]]


def fold_replicas(shards: Shards, files: Sequence[RankFile]) -> dict[Ranks, tuple[Stored, ...]]:
    """Group shards that hold the same rows; shards without rows are left out.

    Ranks along the last coordinate hold consecutive rows. When all rows are complete, the next rank
    starts again: each of several groups of ranks cuts the tensor. Four ranks in two groups, over
    five rows, become two shards of two replicas:

        rank 0: 0..3   rank 1: 3..5   rank 2: 0..3   rank 3: 3..5   →   (0,): ranks 0, 2   (1,): ranks 1, 3

    Raises:
        EngineError: E208 when the recorded rows do not follow each other in the order of ranks.
    """
    lines = grouped((ranks[:-1], shards[ranks]) for ranks in sorted(shards))
    result: dict[Ranks, tuple[Stored, ...]] = {}
    for others, line in lines.items():
        rows, end, position = line[0][0].header.whole[0], 0, 0
        for held in line:
            if end == rows and any(one.header.shape[0] for one in held):
                end = position = 0
            for one in held:
                begin = (end, *(0,) * len(one.header.shape[1:]))
                if one.header.starts != begin or one.header.shape != held[0].header.shape:
                    raise _out_of_order(one, files, end)
            end += held[0].header.shape[0]
            if held[0].header.shape[0]:
                result[*others, position] = (*result.get((*others, position), ()), *held)
                position += 1
        if end != rows:
            raise _out_of_order(line[-1][0], files, end)
    return result


def by_boxes(held: Sequence[Stored], files: Sequence[RankFile]) -> dict[Ranks, tuple[Stored, ...]]:
    """Shards by the starts of their boxes: equal boxes are replicas, empty ones are left out.

    Raises:
        EngineError: E208 for the first box that no shard holds, or that two shards partly hold.
    """
    if len(held) == 1 and held[0].header.recorded is None:  # as in a checkpoint without ranks
        return {held[0].header.starts: (held[0],)}
    whole = held[0].header.whole
    found: dict[Box, list[Stored]] = {}
    for one in held:
        header = one.header
        box = tuple((low, low + size) for low, size in zip(header.starts, header.shape, strict=True))
        if header.whole != whole or any(low < 0 or high > size for (low, high), size in zip(box, whole, strict=True)):
            raise _bad_box(
                one,
                files,
                f"{box_text(box)} of {shape_text(header.whole)}",
                f"a box of {shape_text(whole)}, as in other files",
            )
        if prod(header.shape) or not prod(whole):
            found.setdefault(box, []).append(one)
    boxes = sorted(found)
    fault = first_fault(boxes, whole) if prod(whole) else None
    if fault is not None:
        missing, sharing = fault
        one = found[sharing[0]][0] if sharing else held[0]
        got = " and ".join(f"{box_text(b)} in {files[found[b][0].file].name}" for b in sharing)
        if len(sharing) == 1:
            got = f"{len(boxes)} boxes that cross each other in more ways than can be looked at"
        raise _bad_box(
            one,
            files,
            got or f"no shard holds {box_text(missing)} of {shape_text(whole)}",
            f"one shard for {box_text(missing)}" if sharing else f"{shape_text(whole)}, every element in one shard",
        )
    return {tuple(low for low, _ in box): tuple(found[box]) for box in boxes}


def first_fault(boxes: Sequence[Box], whole: Sequence[int]) -> tuple[Box, tuple[Box, ...]] | None:
    """The first box of a tensor, in the order of its elements, that is not held by exactly one of the given boxes.

    Returns:
        The box, and the two boxes that share it, or none if none holds it; None when the boxes make up the whole. One
        box means unknown: the boxes intersect in so many ways that checking takes too long.

    >>> first_fault([((0, 2), (0, 3)), ((2, 4), (0, 1)), ((2, 4), (1, 3))], (4, 3))
    >>> first_fault([((0, 2), (0, 3)), ((2, 4), (1, 3))], (4, 3))
    (((2, 4), (0, 1)), ())
    >>> first_fault([((0, 3), (0, 3)), ((2, 4), (0, 3))], (4, 3))
    (((2, 3), (0, 3)), (((0, 3), (0, 3)), ((2, 4), (0, 3))))
    """

    steps = 0

    def look(held: Sequence[Box], dim: int) -> tuple[Box, tuple[Box, ...]] | None:
        nonlocal steps
        if dim == len(whole) or not held:
            around = tuple((0, size) for size in whole[dim:])
            return None if len(held) == 1 else (around, tuple(held[:2]))
        edges = sorted({0, whole[dim], *(edge for box in held for edge in box[dim])})
        slabs: list[list[Box]] = [[] for _ in edges[1:]]  # for each interval between two edges, the boxes that reach it
        reached = [range(bisect_left(edges, box[dim][0]), bisect_left(edges, box[dim][1])) for box in held]
        steps += sum(map(len, reached))
        if steps > _MOST_STEPS:
            return tuple((0, size) for size in whole[dim:]), tuple(held[:1])
        for box, indices in zip(held, reached, strict=True):
            for index in indices:
                slabs[index].append(box)
        for interval, slab in zip(pairwise(edges), slabs, strict=True):
            fault = look(slab, dim + 1)
            if fault is not None:
                return (interval, *fault[0]), fault[1]
        return None

    return look(boxes, 0)


def box_text(box: Box) -> str:
    """A box as text: `[0:65, 32:64]`."""
    return f"[{', '.join(f'{low}:{high}' for low, high in box)}]"


def _bad_box(one: Stored, files: Sequence[RankFile], got: str, expected: str) -> EngineError:
    return EngineError(
        "E208",
        f"the shards of `{one.name}` do not make up the tensor",
        place=Place(files[one.file].name, tensor=one.header.name),
        got=got,
        expected=expected,
        fix="A file is missing, damaged or from another run: copy the checkpoint again. Holes are never filled.",
    )


def _out_of_order(one: Stored, files: Sequence[RankFile], end: int) -> EngineError:
    first, count, rows = one.header.starts[0], one.header.shape[0], one.header.whole[0]
    return EngineError(
        "E208",
        f"shards of `{one.name}` do not follow each other in the order of ranks",
        place=Place(files[one.file].name, tensor=one.header.name),
        got=f"rows {first} to {first + count} of {rows}, by the shard's own record",
        expected=f"rows from {end} on, where the rank before ends" if first != end else f"all {rows} rows on some rank",
        fix="Files were renamed, are missing at the end, or are from another run: copy them again.",
    )


def unlike_record(one: Stored, file: RankFile) -> EngineError:
    """E303 for a shard in files whose mode cuts by rank, or for a tensor that only some files shard."""
    sharded = one.header.recorded is not None
    return EngineError(
        "E303",
        f"`{one.name}` is {'a shard' if sharded else 'no shard'}, unlike what its file's name or other ranks say",
        place=Place(file.name, tensor=one.header.name),
        got="a ShardedTensor, as FSDP saves it" if sharded else "a plain tensor",
        expected=f"plain tensors in `{file.pattern.name}`, or the same on every rank",
        fix="The file was renamed or is from another run: FSDP's files keep their names, `_dp` and a number.",
    )
