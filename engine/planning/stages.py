"""Stages: how layers are distributed over chunks and ranks, and how other numbers in names depend on ranks.

A layout's expressions `layers.stage` and `indices` say which rank dimensions order stages, and which
other numbers are local to a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any

from engine.checkpoint.ranks import RankFile, RankGrid, Stage, counts_of, index_dims
from engine.errors import EngineError, Place, first_of
from engine.language.expressions import whole_number
from engine.language.model import FilePattern, Layout


@dataclass(frozen=True, slots=True)
class Stages:
    """For each stage, the start of its layers in the whole model, and their number.

    Attributes:
        starts: in model order.
        dims: the rank dimensions of a stage.
    """

    starts: Mapping[Stage, int]
    counts: Mapping[Stage, int]
    chunks: int
    dims: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return sum(self.counts.values())

    def name(self, stage: Stage) -> str:
        """`pp1`, with its chunk if there are several.

        >>> Stages({}, {}, 2, ("pp",)).name((0, 1)), Stages({}, {}, 1).name((0,))
        ('chunk0 pp1', 'the only stage')
        """
        told = [f"chunk{stage[0]}"] if self.chunks > 1 else []
        told += [f"{dim}{rank}" for dim, rank in zip(self.dims, stage[1:], strict=True)]
        return " ".join(told) or "the only stage"

    def ranks(self, stage: Stage) -> dict[str, int]:
        return dict(zip(self.dims, stage[1:], strict=True))

    def find(self, layer: int) -> tuple[Stage, int]:
        """The stage of a layer, and its number there."""
        for stage, start in self.starts.items():
            if start <= layer < start + self.counts[stage]:
                return stage, layer - start
        raise ValueError(f"layer {layer} of {self.layers} is in no stage")


def in_order(
    layout: Layout, sizes: Mapping[str, int], dims: Sequence[str], chunks: int, names: Mapping[str, Any]
) -> list[Stage]:
    """Every stage, in the order of the model; E105 if two have the same place: their order would be arbitrary."""
    facts = {**names, **counts_of(layout, sizes), "chunks": chunks}
    every = list(product(range(chunks), *(range(sizes.get(dim, 1)) for dim in dims)))

    if len(every) < 2:
        return every
    expression, places = layout.layers.stage, dict[int, Stage]()
    for stage in every:
        here = {"chunk": stage[0], **dict(zip(dims, stage[1:], strict=True))}
        place = whole_number(expression, {**facts, **here}, "layers.stage")
        other = places.setdefault(place, stage)
        if other is not stage:
            told = Stages({}, {}, chunks, tuple(dims))
            raise EngineError(
                "E105",
                "`layers.stage` gives two stages the same place",
                place=expression.place,
                got=f"{place} for {told.name(other)} and for {told.name(stage)}",
                expected="another number for each stage",
                fix="Write the number of the stage in the whole model, such as `chunk * pps + pp`.",
            )
    return [places[place] for place in sorted(places)]


def laid_out(counts: Iterable[tuple[Stage, int]], chunks: int, dims: tuple[str, ...]) -> Stages:
    """Stages end to end, from each one's number of layers in model order."""
    held = dict(counts)
    starts = dict(zip(held, accumulate(held.values(), initial=0), strict=False))
    return Stages(starts, held, chunks, dims)


def number_layers(
    local: Mapping[Stage, Mapping[int, int]],
    grid: RankGrid,
    layout: Layout,
    names: Mapping[str, Any],
) -> Stages:
    """Lay the stages of a checkpoint end to end.

    Args:
        local: for each stage, file index → number of local layers seen in that file.

    Raises:
        EngineError: E211 when files of one stage have different numbers of layers.
    """
    chunks = 1 + max((stage[0] for stage in local), default=0)
    counts: list[tuple[Stage, int]] = []
    for stage in in_order(layout, grid.sizes, grid.staged, chunks, names):
        told = "files of one pipeline stage hold different numbers of layers"
        counts.append((stage, alike(local.get(stage, {}), grid.files, told, " layers")))
    return laid_out(counts, chunks, grid.staged)


def alike(counts: Mapping[int, int], files: Sequence[RankFile], message: str, of: str = "") -> int:
    """The count that all files, given by index, have in common: 0 for no files; E211 with two that differ."""
    if not counts:
        return 0
    few, many = min(counts, key=lambda f: (counts[f], f)), max(counts, key=lambda f: (counts[f], -f))
    if counts[few] != counts[many]:
        raise EngineError(
            "E211",
            message,
            place=Place(files[few].name),
            got=f"{counts[few]}{of} in {files[few].name}",
            expected=f"{counts[many]}{of}, as in {files[many].name}",
            fix="One of the files is from another run or damaged; compare dates and sizes.",
        )
    return counts[many]


def file_numbers(file: FilePattern, stages: Stages, counts: Mapping[str, Any]) -> Iterator[tuple[Stage, int, int]]:
    """(stage, local layer, number) of every layer: the `{number}` of the layer's own files.

    Args:
        counts: ranks per dimension, by their names in expressions.
    """
    if file.number is None:
        return
    facts = {**counts, "layers": stages.layers, "chunks": stages.chunks}
    for ranks in sorted({stage[1:] for stage in stages.counts}):
        nth = 0
        for chunk in range(stages.chunks):
            stage = (chunk, *ranks)
            for local in range(stages.counts[stage]):
                number = whole_number(file.number, {**facts, **stages.ranks(stage), "nth": nth}, "number")
                yield stage, local, number
                nth += 1


class Indices:
    """Maps numbers in tensor names that are local to a rank to those of the whole model.

    Args:
        local: for each axis in the layout's `indices`, how many each rank holds.
    """

    def __init__(self, layout: Layout, sizes: Mapping[str, int], local: Mapping[str, int]) -> None:
        self._layout, self._local = layout, local
        self._known: dict[tuple[object, ...], int] = {}
        self._counts = counts_of(layout, sizes)
        self._dims = {axis: index_dims(layout, axis) for axis in layout.indices}
        self._sizes = {dim: sizes.get(dim, 1) for dims in self._dims.values() for dim in dims}
        for axis, expression in layout.indices.items():
            numbers = sorted(self.homes(axis))
            total = local[axis] * prod(self._sizes[dim] for dim in self._dims[axis])
            first = first_of(numbers, 8)
            if numbers != list(range(total)):
                raise EngineError(
                    "E105",
                    f"`indices` does not number axis `{axis}`",
                    place=expression.place,
                    got=f"{first} for {local[axis]} on each rank",
                    expected=f"each of 0…{total - 1} once",
                    fix=f"With {self._dims[axis][0] if self._dims[axis] else 'rank'} the rank and `count` the number "
                    "on each, write it as `rank * count + number` or the like.",
                )

    def whole(self, values: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
        """The numbers of a tensor in a file of some ranks, in the whole model."""
        result = dict(values)
        for axis, expression in self._layout.indices.items():
            if axis in values:
                here = {dim: ranks.get(dim, 0) for dim in self._dims[axis]}
                key = (axis, values[axis], *here.values())
                if key not in self._known:
                    facts = {**self._counts, **here, "count": self._local[axis], axis: values[axis]}
                    self._known[key] = whole_number(expression, facts, f"indices.{axis}")
                result[axis] = self._known[key]
        return result

    def homes(self, axis: str) -> dict[int, tuple[dict[str, int], int]]:
        """Number in the whole model → the ranks that hold it, and its number there."""
        dims = self._dims[axis]
        found: dict[int, tuple[dict[str, int], int]] = {}
        for ranks in product(*(range(self._sizes[dim]) for dim in dims)):
            here = dict(zip(dims, ranks, strict=True))
            for number in range(self._local[axis]):
                found[self.whole({axis: number}, here)[axis]] = here, number
        return found


def shared_out(axis: str, total: int, layout: Layout, sizes: Mapping[str, int]) -> int:
    """How many of an axis in `indices` each rank will hold; E214 when they do not divide."""
    dims = index_dims(layout, axis)
    ranks = prod(sizes.get(dim, 1) for dim in dims)
    if total % ranks or (ranks > 1 and not total):
        raise EngineError(
            "E214",
            f"axis `{axis}` of {total} does not divide by {ranks} ranks" if total else f"the model has no `{axis}`",
            place=layout.indices[axis].place,
            got=" ".join(f"{dim} {sizes.get(dim, 1)}" for dim in dims),
            expected="1"
            if not total
            else f"ranks that divide {total}: " + ", ".join(str(n) for n in range(1, total + 1) if total % n == 0),
            fix="Every rank must hold the same number.",
        )
    return total // ranks
