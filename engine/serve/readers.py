"""Readers for any number of users: any bytes of a plan's outputs, read by a few threads."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import LifoQueue
from typing import Generic, TypeVar

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader
from engine.move.reader import Reader
from engine.planning.model import Tied, Work
from engine.run.digests import Total
from engine.run.journal import Done
from engine.run.replicas import Check, checks, compare_replicas
from engine.storage.client import check_process
from engine.storage.sources import SourceFiles, check_unchanged

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

PART_BYTES = 16 << 20  # of one output that one thread reads at a time
THREADS = min(os.cpu_count() or 1, 8)  # that read of one plan at a time


def reading_threads() -> ThreadPoolExecutor:
    """The threads that read parts, for one plan or for many; whoever asks reads the first part."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="reader")


class Once(Generic[Key, Value]):
    """Results by key, each computed once, however many threads ask for it at the same time.

    What fails is not kept: whoever asks next tries again.
    """

    def __init__(self, compute: Callable[[Key], Value]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._known: dict[Key, Future[Value]] = {}

    def __call__(self, key: Key) -> Value:
        """The result for a key; whoever asks while it is computed waits for it, and gets its error too."""
        with self._lock:
            found = self._known.get(key)
            mine = found is None
            if found is None:
                found = self._known[key] = Future()
        if mine:
            try:
                found.set_result(self._compute(key))
            except BaseException as error:
                with self._lock:
                    self._known.pop(key, None)
                found.set_exception(error)
                raise
        return found.result()

    def forget(self, key: Key) -> None:
        """Keep a result no longer; whoever asks next computes it again."""
        with self._lock:
            self._known.pop(key, None)


class Readers:
    """The bytes of a plan's outputs, for any number of threads at once.

    Nothing of a tensor is handed out before its replicas were compared, and every read ends with a look at the
    source files: what was read of one that changed since it was planned is not handed out.
    """

    def __init__(self, work: Work, threads: ThreadPoolExecutor | None = None) -> None:
        """Args: threads: they read, and whoever made them ends them; default: own ones, which end with this."""
        self.work, self._threads, self._own = work, threads or reading_threads(), threads is None
        self._opened: list[SourceFiles] = []
        self._idle: LifoQueue[Reader] = LifoQueue()  # the last one used first, which may hold what comes next
        for _ in range(THREADS):
            self._opened.append(SourceFiles(work.files))
            self._idle.put(Reader(work, self._opened[-1]))
        self._closing = weakref.finalize(self, _close, self._opened)
        self._users, self._open = 0, True
        self._process = 0  # whose threads read: the first that does
        self._changed = threading.Condition()
        self._compared, self._ready = Once(self._compare), Once(self._prepare)
        self.done = Once(self._done)  # output → digest and checksum; all of it is read for them
        self._checks: dict[int, list[int]] = {}  # source → checks that it takes part in
        self._ties: dict[int, list[int]] = {}  # output → checks that compare another tensor with it
        for index, check in enumerate(checks(work)):
            if isinstance(check, Tied):
                self._ties.setdefault(check.same_as, []).append(index)
            else:
                for source in check.sources:
                    self._checks.setdefault(source, []).append(index)

    def read_into(self, output: int, start: int, target: memoryview) -> None:
        """Fill a buffer with the bytes of an output from byte `start` on.

        Raises:
            EngineError: E402 when replicas of the tensor differ, E405 when a source changed, E3xx when one
                cannot be read, E001 when this is closed.
            ValueError: for bytes beyond the output's.
        """
        with self._using():
            files = self._ready(output)
            cuts = range(PART_BYTES, len(target), PART_BYTES)
            parts = [self._threads.submit(self._fill, output, start + at, target[at : at + PART_BYTES]) for at in cuts]
            try:
                self._fill(output, start, target[:PART_BYTES])
            finally:
                wait(parts)
            for part in parts:
                part.result()
            check_unchanged(files)

    def _prepare(self, output: int) -> list[FileHeader]:
        """Compare the replicas of a tensor; the files that it is read from."""
        sources = {copy.source for copy in self.work.copies(output)}
        for check in sorted({*self._ties.get(output, ()), *(c for s in sources for c in self._checks.get(s, ()))}):
            self._compared(check)
        files = [self.work.files[file] for file in sorted({self.work.sources[s].file for s in sources})]
        return [one for one in files if not one.file.store.block]  # objects are asked for by their state

    def compare_all(self) -> None:
        """Compare all replicas that have not been yet; E402 when some differ."""
        with self._using():
            for index in range(len(checks(self.work))):
                self._compared(index)

    def close(self) -> None:
        """Close the files, and end own threads, when those who read have finished."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._users)
        self._closing()
        if self._own:
            self._threads.shutdown()

    @contextmanager
    def _using(self) -> Iterator[None]:
        self._process = self._process or os.getpid()
        check_process(self._process, "tensors")
        with self._changed:
            if not self._open:
                raise EngineError(
                    "E001",
                    "the checkpoint is closed",
                    place=Place(self.work.folder),
                    fix="Read it before it is closed, inside its `with` block.",
                )
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _fill(self, output: int, start: int, target: memoryview) -> None:
        reader = self._idle.get()
        try:
            reader.read_into(output, start, target)
        finally:
            self._idle.put(reader)

    def _compare(self, index: int) -> Check:
        check = checks(self.work)[index]
        compare_replicas(self.work, some=[check])
        return check

    def _done(self, output: int) -> Done:
        total, nbytes = Total(digest=True, checksum=True), self.work.outputs[output].nbytes
        buffer = memoryview(bytearray(min(nbytes, PART_BYTES)))
        for at in range(0, nbytes, max(len(buffer), 1)):
            data = buffer[: nbytes - at]
            self.read_into(output, at, data)
            total.add(at, data)
        return Done(total.digest(tuple), total.checksum())


def _close(opened: list[SourceFiles]) -> None:
    for files in opened:
        files.__exit__()
