"""A mount: the folder that a run would write, as a read-only file system in user space.

Sequential readers of a file get large pieces read ahead, others small ones.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.serve.virtual import VirtualFolder
from engine.storage.replacing import given_path
from engine.storage.virtual import VirtualFile

WINDOW = 4 << 20  # bytes
_NEAR = 1 << 20  # reads of a sequential reader come from several threads, slightly out of order
_KEPT = 12  # windows of all files together
_AHEAD = 2  # windows that are on their way while one is read
_THREADS = 3
_FOREVER = 3600  # seconds that the system may remember what never changes


@dataclass(slots=True, eq=False)
class _Window:
    """A piece of a file; its buffer is reused once nobody reads it."""

    buffer: memoryview
    coming: Future[None]
    users: int = 0


class Ahead(AbstractContextManager["Ahead"]):
    """Reads files for many threads. A context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead")
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[str, int], _Window] = OrderedDict()
        self._ends: dict[str, tuple[int, int]] = {}  # for each file: end of the last read, and length of the sequence

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_into(self, file: VirtualFile, start: int, target: memoryview) -> int:
        """Fill a buffer with bytes of a file; returns how many, fewer at its end. Errors are those of the file."""
        stop = min(start + len(target), file.size)
        if start >= stop:
            return 0
        target = target[: stop - start]
        found = self._wanted(file, start, stop)
        if not found:
            file.read_into(start, target)
            return len(target)
        try:
            for number, window in found:
                window.coming.result()
                low = max(start - number * WINDOW, 0)
                some = window.buffer[low : stop - number * WINDOW]
                at = number * WINDOW + low - start
                target[at : at + len(some)] = some
        finally:
            with self._lock:
                for _, window in found:
                    window.users -= 1
        return len(target)

    def _wanted(self, file: VirtualFile, start: int, stop: int) -> list[tuple[int, _Window]]:
        """The windows with these bytes, which count as read; none for a reader that jumps around."""
        with self._lock:
            last, count = self._ends.get(file.name, (0, 0))
            count = count + 1 if abs(start - last) <= _NEAR else 0
            self._ends[file.name] = stop, count
            numbers = range(start // WINDOW, (stop - 1) // WINDOW + 1)
            if count < 2 and not all((file.name, one) in self._windows for one in numbers):
                return []
            found = [(one, self._window(file, one)) for one in numbers]
            for _, window in found:
                window.users += 1
            for number in range(numbers.stop, numbers.stop + _AHEAD):
                if number * WINDOW < file.size:
                    self._window(file, number)
            return found

    def _window(self, file: VirtualFile, number: int) -> _Window:
        key = file.name, number
        found = self._windows.get(key)
        if found is None or (found.coming.done() and found.coming.exception() is not None):
            buffer = self._buffer()[: file.size - number * WINDOW]
            found = _Window(buffer, self._pool.submit(file.read_into, number * WINDOW, buffer))
            self._windows[key] = found
        self._windows.move_to_end(key)
        return found

    def _buffer(self) -> memoryview:
        """The buffer of the least recently used window, or a new one."""
        if len(self._windows) >= _KEPT:
            _, old = self._windows.popitem(last=False)
            if old.coming.done() and not old.users and len(old.buffer) == WINDOW:
                return old.buffer
        return memoryview(bytearray(WINDOW))


class Files:
    """The file system operations of the folder. The system calls them from its own threads."""

    use_ns = True

    def __init__(self, folder: VirtualFolder, ahead: Ahead, log: Callable[[str], None], ready: Callable[[], None]):
        self._folder, self._ahead, self._log, self._ready = folder, ahead, log, ready
        self._made = time.time_ns()

    def init(self, path: str) -> None:
        self._ready()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        common = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        common |= dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._made)
        if path == "/":
            return {**common, "st_mode": stat.S_IFDIR | 0o555, "st_nlink": 2}
        size = self._file(path).size
        return {**common, "st_mode": stat.S_IFREG | 0o444, "st_nlink": 1, "st_size": size, "st_blocks": -(-size // 512)}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *self._folder]

    def open(self, path: str, flags: int) -> int:
        self._file(path)
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, path)
        return 0

    def read(self, path: str, offset: int, target: memoryview) -> int:
        """Fill the system's buffer."""
        try:
            return self._ahead.read_into(self._file(path), offset, target)
        except EngineError as error:
            self._log(str(error))
            raise OSError(errno.EIO, path) from error

    def statfs(self, path: str) -> dict[str, int]:
        size = sum(file.size for file in self._folder.values())
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": -(-size // 4096), "f_files": len(self._folder),
                "f_bfree": 0, "f_bavail": 0, "f_namemax": 255}  # fmt: skip

    def _file(self, path: str) -> Any:
        file = self._folder.get(path[1:])
        if file is None:
            raise OSError(errno.ENOENT, path)
        return file


def mount(
    folder: VirtualFolder,
    at: str | Path,
    *,
    log: Callable[[str], None] = lambda _: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Mount virtual files as a read-only folder until SIGINT, SIGTERM or an unmount; only from the main thread.

    Args:
        at: an empty folder, or a path where there is nothing: then a folder is made, and removed afterwards.
        log: called with errors of reads; the reading program sees only an I/O error.
        ready: called once it is mounted.

    Raises:
        EngineError: E001 when there is no FUSE, E401 when `at` is not empty.
    """
    at, fuse = given_path(at, "the folder to mount at"), _fuse()
    with _mount_point(at), Ahead() as ahead, _default(signal.SIGTERM, signal.SIGHUP):
        files = Files(folder, ahead, log, ready)
        try:
            fuse(
                files, str(at), foreground=True, ro=True, kernel_cache=True, fsname="engine", subtype="engine",
                attr_timeout=_FOREVER, entry_timeout=_FOREVER, default_permissions=True,
            )  # fmt: skip
        except RuntimeError as error:
            raise EngineError(
                "E001", "the system did not mount it", place=Place(str(at)), got=f"libfuse ended with {error}",
                fix="The reason is above. `fusermount -u` ends an old mount; in a container FUSE must be allowed.",
            ) from error  # fmt: skip


def _fuse() -> Any:
    """The FUSE module; E001 with what is missing."""
    if not os.path.exists("/dev/fuse"):
        raise _no_fuse("there is no /dev/fuse", "Use `engine serve`, or allow FUSE to this container or machine.")
    try:
        import mfusepy
    except ImportError as error:
        raise _no_fuse("the package mfusepy is not installed", "Run `pip install 'internlm-engine[mount]'`.") from error
    except (OSError, AttributeError) as error:
        fix = "Install it from the distribution, for example with `apt-get install fuse3`, or use `engine serve`."
        raise _no_fuse(str(error) or "libfuse is not installed", fix) from error

    class Direct(mfusepy.FUSE):  # type: ignore[misc]
        """Reads go directly to the system's buffer, without a copy."""

        def read(self, path: bytes, buf: Any, size: int, offset: int, fip: Any) -> int:
            target = memoryview((ctypes.c_ubyte * size).from_address(ctypes.addressof(buf.contents))).cast("B")
            count: int = self.operations.read(path.decode(self.encoding, self.errors), offset, target)
            return count

    return Direct


def _no_fuse(got: str, fix: str) -> EngineError:
    return EngineError("E001", "nothing can be mounted here", got=got, expected="file systems in user space", fix=fix)


@contextmanager
def _mount_point(at: Path) -> Iterator[None]:
    made = not os.path.lexists(at)
    try:
        if made:
            at.mkdir()
        elif next(os.scandir(at), None) is not None:
            raise EngineError(
                "E401", "the folder to mount at is not empty", place=Place(str(at)), fix="Choose another one."
            )
    except OSError as error:
        raise EngineError(
            "E001", "nothing can be mounted there", place=Place(str(at)), got=error.strerror,
            expected="an empty folder, or a path where there is nothing", fix="Choose another one.",
        ) from error  # fmt: skip
    try:
        yield
    finally:
        if made:
            at.rmdir()


@contextmanager
def _default(*numbers: signal.Signals) -> Iterator[None]:
    """Reset signal handlers, so that libfuse handles the signals and ends the mount: it skips those with a handler."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
