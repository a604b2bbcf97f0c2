"""Processes of their own that start at once: forks of the tests' process, with all that it has loaded.

What starting Python itself may change, such as what is imported, needs a new interpreter instead.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from engine.commands.main import main


def become(work: Callable[[], object]) -> NoReturn:
    """In a process that was just forked: work on the streams 0, 1 and 2, and end as a program does."""
    code: object = 1
    gc.freeze()  # what the tests left, such as a client of Dask, is not closed here, where its threads are not
    try:
        for number, (name, errors) in enumerate(
            {"stdin": "surrogateescape", "stdout": "strict", "stderr": "backslashreplace"}.items()
        ):
            stream = open(number, "w" if number else "r", buffering=1, errors=errors, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.showwarning = lambda *_: None  # pytest's gathers them
        sys.excepthook = sys.__excepthook__
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def become_engine(arguments: Sequence[str | Path]) -> NoReturn:
    """In a process that was just forked: be the command line."""
    sys.argv = ["engine", *map(str, arguments)]
    become(main)


def start_engine(*arguments: str | Path, cwd: Path) -> int:
    """Begin a command whose words nobody reads; gives the process, which is to be waited for."""
    child = os.fork()
    if child == 0:
        _be_in(cwd, *(os.open(os.devnull, os.O_RDWR) for _ in range(3)))
        become_engine(arguments)
    return child


def run_engine(
    *arguments: str | Path, cwd: Path, before: Callable[[], None] = lambda: None
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line to its end.

    Args:
        before: called in the process, before it is the command line.
    """

    def work() -> None:
        before()
        become_engine(arguments)

    return run(work, cwd)


def run(work: Callable[[], object], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Call a function in a process of its own, to its end."""
    (out, into_out), (err, into_err) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _be_in(cwd, os.open(os.devnull, os.O_RDONLY), into_out, into_err)
        become(work)
    os.close(into_out)
    os.close(into_err)
    with ThreadPoolExecutor(2) as readers, open(out, "rb") as stdout, open(err, "rb") as stderr:
        said = list(readers.map(lambda stream: stream.read(), (stdout, stderr)))
    return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *said)


def _be_in(cwd: Path, *streams: int) -> None:
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(cwd)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
