"""Comparing mappings: the public function behind `engine diff`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.language.mapping_file import load_mapping
from engine.language.search import find_file

if TYPE_CHECKING:
    from engine.proving.diff import MappingDiff


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
    from engine.proving.diff import diff_layouts, diff_mappings, diff_templates, gather

    if new is not None and not paths and not revisions:
        return gather([diff_mappings(str(new), load_mapping(old), load_mapping(new))])
    from engine.proving.revisions import Tree, checked_out, top_of

    given = [_path_of(path) for path in paths]
    top = top_of(given[0].parent if given else Path.cwd(), str(old))
    files = _below(top, given)
    found: list[MappingDiff] = []
    with ExitStack() as opened:
        before = opened.enter_context(checked_out(top, str(old), files))
        after = Tree(top) if new is None else opened.enter_context(checked_out(top, str(new), files))
        for name in files or _in_order({*before.mappings(), *after.mappings()}):
            texts = before.read(name), after.read(name)
            if name.is_relative_to("mappings/layouts") or name.suffix == ".jinja":
                found.append((diff_templates if name.suffix == ".jinja" else diff_layouts)(str(name), *texts))
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


def _below(top: Path, files: Sequence[Path]) -> list[PurePosixPath]:
    """Paths from a repository's top, each once; E001 for a file that is not below it."""
    names: list[PurePosixPath] = []
    for file in files:
        absolute = file.parent.resolve() / file.name
        if not absolute.is_relative_to(top.resolve()):
            raise EngineError(
                "E001",
                f"`{file}` is not in the repository of the revision",
                got=str(file),
                expected=f"a file below {top}",
                fix="Run it in the checkout that has the file.",
            )
        names.append(PurePosixPath(absolute.relative_to(top.resolve()).as_posix()))
    return list(dict.fromkeys(names))


def _in_order(names: Iterable[str]) -> list[PurePosixPath]:
    """Layouts, families and templates first, so that releases say they follow."""
    first = ("layouts", "families", "chat_templates")
    return sorted(map(PurePosixPath, names), key=lambda p: (p.parent.name not in first, str(p)))


def is_mapping(name: str) -> bool:
    """Whether a word names a mapping rather than a git revision."""
    try:
        find_file(name)
    except EngineError:
        return False
    return True
