"""An output in an object store: uploaded in parts, visible only once all of it was sent; and leftovers of ended runs.

Each file is a separate upload that is completed at the end: weights first, then small files, the configuration after
the others, and last the one that marks a whole output, which is only put if it does not exist. A run that fails or is
interrupted aborts its uploads and removes what it made visible. After SIGKILL the uploads stay pending, invisible
but paid for, until `engine clean`, through botocore, or the bucket's own rule ends them.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from engine.errors import EngineError, Place, first_of, needs_extra
from engine.storage.client import refused, requests
from engine.storage.objects import LOCK, MARK, ObjectStore
from engine.storage.replacing import exists, held, overlap
from engine.storage.sources import share
from engine.storage.store import Store, walk
from engine.storage.upload import CONFIG, Upload, buffer_of

_KEYS = {
    "endpoint_url": ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url"),
    "region_name": ("region", "aws_region", "default_region"),
    "aws_access_key_id": ("access_key_id", "aws_access_key_id"),
    "aws_secret_access_key": ("secret_access_key", "aws_secret_access_key"),
    "aws_session_token": ("session_token", "token", "aws_session_token"),
}


class ObjectLock:
    """An object at the prefix of an output that says which run is writing there.

    A killed run leaves it behind. When the same run is resumed, it takes the object over: the same work writes the
    same bytes.
    """

    def __init__(self, store: ObjectStore, work: str) -> None:
        """Args: work: a digest of everything that determines the bytes of the output."""
        self._store, self._work = store, work
        self._told = f"{work} {secrets.token_hex(8)}".encode()

    def take(self, *, resume: bool) -> None:
        """Put the object; E408 when another run has put one. One that is interrupted meanwhile leaves none."""
        try:
            if self._store.write(LOCK, self._told, new=True):
                return
            self._check(self._store.content(LOCK) or b"", resume=resume)
            self._store.write(LOCK, self._told)
        except BaseException:
            self.leave()
            raise

    def check(self) -> None:
        """E408 when a run of other work has put one: a part is written beside others, but not beside that."""
        there = self._store.content(LOCK)
        if there is not None:
            self._check(there, resume=True)

    def _check(self, there: bytes, *, resume: bool) -> None:
        if not resume or there.partition(b" ")[0].decode("utf-8", "replace") != self._work:
            raise held(
                self._store.place(),
                "Wait for it to end, or choose another --out. If it was killed, repeat it with --resume, or remove "
                "what it left with `engine clean`.",
            )

    @property
    def held(self) -> bool:
        """Whether it exists and is this run's."""
        return self._store.content(LOCK) == self._told

    def leave(self) -> None:
        """Remove the object if possible; ignores errors, so that the run's own error is reported."""
        with suppress(EngineError):
            if self.held:
                self._store.delete(LOCK)


class Uploads:
    """A context that yields a store to write to, and makes the written files visible on success."""

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
            work: a digest of everything that determines the bytes of the output.
            foreign: returns what a store holds that the engine did not write, in words; None for nothing.
        """
        self.need = 0  # bytes to be written; a store does not report its free space
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
            raise overlap(store.place(), f"output inside or around {source}", "two prefixes apart")
        self._before = self._check_free()

    def _check_free(self) -> set[str]:
        """The existing objects that may be replaced or resumed from; E401 for a prefix that holds others."""
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
        return buffer_of(share(self._store.block, files))

    @property
    def written(self) -> Store:
        """The files written so far."""
        return self._store

    def join(self) -> Upload:
        """The upload of a part; `complete` makes its files visible, before the whole output is marked."""
        if self._overwrite and self._name in self._before:
            raise exists(self._store.place(), "Choose an --out where nothing is: parts cannot replace an output.")
        self._lock.check()
        return Upload(self._store, self._work, self._before, mark=self._name, beside=self._lock.check)

    def __enter__(self) -> Upload:
        replaces = self._overwrite and bool(self._before)
        left = self._before if self._resume and self._name not in self._before else set()  # a whole output is no rest
        upload = Upload(self._store, self._work, left, mark=self._name, replaces=replaces)
        for _ in requests().map(upload.is_left, sorted(left)):
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
        if now - self._before:  # written by someone else meanwhile
            raise exists(
                self._store.place(), "Choose another --out.", "an output that appeared while this one was written"
            )
        rest = sorted(now - {*upload.names(), self._name, CONFIG})
        marks = [name for name in rest if self._resume and self._store.attribute(name, MARK) == self._work]

        def remove(names: Iterable[str]) -> None:
            for name in names:
                self._store.delete(name)

        def check() -> None:
            """Before the first small file: nothing of an old output is beside one that is marked as whole."""
            self._check_lock()
            remove(name for name in rest if name not in marks)

        remove(name for name in (self._name, CONFIG) if name in now)  # without them the old files are no checkpoint
        upload.complete(last=self._name, check=check)
        remove(marks)  # of parts: a commit that is repeated needs them
        gone = set(upload.names()) - self._there()
        if gone:
            self._store.delete(self._name)
            raise self._removed(first_of(sorted(gone), 4))

    def _check_lock(self) -> None:
        if not self._lock.held:
            raise self._removed("the mark of this run")

    def _removed(self, what: str) -> EngineError:
        return EngineError(
            "E403",
            "files of the output were removed while it was written",
            place=Place(self._store.place()),
            got=what,
            fix="Did someone run `engine clean` there? Run again with --resume.",
        )


def clean(store: ObjectStore, ours: Callable[[str], bool], whole: str) -> list[str]:
    """Abort pending uploads at a prefix, and remove objects that interrupted runs left there.

    Args:
        ours: whether an output at the prefix could have a file of this name; others belong to outputs further below.
        whole: the file that marks a whole output; nothing is removed of a whole output.

    Returns:
        What was removed.

    Raises:
        EngineError: E001 for a store whose uploads cannot be listed, E403 when the store refuses.
    """
    removed: list[str] = []
    try:
        there = [] if store.has(whole) else [name for name, _ in walk(store) if ours(name)]
    except FileNotFoundError:
        there = []
    for name in [*there, LOCK]:
        marked = store.attribute(name, MARK) is not None
        if marked or (name == LOCK and re.fullmatch(rb"[0-9a-f]+ [0-9a-f]{16}", store.content(name) or b"")):
            store.delete(name)
            removed.append(store.place(name))
    return removed + ([] if removed and not store.url.startswith("s3:") else _end_uploads(store, ours))


def _end_uploads(store: ObjectStore, ours: Callable[[str], bool]) -> list[str]:
    kind, _, place = store.url.partition("://")
    if kind != "s3":
        raise EngineError(
            "E001",
            "pending uploads can be ended in S3 stores only",
            place=Place(store.place()),
            fix="Azure drops them after a week; in Google Cloud set a lifecycle rule AbortIncompleteMultipartUpload.",
        )
    client = _client(store)
    bucket, _, prefix = place.partition("/")
    prefix += "/" if prefix else ""
    ended: list[str] = []
    try:
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Uploads", ()):
                if ours(one["Key"].removeprefix(prefix)):
                    client.abort_multipart_upload(Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
                    ended.append(f"s3://{bucket}/{one['Key']}")
    except Exception as error:  # botocore's own kinds
        raise refused(store.place(), str(error), writing=True) from error
    return ended


def _client(store: ObjectStore) -> Any:
    with needs_extra("store", "ending uploads needs"):
        from botocore import session
    given = dict(store.options)
    how = {name: next((given[key] for key in keys if key in given), None) for name, keys in _KEYS.items()}
    how["region_name"] = how["region_name"] or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    how["endpoint_url"] = how["endpoint_url"] or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
    return session.get_session().create_client("s3", **{name: value for name, value in how.items() if value})
