"""Files on their way to an object store: begun, sent in parts, made visible together, or taken back.

A mark that each object carries tells what an interrupted run of the same work left from the objects of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from engine.errors import EngineError, Place
from engine.storage.client import give_back_memory
from engine.storage.coalesce import WINDOW, share
from engine.storage.in_order import InOrder, at_once, buffer_of
from engine.storage.objects import MARK, ObjectStore
from engine.storage.replacing import exists
from engine.storage.store import Sinks

_BLOCK = 4 << 20  # bytes of what is read again at once


class Upload:
    """Files of an output that are on their way to an object store. Shared by the workers."""

    folder: Path | None = None
    positioned = False

    def __init__(self, store: ObjectStore, work: str, there: set[str], *, mark: str, replaces: bool = False) -> None:
        """
        Args:
            work: what is kept with each object, to tell by it what it was made from.
            there: objects that an interrupted run may have left whole.
            mark: the file that marks a whole output.
            replaces: whether those that other runs made may be replaced.
        """
        self._store, self._work, self._there, self._mark, self._replaces = store, work, there, mark, replaces
        if store.block < WINDOW:  # it takes time, which a small window gives for memory
            give_back_memory()
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
        parts = 1 if self._replaces else at_once(window)  # what is replaced stays until all parts have arrived
        self.writers[name] = InOrder(self._store, name, size, self._work, window, parts)

    def is_left(self, name: str) -> bool:
        """Whether an interrupted run of the same work left an object; E401 or E407 for one that must stay."""
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

    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Some bytes of an object that is whole already."""
        state = self._store.states([name])[name]
        for at in range(offset, offset + nbytes, _BLOCK):
            yield self._store.get(name, state, at, min(at + _BLOCK, offset + nbytes))

    def complete(self, last: str = "", check: Callable[[], None] = lambda: None) -> None:
        """Make all files visible, the one named `last` after all others and only if it is not there.

        The last parts of files may still be on their way, unless old files are replaced. If one fails, what became
        visible is removed; but where `last` is there, or the output is whole, the same run has made all of it
        elsewhere.

        Raises:
            EngineError: E401 when the output that a part belongs to is whole already.
        """
        if last != self._mark and self._store.attribute(self._mark, MARK) is not None:
            raise exists(self._store.place(), "Choose another --out.", "an output that was made whole in the meantime")
        visible: list[str] = []
        try:
            for name, writer in reversed(self.writers.items()):  # the last parts of those begun last may fail
                writer.close()
                visible.append(name)
            check()
            for name in sorted(self._small, key=lambda name: name == last):
                if not self._store.write(name, self._small[name], self._work, new=name == last):
                    raise exists(
                        self._store.place(name), "Choose another --out.", "another run's, written in the meantime"
                    )
                visible.append(name)
        except BaseException:
            self._take_back(visible, last)
            raise
        self._whole.update(visible)
        self.writers.clear()
        self._small.clear()

    def _take_back(self, names: Sequence[str], last: str) -> None:
        """Remove what this run made visible, as far as the store lets it."""
        for name in names:
            with suppress(EngineError, FileNotFoundError):
                if {last, self._mark}.isdisjoint(self._store.names()) and self._store.attribute(
                    name, MARK
                ) == self._work:
                    self._store.delete(name)

    def abort(self) -> None:
        """End uploads that were not completed."""
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
