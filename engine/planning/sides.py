"""Sides: the tensors of a plan's source or target, and where each holds the pieces of the rules.

Both sides are groups of shards: rank files are groups that a layout cuts, a Hugging Face
checkpoint is groups of one whole shard each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, product

from engine.planning.boxes import Interval, Region, regions
from engine.planning.groups import Group, GroupKey
from engine.planning.pieces import Key, Pieces
from engine.planning.sizes import extents
from engine.planning.stored import End, Instance, Stored

Holding = dict[tuple[int, ...], list[tuple[int, ...]]]
Keys = Mapping[tuple[str, frozenset[str]], Key]  # (instance, piece) → the piece's name on both sides


def keys_at(end: End, used: Iterable[Instance], pieces: Pieces) -> Keys:
    """The keys of a side's pieces. A dropped training piece has no target: its rule and parameter name it."""
    if end == "whole":
        targets = (spec.own for spec in pieces.targets.values())
        return {(one.key, piece): (one.key, piece) for one in targets for piece in one.pieces}
    keys = dict(pieces.by_source)
    for instance in used:
        for piece in instance.pieces:
            keys.setdefault((instance.key, piece), (f"{instance.rule.name}.{instance.param}", piece))
    return keys


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a group: its replicas and their place in the whole tensor.

    Attributes:
        ranks: its key in the group.
        sizes: extent of every axis as stored.
        starts: global index of the first stored element of each cut axis.
        window: the interval that it holds of each storage dimension, in the tensor that remains after cutting axes.
    """

    ranks: tuple[int, ...]
    replicas: tuple[Stored, ...]
    sizes: Mapping[str, int]
    starts: Mapping[str, int]
    window: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """Groups of shards with a number for every tensor, in the order of the groups.

    Attributes:
        keys: (instance, piece) → key; pieces of equal keys on two sides are the same elements.
        sizes: the size of every axis.
        stored: every tensor, by its number.
    """

    groups: tuple[Group, ...]
    keys: Keys
    sizes: Mapping[str, int]
    stored: tuple[Stored, ...] = field(init=False, compare=False, repr=False)
    _groups: Mapping[GroupKey, tuple[Group, int]] = field(init=False, compare=False, repr=False)
    _owners: Mapping[Key, tuple[str, tuple[str, ...]]] = field(init=False, compare=False, repr=False)
    # for a group with recorded boxes: values of some axes → the shards that hold such elements
    _holding: dict[tuple[GroupKey, tuple[str, ...]], Holding] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        stored: list[Stored] = []
        groups: dict[GroupKey, tuple[Group, int]] = {}
        orders: dict[str, tuple[str, ...]] = {}
        for group in self.groups:
            groups[group.key] = group, len(stored)
            orders[group.instance.key] = tuple(group.fixed)
            for replicas in group.shards.values():
                stored.extend(replicas)
        owners = {key: (owner, orders[owner]) for (owner, _), key in self.keys.items() if owner in orders}
        for name, value in (("stored", tuple(stored)), ("_groups", groups), ("_owners", owners)):
            object.__setattr__(self, name, value)

    def numbers(self, group: Group) -> Iterator[range]:
        """The numbers of each shard's replicas."""
        whole, first = self._groups[group.key]
        for ranks, replicas in whole.shards.items():
            if whole is group or ranks in group.shards:
                yield range(first, first + len(replicas))
            first += len(replicas)

    def reaching(self, group: Group, other: Side) -> list[Group]:
        """Groups of this side that hold pieces of a group of the other side, without shards that hold none of it."""
        result: dict[GroupKey, Group] = {}
        for piece in group.instance.pieces:
            owner = self._owners.get(other.keys[group.instance.key, piece])
            if owner is None:
                continue
            ranges = [[group.fixed[a]] if a in group.fixed else range(self.sizes[a]) for a in owner[1]]
            for values in product(*ranges):
                key: GroupKey = (owner[0], *values)
                result[key] = self._narrowed(self._groups[key][0], group.fixed)
        return [one for one in result.values() if one.shards]

    def _narrowed(self, group: Group, fixed: Mapping[str, int]) -> Group:
        """A group with only those shards whose recorded boxes hold elements with given indices.

        This avoids searching all of a checkpoint with stacked layers for each layer.
        """
        axes = tuple(axis for axis in group.instance.axes.names() if axis in fixed)
        if not axes or not group.cut.boxes or len(group.shards) == 1:
            return group
        holding = self._holding.get((group.key, axes))
        if holding is None:
            holding = self._holding[group.key, axes] = {}
            for ranks, held in zip(group.shards, self.place(group), strict=True):
                boxes = [[range(*region.box.get(axis, (0, 1))) for axis in axes] for _, region in held]
                for values in dict.fromkeys(values for box in boxes for values in product(*box)):
                    holding.setdefault(values, []).append(ranks)
        kept = holding.get(tuple(fixed[axis] for axis in axes), ())
        return replace(group, shards={ranks: group.shards[ranks] for ranks in kept})

    def place(self, group: Group) -> list[list[tuple[Key, Region]]]:
        """The regions of each shard."""
        placed: list[list[tuple[Key, Region]]] = []
        for shard in self.shards(group):
            found = regions(
                group.instance.axes,
                shard.sizes,
                shard.replicas[0].header.strides,
                window=shard.window,
                starts=shard.starts,
                fixed=group.fixed,
            )
            placed.append([(self.keys[group.instance.key, region.piece], region) for region in found])
        return placed

    def shards(self, group: Group) -> list[Shard]:
        """The place of each shard in the whole tensor: offsets are running sums over the ranks before."""
        local = extents(group, self.sizes)
        starts = {axis: _running(by_rank) for axis, by_rank in local.items()}
        row = 0
        result: list[Shard] = []
        for ranks, replicas in group.shards.items():
            sizes, begin = dict(self.sizes), {}
            for axis, position in group.cut.axes.items():
                sizes[axis] = local[axis][ranks[position]]
                begin[axis] = starts[axis][ranks[position]]
            header = replicas[0].header
            first = header.starts
            if group.cut.by_rows:
                at = group.cut.at
                first, row = (*first[:at], row, *first[at + 1 :]), row + header.shape[at]
            window = tuple((low, low + size) for low, size in zip(first, header.shape, strict=True))
            result.append(Shard(ranks, replicas, sizes, begin, window))
        return result


def _running(by_rank: Mapping[int, int]) -> dict[int, int]:
    """For each rank, the sum over the ranks before it."""
    ranks = sorted(by_rank)
    return dict(zip(ranks, accumulate((by_rank[rank] for rank in ranks), initial=0), strict=False))
