"""Which files of a folder belong to a checkpoint, what each one is, and which are missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase, translate
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from engine.checkpoint.hf_folder import is_whole
from engine.checkpoint.ranks import MOST_FILES, RankFile, RankGrid, counts_of, expected_files, rank_dims, stage_dims
from engine.errors import EngineError, Lines, Place
from engine.formats.headers import FileHeader
from engine.language.expressions import evaluate, names_in
from engine.language.model import Expression, Layout, Mode
from engine.language.names import pattern

Config = Callable[[Expression], Mapping[str, Any]]  # the configuration, where an expression can read it


class NoWeights(EngineError):
    """The E304 of a folder in which a layout knows no file."""


class OnlyConfiguration(EngineError):
    """The E304 of a folder with a layout's configuration and no weights: an unfinished step, or the folder of a run."""


def folders_in(layout: Layout) -> list[str]:
    """Patterns of the subfolders in which a layout has files."""
    files = (file.name for mode in layout.modes for file in mode.files)
    return [name.split("/")[0] for name in files if "/" in name]


def either_in(layout: Layout) -> list[str]:
    """Patterns of a layout's files that hold a whole state: a step that is a folder may have such a name too."""
    return [file.name for mode in layout.modes if mode.format == "nested" for file in mode.files]


def read_grid(names: Sequence[str], layout: Layout, folder: str, config: Config = lambda _: {}) -> RankGrid:
    """Sort a folder's file names into weights files, known files and unknown ones.

    Args:
        config: returns the configuration, which distinguishes modes whose files have the same names.

    Raises:
        EngineError: E303 for files the layout refuses, E304 when there are no weights files or
            files of two modes.
    """
    for refused in layout.refuse:
        listed = [pattern(text) for text in refused.patterns]
        hit = next((n for n in sorted(names) if any(one.match(n) is not None for one in listed)), None)
        if hit is not None and (refused.when is None or evaluate(refused.when, config(refused.when))):
            raise EngineError("E303", refused.why, place=Place(hit), fix=refused.fix)
    mode = _mode_of(names, layout, folder, config)
    known = {
        name: RankFile(name, file, ranks)
        for name in names
        for file in reversed(mode.files)  # the first pattern counts
        if (ranks := pattern(file.name).match(name)) is not None
    }
    files, rest = list(known.values()), [name for name in names if name not in known]
    skipped = tuple(n for n in rest if _known(n, layout))
    unknown = tuple(n for n in rest if n not in skipped)
    main = [f for f in files if f.pattern is mode.files[0]]
    sizes = {dim: 1 + max(f.ranks[dim] for f in main) for dim in rank_dims(mode.files[0])}
    grid = RankGrid(mode, sizes, tuple(sorted(files, key=_order)), skipped, unknown, stage_dims(layout))
    if mode.format == "nested":
        _one_state(grid.files, folder)
    return grid


def check_refused(files: Sequence[FileHeader], layout: Layout, config: Config) -> None:
    """E303 for the first tensor whose name the layout refuses."""
    for refused in (one for one in layout.refuse if one.tensors):
        listed = re.compile("|".join(map(translate, refused.tensors)))
        hits = ((file.name, one.name) for file in files for one in file.tensors if listed.match(one.name))
        hit = next(hits, None)
        if hit is not None and (refused.when is None or evaluate(refused.when, config(refused.when))):
            raise EngineError("E303", refused.why, place=Place(hit[0], tensor=hit[1]), fix=refused.fix)


def _mode_of(names: Sequence[str], layout: Layout, folder: str, config: Config) -> Mode:
    """The one mode whose files are in the folder; E304 for none and for several."""
    found = [(mode, name) for mode in layout.modes if (name := _first(mode, names)) is not None]
    own = layout.config_from_target or layout.config_of_target or any(one.file in names for one in layout.configs)
    found = [(mode, name) for mode, name in found if own or not mode.files[0].boxes]  # common file names
    modes = [mode for mode, name in found if not _skipped(name, layout)]
    if not modes and layout.config_file not in names:  # other programs' folders may hold such files
        modes = [mode for mode, _ in found]
    modes = [mode for mode in modes if mode.format != "nested"] or modes  # a state in one file may be a copy
    if not modes:
        raise _no_weights(names, layout, folder, beside="" if own else f" beside {layout.config_file}")
    held = {name: mode for mode, name in found if mode in modes}
    if len(held) == 1 and any(mode.when is not None for mode in modes):  # it selects between modes
        modes = [m for m in modes if m.when is None or evaluate(m.when, config(m.when))]
        if not modes:
            raise EngineError(
                "E304",
                "the configuration does not belong to these files",
                place=Place(folder),
                got=_sample(names),
                expected="files named for the numbers of ranks in the configuration",
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
    return modes[0]


def _no_weights(names: Sequence[str], layout: Layout, folder: str, beside: str) -> EngineError:
    """E304 for a folder without weights files of the layout, with what it looks like.

    Args:
        beside: what common file names must lie beside, to be the layout's.
    """
    wanted = ", ".join(m.files[0].name + (beside if m.files[0].boxes else "") for m in layout.modes)
    whole = is_whole(names)
    place, found, expected = Place(folder), _sample(names), f"files named {wanted}"
    kept = [one.file for one in layout.configs if one.file in names]
    if kept and not whole and not layout.config_of_target:  # any model may have the target's
        told = f"`{kept[0]}` is here and no weights file is: saving has not ended, or a part was copied"
        fix = "Take the step before, or copy the folder again from the training run. "
        fix += "`engine inspect DIR` says what lies in it, such as a finished model."
        return OnlyConfiguration("E304", told, place=place, got=found, expected=expected, fix=fix)
    fix = "It looks like a Hugging Face checkpoint, as `run` writes and `reverse` reads it. " if whole else ""
    fix += "Give the folder of one step, which holds the files under the names that training gave them; "
    fix += "`engine inspect DIR` says what DIR is."
    alone = next((mode.files[0].name for mode in layout.modes if mode.format == "nested"), None)
    fix += f" A state in one file is read if it is called {alone}." if alone is not None and not whole else ""
    told = f"no weights files of layout `{layout.name}` in this folder"
    return NoWeights("E304", told, place=place, got=found, expected=expected, fix=fix)


def check_ranks(grid: RankGrid, layout: Layout, said: Mapping[str, Any], file: str, folder: str) -> None:
    """Compare the grid with the numbers of ranks in the training configuration, and then with the files.

    From the files alone, it cannot be seen that all files of the last ranks are missing, nor whether a file is missing
    or its neighbour is another run's.

    Args:
        said: the configuration, in `file`, with the training configuration as `training`.

    Raises:
        EngineError: E201 naming the first rank file that is missing, or one of a rank that training did not have.
    """
    for dim, expression in layout.sizes.items():
        claimed = evaluate(expression, said)
        if dim not in grid.sizes or isinstance(claimed, bool) or not isinstance(claimed, int) or claimed < 1:
            continue
        if claimed != grid.sizes[dim]:
            some = {**dict.fromkeys(grid.sizes, 0), dim: min(claimed, grid.sizes[dim])}
            name = pattern(grid.mode.files[0].name).format(some)
            more, read = claimed > grid.sizes[dim], "training" in names_in(expression)
            raise EngineError(
                "E201",
                f"rank file `{name}` is missing" if more else f"`{name}` does not belong to this training run",
                place=Place(folder),
                got=f"{dim} {grid.sizes[dim]}, counted over the files",
                expected=f"{dim} {claimed}: `{expression.text}` in {layout.training_file if read else file}",
                fix="Copy the missing files from the training run; every rank holds a different slice."
                if more
                else "Files of two checkpoints seem to be mixed; keep those of one.",
            )
    if not grid.mode.files[0].boxes:  # else the boxes show what is missing
        _complete(grid, layout, folder)


def _first(mode: Mode, names: Sequence[str]) -> str | None:
    """A file that shows the mode: one of its first pattern, or of any if its files record what they hold."""
    shown = [pattern(file.name) for file in mode.files if file.boxes or file is mode.files[0]]
    return next((name for name in names if any(one.match(name) is not None for one in shown)), None)


def _skipped(name: str, layout: Layout) -> bool:
    return any(fnmatchcase(name, glob) for glob in layout.skip)


def _known(name: str, layout: Layout) -> bool:
    return name in (*(place.file for place in layout.configs), layout.training_file) or _skipped(name, layout)


def _order(file: RankFile) -> tuple[bool, tuple[int, ...], str]:
    return file.pattern.number is not None, tuple(file.ranks.values()), file.name


def _complete(grid: RankGrid, layout: Layout, folder: str) -> None:
    main = grid.mode.files[0]
    present = {f.name for f in grid.files}
    most = len(present) + MOST_FILES
    expected = expected_files(main, grid.sizes, counts_of(layout, grid.sizes), main=True)
    wanted = list(map(pattern(main.name).format, islice(expected, most)))
    missing = [name for name in wanted if name not in present]
    shape = " × ".join(f"{dim} {size}" for dim, size in grid.sizes.items())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        stem = missing[0].removesuffix(PurePosixPath(missing[0]).suffix)
        near = next((name for name in grid.unknown if name.startswith(stem)), None)
        like = "" if near is None else f" `{near}` is here: if it is this file, and whole, give it its name."
        raise EngineError(
            "E201",
            f"rank file `{missing[0]}` is missing{more}",
            place=Place(folder),
            got=f"{len(wanted) - len(missing)} of {len(wanted)}{' or more' * (len(wanted) == most)} files "
            f"of a grid of {shape}",
            expected=Lines.of(missing[:8]),
            fix=f"Copy the missing files from the training run; every rank holds a different slice.{like}",
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


def _one_state(files: Sequence[RankFile], folder: str) -> None:
    """E304 for files that each hold a whole state: only numbered files of one pattern share one."""
    states = {(f.pattern.name, *(rank for dim, rank in f.ranks.items() if dim != "file")): f.name for f in files}
    if len(states) > 1:
        raise EngineError(
            "E304",
            f"{len(states)} whole states lie in one folder",
            place=Place(folder),
            got=_sample([*states.values()]),
            expected="one",
            fix="Put the one that you want into a folder of its own. If one is a copy of another, either will do.",
        )


def _sample(names: Sequence[str]) -> str:
    shown = sorted(names)[:6]
    more = f", and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(shown) + more) if shown else "an empty folder"
