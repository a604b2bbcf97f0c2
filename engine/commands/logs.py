"""A log of one run for machines: one JSON line per event. No tensor contents."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, EngineErrors, Place

if TYPE_CHECKING:
    from engine.run.meter import Progress

_EVERY = 5.0  # seconds between events of progress


class Log:
    """Appends events to a file; `time` is in seconds since the epoch, `elapsed` since the log was opened."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise EngineError(
                "E403",
                "the log cannot be written",
                place=Place(path),
                got=error.strerror,
                fix="Choose another --log-file.",
            ) from error
        self._clock = clock
        self._started = self._told = clock()

    def event(self, name: str, **facts: Any) -> None:
        """Write one line; a log that cannot be written does not stop a run."""
        now = self._clock()
        line = {"event": name, "time": round(now, 3), "elapsed": round(now - self._started, 3), **facts}
        try:
            os.write(self._file, json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
        except OSError:
            return

    def progress(self, state: Progress) -> None:
        """Bytes moved, now and then and at the end."""
        now = self._clock()
        if now - self._told >= _EVERY or state.done_bytes == state.total_bytes:
            self._told = now
            self.event("progress", done_bytes=state.done_bytes, total_bytes=state.total_bytes)

    def close(self) -> None:
        os.close(self._file)


@contextmanager
def logged(path: str | None, command: str, asked: Mapping[str, Any]) -> Iterator[Log | None]:
    """A log around one command: `started`, then `failed` or `interrupted` when it does not end well."""
    if path is None:
        yield None
        return
    log = Log(path)
    log.event("started", command=command, **{name: value for name, value in asked.items() if value is not None})
    try:
        yield log
    except (EngineError, EngineErrors) as error:
        errors = error.errors if isinstance(error, EngineErrors) else [error]
        log.event("failed", errors=[one.as_dict() for one in errors])
        raise
    except BaseException as error:
        log.event("interrupted", by=type(error).__name__)
        raise
    finally:
        log.close()
