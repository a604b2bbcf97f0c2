"""Compares mappings: of files, or of git revisions, which are read without touching the working tree."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from engine.errors import EngineError, Place, printable
from engine.language.mapping_file import load_mapping
from engine.language.merging import chain_of
from engine.language.model import MappingFile
from engine.language.search import find_file

if TYPE_CHECKING:
    from engine.proving.diff import MappingDiff


def diff(
    old: str | Path, new: str | Path | None = None, paths: Sequence[str | Path] = (), *, revisions: bool = False
) -> list[MappingDiff]:
    """The differences between mappings: in their rules, and in where every tensor goes.

    >>> [one.name for one in engine.diff("internlm2-7b", "internlm2-20b")]
    ['internlm2-20b']

    Args:
        old: a mapping (with `new` another), or a git revision.
        new: a mapping, or a revision; without it a revision is compared with the working tree.
        paths: between revisions, the mapping files; default: all below `mappings/`.
        revisions: take `old` and `new` as revisions, also without paths.

    Returns:
        One diff for each mapping or layout that differs; those with the same change are merged.

    Raises:
        EngineError: E001 for a name that is neither mapping nor revision, E1xx for files that cannot be read.
    """
    from engine.proving.diff import diff_layouts, diff_mappings, diff_templates, gather

    if new is not None and not paths and not revisions:
        return gather([diff_mappings(str(new), load_mapping(old), load_mapping(new))])
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
    """The given path, even if the file no longer exists, or the file of a bundled name."""
    given = Path(path)
    if os.path.exists(given) or (given.suffix == ".yaml" and given.parent != Path(".")):
        return given
    try:
        return find_file(str(path))
    except EngineError:
        return given


def _below(top: Path, files: Sequence[Path]) -> list[PurePosixPath]:
    """Paths relative to a repository's top, each once; E001 for a file that is not below it."""
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
    """Layouts, families and templates first, so that releases with the same change are merged with them."""
    first = ("layouts", "families", "chat_templates")
    return sorted(map(PurePosixPath, names), key=lambda p: (p.parent.name not in first, str(p)))


def is_mapping(name: str) -> bool:
    """Whether a word names a mapping rather than a git revision."""
    try:
        find_file(name)
    except EngineError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Tree:
    """Files of a repository, in a folder.

    Attributes:
        revision: their revision, for messages; empty for the working tree.
    """

    folder: Path
    revision: str = ""

    def read(self, path: PurePosixPath) -> str | None:
        """A file's text, by its path relative to the repository's top; None if there is no such file."""
        return (self.folder / path).read_text("utf-8") if os.path.isfile(self.folder / path) else None

    def mappings(self) -> list[str]:
        """Paths of the mapping, layout and template files below the top's `mappings` folder."""
        found = (path for kind in ("*.yaml", "*.jinja") for path in (self.folder / "mappings").rglob(kind))
        return [path.relative_to(self.folder).as_posix() for path in found]

    def load(self, path: PurePosixPath) -> MappingFile | None:
        """The mapping resolved over its parents of the same revision; None if there is no such file.

        Raises:
            EngineError: E1xx, with places in that revision.
        """
        if not os.path.isfile(self.folder / path):
            return None
        try:
            return load_mapping(self.folder / path, self._named)
        except EngineError as error:
            for one in (error, *error.errors):
                place = one.place
                if self.revision and place is not None and Path(place.file).is_relative_to(self.folder):
                    shown = f"{self.revision}:{Path(place.file).relative_to(self.folder)}"
                    one.place = Place(shown, place.line, place.column, place.tensor)
            raise

    def parent_of(self, path: PurePosixPath) -> MappingFile | None:
        """The parent of an existing mapping; None if it extends nothing."""
        chain = chain_of(self.folder / path, self._named)
        return load_mapping(chain[-2].path, self._named) if len(chain) > 1 else None

    @property
    def _named(self) -> Path | None:
        """The folder where a parent that is given by name is searched first."""
        return self.folder / "mappings" if self.revision else None


def top_of(beside: Path, revision: str) -> Path:
    """The top of the git repository that contains a folder; E001 if there is none."""
    there = next(folder for folder in (beside.absolute(), *beside.absolute().parents) if folder.is_dir())
    found = _git(there, "rev-parse", "--show-toplevel")
    if found is None:
        raise EngineError(
            "E001",
            f"`{revision}` is neither a mapping nor a git revision",
            got=f"{beside} is in no git repository",
            expected="a mapping file, the name of a bundled one, or a revision",
            fix="Write `engine diff OLD NEW` with two mappings, or run it in a git checkout.",
        )
    return Path(found.strip())


@contextmanager
def checked_out(top: Path, revision: str, files: Sequence[PurePosixPath]) -> Iterator[Tree]:
    """The YAML files of a revision, and `files`, in a folder that is removed afterwards.

    Raises:
        EngineError: E001 when there is no such revision.
    """
    commit = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise EngineError(
            "E001",
            f"`{revision}` is neither a mapping nor a git revision",
            got=revision,
            expected="a mapping file, the name of a bundled one, or a branch, tag or commit",
            fix="Fetch it first, if it is another repository's: `git fetch origin`.",
        )
    with tempfile.TemporaryDirectory(prefix="engine-diff-") as name:
        folder = Path(name).resolve()
        listed = _git(top, "ls-tree", "-r", "-z", "--full-tree", commit.strip())
        blobs = {
            path: about.split()[2]  # of a line like `100644 blob 1f5c…<tab>path`
            for about, _, path in (line.partition("\t") for line in (listed or "").split("\0"))
            if " blob " in about and (path.endswith((".yaml", ".yml", ".jinja")) or PurePosixPath(path) in files)
        }
        content = _git(top, "cat-file", "--batch", given="".join(f"{blob}\n" for blob in blobs.values())) or ""
        data = BytesIO(content.encode("utf-8", "surrogateescape"))
        for path, blob in [("", "")] if listed is None else blobs.items():
            head = data.readline().decode("utf-8", "replace").rstrip("\n")
            if head.split()[:2] != [blob, "blob"] or ".." in PurePosixPath(path).parts:
                raise EngineError(
                    "E001",
                    f"git cannot read the files of revision `{revision}`",
                    place=Place(printable(path)) if path else None,
                    got=printable(head) or f"`git {'ls-tree' if listed is None else 'cat-file'}` failed in {top}",
                    fix="`git fsck` lists what is missing; fetch it again.",
                )
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            # raw content: a link is its target's name, and no filter runs
            (folder / path).write_bytes(data.read(int(head.split()[2]) + 1)[:-1])
        yield Tree(folder, revision)


def _git(folder: Path, *arguments: str, given: str | None = None) -> str | None:
    """What git prints, or None if it fails. No shell is involved."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            input=None if given is None else given.encode(),
        )
    except OSError as error:
        raise EngineError(
            "E001", "git cannot be run", got=error.strerror, fix="Install git, or compare two files."
        ) from error
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None  # bytes, line ends and all
