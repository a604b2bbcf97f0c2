"""An output in an object store: uploaded in parts, and visible only when all of it was sent.

Each file is an upload of its own that is completed at the end: weights first, then small files in the order they
were put, and last the one that marks a whole output, which is only put where none is. What fails or is interrupted
ends its uploads, and takes back what it made visible. After SIGKILL they stay pending, unseen, until `engine clean` or
the bucket's own rule ends them.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import EngineError, Place
from engine.storage.client import requests
from engine.storage.coalesce import share
from engine.storage.locks import ObjectLock
from engine.storage.objects import ObjectStore
from engine.storage.replacing import exists
from engine.storage.store import Store, walk
from engine.storage.upload import Upload, buffer_of


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
        """As a target has it."""
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
