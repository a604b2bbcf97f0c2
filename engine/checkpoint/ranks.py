"""The rank grid: the dimensions of files, how many ranks each has, and which files there should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from engine.errors import Place
from engine.language.expressions import evaluate, names_in, whole_number
from engine.language.model import FilePattern, Layout, Mode, RankMap
from engine.language.names import pattern

MOST_FILES = 10_000  # missing files are counted up to this number


Stage = tuple[int, ...]  # a chunk, then a rank of each dimension that orders stages


@dataclass(frozen=True, slots=True)
class RankFile:
    """A weights file: its name, the layout's pattern it matches and its rank coordinates."""

    name: str
    pattern: FilePattern
    ranks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RankGrid:
    """A folder read with a layout.

    Attributes:
        sizes: ranks per dimension (`{"tp": 2, "pp": 2}`).
        files: weights files, sorted by coordinates.
        skipped: known files beside the weights.
        unknown: files the layout does not know.
        staged: the rank dimensions that order pipeline stages.
    """

    mode: Mode
    sizes: Mapping[str, int]
    files: tuple[RankFile, ...]
    skipped: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    staged: tuple[str, ...] = ()

    @property
    def pipelined(self) -> bool:
        """Whether files belong to several pipeline stages."""
        return any(self.sizes.get(dim, 1) > 1 for dim in self.staged)

    def stage(self, file: int, chunk: int) -> Stage:
        """The stage of a chunk of a file."""
        return (chunk, *[self.files[file].ranks.get(dim, 0) for dim in self.staged])

    def slices(self, file: int) -> dict[str, int]:
        """The ranks of a file that distinguish slices of one tensor."""
        return {
            dim: rank for dim, rank in self.files[file].ranks.items() if dim in self.sizes and dim not in self.staged
        }


_WHOLE = FilePattern("*", {}, None, None, Place("a Hugging Face checkpoint"), boxes=True)
WHOLE = Mode("whole", "", (_WHOLE,), only_read="it is no mode of training")


def whole_grid(names: Sequence[str]) -> RankGrid:
    """Files of a checkpoint without ranks: a file holds whole tensors, or records which boxes of them it holds."""
    return RankGrid(WHOLE, {}, tuple(RankFile(name, _WHOLE, {}) for name in names))


def rank_dims(file: FilePattern) -> tuple[str, ...]:
    """The placeholders of a file pattern that are rank dimensions: not `{number}`, not an expert.

    None if tensors record their boxes: then the file's name means nothing.
    """
    if file.boxes:
        return ()
    cut = {dim for cuts in file.cuts.values() for dim in cuts}
    names = pattern(file.name).placeholders
    return tuple(n for n in names if file.number is None or n in cut)


def written_dims(file: FilePattern) -> tuple[str, ...]:
    """The rank dimensions of a file that is written."""
    return tuple(file.mesh) if file.boxes else rank_dims(file)


def layout_dims(layout: Layout) -> tuple[str, ...]:
    """Every rank dimension that files of some mode have."""
    return tuple(dict.fromkeys(dim for mode in layout.modes for dim in written_dims(mode.files[0])))


def stage_dims(layout: Layout) -> tuple[str, ...]:
    """The rank dimensions that order pipeline stages: those that `layers.stage` reads."""
    read = names_in(layout.layers.stage)
    return tuple(dim for dim in layout_dims(layout) if dim in read)


def index_dims(layout: Layout, axis: str) -> tuple[str, ...]:
    """The rank dimensions within which an axis is numbered locally in tensor names."""
    read = names_in(layout.indices[axis])
    return tuple(dim for dim in layout_dims(layout) if dim in read)


def counts_of(layout: Layout, sizes: Mapping[str, int]) -> dict[str, int]:
    """Ranks per dimension as layout expressions see them: `tps`, `pps`, ...; 1 where files have no such dimension."""
    return {f"{dim}s": sizes.get(dim, 1) for dim in layout_dims(layout)}


def expected_files(
    file: FilePattern, sizes: Mapping[str, int], counts: Mapping[str, Any], *, main: bool = False
) -> Iterator[dict[str, int]]:
    """Rank coordinates of every file of a pattern, by the layout's rank map or as a cross product.

    Args:
        main: whether the sizes are those of these files, as of a mode's first; other files may have more ranks.
    """
    dims = rank_dims(file)
    if file.ranks is None:
        for values in points([sizes[d] for d in dims]):
            yield dict(zip(dims, values, strict=True))
        return
    mapped = file.ranks.dims
    others = [d for d in dims if d not in mapped]
    said = _said(file.ranks, counts)
    for rank in range(max(sizes[d] for d in mapped) if said is None else said):
        named = {
            d: whole_number(e, {**counts, "rank": rank}, f"ranks.{d}", sizes[d] if main else MOST_FILES)
            for d, e in mapped.items()
        }
        for values in points([sizes[d] for d in others]):
            yield {**named, **dict(zip(others, values, strict=True))}


def _said(ranks: RankMap, counts: Mapping[str, Any]) -> int | None:
    """The number of files that a rank map gives; None when it gives none."""
    count = evaluate(ranks.count, counts)
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= MOST_FILES else None


def sizes_in(file: FilePattern, grid: RankGrid, said: Mapping[str, Any]) -> Mapping[str, int]:
    """Ranks per dimension that files of a pattern should have; their rank map may differ from that of the mode's first.

    Where it does not say, their number is that of the files present: shapes show whether one is missing.

    Args:
        said: the values that expressions of a rank map can use.
    """
    if file.ranks is None or file is grid.mode.files[0]:
        return grid.sizes
    held = [one.ranks for one in grid.files if one.pattern is file]
    told = _said(file.ranks, said)
    if told is not None:  # only enough to show that one is missing
        held = [*islice(expected_files(file, grid.sizes, said), len(held) + 1)]
    return {**grid.sizes, **{dim: 1 + max(ranks[dim] for ranks in held) for dim in file.ranks.dims}}


def points(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every index of a grid, lazily: a file's name can claim 10 ** 17 ranks.

    >>> list(points([2, 2]))
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for rest in points(sizes[1:]):
            yield (first, *rest)
