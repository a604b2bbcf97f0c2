"""What the system is asked about folders on this machine: exchanged names, mounts, removal."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2): two names change places at once
_AT_CWD = -100
_MOUNTS = Path("/proc/self/mountinfo")


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to stable storage."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # some file systems cannot
            raise
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, so that neither is ever missing; False where it cannot be done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = rename(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE)
    return done == 0


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to the first that holds anything."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def is_mount(path: Path) -> bool:
    """Whether something is mounted there: also a folder of the same disk, which `os.path.ismount` does not see."""
    try:
        told = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    name = os.fsencode(path)
    for one, code in ((b"\\", b"\\134"), (b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012")):
        name = name.replace(one, code)
    return any(line.split(b" ")[4:5] == [name] for line in told)


def is_empty(path: Path) -> bool:
    """Whether it is a folder with nothing in it, as `mkdir` makes one for an output."""
    if not is_folder(path):
        return False
    with os.scandir(path) as entries:
        return next(entries, None) is None


def remove(path: Path) -> None:
    """Remove a folder with all that it holds, or a file or link."""
    if is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
