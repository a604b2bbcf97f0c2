"""The output folder: built beside its final place, and moved there only when complete."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from engine.errors import KEPT, EngineError, Place
from engine.storage.local import LocalStore
from engine.storage.replacing import (
    OutputLock,
    exchange,
    exists,
    free_bytes,
    impossible,
    is_empty,
    is_folder,
    is_mount,
    overlap,
    remove,
    remove_empty,
    set_mode,
    sync_folder,
)
from engine.storage.store import Store, Target, write_error, writing

_LEFT = re.compile(r"\..*\.(partial|parts|old)-[0-9a-f]{8}", re.DOTALL)  # what an interrupted run leaves


class OutputFolder:
    """A context that yields a partial folder and puts it in place on success.

    On success everything is on stable storage before the name changes, and an old output is
    replaced in one step. On failure the final path is untouched. The partial folder is kept
    where `--resume` can use it, that is after an interruption or a failing disk, and is
    removed when the input itself is at fault.
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        read: Sequence[Path] = (),
        *,
        overwrite: bool,
        resume: bool = False,
        foreign: Callable[[Store], str | None] = lambda _: "a folder that the engine cannot read",
        shared: tuple[str, str] | None = None,
    ) -> None:
        """
        Args:
            read: files of the source, which may be elsewhere, behind links.
            shared: for an output that several processes write in parts: a digest that identifies it for all of them,
                and the name prefix of the parts' markers, which are kept until the output is put in place.
            foreign: returns what a folder holds that the engine did not write, in words; None for nothing.
        """
        self.final = located(out)
        if not self.final.name or _LEFT.fullmatch(self.final.name):  # the next run removes such a name
            raise EngineError("E001", "this cannot be an output", got=str(out), fix="Name a folder to write.")
        self._foreign = foreign
        self._shared = shared is not None
        work, self._spare = shared or (secrets.token_hex(4), "")
        kind = "parts" if shared else "partial"
        self.partial = self.final.with_name(f".{self.final.name}.{kind}-{work[:8]}")
        if (why := impossible(self.partial)) is not None:
            got, fix = f"{why}: {self.partial.name}", "Give the output a shorter name: this stands beside it first."
            raise EngineError("E001", "this cannot be an output", got=got, fix=fix)
        self._overwrite, self._resume, self._out = overwrite, resume, out
        self.need = 0  # bytes to be written: entering raises E403 if there is no room for them
        self._held = ExitStack()  # what is let go of at the end
        _check_apart(self.final, source, read)
        self._check_free()

    def _check_free(self) -> None:
        if not os.path.lexists(self.final):
            return
        if is_folder(self.final) and os.path.samefile(self.final, os.curdir):  # processes in it would stay there
            raise EngineError(
                "E001", "the current folder cannot be replaced", got=str(self._out), fix="First go to the folder above."
            )
        if is_mount(self.final):
            raise exists(self._out, "Name a folder in it.", "a mount point, which cannot be replaced")
        if is_empty(self.final):
            return
        found = None if is_folder(self.final) else "a file or a link, not a folder"
        if found is None and not self._overwrite:
            raise exists(self._out, "Choose another --out, or replace an output of the engine by --overwrite.")
        found = found or self._foreign(LocalStore(self.final))
        if found is not None:
            raise exists(
                self._out,
                "Choose another --out, or move it away: only an output of the engine or an empty folder is replaced.",
                found,
            )

    def buffer(self, files: int) -> int:
        return LocalStore(self.partial).buffer(files)

    @property
    def written(self) -> Store:
        """The files written so far."""
        return LocalStore(self.partial)

    def join(self) -> Target:
        """The partial folder, to write a part to; entering the context is what puts it in place."""
        self._check_unlinked()
        with writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._let_in_as_before()
        return LocalStore(self.partial)

    def _check_unlinked(self) -> None:
        """E401 for a link in the partial folder's place: files behind it would be removed."""
        if self.partial.is_symlink():
            raise exists(self.partial, "Remove the link, and run all parts again.", "a link, which is not followed")

    def _let_in_as_before(self) -> None:
        """Give the partial folder the group and mode of the one that it replaces, which may be closed to others."""
        if not is_folder(self.final):
            return
        old, new = self.final.lstat(), self.partial.lstat()
        if old.st_gid != new.st_gid:
            with suppress(PermissionError):  # not one of this user's groups
                os.chown(self.partial, -1, old.st_gid)
        set_mode(self.partial, old.st_mode | stat.S_IRWXU)

    def __enter__(self) -> Target:
        with ExitStack() as held:
            try:
                missing = [p for p in self.final.parents if not os.path.lexists(p)]
                held.callback(remove_empty, missing)
                for folder in reversed(missing):  # mkdir(parents=True) recurses for each
                    folder.mkdir(exist_ok=True)
                lock = held.enter_context(OutputLock(self.final))
                found = _put_back(self.final)
                self._check_free()  # a run that held the lock may just have finished
                if self._resume:
                    resumable = [path for path in found if _kind(path) == "partial" and is_folder(path)]
                    newest = max(resumable, key=lambda path: path.lstat().st_mtime_ns, default=self.partial)
                    if lock.locks or not resumable:
                        self.partial = newest
                    else:  # another run may still be writing it: that one fails
                        os.rename(newest, self.partial)
                for path in found:  # but parts, which other processes may be writing, as may a run without locks
                    if path != self.partial and _kind(path) != "parts" and lock.locks:
                        remove(path)
                self._check_unlinked()
                self._check_room()
                self.partial.mkdir(exist_ok=self._resume or self._shared)
                self._let_in_as_before()
            except OSError as error:
                raise write_error(self.partial, error) from error
            self._held = held.pop_all()
        return LocalStore(self.partial)

    def _check_room(self) -> None:
        free = free_bytes(self.final.parent)
        if free is None:
            return
        there = sum(file.lstat().st_blocks * 512 for file in self.partial.iterdir()) if self.partial.is_dir() else 0
        if self.need > free + there:
            raise EngineError(
                "E403",
                "there is not enough room for the output",
                place=Place(str(self.final.parent)),
                got=f"{free} bytes free",
                expected=f"{self.need} bytes",
                fix="Free some space, or choose an --out on another file system.",
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        with self._held:
            if kind is not None:
                if isinstance(error, EngineError) and error.code not in KEPT and not self._shared:
                    shutil.rmtree(self.partial, ignore_errors=True)
                if isinstance(error, OSError):
                    raise write_error(self.partial, error) from error
                return
            with writing(self.final):
                self._move()

    def _move(self) -> None:
        for folder in (*(path for path in self.partial.iterdir() if path.is_dir()), self.partial):
            sync_folder(folder)
        self._check_free()  # if something was put there meanwhile, it is kept, and so is the new output beside it
        for path in sorted(self.partial.glob(f"{self._spare}*"), reverse=True) if self._spare else ():
            path.unlink()
        if os.path.lexists(self.final):
            old = self.partial if exchange(self.partial, self.final) else self._swap()
            sync_folder(self.final.parent)
            try:
                remove(old)
            except OSError as error:
                told = "the new output is in its place, but what was there before could not be removed"
                got = error.strerror or str(error)
                raise EngineError("E403", told, place=Place(str(old)), got=got, fix="Remove it yourself.") from error
        else:
            os.rename(self.partial, self.final)
            sync_folder(self.final.parent)

    def _swap(self) -> Path:
        """Two renames, for a file system that cannot exchange names; the old output is restored if one fails."""
        old = self.final.with_name(f".{self.final.name}.old-{secrets.token_hex(4)}")
        os.rename(self.final, old)
        try:
            os.rename(self.partial, self.final)
        except BaseException:
            os.rename(old, self.final)
            raise
        os.rename(old, self.partial)  # a run that is killed while it removes this leaves nothing to put back
        return self.partial


def located(out: Path) -> Path:
    """The output with its real parent folder: `..` after a link leads out of the link's target, not back."""
    if out.name in ("", ".."):
        return Path(os.path.realpath(out))
    return Path(os.path.realpath(out.parent), out.name)


def leftovers(out: Path) -> list[Path]:
    """What interrupted runs left beside an output."""
    final = located(out)
    if not final.name:
        return []
    start = f".{final.name}."
    names = os.listdir(final.parent) if os.path.isdir(final.parent) else []  # a path may be too long for `Path`
    return [final.parent / n for n in sorted(names) if _LEFT.fullmatch(n) and n.rpartition(".")[0] + "." == start]


def _kind(left: Path) -> str:
    """What one of the `leftovers` is: an output that one run or several parts began, or an old one."""
    return left.name.rpartition(".")[2].partition("-")[0]


def _put_back(final: Path) -> list[Path]:
    """`leftovers`, without the old output of a run that was killed between two renames: that is restored."""
    found = leftovers(final)
    old = [path for path in found if _kind(path) == "old" and is_folder(path)]
    if old and not os.path.lexists(final):
        newest = max(old, key=lambda path: path.lstat().st_ctime_ns)
        os.rename(newest, final)
        found.remove(newest)
    return found


def clean(out: Path) -> list[Path]:
    """Remove what interrupted runs left beside an output; E408 while a run writes it."""
    found = leftovers(out)
    if found:
        with writing(out), OutputLock(located(out)):
            found = _put_back(located(out))
            for path in found:
                remove(path)
    return found


def sweep(folder: Path, keep: Collection[str]) -> None:
    """Remove from a partial output what the run will not overwrite, and whatever is a link, hard link or pipe.

    Others may have put them there: they would become part of the output, or lead out of the folder.
    """
    with writing(folder):
        for path in sorted(folder.iterdir()):
            found, inside = path.lstat(), f"{path.name}/"
            below = [name.removeprefix(inside) for name in keep if name.startswith(inside)]
            if below and stat.S_ISDIR(found.st_mode):
                sweep(path, below)
            elif path.name not in keep or not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                remove(path)


def _check_apart(out: Path, source: Path, files: Sequence[Path]) -> None:
    real_out, real_source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    linked = (os.path.realpath(file) for file in real_source.glob("*") if file.is_symlink() and file.is_file())
    read = (real_source, *map(Path, linked), *(Path(os.path.realpath(file)) for file in files))
    around = {path for one in read for path in (one, *one.parents)}
    if real_source in real_out.parents or real_out in around:
        got = f"output inside or around {source}, or around a file that it links to"
        raise overlap(str(out), got, "two folders apart")
    removed = next((path.name for path in leftovers(out) if path in around), None)
    if removed is not None:
        raise overlap(str(out), f"{source} in {removed}, which a run to this output removes", "two folders apart")
