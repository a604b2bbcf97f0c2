"""The rank grid: which files a checkpoint folder should have, which it has, and what each is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from engine.errors import EngineError, Place
from engine.language.expressions import evaluate, names_in
from engine.language.model import FilePattern, Layout, Mode, RankMap
from engine.language.names import Pattern, pattern

_MOST_FILES = 10_000  # missing ones that are counted


Stage = tuple[int, ...]  # a chunk, then a rank of each dimension that orders stages


@dataclass(frozen=True, slots=True)
class RankFile:
    """A weight file: its name, the layout's pattern it matches and its rank coordinates."""

    name: str
    pattern: FilePattern
    ranks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RankGrid:
    """A folder read with a layout.

    Attributes:
        sizes: ranks per dimension (`{"tp": 2, "pp": 2}`).
        files: weight files, sorted by coordinates.
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
        """Whether files are of several pipeline stages."""
        return any(self.sizes.get(dim, 1) > 1 for dim in self.staged)

    def stage(self, file: int, chunk: int) -> Stage:
        """The stage that a chunk of a file is."""
        return (chunk, *[self.files[file].ranks.get(dim, 0) for dim in self.staged])

    def slices(self, file: int) -> dict[str, int]:
        """The ranks of a file that tell slices of one tensor apart."""
        return {
            dim: rank for dim, rank in self.files[file].ranks.items() if dim in self.sizes and dim not in self.staged
        }


_WHOLE = FilePattern("*", {}, None, None, Place("a Hugging Face checkpoint"), boxes=True)
WHOLE = Mode("whole", "", (_WHOLE,), only_read="it is no mode of training")


def whole_grid(names: Sequence[str]) -> RankGrid:
    """Files of a checkpoint without ranks: whichever holds a tensor holds all of it, or records what it holds."""
    return RankGrid(WHOLE, {}, tuple(RankFile(name, _WHOLE, {}) for name in names))


def rank_dims(file: FilePattern) -> tuple[str, ...]:
    """The placeholders of a file pattern that are rank dimensions: not `{number}`, not an expert.

    None are where tensors record their boxes: nothing follows from such a file's name.
    """
    if file.boxes:
        return ()
    cut = {dim for cuts in file.cuts.values() for dim in cuts}
    names = pattern(file.name).placeholders
    return tuple(n for n in names if file.number is None or n in cut)


def folders_in(layout: Layout) -> list[str]:
    """Names of the folders that a layout has files in, as patterns."""
    files = (file.name for mode in layout.modes for file in mode.files)
    return [name.split("/")[0] for name in files if "/" in name]


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
    """The rank dimensions to which an axis' numbers in tensor names are local."""
    read = names_in(layout.indices[axis])
    return tuple(dim for dim in layout_dims(layout) if dim in read)


def counts_of(layout: Layout, sizes: Mapping[str, int]) -> dict[str, int]:
    """Ranks per dimension as layout expressions see them: `tps`, `pps`, ...; 1 where files have no such dimension."""
    return {f"{dim}s": sizes.get(dim, 1) for dim in (*layout_dims(layout), *sizes)}


def read_grid(
    names: Sequence[str], layout: Layout, folder: str, config: Callable[[], Mapping[str, Any]] = dict
) -> RankGrid:
    """Sort a folder's file names into weight files, known files and unknown ones.

    Args:
        config: gives the configuration, which tells modes apart whose files have the same names.

    Raises:
        EngineError: E303 for files the layout refuses, E304 when there are no weight files or
            files of two modes, E201 naming the first missing rank file.
    """
    for refused in layout.refuse:
        listed = [pattern(text) for text in refused.patterns]
        hit = next((n for n in sorted(names) if any(one.match(n) is not None for one in listed)), None)
        if hit is not None and (refused.when is None or evaluate(refused.when, config())):
            raise EngineError("E303", refused.why, place=Place(hit), fix=refused.fix)
    found = [(mode, name) for mode in layout.modes if (name := _first(mode, names)) is not None]
    own = layout.config_from_target or layout.config_of_target or any(one.file in names for one in layout.configs)
    found = [(mode, name) for mode, name in found if own or not mode.files[0].boxes]  # many save files of such names
    modes = [mode for mode, name in found if not _skipped(name, layout)]
    if not modes and layout.config_file not in names:  # files that others may have beside them, and nothing else
        modes = [mode for mode, _ in found]
    if not modes:
        wanted = ", ".join(m.files[0].name for m in layout.modes)
        raise EngineError(
            "E304",
            f"no weight files of layout `{layout.name}` in this folder",
            place=Place(folder),
            got=_sample(names),
            expected=f"files named {wanted}",
            fix="Give the folder of one step, which holds the files under the names that training gave them; "
            "`engine inspect DIR` says what DIR is.",
        )
    held = {name: mode for mode, name in found if mode in modes}
    if len(held) == 1 and any(mode.when is not None for mode in modes):  # which tells modes of the same names apart
        facts = config()
        modes = [m for m in modes if m.when is None or evaluate(m.when, facts)]
        if not modes:
            raise EngineError(
                "E304",
                "the configuration is not of these files",
                place=Place(folder),
                got=_sample(names),
                expected="files named as the configuration's numbers of ranks say",
                fix="Copy the folder again from the training run, with its configuration.",
            )
    if len(modes) > 1:
        raise EngineError(
            "E304",
            "files of two parallel modes lie in one folder",
            place=Place(folder),
            got=" and ".join(f"{m.files[0].name} ({m.name})" for m in modes),
            expected="one mode",
            fix="Keep the files of one checkpoint only.",
        )
    mode = modes[0]
    files: list[RankFile] = []
    rest: list[str] = []
    for name in names:
        for file in mode.files:
            ranks = pattern(file.name).match(name)
            if ranks is not None:
                files.append(RankFile(name, file, ranks))
                break
        else:
            rest.append(name)
    skipped = tuple(n for n in rest if _known(n, layout))
    unknown = tuple(n for n in rest if n not in skipped)
    main = [f for f in files if f.pattern is mode.files[0]]
    sizes = {dim: 1 + max(f.ranks[dim] for f in main) for dim in rank_dims(mode.files[0])}
    grid = RankGrid(mode, sizes, tuple(sorted(files, key=_order)), skipped, unknown, stage_dims(layout))
    if not mode.files[0].boxes:  # else the boxes tell what is missing
        _complete(grid, layout, folder)
    return grid


def check_claims(grid: RankGrid, layout: Layout, said: Mapping[str, Any], file: str, folder: str) -> None:
    """Compare the grid with the ranks that the training configuration claims.

    The files alone cannot tell that the last ranks are missing altogether.

    Args:
        said: the configuration, and as `training` that of training; `file` is where the claims stand.

    Raises:
        EngineError: E201 naming the first rank that has no file.
    """
    for dim, expression in layout.sizes.items():
        claimed = evaluate(expression, said)
        if dim not in grid.sizes or isinstance(claimed, bool) or not isinstance(claimed, int) or claimed < 1:
            continue
        if claimed != grid.sizes[dim]:
            some = {**dict.fromkeys(grid.sizes, 0), dim: min(claimed, grid.sizes[dim])}
            name = pattern(grid.mode.files[0].name).format(some)
            more = claimed > grid.sizes[dim]
            raise EngineError(
                "E201",
                f"rank file `{name}` is missing" if more else f"`{name}` does not belong to this training run",
                place=Place(folder),
                got=f"{dim} {grid.sizes[dim]}, counted over the files",
                expected=f"{dim} {claimed}: `{expression.text}` in {file}",
                fix="Copy the missing files from the training run; every rank holds a different slice."
                if more
                else "Files of two checkpoints seem to be mixed; keep those of one.",
            )


def _first(mode: Mode, names: Sequence[str]) -> str | None:
    return next((name for name in names if pattern(mode.files[0].name).match(name) is not None), None)


def _skipped(name: str, layout: Layout) -> bool:
    return any(fnmatchcase(name, glob) for glob in layout.skip)


def _known(name: str, layout: Layout) -> bool:
    return name in (*(place.file for place in layout.configs), layout.training_file) or _skipped(name, layout)


def _order(file: RankFile) -> tuple[bool, tuple[int, ...], str]:
    return file.pattern.number is not None, tuple(file.ranks.values()), file.name


def expected_files(file: FilePattern, sizes: Mapping[str, int], counts: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Rank coordinates of every file of a pattern, by the layout's rank map or as a cross product."""
    dims = rank_dims(file)
    if file.ranks is None:
        for values in points([sizes[d] for d in dims]):
            yield dict(zip(dims, values, strict=True))
        return
    mapped = file.ranks.dims
    others = [d for d in dims if d not in mapped]
    said = _said(file.ranks, counts)
    for rank in range(max(sizes[d] for d in mapped) if said is None else said):
        named = {d: int(evaluate(e, {**counts, "rank": rank})) for d, e in mapped.items()}
        for values in points([sizes[d] for d in others]):
            yield {**named, **dict(zip(others, values, strict=True))}


def _said(ranks: RankMap, counts: Mapping[str, Any]) -> int | None:
    """How many files a rank map says there are; None where nothing tells."""
    count = evaluate(ranks.count, counts)
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= _MOST_FILES else None


def sizes_in(file: FilePattern, grid: RankGrid, said: Mapping[str, Any]) -> Mapping[str, int]:
    """Ranks per dimension that files of a pattern should have: their rank map may say others than the mode's first.

    Where it does not tell, they are as many as there are files: shapes tell whether one is missing.

    Args:
        said: what expressions of a rank map see.
    """
    if file.ranks is None or file is grid.mode.files[0]:
        return grid.sizes
    held = [one.ranks for one in grid.files if one.pattern is file]
    told = _said(file.ranks, said)
    if told is not None:  # no more than would show that one is missing
        held = [*islice(expected_files(file, grid.sizes, said), len(held) + 1)]
    return {**grid.sizes, **{dim: 1 + max(ranks[dim] for ranks in held) for dim in file.ranks.dims}}


def points(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every index of a grid, made when asked for: a file's name can claim 10 ** 17 ranks.

    >>> list(points([2, 2]))
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for rest in points(sizes[1:]):
            yield (first, *rest)


def _complete(grid: RankGrid, layout: Layout, folder: str) -> None:
    main = grid.mode.files[0]
    compiled: Pattern = pattern(main.name)
    present = {f.name for f in grid.files}
    most = len(present) + _MOST_FILES
    wanted = [
        compiled.format(ranks)
        for ranks in islice(expected_files(main, grid.sizes, counts_of(layout, grid.sizes)), most)
    ]
    missing = [name for name in wanted if name not in present]
    shape = " × ".join(f"{dim} {size}" for dim, size in grid.sizes.items())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EngineError(
            "E201",
            f"rank file `{missing[0]}` is missing{more}",
            place=Place(folder),
            got=f"{len(wanted) - len(missing)} of {len(wanted)}{' or more' * (len(wanted) == most)} files "
            f"of a grid of {shape}",
            expected="\n".join(missing[:8]),
            fix="Copy the missing files from the training run; every rank holds a different slice.",
        )
    foreign = [f.name for f in grid.files if f.pattern is main and f.name not in set(wanted)]
    if foreign:
        raise EngineError(
            "E304",
            f"`{foreign[0]}` does not belong to a grid of {shape}",
            place=Place(folder),
            got=f"{len(wanted) + len(foreign)} files",
            expected=f"{len(wanted)} files: {_sample(wanted)}",
            fix="Files of two checkpoints seem to be mixed; keep those of one.",
        )


def _sample(names: Sequence[str]) -> str:
    shown = sorted(names)[:6]
    more = f", and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(shown) + more) if shown else "an empty folder"
