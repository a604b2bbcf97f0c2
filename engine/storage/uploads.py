"""An output in an object store: uploaded in parts, and visible only when all of it was sent.

Each file is an upload of its own that is completed at the end: weights first, then small files in the order they
were put, and last the one that marks a whole output, which is only put where none is. What fails or is interrupted
ends its uploads, and takes back what it made visible. After SIGKILL they stay pending, unseen, until `engine clean` or
the bucket's own rule ends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import EngineError, Place
from engine.storage.client import give_back_memory, requests
from engine.storage.coalesce import WINDOW, share
from engine.storage.in_order import InOrder, at_once, buffer_of
from engine.storage.locks import ObjectLock
from engine.storage.objects import MARK, ObjectStore
from engine.storage.replacing import exists
from engine.storage.store import OpenFile, Ranges, State, Store, walk

_BLOCK = 4 << 20  # bytes of what is read again at once


class Uploads:
    """A context that yields a store to write to, and makes what was written visible on success."""

    def __init__(
        self,
        store: ObjectStore,
        source: str,
        *,
        mark: str,
        work: str,
        overwrite: bool,
        resume: bool = False,
        foreign: Callable[[Store], str | None] = lambda _: "a folder that the engine cannot read",
    ) -> None:
        """
        Args:
            mark: the file that is written last and marks a whole output.
            work: a digest of all that the bytes of the output depend on.
            foreign: what a store holds that the engine did not write, in words; None when nothing.
        """
        self.need = 0  # bytes that will be written; a store says nothing of its room
        self._store, self._name, self._overwrite, self._resume = store, mark, overwrite, resume
        self._work, self._foreign = work, foreign
        self._upload: Upload | None = None
        self._lock = ObjectLock(store, work)
        if not store.listable:
            raise EngineError(
                "E001", "this store can only be read", place=Place(store.place()), expected="s3://, gs:// or az://",
                fix="Give --out a bucket or a folder.",
            )  # fmt: skip
        ours, theirs = f"{store.place()}/", f"{source.rstrip('/')}/"
        if ours.startswith(theirs) or theirs.startswith(ours):
            raise EngineError(
                "E404",
                "source and output overlap",
                place=Place(store.place()),
                got=f"output inside or around {source}",
                expected="two prefixes apart",
                fix="Choose an --out beside the checkpoint, not in it.",
            )
        self._before = self._check_free()

    def _check_free(self) -> set[str]:
        """The objects that are there and may be replaced, or gone on from; E401 for a prefix that holds others."""
        try:
            whole = self._name in self._store.names()
        except FileNotFoundError:
            return set()
        place = self._store.place()
        if self._overwrite and (whole or not self._resume):
            found = self._foreign(self._store)
            if found is not None:
                raise exists(place, "Choose another --out: only an output of the engine is replaced.", found)
        elif whole or not self._resume:
            raise exists(place, "Choose another --out, or give --overwrite to replace an output of the engine.")
        return self._there()

    def _there(self) -> set[str]:
        try:
            return {name for name, _ in walk(self._store)}
        except FileNotFoundError:
            return set()

    def buffer(self, files: int) -> int:
        """As a store has it."""
        return buffer_of(share(self._store.block, files))

    @property
    def written(self) -> Store:
        """What was written so far."""
        return self._store

    def join(self) -> Upload:
        """Where a part is uploaded to; its files become visible by `complete`, before the whole is marked."""
        if self._overwrite and self._before:
            raise exists(self._store.place(), "Choose an --out where nothing is: parts cannot replace an output.")
        return Upload(self._store, self._work, self._before, mark=self._name)

    def __enter__(self) -> Upload:
        left, replaces = self._before if self._resume else set(), self._overwrite and bool(self._before)
        upload = Upload(self._store, self._work, left, mark=self._name, replaces=replaces)
        if self._resume:
            for _ in requests().map(upload.is_left, sorted(self._before)):
                pass
        self._lock.take(resume=self._resume)
        self._upload = upload
        return upload

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        assert self._upload is not None
        try:
            if kind is None:
                self._commit(self._upload)
        finally:
            self._upload.abort()
            self._lock.leave()

    def _commit(self, upload: Upload) -> None:
        self._check_lock()
        now = self._check_free()
        if now - self._before:  # somebody's, who came meanwhile
            raise exists(
                self._store.place(), "Choose another --out.", "an output that appeared while this one was written"
            )
        for name in (self._name, "config.json"):  # what makes a checkpoint of the old files
            if name in now:
                self._store.delete(name)
        upload.complete(last=self._name, check=self._check_lock)
        for name in sorted(now - set(upload.names())):  # of the old output, and markers of parts
            self._store.delete(name)
        gone = set(upload.names()) - self._there()
        if gone:
            self._store.delete(self._name)
            raise self._removed(", ".join(sorted(gone)[:4]))

    def _check_lock(self) -> None:
        if not self._lock.held:
            raise self._removed("the mark of this run")

    def _removed(self, what: str) -> EngineError:
        return EngineError(
            "E403",
            "files of the output were removed while it was written",
            place=Place(self._store.place()),
            got=what,
            fix="Did somebody clean there? Run again with --resume.",
        )


class Upload:
    """Files of an output that are on their way to an object store. Shared by the workers."""

    folder: Path | None = None
    positioned = False
    block = 0

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
        self._writers: dict[str, InOrder] = {}
        self._small: dict[str, bytes] = {}
        self._whole: set[str] = set()

    def buffer(self, files: int) -> int:
        return buffer_of(share(self._store.block, files))

    def place(self, name: str = "") -> str:
        return self._store.place(name)

    def entries(self, inside: str = "") -> Mapping[str, State | None]:
        return self._store.entries(inside)

    def inside(self, name: str) -> Store:
        return self._store.inside(name)

    def names(self, inside: str = "") -> list[str]:
        return sorted({*self._writers, *self._small, *self._whole})

    def has(self, name: str) -> bool:
        return name in self._there or name in self.names()

    def open(self, name: str) -> OpenFile:
        return self._store.open(name)

    def ranges(self, name: str, state: Any) -> Ranges:
        return self._store.ranges(name, state)

    def states(self, names: Sequence[str]) -> Mapping[str, Any]:
        return self._store.states(names)

    def put(self, name: str, data: bytes) -> None:
        self._small[name] = data

    def sinks(self, names: Sequence[str], users: int = 1) -> UploadSinks:
        return UploadSinks(self, names, share(self._store.block, users))

    def begin(self, name: str, size: int, window: int) -> None:
        parts = 1 if self._replaces else at_once(window)  # what is replaced stays until all parts have arrived
        self._writers[name] = InOrder(self._store, name, size, self._work, window, parts)

    def writer(self, name: str) -> InOrder:
        return self._writers[name]

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

    def whole(self, name: str, size: int) -> State | None:
        """The state of an object that an interrupted run of the same work left whole; None when there is none."""
        if name not in self._there or not self.is_left(name):
            return None
        state = self._store.states([name])[name]
        if state.size != size:
            return None
        self._whole.add(name)
        return state

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
            for name, writer in reversed(self._writers.items()):  # the last parts of those begun last may fail
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
        self._writers.clear()
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
        for writer in self._writers.values():
            writer.abort()


class UploadSinks:
    """The files of an upload, by number."""

    def __init__(self, upload: Upload, names: Sequence[str], window: int) -> None:
        self._upload, self._names, self._window = upload, names, window

    def __enter__(self) -> UploadSinks:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def create(self, file: int, size: int) -> None:
        self._upload.begin(self._names[file], size, self._window)

    def whole(self, file: int, size: int) -> bool:
        return self._upload.whole(self._names[file], size) is not None

    def write(self, file: int, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        self._upload.writer(self._names[file]).write(offset, parts)

    def read(self, file: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        return self._upload.read(self._names[file], offset, nbytes)

    def copy(self, file: int, offset: int, source: int, start: int, nbytes: int) -> int:
        return 0

    def complete(self, file: int) -> None:
        self._upload.writer(self._names[file]).flush()

    def sync(self, file: int) -> None:
        pass
