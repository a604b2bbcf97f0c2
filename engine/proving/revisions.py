"""Mappings as a git revision has them, parents included, without touching the working tree."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path, PurePosixPath

from engine.errors import EngineError, Place
from engine.language.loader import load_text
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile

_MAX_PARENTS = 8


class Revision:
    """A commit of the repository that a folder is in.

    Raises:
        EngineError: E001 when there is no such repository or revision.
    """

    def __init__(self, name: str, beside: Path) -> None:
        self.name = name
        self._beside = next(folder for folder in (beside.absolute(), *beside.absolute().parents) if folder.is_dir())
        top = self._git("rev-parse", "--show-toplevel")
        if top is None:
            raise EngineError(
                "E001",
                f"`{name}` is neither a mapping nor a git revision",
                got=f"{beside} is in no git repository",
                expected="a mapping file, the name of a bundled one, or a revision",
                fix="Write `engine diff OLD NEW` with two mappings, or run it in a git checkout.",
            )
        self.top = Path(top.strip())
        commit = self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if commit is None:
            raise EngineError(
                "E001",
                f"`{name}` is neither a mapping nor a git revision",
                got=name,
                expected="a mapping file, the name of a bundled one, or a branch, tag or commit",
                fix="Fetch it first, if it is another repository's: `git fetch origin`.",
            )
        self._commit = commit.strip()

    def _git(self, *arguments: str) -> str | None:
        """What git prints, or None when it fails. No shell is involved."""
        try:
            done = subprocess.run(
                ["git", "-C", str(self._beside), *arguments], capture_output=True, text=True, encoding="utf-8"
            )
        except OSError as error:
            raise EngineError(
                "E001", "git cannot be run", got=error.strerror, fix="Install git, or compare two files."
            ) from error
        return done.stdout if done.returncode == 0 else None

    def read(self, path: PurePosixPath) -> str | None:
        """A file's text, by its path from the repository's top; None when it is not there."""
        return self._git("show", f"{self._commit}:{path}")

    def mappings(self) -> list[str]:
        """Paths of the mapping and layout files below the top's `mappings` folder."""
        listed = (self._git("ls-tree", "-r", "--name-only", "-z", self._commit, "mappings/") or "").split("\0")
        return [p for p in listed if p.endswith(".yaml")]

    def load(self, path: PurePosixPath) -> MappingFile | None:
        """The mapping resolved over its parents of that revision; None when it is not there.

        Raises:
            EngineError: E1xx, with places in that revision.
        """
        text = self.read(path)
        if text is None:
            return None
        with tempfile.TemporaryDirectory(prefix="engine-diff-") as name:
            root = Path(name).resolve()
            try:
                self._put(root, root / path, path, text, _MAX_PARENTS)
                return load_mapping(root / path)
            except EngineError as error:
                place = error.place
                if place is not None and place.file.startswith(str(root)):
                    shown = f"{self.name}:{place.file[len(str(root)) + 1 :]}"
                    error.place = Place(shown, place.line, place.column, place.tensor)
                raise

    def _put(self, root: Path, at: Path, path: PurePosixPath, text: str, left: int) -> None:
        """Write a file and its parents where the loader looks for them: beside it."""
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text, encoding="utf-8")
        parent = load_text(text, f"{self.name}:{path}").data.get("extends")
        if not isinstance(parent, str) or left == 0:
            return
        found = self._parent(path, parent)
        target = Path(_normal(at.parent / parent))
        if found is None or not target.is_relative_to(root) or target.exists():
            return
        self._put(root, target, found[0], found[1], left - 1)

    def parent_of(self, path: PurePosixPath) -> MappingFile | None:
        """What a mapping extends, in that revision; None when it extends nothing that is there."""
        parent = load_text(self.read(path) or "{}", f"{self.name}:{path}").data.get("extends")
        found = self._parent(path, parent) if isinstance(parent, str) else None
        return None if found is None else self.load(found[0])

    def _parent(self, path: PurePosixPath, parent: str) -> tuple[PurePosixPath, str] | None:
        """As when reading files: beside the child, else by name among the mappings."""
        names = [path.parent / parent]
        for stem in (parent, f"families/{parent}"):
            names += [PurePosixPath("mappings") / stem, PurePosixPath("mappings") / f"{stem}.yaml"]
        for name in names:
            normal = PurePosixPath(_normal(name))
            text = None if normal.parts[:1] == ("..",) else self.read(normal)
            if text is not None:
                return normal, text
        return None


class WorkingTree:
    """The files of a repository as they are now."""

    def __init__(self, top: Path) -> None:
        self._top = top

    def read(self, path: PurePosixPath) -> str | None:
        return (self._top / path).read_text("utf-8") if os.path.isfile(self._top / path) else None

    def mappings(self) -> list[str]:
        return [p.relative_to(self._top).as_posix() for p in (self._top / "mappings").rglob("*.yaml")]

    def load(self, path: PurePosixPath) -> MappingFile | None:
        return load_mapping(self._top / path) if os.path.isfile(self._top / path) else None

    def parent_of(self, path: PurePosixPath) -> MappingFile | None:
        parent = load_text(self.read(path) or "{}", str(path)).data.get("extends")
        beside = self._top / path.parent / str(parent)
        return load_mapping(beside if beside.is_file() else parent) if isinstance(parent, str) else None


def _normal(path: Path | PurePosixPath) -> str:
    """The path without `..`, links not followed."""
    return os.path.normpath(path)
