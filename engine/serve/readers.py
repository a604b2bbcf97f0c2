"""Reads any bytes of a plan's outputs, for any number of users, with a few threads."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import LifoQueue
from typing import Any, Generic, Self, TypeVar

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader
from engine.language.documents import grouped
from engine.move.reader import Reader
from engine.planning.model import Tied, Work
from engine.run.digests import Total
from engine.run.journal import Done
from engine.run.replicas import Check, checks, compare_replicas
from engine.storage.client import check_process
from engine.storage.cores import cores
from engine.storage.sources import SourceFiles, check_unchanged

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Item = TypeVar("Item", covariant=True)

PART_BYTES = 16 << 20  # of one output that one thread reads at a time
THREADS = min(cores(), 8)  # that read from one plan at a time


def reading_threads() -> ThreadPoolExecutor:
    """The threads that read parts, for one plan or for many; the calling thread reads the first part."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="reader")


class Once(Generic[Key, Value]):
    """Results by key, each computed once, even if many threads ask for it at the same time.

    Failures are not kept: the next caller tries again.
    """

    def __init__(self, compute: Callable[[Key], Value]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._known: dict[Key, Future[Value]] = {}

    def __call__(self, key: Key) -> Value:
        """The result for a key; callers that ask while it is computed wait for it, and get its error too."""
        mine: Future[Value] = Future()
        try:  # around all of it: an interrupt comes anywhere
            with self._lock:
                found = self._known.setdefault(key, mine)
            if found is mine:
                mine.set_result(self._compute(key))
        except BaseException as error:
            if not mine.done():
                with self._lock:
                    if self._known.get(key) is mine:
                        del self._known[key]
                mine.set_exception(error)
            raise
        return found.result()

    def forget(self, key: Key) -> None:
        """Drop a result; the next caller computes it again."""
        with self._lock:
            self._known.pop(key, None)


class Readers:
    """Reads the bytes of a plan's outputs, for any number of threads at once.

    No bytes of a tensor are returned before its replicas have been compared, and every read ends with a check of
    the source files: bytes of a file that has changed since it was planned are not returned.
    """

    def __init__(self, work: Work, threads: ThreadPoolExecutor | None = None) -> None:
        """Args: threads: the executor that reads; its owner shuts it down. Default: one that `close` shuts down."""
        self.work, self._threads, self._own = work, threads or reading_threads(), threads is None
        self._opened: list[SourceFiles] = []
        self._idle: LifoQueue[Reader] = LifoQueue()  # last used, first out: it may hold what is read next
        for _ in range(THREADS):
            self._opened.append(SourceFiles(work.files))
            self._idle.put(Reader(work, self._opened[-1]))
        self._closing = weakref.finalize(self, _close, self._opened)
        self._users, self._open = set[object](), True
        self._process = 0  # id of the process whose threads read: the first to read
        self._changed = threading.Condition()
        self._compared, self._ready = Once(self._compare), Once(self._prepare)
        self.done = Once(self._done)  # output → digest and checksum, which need all of its bytes
        # source → checks that use it; output → checks that compare another tensor with it
        self._checks = grouped(
            (source, i) for i, one in enumerate(checks(work)) if not isinstance(one, Tied) for source in one.sources
        )
        self._ties = grouped((one.same_as, i) for i, one in enumerate(checks(work)) if isinstance(one, Tied))

    def __reduce__(self) -> str:
        raise TypeError("an open checkpoint is neither copied nor sent to another process: open it there")

    def read_into(self, output: int, start: int, target: memoryview) -> None:
        """Fill a buffer with the bytes of an output from byte `start` on.

        Raises:
            EngineError: E402 when replicas of the tensor differ, E405 when a source changed, E3xx when one
                cannot be read, E001 when this object is closed.
            ValueError: for bytes beyond the end of the output.
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
        """Compare the replicas of a tensor; returns the files that it is read from."""
        sources = {copy.source for copy in self.work.copies(output)}
        for check in sorted({*self._ties.get(output, ()), *(c for s in sources for c in self._checks.get(s, ()))}):
            self._compared(check)
        files = [self.work.files[file] for file in sorted({self.work.sources[s].file for s in sources})]
        return [one for one in files if not one.file.store.block]  # requests for objects already name their state

    def compare_all(self) -> None:
        """Compare all replicas that have not been compared yet; E402 when some differ."""
        with self._using():
            for index in range(len(checks(self.work))):
                self._compared(index)

    def close(self) -> None:
        """Close the files and end own threads, once all reads have finished."""
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
        user = object()
        try:  # around all of it: an interrupt comes anywhere
            with self._changed:
                if not self._open:
                    raise EngineError(
                        "E001",
                        "the checkpoint is closed",
                        place=Place(self.work.folder),
                        fix="Read it before it is closed, inside its `with` block.",
                    )
                self._users.add(user)
            yield
        finally:
            with self._changed:
                self._users.discard(user)
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
        nbytes = self.work.outputs[output].nbytes
        total = Total(nbytes, digest=True, checksum=True)
        buffer = memoryview(bytearray(min(nbytes, PART_BYTES)))
        for at in range(0, nbytes, max(len(buffer), 1)):
            data = buffer[: nbytes - at]
            self.read_into(output, at, data)
            total.add(at, data)
        return Done(total.digest(tuple), total.checksum())


class Reading(Mapping[str, Item]):
    """What is read by name, made on access. A context manager that closes its readers."""

    def __init__(self, readers: Readers, names: Mapping[str, Any], make: Callable[[Any], Item]) -> None:
        self.readers, self._names, self._make = readers, names, make

    def __getitem__(self, name: str) -> Item:
        return self._make(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the source files, once all reads have finished."""
        self.readers.close()


def _close(opened: list[SourceFiles]) -> None:
    for files in opened:
        files.__exit__()
