"""A log of one run for machines: one JSON line per event. No tensor contents."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, Place, escaped_json
from engine.storage.replacing import exists, given_path

if TYPE_CHECKING:
    from engine.run.meter import Progress

_START = b'{"event": "'
_HOW = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_EVERY = 5.0  # seconds between events of progress


class Log:
    """Appends events to a file; `time` is in seconds since the epoch, `elapsed` since the log was opened."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        try:
            self._file = os.open(given_path(path, "the log"), _HOW, 0o666)
            if stat.S_ISREG(os.fstat(self._file).st_mode) and not is_log(os.pread(self._file, len(_START), 0)):
                os.close(self._file)
                raise exists(Path(path), "Choose another --log-file.", "a file that is no log of the engine")
        except OSError as error:
            raise self._failed(error) from error
        self._clock = clock
        self._started = self._told = clock()

    def event(self, name: str, **facts: Any) -> None:
        """Write one line; E403 when it cannot be written."""
        now = self._clock()
        line = {"event": name, "time": round(now, 3), "elapsed": round(now - self._started, 3), **facts}
        try:
            os.write(self._file, escaped_json(json.dumps(line, ensure_ascii=False, default=str)).encode() + b"\n")
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> EngineError:
        return EngineError(
            "E403",
            "the log cannot be written",
            place=Place(self._path),
            got=error.strerror,
            fix="Choose another --log-file.",
        )

    def progress(self, state: Progress) -> None:
        """Bytes moved, now and then and at the end."""
        now = self._clock()
        if now - self._told >= _EVERY or state.done == state.total:
            self._told = now
            self.event("progress", phase=state.phase, done=state.done, total=state.total, unit=state.unit)

    def close(self) -> None:
        os.close(self._file)


def is_log(start: bytes) -> bool:
    """Whether a file of these first bytes is empty, or was written as a log."""
    return start[: len(_START)] in (b"", _START)


@contextmanager
def logged(path: str | None, command: str, asked: Mapping[str, Any]) -> Iterator[Log | None]:
    """A log around one command: `started`, then `failed` or `interrupted` when it does not end well."""
    if path is None:
        yield None
        return
    log = Log(path)
    try:
        log.event("started", command=command, **{name: value for name, value in asked.items() if value is not None})
        yield log
    except EngineError as error:
        with suppress(EngineError):  # the first error tells more than a log that cannot be written
            log.event("failed", errors=[one.as_dict() for one in error.errors])
        raise
    except BaseException as error:
        with suppress(EngineError):
            log.event("interrupted", by=type(error).__name__)
        raise
    finally:
        log.close()
