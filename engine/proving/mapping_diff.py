"""Comparing mappings: the public function behind `engine diff`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.language.search import find_file

if TYPE_CHECKING:
    from engine.proving.diff import MappingDiff
    from engine.proving.revisions import Revision, WorkingTree


def diff(
    old: str | Path, new: str | Path | None = None, paths: Sequence[str | Path] = (), *, revisions: bool = False
) -> list[MappingDiff]:
    """What changes between mappings: in their rules, and in where every tensor goes.

    >>> [one.name for one in engine.diff("internlm2-7b", "internlm2-20b")]
    ['internlm2-20b']

    Args:
        old: a mapping (with `new` another), or a git revision.
        new: a mapping, or a revision; without it a revision is compared with the working tree.
        paths: between revisions, the mapping files; default: all below `mappings/`.
        revisions: take `old` and `new` for revisions, also without paths.

    Returns:
        The mappings and layouts that differ; those that change in the same way as one.

    Raises:
        EngineError: E001 for what is neither mapping nor revision, E1xx for what cannot be read.
    """
    from engine.proving.diff import diff_layouts, diff_mappings, gather

    if new is not None and not paths and not revisions:
        return gather([diff_mappings(str(new), load_mapping(old), load_mapping(new))])
    from engine.proving.revisions import Revision, WorkingTree

    files = [_path_of(path) for path in paths]
    before = Revision(str(old), files[0].parent if files else Path.cwd())
    after = WorkingTree(before.top) if new is None else Revision(str(new), before.top)
    found: list[MappingDiff] = []
    for name in _names(before, after, files):
        if name.is_relative_to("mappings/layouts"):
            found.append(diff_layouts(str(name), before.read(name), after.read(name)))
            continue
        was, now = before.load(name), after.load(name)
        parent = after.parent_of(name) if was is None and now is not None else None
        found.append(diff_mappings(str(name), was, now, parent))
    return gather(found)


def _path_of(path: str | Path) -> Path:
    """A path, also of a file that is not there any more, or the file of a bundled name."""
    given = Path(path)
    if os.path.exists(given) or (given.suffix == ".yaml" and given.parent != Path(".")):
        return given
    try:
        return find_file(str(path))
    except EngineError:
        return given


def _names(before: Revision, after: Revision | WorkingTree, files: Sequence[Path]) -> list[PurePosixPath]:
    """Paths from the repository's top; layouts, then families, so that releases say they follow."""
    if files:
        names: list[PurePosixPath] = []
        for file in files:
            absolute = file.parent.resolve() / file.name
            if not absolute.is_relative_to(before.top.resolve()):
                raise EngineError(
                    "E001",
                    f"`{file}` is not in the repository of the revision",
                    got=str(file),
                    expected=f"a file below {before.top}",
                    fix="Run it in the checkout that has the file.",
                )
            names.append(PurePosixPath(absolute.relative_to(before.top.resolve()).as_posix()))
        return list(dict.fromkeys(names))
    listed = {*before.mappings(), *after.mappings()}
    first = ("layouts", "families")
    return sorted(map(PurePosixPath, listed), key=lambda p: (p.parent.name not in first, str(p)))


def is_mapping(name: str) -> bool:
    """Whether a word names a mapping rather than a git revision."""
    try:
        find_file(name)
    except EngineError:
        return False
    return True
