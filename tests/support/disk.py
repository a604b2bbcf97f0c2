"""What lies on a disk, and a disk that fails."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from engine.storage.sinks import SinkFiles


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def partials(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f".{out.name}.*"))


class Disk:
    """A disk that fails after so many writes of payload."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, good: int) -> None:
        write = SinkFiles.write
        self.left = good

        def limited(sinks: SinkFiles, file: int, offset: int, data: bytes | memoryview) -> None:
            self.left -= any(isinstance(part, memoryview) for part in data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            write(sinks, file, offset, data)

        monkeypatch.setattr(SinkFiles, "write", limited)


def tree(folder: Path) -> dict[bytes, object]:
    """Every path below a folder, with what lies there."""
    found: dict[bytes, object] = {}
    for here, folders, files in os.walk(os.fsencode(folder)):
        for name in folders + files:
            path = os.path.join(here, name)
            kind = os.lstat(path)
            if stat.S_ISREG(kind.st_mode):
                with open(path, "rb") as file:
                    found[path] = hashlib.sha256(file.read()).digest()
            else:
                found[path] = os.readlink(path) if stat.S_ISLNK(kind.st_mode) else kind.st_mode
    return found
