"""A terminal of so many columns, in which a test runs a command and reads the screen as a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.forked import become_engine

_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b[=>]|\x1b\][^\x07]*\x07")
_LONGEST = 120  # seconds
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Screen:
    """What stood on the terminal at the end, and everything that was ever written to it."""

    text: str
    code: int
    written: str


def run_in_terminal(command: Sequence[str], cwd: Path, *, columns: int = 80) -> Screen:
    """Run a command in a pseudo-terminal.

    Args:
        command: `engine` is the one of this checkout, forked with all that the tests have loaded.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        paths = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])
        variables = {**kept, "TERM": "xterm", "PYTHONPATH": paths}
        if command[0] != "engine":
            os.execvpe(command[0], command, variables)
        os.environ.clear()
        os.environ.update(variables)
        become_engine(command[1:])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    raw, deadline = b"", time.monotonic() + _LONGEST
    while True:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"{command} takes over {_LONGEST} s; so far:\n{raw.decode(errors='replace')}")
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:
            break
        if not data:
            break
        raw += data
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    written = raw.decode()
    return Screen(shown(written), os.waitstatus_to_exitcode(status), written)


def shown(written: str) -> str:
    """The lines that stand on a terminal, of what was written to it: lines may be erased and written again.

    >>> shown("one\\r\\ntwo\\x1b[2K\\rthree\\r\\n")
    'one\\nthree\\n'
    """
    lines, row, column, at = [""], 0, 0, 0
    while at < len(written):
        found = _SEQUENCE.match(written, at)
        if found is not None:
            at = found.end()
            kind, number = found[2], (found[1] or "")
            count = int(number) if number.isdecimal() else 1
            if kind == "A":
                row = max(0, row - count)
            elif kind == "K":
                lines[row] = "" if number == "2" else lines[row][:column]
            elif kind == "J":
                lines[row], lines[row + 1 :] = lines[row][:column], []
            continue
        char, at = written[at], at + 1
        if char == "\r":
            column = 0
        elif char == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + char + line[column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines)
