"""What a command reports while it works: progress if it takes over a second, and a log for machines.

Progress is live on a terminal, else plain lines. A log has one JSON line per event, without tensor contents.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.commands.say import LIVE, clear_progress, say
from engine.errors import EngineError, Place, escaped_json
from engine.planning.given import amount
from engine.show.text import duration
from engine.storage.replacing import exists, given_path

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from engine.run.meter import Listener, Progress

_SILENT = 1.0  # seconds before anything is shown
_START = b'{"event": "'  # every log starts so
_HOW = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_EVERY = 5.0  # seconds between a log's events of progress


class InWords:
    """Progress in words, with the rate of the current phase.

    >>> from engine.run.meter import Progress
    >>> now = [0.0]
    >>> told = InWords(lambda: now[0])
    >>> told(Progress(0, 8 * 10**9))
    '0 %  0 B of 8 GB'
    >>> now[0] = 2.0
    >>> told(Progress(2 * 10**9, 8 * 10**9))
    '25 %  2 GB of 8 GB, 1 GB/s, 6.0 s left'
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase, self._since, self._from = "", clock(), 0

    def __call__(self, state: Progress) -> str:
        if state.phase != self._phase:
            self._phase, self._since, self._from = state.phase, self._clock(), state.done
        bytes_ = state.unit == "bytes"
        done, total = (amount(n) if bytes_ else f"{n:,}" for n in (state.done, state.total))
        told = f"{100 * state.done // max(state.total, 1)} %  {done} of {total}" + ("" if bytes_ else f" {state.unit}")
        seconds, moved = self._clock() - self._since, state.done - self._from - state.kept
        if moved > 0 and seconds > 0 and state.done < state.total:
            told += f", {amount(moved / seconds)}/s" if bytes_ else ""
            told += f", {duration((state.total - state.done) * seconds / moved)} left"
        return told


@contextmanager
def progress(*, show: bool, doing: str = "planning", also: Listener | None = None) -> Iterator[Listener | None]:
    """A listener for a long piece of work.

    Args:
        doing: the phase before the first report.
        also: another listener for the same reports.
    """
    if not show:
        yield also
    elif sys.stderr.isatty():
        with live(doing) as listener:
            yield _both(listener, also)
    else:
        yield _both(plain_progress(lambda line: say(line, err=True)), also)


def _both(*listeners: Listener | None) -> Listener:
    def listen(state: Progress) -> None:
        for one in filter(None, listeners):
            one(state)

    return listen


class Live:
    """A line at the bottom of the terminal, shown after a second and removed when the work ends."""

    def __init__(self, doing: str) -> None:
        self._doing, self._no_color = doing, click.get_current_context().color is False
        self._told = InWords(time.monotonic)
        self._lock, self._ended = threading.Lock(), False
        self._bar: Bar | None = None
        self._waiting = threading.Timer(_SILENT, self._start)
        self._waiting.daemon = True
        self._waiting.start()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(16, style="dim", complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
            TextColumn("{task.fields[told]}"),
        )
        bar = Bar(*columns, console=Console(stderr=True, no_color=self._no_color), transient=True)
        bar.add_task(self._doing, total=None, told="")
        with self._lock:
            if not self._ended:
                self._bar = bar
                bar.start()

    def __call__(self, state: Progress) -> None:
        told = self._told(state)
        with self._lock:
            if self._bar is not None:
                task = self._bar.task_ids[0]
                self._bar.update(task, description=state.phase, completed=state.done, total=state.total, told=told)
            else:
                self._doing = state.phase

    def stop(self) -> None:
        with self._lock:
            self._ended, bar, self._bar = True, self._bar, None
        self._waiting.cancel()
        if bar is not None:
            bar.stop()


@contextmanager
def live(doing: str) -> Iterator[Live]:
    """Show that work goes on, until it ends or something is printed; rich is loaded only if this is shown."""
    clear_progress()
    shown = click.get_current_context().meta[LIVE] = Live(doing)
    try:
        yield shown
    finally:
        shown.stop()


def plain_progress(write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Listener:
    """A listener that writes a line for every 10 % and every phase, and after five seconds without one."""
    told = InWords(clock)
    started = last = clock()
    reached: tuple[str, int] = ("", 0)

    def listen(state: Progress) -> None:
        nonlocal last, reached
        now, line = clock(), told(state)
        tenth = state.phase, 10 * state.done // max(state.total, 1)
        if now - started < _SILENT or (tenth == reached and now - last < 5):
            return
        last, reached = now, tenth
        write(f"{state.phase}: {line}")

    return listen


class Log:
    """Appends events to a file; `time` is in seconds since the epoch, `elapsed` since the log was opened."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time, out: str | None = None) -> None:
        self._path = path
        try:
            if out is not None and os.path.realpath(out) in map(str, Path(os.path.realpath(path)).parents):
                raise OSError(errno.EPERM, "it would be a foreign file in the output")
            self._file = os.open(given_path(path, "the log"), _HOW, 0o666)
            if stat.S_ISREG(os.fstat(self._file).st_mode) and not is_log(os.pread(self._file, len(_START), 0)):
                os.close(self._file)
                raise exists(Path(path), "Choose another --log-file.", "a file that is not a log of the engine")
        except OSError as error:
            raise self._failed(error) from error
        self._clock = clock
        self._started = self._told = time.monotonic()  # the clock may be set meanwhile

    def event(self, name: str, **facts: Any) -> None:
        """Write one line; E403 when it cannot be written."""
        elapsed = time.monotonic() - self._started
        line = {"event": name, "time": round(self._clock(), 3), "elapsed": round(elapsed, 3), **facts}
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
        """Log the bytes moved, every few seconds and at the end."""
        now = time.monotonic()
        if now - self._told >= _EVERY or state.done == state.total:
            self._told = now
            self.event("progress", phase=state.phase, done=state.done, total=state.total, unit=state.unit)

    def close(self) -> None:
        os.close(self._file)


def is_log(start: bytes) -> bool:
    """Whether a file that starts with these bytes is empty or a log."""
    return start[: len(_START)] in (b"", _START)


@contextmanager
def logged(path: str | None, command: str, asked: Mapping[str, Any], out: str | None = None) -> Iterator[Log | None]:
    """A log around one command: `started`, then `failed` or `interrupted` if it does not succeed.

    Args:
        out: the output, in which no log may be.
    """
    if path is None:
        yield None
        return
    log = Log(path, out=out)
    try:
        log.event("started", command=command, **{name: value for name, value in asked.items() if value is not None})
        yield log
    except EngineError as error:
        with suppress(EngineError):  # the first error matters more than that of the log
            log.event("failed", errors=[one.as_dict() for one in error.errors])
        raise
    except BaseException as error:
        with suppress(EngineError):
            log.event("interrupted", by=type(error).__name__)
        raise
    finally:
        log.close()
