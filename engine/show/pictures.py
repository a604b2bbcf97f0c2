"""Pictures of a plan: for each rule, the shards of one layer as boxes and where each box lands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from engine.errors import span
from engine.explaining.describe import leaf
from engine.explaining.links import Lattice, Link, Spot, joined, links, spots
from engine.explaining.words import cut_sentence, index_texts, shard_words
from engine.formats.headers import ITEM_SIZES, dense_strides
from engine.language.documents import grouped
from engine.planning.boxes import Interval
from engine.planning.groups import Group
from engine.planning.model import Plan
from engine.planning.sides import Shard
from engine.run.schedule import Sets

WIDE, HIGH = 250, 260  # pixels of the largest tensor as it is drawn
MOST_TILES = 64  # source shards that are drawn
MOST_RUNS = 64  # rectangles along one dimension of a box; more are drawn as their hull


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a tensor drawn as rows and columns; `woven` when it also holds gaps."""

    link: int
    rows: Interval
    columns: Interval
    woven: bool


@dataclass(frozen=True, slots=True)
class Tile:
    """A tensor that is drawn: a shard on the left, an output on the right."""

    label: str
    name: str
    file: str
    shape: tuple[int, ...]
    replicas: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A link that is drawn: its colour is the source's, its shade the target's.

    Attributes:
        goes, comes: what stands in its box on the left, and in its box on the right.
    """

    source: int
    target: int
    text: str
    goes: str
    comes: str


@dataclass(frozen=True, slots=True)
class Picture:
    """One rule: the source tensors of every rank for one layer, and the targets they fill.

    `lookup` is what answers where an element comes from: addresses of sources, affine links.
    """

    rule: str
    place: str
    layer: str
    source_axes: tuple[str, ...]
    target_axes: tuple[str, ...]
    cut: str
    sources: tuple[Tile, ...]
    hidden: int
    targets: tuple[Tile, ...]
    drawn: tuple[Drawn, ...]
    lookup: Mapping[str, Any]

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of a column and of a row, the same for all of its tensors."""
        shapes = [flat_shape(tile.shape) for tile in (*self.sources, *self.targets)]
        vectors = all(columns == 1 for _, columns in shapes)
        rows, columns = (max(max(sizes), 1) for sizes in zip(*shapes, strict=True))
        return (40.0, HIGH / 3 / rows) if vectors else (WIDE / columns, HIGH / rows)


def pictures(plan: Plan) -> tuple[Picture, ...]:
    """One picture per set of targets that come from the same source tensors, for their first layer."""
    table = plan.copies
    source, target = table.source, table.target
    outputs = [held[0] for held in grouped((one.pattern, at) for at, one in enumerate(plan.outputs)).values()]
    reached = [{one.key: one for one in source.reaching(table.outputs[at][0], target)} for at in outputs]
    together = Sets(len(outputs))
    for sharing in grouped((key, number) for number, groups in enumerate(reached) for key in groups).values():
        together.join(sharing)
    found: list[Picture] = []
    for held in together.members().values():
        groups = {key: group for number in held for key, group in reached[number].items()}
        found.append(_picture(plan, list(groups.values()), [outputs[number] for number in held]))
    return tuple(found)


def _picture(plan: Plan, groups: Sequence[Group], outputs: Sequence[int]) -> Picture:
    table = plan.copies
    source, target = table.source, table.target
    shards = [(group, shard) for group in groups for shard in source.shards(group)]
    ends = [table.outputs[index] for index in outputs]
    landings = [spots(target, group, target.shards(group)[position]) for group, position in ends]
    drawn: list[Drawn] = []
    found: list[Link] = []
    source_boxes: list[list[Box]] = [[] for _ in shards]
    target_boxes: list[list[Box]] = [[] for _ in outputs]
    for s, (group, shard) in enumerate(shards):
        held = spots(source, group, shard)
        for t, landing in enumerate(landings):
            for link in links(held, landing):
                number = len(found)
                found.append(link)
                shapes = shard.replicas[0].header.shape, plan.outputs[outputs[t]].shape
                goes = leaf(plan.outputs[outputs[t]].name) if len(outputs) > 1 else ""
                comes = _label(groups, group, shard) if len(shards) > 1 else ""
                drawn.append(Drawn(s, t, _text(link), goes, comes))
                source_boxes[s] += _boxes(number, link.source, link, shapes[0])
                target_boxes[t] += _boxes(number, link.target, link, shapes[1])
    first = groups[0]
    names = [group.instance.rule.name for group in groups]
    return Picture(
        rule=" + ".join(dict.fromkeys(names)),
        place=str(first.instance.rule.place),
        layer=", ".join(f"{axis} {value}" for axis, value in ends[0][0].fixed.items()),
        source_axes=tuple(dict.fromkeys(f"{g.instance.sources[0].text}: {g.instance.axes}" for g in groups)),
        target_axes=tuple(
            f"{plan.outputs[i].pattern}: {end[0].instance.axes}" for i, end in zip(outputs, ends, strict=True)
        ),
        cut=cut_sentence(source, first),
        sources=tuple(
            _source_tile(plan, groups, group, shard, boxes)
            for (group, shard), boxes in zip(shards[:MOST_TILES], source_boxes, strict=False)
        ),
        hidden=max(0, len(shards) - MOST_TILES),
        targets=tuple(
            Tile("", plan.outputs[i].name, "", plan.outputs[i].shape, 0, tuple(boxes))
            for i, boxes in zip(outputs, target_boxes, strict=True)
        ),
        drawn=tuple(drawn),
        lookup=_lookup(plan, shards, outputs, drawn, found),
    )


def _source_tile(plan: Plan, groups: Sequence[Group], group: Group, shard: Shard, boxes: Sequence[Box]) -> Tile:
    one = shard.replicas[0]
    file = plan.files[one.file].name
    label = _label(groups, group, shard) or file
    return Tile(label, one.header.name, file, one.header.shape, len(shard.replicas), tuple(boxes))


def _label(groups: Sequence[Group], group: Group, shard: Shard) -> str:
    """What tells a shard from the others of its picture: `tp1`, or `w1 expert 3 tp1`."""
    told = [words] if (words := shard_words(group, shard)) else []
    if len(groups) > 1:
        told = [leaf(group.name), *(f"{a} {v}" for a, v in group.fixed.items() if a != "layer"), *told]
    return " ".join(told)


def _text(link: Link) -> str:
    """What hovering shows: index ranges on both sides and the axes."""
    here, there = (", ".join(index_texts(spot, link.box)) for spot in (link.source, link.target))
    return f"[{here}] → [{there}]: " + ", ".join(f"{axis} {span(ends)}" for axis, ends in link.box.items())


def flat_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as it is drawn: all dimensions but the last are rows.

    >>> flat_shape((4, 8, 16)), flat_shape((5,))
    ((32, 16), (5, 1))
    """
    return (shape[0], 1) if len(shape) == 1 else (prod(shape[:-1]), shape[-1])


def _boxes(number: int, spot: Spot, link: Link, shape: Sequence[int]) -> list[Box]:
    *outer, columns = (spot.positions(dim, link.box) for dim in range(len(shape)))
    rows, columns = (joined(outer, dense_strides(shape[:-1])), columns) if outer else (columns, Lattice(0))
    (across, woven), (down, also) = coarse(columns, MOST_RUNS), coarse(rows, MOST_RUNS)
    return [Box(number, row, column, woven or also) for row in down for column in across]


def coarse(lattice: Lattice, limit: int) -> tuple[list[Interval], bool]:
    """At most `limit` runs: the innermost gaps are drawn over, and whether any were.

    >>> coarse(Lattice(0, ((8, 2), (2, 3))), 4)
    ([(0, 5), (8, 13)], True)
    """
    flat = lattice.ascending()
    steps, inner, woven = list(flat.steps), 1, False
    if steps and steps[-1][0] == 1:
        inner = steps.pop()[1]
    while len(Lattice(0, tuple(steps))) > limit:
        stride, size = steps.pop()
        inner, woven = stride * (size - 1) + inner, True
    return [(low, low + inner) for low in Lattice(flat.start, tuple(steps))], woven


def _lookup(
    plan: Plan,
    shards: Sequence[tuple[Group, Shard]],
    outputs: Sequence[int],
    drawn: Sequence[Drawn],
    found: Sequence[Link],
) -> dict[str, Any]:
    """Data that the page's script inverts: target index → source tensor, index and byte."""
    told_links = []
    for one, link in zip(drawn, found, strict=True):
        axes = []
        here, there = link.source.dims, link.target.dims
        start_here = [link.source.positions(d, link.box).start for d in range(len(here))]
        start_there = [link.target.positions(d, link.box).start for d in range(len(there))]
        for axis, (low, high) in link.box.items():
            if high - low > 1:
                s = next(d for d, region in enumerate(here) if axis in region.strides)
                t = next(d for d, region in enumerate(there) if axis in region.strides)
                axes.append([high - low, s, here[s].strides[axis], t, there[t].strides[axis]])
        axes.sort(key=lambda entry: -entry[4])
        told_links.append([one.source, one.target, start_here, start_there, axes])
    return {
        "sources": [
            [plan.files[one.file].name, one.header.name, one.header.offset, list(one.header.strides),
             ITEM_SIZES[one.header.dtype]]
            for one in (shard.replicas[0] for _, shard in shards)
        ],
        "targets": [[plan.outputs[i].name, list(plan.outputs[i].shape)] for i in outputs],
        "links": told_links,
    }  # fmt: skip
