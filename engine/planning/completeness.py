"""Completeness: every axis has a size, every rule its tensor for each layer and expert, on each rank with a slice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise, product

from engine.checkpoint.ranks import RankFile, RankGrid, counts_of, index_dims, points, rank_dims, sizes_in
from engine.errors import EngineError, Place, first_of
from engine.language.documents import grouped
from engine.language.model import Layout
from engine.language.names import pattern
from engine.planning.attempts import Attempt, Checkpoint
from engine.planning.groups import Group
from engine.planning.stored import Instance, at_end


def used_rules(
    attempt: Attempt, rules: Sequence[Instance], checkpoint: Checkpoint, *, each: bool = True
) -> tuple[Instance, ...]:
    """The rules whose tensors all exist in the checkpoint that is read.

    Args:
        rules: the active rules.
        each: whether to check every layer and expert, which needs all sizes.

    Raises:
        EngineError: E207 for a rule that is not optional and has no tensors or only some; names the first missing one.
    """
    found = grouped((group.instance.key, group) for group in attempt.groups.values())
    other = checkpoint.grid.unknown if checkpoint.end == "whole" else ()
    unlisted = f"; not read, as the index does not name them: {first_of(other, 4)}" if other else ""
    used: list[Instance] = []
    sizes = attempt.sizes.values()
    for rule in rules:
        held = at_end([rule], checkpoint.end)
        lacking = next((one for one in held if one.key not in found), None)
        if lacking is None:
            used.append(rule)
            for one in held if each else ():
                _check_each(one, found[one.key], attempt, sizes, unlisted)
        elif any(one.key in found for one in held) or not (rule.param == "bias" or rule.rule.optional):
            raise EngineError(
                "E207",
                f"rule `{rule.rule.name}` matches no tensor",
                place=rule.rule.place,
                got=f"no tensor named {' or '.join(s.text for s in lacking.sources)} in {checkpoint.folder}{unlisted}",
                expected="one for every layer",
                fix="Is it the mapping for this checkpoint, and are the variants right? "
                "`engine inspect` shows which fit. Mark a rule that may be absent as `optional: true`.",
            )
    return tuple(used)


def _check_each(
    one: Instance, groups: Sequence[Group], attempt: Attempt, sizes: Mapping[str, int], unlisted: str
) -> None:
    """E207 for the first layer or expert without a tensor that others have."""
    there = groups[0].fixed
    for values in points([sizes[axis] for axis in one.axis_names]):
        fixed = dict(zip(one.axis_names, values, strict=True))
        if (one.key, *(fixed[axis] for axis in there)) not in attempt.groups:
            where = ", ".join(f"{a} {v}" for a, v in fixed.items())
            raise EngineError(
                "E207",
                f"a tensor that a rule needs is missing: {one.sources[0].format(fixed)}",
                place=one.rule.place,
                got=(f"nothing for {where}" if where else "no such tensor") + unlisted,
                expected="one for each, as for " + ", ".join(f"{a} {v}" for a, v in there.items()),
                fix="A rule needs its tensors for all layers and experts; a mapping cannot say that only some layers "
                "have them. If two stages of an expert checkpoint wrote the same file number, that layer was lost at "
                "saving.",
            )


def check_slices(attempt: Attempt, checkpoint: Checkpoint, layout: Layout) -> None:
    """E207 for the first tensor that lacks a slice on some rank, or a copy on some rank that should hold one."""
    holding: dict[tuple[str, ...], dict[tuple[int, ...], list[RankFile]]] = {}
    grid = checkpoint.grid
    said = {**counts_of(layout, grid.sizes), "training": checkpoint.training}
    patterns = {file.pattern.name: file.pattern for file in grid.files}
    sizes = {name: sizes_in(file, grid, said) for name, file in patterns.items()}
    whole: set[tuple[object, ...]] = set()  # what was found complete: most layers are cut alike, over the same files
    for group in attempt.groups.values():
        if group.cut.pieces > 1:
            _check_order(group, grid)
        files = tuple([tuple([one.file for one in each]) for each in group.shards.values()])
        alike = group.cut, tuple(group.fixed), files
        if alike in whole:
            continue
        whole.add(alike)
        if group.cut.lone:
            _check_lone(group, checkpoint, layout.lone_rank)
        dims = group.cut.rank_dims()
        if group.cut.recorded:
            dims = dims[:-1]  # recorded rows are known to be complete
        # Each rank is in as many shards as it saved the tensor in pieces.
        held = Counter(
            ranks for each in files for ranks in {tuple([grid.files[number].ranks[d] for d in dims]) for number in each}
        )
        file = grid.files[group.first.file]
        most = [1 + max(ranks) for ranks in zip(*held, strict=True)]  # of numbers in names
        known = sizes[file.pattern.name]
        wanted = list(product(*(range(known.get(d, there)) for d, there in zip(dims, most, strict=True))))
        full = {ranks for ranks, count in held.items() if count >= group.cut.pieces}
        missing = next((ranks for ranks in wanted if ranks not in full), None)
        if missing is not None:
            lacks = dict(zip(dims, missing, strict=True))
            name = pattern(file.pattern.name).format({**file.ranks, **lacks})
            exists = any(f.name == name for f in grid.files)
            raise EngineError(
                "E207",
                f"tensor `{group.name}` is missing on rank {', '.join(f'{d}{r}' for d, r in lacks.items())}",
                place=group.instance.rule.place,
                got=f"{len(full)} of {len(wanted)} slices; one is {group.first.header.name} in {file.name}",
                expected=f"a slice on every rank of {' and '.join(dims)}",
                fix=f"`{name}` is from another run or damaged."
                if exists
                else f"Copy `{name}` from the training run; it is not in the folder.",
            )
        if not group.cut.lone and not group.cut.recorded:
            _check_alike(group, grid, layout, holding)


def _check_order(group: Group, grid: RankGrid) -> None:
    """E208 for pieces of one linear that are stored end to end, as torch saves views, but in another order."""
    for held in grouped((ranks[:-1], stored[0]) for ranks, stored in group.shards.items()).values():
        placed = sorted(held, key=lambda one: one.header.offset)
        joined = all(
            one.file == after.file and one.header.offset + one.header.nbytes == after.header.offset
            for one, after in pairwise(placed)
        )
        if joined and placed != held:
            file = grid.files[held[0].file].name
            raise EngineError(
                "E208",
                f"pieces of `{group.instance.sources[0].text}` have exchanged names",
                place=Place(file, tensor=held[0].header.name),
                got="one after the other in the file: " + ", ".join(one.name for one in placed),
                expected=", ".join(one.name for one in held),
                fix="Training saved them in the order of the rows of one linear; copy the file again.",
            )


def _check_alike(
    group: Group, grid: RankGrid, layout: Layout, holding: dict[tuple[str, ...], dict[tuple[int, ...], list[RankFile]]]
) -> None:
    """Check that every rank that should have a copy of a slice has one.

    Args:
        holding: cache: rank dimensions that distinguish slices, stages and experts → ranks → files.
    """
    of = grid.files[group.first.file].pattern
    if of.number is not None or any("recorded" in cuts.values() for cuts in of.cuts.values()):
        return  # one file per expert; or ranks that record what they hold
    indexed = (dim for axis in group.fixed if axis in layout.indices for dim in index_dims(layout, axis))
    dims = tuple(dim for dim in (*group.cut.rank_dims(), *grid.staged, *indexed) if dim in rank_dims(of))
    if (of.name, *dims) not in holding:
        alike = (file for file in grid.files if file.pattern.name == of.name)
        holding[(of.name, *dims)] = grouped((tuple(file.ranks[d] for d in dims), file) for file in alike)
    for stored in group.shards.values():
        held = {grid.files[one.file].name for one in stored}
        places = {tuple(grid.files[one.file].ranks[d] for d in dims) for one in stored}
        files = [file for ranks in places for file in holding[(of.name, *dims)][ranks]]
        if len(held) < len(files):
            lacks = next(file.name for file in files if file.name not in held)
            raise EngineError(
                "E207",
                f"tensor `{group.name}` is missing in {lacks}",
                place=group.instance.rule.place,
                got=f"a copy in {len(held)} of {len(files)} files, as in {min(held)}",
                expected="an equal copy in each of them",
                fix=f"`{lacks}` is from another run or damaged; copy it again.",
            )


def _check_lone(group: Group, checkpoint: Checkpoint, lone_rank: Mapping[str, int]) -> None:
    """Check that a tensor that only one rank should hold is on that rank: other ranks' files look alike."""
    stored = [one for shard in group.shards.values() for one in shard]
    for dim, rank in lone_rank.items():
        held = {checkpoint.grid.files[one.file].ranks.get(dim, rank) for one in stored}
        if rank not in held:
            raise EngineError(
                "E207",
                f"tensor `{stored[0].name}` is missing on rank {dim}{rank}, the only one that should have it",
                place=group.instance.rule.place,
                got=f"it is in {checkpoint.grid.files[stored[0].file].name}",
                expected=f"in a file of {dim}{rank}",
                fix="Files were renamed or exchanged, or are from another run; copy the folder again.",
            )


def check_repeated(attempt: Attempt, checkpoint: Checkpoint) -> None:
    """E203 when an axis has fewer elements than ranks it is cut over: each is stored several times."""
    for group in attempt.groups.values():
        for dim, axis in group.cut.dims:
            ranks, known = checkpoint.grid.sizes.get(dim, 1), attempt.sizes.facts.get(axis)
            if known is None or known.value >= ranks:
                continue
            if known.value < 1:
                continue  # reported as a contradiction
            times = ranks / known.value
            raise EngineError(
                "E203",
                f"axis `{axis}` is cut over more {dim} ranks than it has elements",
                place=group.instance.rule.place,
                got=f"{ranks} {dim} ranks hold {group.name}",
                expected=f"at most {known.value}, from {known.why}: each is stored {times:g} times",
                fix="Neighbouring ranks may repeat whole heads if these are equal, and here they are not. If the "
                f"configuration is this model's, save it with at most {known.value} {dim} ranks.",
            )


def check_known(used: Sequence[Instance], sizes: Mapping[str, int], unread: Mapping[str, EngineError]) -> None:
    """E204 for the first axis with an unknown size, or the error that kept it from being computed."""
    for one in used:
        for axis in (*one.axis_names, *one.axes.names()):
            if axis not in sizes:
                raise unread.get(axis) or EngineError(
                    "E204",
                    f"the size of axis `{axis}` stays unknown",
                    place=one.rule.place,
                    fix="Give it in `dims`, or write the axes of a tensor that determines it.",
                )
