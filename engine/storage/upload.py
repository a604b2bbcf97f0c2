"""Uploads to an object store: begun, sent in parts, made visible together, or withdrawn.

Each object carries a mark that distinguishes what an interrupted run of the same work left from other objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.storage.client import GIVEN_BACK, MMAP_THRESHOLD, allocate, library, refused
from engine.storage.objects import MARK, ObjectStore
from engine.storage.replacing import exists
from engine.storage.sources import WINDOW, share
from engine.storage.store import Sinks

CONFIG = "config.json"  # without it no program takes the weights for a model
_LEAST, _MOST = 5 << 20, 8 << 20  # approximate bytes of a part of an upload; S3 accepts no smaller ones
_MOST_PARTS = 9_000
_FOR_A_PART = 2 << 20  # bytes read ahead for each part being sent
_MOST_AT_ONCE = 4  # parts of a file being sent: one connection to a store is slow


def buffer_of(window: int) -> int:
    """Bytes that writing one file keeps in memory: parts being sent, one being filled, and one of another file."""
    return (at_once(window) + 2) * about(window)


def about(window: int) -> int:
    """Approximate bytes of a part: half of what is read ahead at once, so a small window saves memory here too."""
    return min(max(window // 2, _LEAST), _MOST)


def at_once(window: int) -> int:
    """Parts of a file that are sent at the same time: fewer with a small window, as memory is short then."""
    return min(max(window // _FOR_A_PART, 1), _MOST_AT_ONCE)


def part_size(size: int, least: int = _MOST) -> int:
    """Bytes of each part, such that almost nothing of a file is left for the last one.

    The last one stays in memory until the upload is completed.

    >>> part_size(20_000_003), part_size(1000), part_size(200 << 30) > 8 << 20
    (10000001, 1000, True)
    """
    return max(size // max(min(size // least, _MOST_PARTS), 1), 1)


class InOrder:
    """One object that is uploaded from start to end. Bytes that arrive early are kept until their turn."""

    def __init__(self, store: ObjectStore, name: str, size: int, work: str, window: int, parts: int) -> None:
        """
        Args:
            work: the mark that is stored with the object.
            window: bytes that are read ahead at once for it.
            parts: how many may be in flight; with one, all have arrived when `flush` returns.
        """
        self._place, self.size, self._end = store.place(name), size, 0
        self._early: dict[int, bytes] = {}
        self._closed = False
        self._writer = library().open_writer(
            store.client, name, buffer_size=part_size(size, about(window)), max_concurrency=parts,
            attributes={MARK: work},
        )  # fmt: skip

    def write(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        if offset != self._end:
            self._early[offset] = b"".join(parts)
            return
        for part in parts:
            self._append(part)
        while (early := self._early.pop(self._end, None)) is not None:
            self._append(early)

    def _append(self, data: bytes | memoryview) -> None:
        if len(data):
            own = bytes(data)  # a copy for the writer: the caller's buffer is reused
            self._said(lambda: self._writer.write(own))
            self._end += len(data)

    def flush(self) -> None:
        """Wait until fewer parts are in flight than allowed, so until none is with one. The file is not visible yet."""
        self.check_whole()
        self._said(lambda: self._writer.write(b""))

    def check_whole(self) -> None:
        if self._end != self.size or self._early:
            raise OSError(f"{self._end} of {self.size} bytes were written in order")

    def close(self) -> None:
        self.check_whole()
        self._said(self._writer.close)
        self._closed = True

    def _said(self, ask: Callable[[], object]) -> None:
        """E403 for a store's error on a write request."""
        try:
            ask()
        except Exception as error:  # obstore's own kinds, and OSError
            raise refused(self._place, str(error), writing=True) from error

    def abort(self) -> None:
        """Abort the upload, so that nothing of it remains."""
        if not self._closed:
            self._closed = True
            stop = InterruptedError("the upload is aborted")
            try:
                self._writer.__exit__(InterruptedError, stop, None)
            except Exception:  # `engine clean` ends what cannot be aborted now
                return


_BLOCK = 4 << 20  # bytes that are read back at once


class Upload:
    """Files of an output that are being uploaded to an object store. Shared by the workers."""

    folder: Path | None = None
    positioned = False

    def __init__(
        self,
        store: ObjectStore,
        work: str,
        there: set[str],
        *,
        mark: str,
        replaces: bool = False,
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            work: the mark that is stored with each object, which says what it was made from.
            there: objects that an interrupted run may have left whole.
            mark: the file that marks a whole output.
            replaces: whether objects of other runs may be replaced.
            beside: raises when objects of another run are becoming visible at the same place.
        """
        self._store, self._work, self._there, self._mark, self._replaces = store, work, there, mark, replaces
        self._beside = beside
        if store.block < WINDOW:  # give large buffers back once freed, which takes time: they would leave gaps
            allocate(MMAP_THRESHOLD, GIVEN_BACK)
        self.writers: dict[str, InOrder] = {}
        self._small: dict[str, bytes] = {}
        self._whole: set[str] = set()

    def buffer(self, files: int) -> int:
        return buffer_of(share(self._store.block, files))

    def place(self, name: str = "") -> str:
        return self._store.place(name)

    def names(self) -> list[str]:
        return sorted({*self.writers, *self._small, *self._whole})

    def put(self, name: str, data: bytes) -> None:
        self._small[name] = data

    def sinks(self, names: Sequence[str], users: int = 1) -> UploadSinks:
        return UploadSinks(self, names, share(self._store.block, users))

    def begin(self, name: str, size: int, window: int) -> None:
        parts = 1 if self._replaces else at_once(window)  # the old object stays until all parts have arrived
        self.writers[name] = InOrder(self._store, name, size, self._work, window, parts)

    def is_left(self, name: str) -> bool:
        """Whether an interrupted run of the same work left an object; E401 or E407 if it must not be replaced."""
        made_from = self._store.attribute(name, MARK)
        if made_from is None:
            raise exists(
                self._store.place(name),
                "Choose another --out, or move it away: only what an interrupted run left is replaced.",
                "an object that the engine did not write",
            )
        if made_from != self._work and not self._replaces:
            raise EngineError(
                "E407",
                "the interrupted run cannot be resumed: it was another one",
                place=Place(self._store.place(name)),
                got="an object that was written from another source, plan or mapping, or with other options",
                expected="the same as when it was started",
                fix="Remove what is there with `engine clean`, or choose another --out.",
            )
        return made_from == self._work

    def whole(self, name: str, size: int) -> bool:
        """Whether an interrupted run of the same work left an object whole."""
        found = name in self._there and self.is_left(name) and self._store.states([name])[name].size == size
        self._whole |= {name} if found else set()
        return found

    def objects(self, names: Sequence[str]) -> dict[str, Any]:
        """The states of complete objects as JSON, each another one once it is written anew."""
        return {name: dict(state.told()) for name, state in self._store.states(names).items()}

    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Some bytes of an object that is complete."""
        state = self._store.states([name])[name]
        for at in range(offset, offset + nbytes, _BLOCK):
            yield self._store.get(name, state, at, min(at + _BLOCK, offset + nbytes))

    def complete(self, last: str = "", check: Callable[[], None] = lambda: None) -> None:
        """Make all files visible; the configuration after the others, then `last`, and only if it does not exist.

        The last parts of files may still be in flight, unless old files are replaced. If one fails, what became
        visible is removed; unless `last` or the whole output is there, from the same work: then it was completed
        elsewhere.

        Raises:
            EngineError: E401 when the output that a part belongs to is already whole.
        """
        try:
            if last != self._mark and self._store.attribute(self._mark, MARK) is not None:
                told = "an output that was made whole in the meantime"
                raise exists(self._store.place(), "Choose another --out.", told)
            self._beside()
        except EngineError:
            self._take_back(sorted(self._whole), last)
            raise
        visible: list[str] = []  # and the one that may be: if a request fails, its response may have been lost
        try:
            for name, writer in reversed(self.writers.items()):  # the last parts of the newest uploads may fail
                visible.append(name)
                self._close(name, writer)
            check()
            for name in sorted(self._small, key=lambda name: (name == last, name == CONFIG, name)):
                visible.append(name)
                if not self._store.write(name, self._small[name], self._work, new=name == last):
                    raise exists(
                        self._store.place(name), "Choose another --out.", "another run's, written in the meantime"
                    )
        except BaseException:
            self._take_back(visible, last)
            raise
        self._whole.update(visible)
        self.writers.clear()
        self._small.clear()

    def _close(self, name: str, writer: InOrder) -> None:
        """Make one object visible. If it is there though that failed, only the response was lost."""
        try:
            writer.close()
        except EngineError:
            if self._replaces or not self._is_there(name, writer.size):
                raise

    def _is_there(self, name: str, size: int) -> bool:
        return self._store.attribute(name, MARK) == self._work and self._store.states([name])[name].size == size

    def _take_back(self, names: Sequence[str], last: str) -> None:
        """Remove what this run made visible, as far as the store allows."""
        for name in names:
            with suppress(EngineError, FileNotFoundError):
                *ends, own = (self._store.attribute(one, MARK) for one in (last, self._mark, name))
                if own == self._work and self._work not in ends:
                    self._store.delete(name)

    def abort(self) -> None:
        """Abort uploads that were not completed."""
        for writer in self.writers.values():
            writer.abort()


class UploadSinks(Sinks):
    """The files of an upload, by number."""

    def __init__(self, upload: Upload, names: Sequence[str], window: int) -> None:
        self._upload, self._names, self._window = upload, names, window

    def create(self, file: int, size: int) -> None:
        self._upload.begin(self._names[file], size, self._window)

    def whole(self, file: int, size: int) -> bool:
        return self._upload.whole(self._names[file], size)

    def write(self, file: int, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        self._upload.writers[self._names[file]].write(offset, parts)

    def read(self, file: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        return self._upload.read(self._names[file], offset, nbytes)

    def complete(self, file: int) -> None:
        self._upload.writers[self._names[file]].flush()
