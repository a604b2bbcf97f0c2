"""Opening regular files only: never a pipe or a device, which could block or have no end."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from engine.errors import EngineError, Place


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; E305 for anything else, without blocking on a fifo."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise EngineError(
            "E305",
            "a file cannot be read",
            place=Place(str(path)),
            got=error.strerror,
            fix="Check the file and its permissions.",
        ) from error
    check_regular(descriptor, path)
    return os.fdopen(descriptor, "rb")


def check_regular(descriptor: int, path: Path) -> None:
    """E305 for a folder, a pipe or a device, which is closed."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise EngineError("E305", "not a regular file", place=Place(str(path)), fix="Put the checkpoint's file there.")
