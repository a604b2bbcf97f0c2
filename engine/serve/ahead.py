"""Reading ahead: large pieces for whoever reads virtual files in order, small ones for whoever does not."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

from engine.storage.virtual import VirtualFile

WINDOW = 4 << 20  # bytes
_NEAR = 1 << 20  # reads of one that goes in order come from several threads, a little out of it
_KEPT = 12  # windows of all files together
_AHEAD = 2  # windows that are on their way while one is read
_THREADS = 3


@dataclass(slots=True, eq=False)
class _Window:
    """A piece of a file, whose buffer is used again when nobody reads it any more."""

    buffer: memoryview
    coming: Future[None]
    users: int = 0


class Ahead(AbstractContextManager["Ahead"]):
    """Reads files for many threads. A context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead")
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[str, int], _Window] = OrderedDict()
        self._ends: dict[str, tuple[int, int]] = {}  # of each file: where the last read ended, and how many in order

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_into(self, file: VirtualFile, start: int, target: memoryview) -> int:
        """Fill a buffer with bytes of a file; how many, fewer at its end. Errors as of the file."""
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
        """The windows that hold some bytes, which count as read; none for one that jumps about."""
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
        """That of the window that was used longest ago, or a new one."""
        if len(self._windows) >= _KEPT:
            _, old = self._windows.popitem(last=False)
            if old.coming.done() and not old.users and len(old.buffer) == WINDOW:
                return old.buffer
        return memoryview(bytearray(WINDOW))
