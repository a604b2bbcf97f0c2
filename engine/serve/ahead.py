"""Reading ahead: large pieces for whoever reads virtual files in order, small ones for whoever does not."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from engine.serve.files import VirtualFile

WINDOW = 4 << 20  # bytes
_NEAR = 1 << 20  # reads of one that goes in order come from several threads, a little out of it
_KEPT = 12  # windows of all files together
_THREADS = 3


class Ahead:
    """Reads files for many threads. A context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead")
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._ends: dict[str, tuple[int, int]] = {}  # of each file: where the last read ended, and how many in order

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, file: VirtualFile, start: int, size: int) -> bytes:
        """Bytes of a file, fewer at its end; errors as of the file."""
        stop = min(start + size, file.size)
        if start >= stop:
            return b""
        with self._lock:
            last, count = self._ends.get(file.name, (0, 0))
            count = count + 1 if abs(start - last) <= _NEAR else 0
            self._ends[file.name] = stop, count
            windows = range(start // WINDOW, (stop - 1) // WINDOW + 1)
            held = all((file.name, one) in self._windows for one in windows)
            if count < 2 and not held:
                windows = range(0)
            found = [(one, self._window(file, one)) for one in windows]
            if found and (windows[-1] + 1) * WINDOW < file.size:
                self._window(file, windows[-1] + 1)
        if not found:
            return file.read(start, stop - start)
        return b"".join(w.result()[max(start - n * WINDOW, 0) : stop - n * WINDOW] for n, w in found)

    def _window(self, file: VirtualFile, number: int) -> Future[bytes]:
        key = file.name, number
        found = self._windows.get(key)
        if found is None or (found.done() and found.exception() is not None):
            found = self._windows[key] = self._pool.submit(file.read, number * WINDOW, WINDOW)
        self._windows.move_to_end(key)
        while len(self._windows) > _KEPT:
            self._windows.popitem(last=False)
        return found
