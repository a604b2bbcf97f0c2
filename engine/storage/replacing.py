"""What may be replaced: only what the engine itself wrote. Anything else belongs to somebody."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from engine.errors import EngineError, Place
from engine.storage.local import open_regular
from engine.storage.store import write_error

_LOOKED_AT = 1 << 20  # bytes at the start of a file, which tell what it is


def given_path(path: str | Path, what: str) -> Path:
    """A path as a user gave it; E001 for one that names nothing.

    An empty one would stand for the current folder, as when a shell variable is not set.
    """
    if not issubclass(type(path), str | os.PathLike):
        got = f"{str(path)[:80]}, of type {type(path).__name__}"
    elif path == "":
        got = "nothing"
    elif "\0" in str(path):
        got = "a NUL in it"
    elif not _encodes(str(path)):
        got = "half characters in it, which no file system takes"
    else:
        return Path(path)
    raise EngineError("E001", f"{what} has no path", got=got, fix="Write it out; the current folder is `./`.")


def _encodes(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def exists(path: Path | str, fix: str, got: str | None = None) -> EngineError:
    return EngineError("E401", "the output exists already", place=Place(str(path)), got=got, fix=fix)


def check_file_free(path: Path, overwrite: bool, ours: Callable[[bytes], bool]) -> None:
    """E401 unless nothing is at the path, or with `overwrite` a file that the engine wrote.

    Args:
        ours: whether bytes are the start of a file that the engine wrote for the same purpose.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise exists(path, "Choose another path, or give --overwrite to replace what the engine wrote there.")
    if not stat.S_ISREG(path.lstat().st_mode):
        raise exists(path, "Choose another path.", "a folder, a link or a device")
    with open_regular(path) as file:
        start = file.read(_LOOKED_AT)
    if start and not ours(start):
        raise exists(path, "Choose another path, or move the file away.", "a file that the engine did not write")


def write_file(path: Path, data: bytes, *, overwrite: bool, ours: Callable[[bytes], bool]) -> None:
    """Write a file whole or not at all; E401 as `check_file_free`, E403 when it cannot be written."""
    check_file_free(path, overwrite, ours)
    partial = path.with_name(f".{path.name[:100]}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(data)
        if overwrite:
            if path.exists():
                shutil.copymode(path, partial)
            os.replace(partial, path)
        else:
            os.link(partial, path)  # another file that came meanwhile is kept
    except FileExistsError:
        check_file_free(path, overwrite, ours)
        raise
    except OSError as error:
        raise write_error(path, error, "there") from error
    finally:
        partial.unlink(missing_ok=True)
