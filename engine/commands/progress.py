"""Progress of a run: bytes, rate and time left; a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from engine.commands.say import say

if TYPE_CHECKING:
    from engine.run.meter import Progress

    Listener = Callable[[Progress], None] | None


@contextmanager
def progress(*, show: bool, doing: str = "converting", also: Listener = None) -> Iterator[Listener]:
    """A listener for a run: a live bar on a terminal, now and then a plain line elsewhere.

    Args:
        also: another listener that is told the same.
    """
    if not show:
        yield also
    elif sys.stderr.isatty():
        with _bar(doing) as listener:
            yield _both(listener, also)
    else:
        yield _both(plain_progress(lambda line: say(line, err=True)), also)


def _both(one: Listener, other: Listener) -> Listener:
    if one is None or other is None:
        return one or other

    def listen(state: Progress) -> None:
        one(state)
        other(state)

    return listen


@contextmanager
def _bar(doing: str) -> Iterator[Listener]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    no_color = click.get_current_context().color is False
    with Bar(*columns, console=Console(stderr=True, no_color=no_color), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda state: bar.update(task, completed=state.done_bytes, total=state.total_bytes)


def plain_progress(
    write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[Progress], None]:
    """A line at every tenth of the way, and after five seconds without one."""
    from engine.show.text import amount, duration

    started = last = clock()
    tenth = 0

    def listen(state: Progress) -> None:
        nonlocal last, tenth
        now = clock()
        reached = 10 if not state.total_bytes else 10 * state.done_bytes // state.total_bytes
        if reached == tenth and now - last < 5:
            return
        last, tenth = now, reached
        rate = state.done_bytes / max(now - started, 1e-3)
        line = f"{10 * state.done_bytes * 10 // max(state.total_bytes, 1):3d} %  {amount(state.done_bytes)} of "
        line += f"{amount(state.total_bytes)}, {amount(rate)}/s"
        if rate and state.done_bytes < state.total_bytes:
            line += f", {duration((state.total_bytes - state.done_bytes) / rate)} left"
        write(line)

    return listen
