"""A lock on an output: held by one run at a time, gone with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from engine.errors import EngineError, Place


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
                raise EngineError(
                    "E408",
                    "another run is writing this output",
                    place=Place(str(self._final)),
                    fix="Wait for it to end, or choose another --out.",
                ) from None
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
