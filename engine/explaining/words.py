"""Axes in words: what a tensor's dimensions mean, how training cuts them, what a slice covers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.errors import span
from engine.explaining.describe import fold
from engine.explaining.links import Lattice, Link, Spot, index_text, words
from engine.language.axes import Axis, leaves
from engine.language.documents import grouped
from engine.planning.boxes import Interval
from engine.planning.groups import Group
from engine.planning.recorded import box_text
from engine.planning.sides import Shard, Side
from engine.planning.stages import Stages

MOST_ORDERED = 100_000  # positions that are examined one by one


def named(dim: int, dims: int, positions: str) -> str:
    """
    >>> named(0, 2, "0…3"), named(1, 2, "3"), named(0, 1, "0…3"), named(2, 3, "3")
    ('rows 0…3', 'column 3', 'elements 0…3', 'dimension 2 3')
    """
    name = "elements" if dims == 1 else ("rows", "columns")[dim] if dims == 2 else f"dimension {dim}"
    return f"{name.removesuffix('s') if positions.isdecimal() else name} {positions}"


def slice_text(window: Sequence[Interval], shape: Sequence[int]) -> str:
    """
    >>> slice_text([(0, 128), (0, 64)], [256, 64]), slice_text([(17, 18), (3, 4)], [32, 32])
    ('[0:128, :]', '[17, 3]')
    """
    parts = []
    for (low, high), size in zip(window, shape, strict=True):
        if (low, high) == (0, size) and size > 1:
            parts.append(":")
        else:
            parts.append(str(low) if high == low + 1 else f"{low}:{high}")
    return f"[{', '.join(parts)}]"


def axes_sentence(name: str, group: Group, sizes: Mapping[str, int]) -> str:
    """What a tensor's dimensions are: `q_proj.weight is (groups queries) | hidden, with groups 8, …`."""
    names = [axis for axis in group.instance.axes.names() if axis in sizes]
    told = ", ".join(f"{axis} {sizes[axis]}" for axis in names)
    axes = group.instance.axes
    written = axes if group.instance.param != "weight" else group.instance.rule.axes
    return f"{name} is `{written}`, with {told}"


def fixed_sentence(fixed: Mapping[str, int], sizes: Mapping[str, int], stages: Stages) -> str | None:
    """`layer 7 of 0…31, number 1 in pp3 (6…8)`."""
    if not fixed:
        return None
    parts = []
    for axis, value in fixed.items():
        text = f"{axis} {value} of 0…{sizes[axis] - 1}"
        if axis == "layer":
            stage, local = stages.find(value)
            first = stages.starts[stage]
            text += f", number {local} in {stages.name(stage)} ({span((first, first + stages.counts[stage]))})"
        parts.append(text)
    return "; ".join(parts)


def slice_sentences(group: Group, window: Sequence[Interval], found: Iterable[Spot]) -> list[str]:
    """The ranges of axes that the selected positions cover; one sentence per dimension."""
    result = []
    listed = list(found)
    dims = group.instance.axes.dims
    for dim, node in enumerate(dims):
        if isinstance(node, Axis):
            continue
        axes = list(leaves(node))
        told = (", ".join(f"{axis} {span(one.box[axis])}" for axis in axes if axis in one.box) for one in listed)
        ranges = list(dict.fromkeys(told))
        shown = "; ".join(ranges[:4]) + (f"; … ({len(ranges)} boxes)" if len(ranges) > 4 else "")
        positions = span(window[dim])
        verb = "is" if positions.isdecimal() else "are"
        result.append(f"{named(dim, len(dims), positions)} {verb} {shown}")
    return result


def cut_sentence(side: Side, group: Group) -> str:
    """How training cuts a tensor: `groups is cut over tp: ranks 0…3 hold 2 each`."""
    dims = group.cut.rank_dims()
    shards = side.shards(group)
    if group.cut.lone:
        return "one rank holds it undivided"
    if group.cut.boxes and len(shards) > 1:
        return f"{len(shards)} shards record which boxes of it they hold"
    if not dims:
        copies = len(shards[0].replicas)
        return f"{copies} files hold it whole and must agree" if copies > 1 else "one file holds it whole"
    told = []
    for axis, position in group.cut.axes.items():
        dim = dims[position]
        shares = _shares({s.ranks[position]: s.sizes[axis] for s in shards})
        told.append(f"{axis} is cut {'by the number in names' if dim == axis else f'over {dim}'}: {shares}")
    if group.cut.rows is not None:
        held: dict[int, int] = {}  # in one tensor, in pieces, or in slices
        count = len(group.cut.axes)
        for one in (one for one in shards if one.ranks[:count] == shards[0].ranks[:count]):
            rank, (low, high) = one.ranks[len(dims) - 1], one.window[group.cut.at]
            held[rank] = held.get(rank, 0) + high - low
        stored = ("rows", "columns")[group.cut.at]
        slices = f"of slices by the number of {' and '.join(dims[count:-1])} " if dims[count:-1] else ""
        told.append(f"storage {stored} {slices}are cut over {dims[-1]}, wherever that falls: {_shares(held)}")
    return "; ".join(told)


def _shares(held: Mapping[int, int]) -> str:
    """
    >>> _shares({0: 3, 1: 3, 2: 2})
    'ranks 0…1 hold 3 each, rank 2 holds 2'
    """
    by_size = grouped((size, rank) for rank, size in held.items())
    return ", ".join(
        f"ranks {fold(ranks)} hold {size} each" if len(ranks) > 1 else f"rank {ranks[0]} holds {size}"
        for size, ranks in by_size.items()
    )


def shard_words(group: Group, shard: Shard) -> str:
    """
    `tp1`, or `[0:65, 32:64]` where shards record their boxes, or nothing for a tensor that is not cut.
    """
    if group.cut.boxes:
        return box_text(shard.window) if len(group.shards) > 1 else ""
    return ", ".join(f"{dim}{rank}" for dim, rank in zip(group.cut.rank_dims(), shard.ranks, strict=False))


def order_sentences(link: Link) -> list[str]:
    """For each target dimension in another order: the source positions that its positions come from, in order."""
    result: list[str] = []
    source_dims = len(link.source.dims)
    target_dims = len(link.target.dims)
    for dim, strides in enumerate(one.strides for one in link.target.dims):
        order = sorted(strides, key=lambda axis: -strides[axis])
        wide = {axis for axis in order if link.box[axis][1] - link.box[axis][0] > 1}
        to = link.target.positions(dim, link.box, order)
        for other, theirs in enumerate(one.strides for one in link.source.dims):
            if not wide & set(theirs):
                continue
            part = {axis: link.box[axis] if axis in wide else _first(link.box[axis]) for axis in theirs}
            origin = link.source.positions(other, part, [axis for axis in order if axis in theirs])
            mine = {axis: link.box[axis] if axis in theirs else _first(link.box[axis]) for axis in strides}
            here = link.target.positions(dim, mine, order) if wide - set(theirs) else to
            same_dim = dim == other and source_dims == target_dims
            if same_dim and _plain(here) and _plain(origin):
                continue
            if max(len(here), len(origin)) > MOST_ORDERED:
                continue
            told = named(dim, target_dims, words(list(here))), named(other, source_dims, words(list(origin)))
            result.append(f"{told[0]} come from {told[1]}")
    return result


def _first(interval: Interval) -> Interval:
    return interval[0], interval[0] + 1


def _plain(lattice: Lattice) -> bool:
    """Whether positions are consecutive."""
    step = 1
    for stride, size in reversed(lattice.steps):
        if stride != step:
            return False
        step *= size
    return True


def index_texts(spot: Spot, box: Mapping[str, Interval]) -> tuple[str, ...]:
    """The positions along each dimension as slices."""
    return tuple(index_text(spot.positions(dim, box)) for dim in range(len(spot.dims)))
