"""Local paths: only what the engine itself wrote may be replaced; folders, mounts and locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from engine.errors import EngineError, Place
from engine.storage.local import open_regular
from engine.storage.store import write_error

_URL = re.compile(r"(s3|gs|az|https?):/")  # also as `Path` shortens it
_LOOKED_AT = 1 << 20  # bytes at the start of a file, which show what it is
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2): swaps two names atomically
_AT_CWD = -100
_UNSYNCED = (errno.EINVAL, errno.EROFS, errno.ENOSYS, errno.EOPNOTSUPP)  # by a file system that cannot flush a folder
_MOUNTS = Path("/proc/self/mountinfo")


def given_path(path: str | Path, what: str) -> Path:
    """A path that a user gave; E001 for an invalid one.

    An empty path, as from an unset shell variable, would stand for the current folder.
    """
    if not issubclass(type(path), str | os.PathLike):
        got = f"{str(path)[:80]}, of type {type(path).__name__}"
    elif path == "":
        got = "nothing"
    elif "\0" in str(path):
        got = "a NUL in it"
    elif not _encodes(str(path)):
        got = "half characters in it, which no file system takes"
    elif _URL.match(str(path)) and not os.path.lexists(path):
        raise EngineError("E001", f"{what} is a URL, and must be a path", got=str(path), expected="a path",
                          fix="Give a path on this machine. Only checkpoints and outputs can be URLs.")  # fmt: skip
    elif (why := impossible(path)) is not None:
        raise EngineError("E001", f"{what} cannot be at this path", got=why, fix="Choose another path.")
    else:
        return Path(path)
    raise EngineError("E001", f"{what} has no path", got=got, fix="Write it out; the current folder is `./`.")


def _encodes(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def impossible(path: str | Path) -> str | None:
    """Why nothing can be at a path: a name is too long, or links go round in a circle."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.strerror if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else None
    return None


def exists(path: Path | str, fix: str, got: str | None = None) -> EngineError:
    return EngineError("E401", "the output exists already", place=Place(str(path)), got=got, fix=fix)


def overlap(place: str, got: str, expected: str) -> EngineError:
    fix = "Choose an --out beside the checkpoint, not in it."
    return EngineError("E404", "source and output overlap", place=Place(place), got=got, expected=expected, fix=fix)


def check_file_free(path: Path, overwrite: bool, ours: Callable[[bytes], bool]) -> None:
    """E401 if something exists at the path, unless `overwrite` is set and the engine wrote the file.

    Args:
        ours: whether the bytes begin a file that the engine wrote for the same purpose.
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
    """Write a file completely or not at all; E401 as for `check_file_free`, E403 when it cannot be written."""
    check_file_free(path, overwrite, ours)
    partial = path.with_name(f".{path.name[:100]}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(data)
        if overwrite:
            if path.exists():
                set_mode(partial, path.stat().st_mode)
            os.replace(partial, path)
        else:
            _link(partial, path)
    except FileExistsError:
        check_file_free(path, overwrite, ours)
        raise
    except OSError as error:
        raise write_error(path, error, "there") from error
    finally:
        with suppress(OSError):  # it is not there, or what it is to lie in is no folder
            partial.unlink()


def _link(file: Path, path: Path) -> None:
    """Put a file at a free path; one that was created there meanwhile is kept, where hard links are supported."""
    try:
        os.link(file, path)
    except OSError:
        if os.path.lexists(path):
            raise
        os.rename(file, path)


def free_bytes(folder: Path) -> int | None:
    """How much room a folder has; None where the file system does not say: many in user space have no size."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total or usage.free else None


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to stable storage."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, so that neither is ever missing; False where that is not supported."""
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
    """Whether it is a mount point; also finds bind mounts of the same disk, which `os.path.ismount` misses."""
    try:
        told = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    name = os.fsencode(path)
    for one, code in ((b"\\", b"\\134"), (b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012")):
        name = name.replace(one, code)
    return any(line.split(b" ")[4:5] == [name] for line in told)


def is_empty(path: Path) -> bool:
    """Whether it is an empty folder, for example one made with `mkdir` for an output."""
    if not is_folder(path):
        return False
    with os.scandir(path) as entries:
        return next(entries, None) is None


def remove(path: Path) -> None:
    """Remove a folder with its contents, or a file or link; the owner of a closed folder opens it first."""
    if is_folder(path):
        opened(path)
        for folder, names, _ in os.walk(path):
            for one in filter(is_folder, (Path(folder, name) for name in names)):
                opened(one)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def opened(folder: Path) -> None:
    """Let the owner of a folder list and change it; another's stays as it is."""
    with suppress(OSError):  # what it stands in the way of tells why
        set_mode(folder, folder.stat().st_mode | stat.S_IRWXU)


def set_mode(path: Path, mode: int) -> None:
    """Change the mode of a file or folder that has another one: some file systems have the same one for all."""
    if stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(mode):
        path.chmod(stat.S_IMODE(mode))


class OutputLock:
    """An advisory lock on `.NAME.lock` beside an output, released by the kernel when its holder ends.

    Attributes:
        locks: whether the file system has locks; if not, another run may be at work.
    """

    def __init__(self, final: Path) -> None:
        self._path = final.with_name(f".{final.name}.lock")
        self._final = final
        self._descriptor = -1
        self.locks = True

    def __enter__(self) -> OutputLock:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise held(str(self._final), "Wait for it to end, or choose another --out.") from None
            except OSError:  # file systems without locks say so in many ways
                self.locks = False
            if self._is_current(descriptor):
                self._descriptor = descriptor
                return self
            os.close(descriptor)  # its holder removed the file between our open and our lock

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the file does no harm: it is locked only while its holder has it open
            self._path.unlink()
        os.close(self._descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path, follow_symlinks=False))
        except FileNotFoundError:
            return False


def held(place: str, fix: str) -> EngineError:
    """E408 for an output that another run is writing."""
    return EngineError("E408", "another run is writing this output", place=Place(place), fix=fix)
