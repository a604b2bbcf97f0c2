"""A lock on an output, held by one run at a time: a file, gone with its process, or an object, which `clean` takes."""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from engine.errors import EngineError, Place
from engine.storage.objects import LOCK, ObjectStore


class OutputLock:
    """An advisory lock on `.NAME.lock` beside an output, released by the kernel when its holder ends."""

    def __init__(self, final: Path) -> None:
        self._path = final.with_name(f".{final.name}.lock")
        self._final = final
        self._descriptor = -1

    def __enter__(self) -> OutputLock:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise _held(str(self._final), "Wait for it to end, or choose another --out.") from None
            if self._is_current(descriptor):
                self._descriptor = descriptor
                return self
            os.close(descriptor)  # its holder removed the file between our opening and locking it

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path, follow_symlinks=False))
        except FileNotFoundError:
            return False


class ObjectLock:
    """An object at the prefix of an output that says which run is writing there.

    A run that is killed leaves it. The same run resumed takes it over: two of the same work write the same bytes.
    """

    def __init__(self, store: ObjectStore, work: str) -> None:
        """
        Args:
            work: a digest of all that the bytes of the output depend on.
        """
        self._store, self._work = store, work
        self._told = f"{work} {secrets.token_hex(8)}".encode()

    def take(self, *, resume: bool) -> None:
        """Put the object; E408 where another run has put one."""
        if self._store.write(LOCK, self._told, new=True) or self.held:  # put, though the answer was lost
            return
        there = (self._store.content(LOCK) or b"").partition(b" ")[0].decode("utf-8", "replace")
        if not resume or there != self._work:
            raise _held(
                self._store.place(),
                "Wait for it to end, or choose another --out. If it was killed, repeat it with --resume, or remove "
                "what it left with `engine clean`.",
            )
        self._store.write(LOCK, self._told)

    @property
    def held(self) -> bool:
        """Whether it is there and this run's."""
        return self._store.content(LOCK) == self._told

    def leave(self) -> None:
        """Remove the object if it can be: what the run itself ends with counts."""
        with suppress(EngineError):
            if self.held:
                self._store.delete(LOCK)


def _held(place: str, fix: str) -> EngineError:
    return EngineError("E408", "another run is writing this output", place=Place(place), fix=fix)
