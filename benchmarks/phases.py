"""The engine's command line with a stopwatch: when moving tensors begins and ends, and the first byte of one.

    python -m benchmarks.phases REPORT run --mapping ...

Times are those of the monotonic clock, which all processes share. Not for measuring whole runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.commands import main as cli
from engine.run import runner

_PAYLOAD = 64 * 1024  # bytes of a write that is no header; headers of rank files and small models are less


def install(marks: dict[str, float]) -> None:
    """Have `write_weights` note its begin and end, and the first large write meanwhile."""
    write_weights = runner.write_weights
    plain = {name: getattr(os, name) for name in ("pwritev", "copy_file_range")}

    def note() -> None:
        marks["first"] = time.monotonic()
        for name, function in plain.items():
            setattr(os, name, function)

    def pwritev(descriptor: int, parts: Sequence[Any], offset: int) -> int:
        written: int = plain["pwritev"](descriptor, parts, offset)
        marks.setdefault("any", time.monotonic())
        if written >= _PAYLOAD:
            note()
        return written

    def copy_file_range(*args: Any, **options: Any) -> int:
        moved = plain["copy_file_range"](*args, **options)
        if moved:
            note()
        return moved

    def timed(*args: Any, **options: Any) -> Any:
        marks["begin"] = time.monotonic()
        os.pwritev, os.copy_file_range = pwritev, copy_file_range
        try:
            return write_weights(*args, **options)
        finally:
            marks["end"] = time.monotonic()

    runner.write_weights = timed


def main() -> None:
    report = Path(sys.argv.pop(1))
    marks: dict[str, float] = {}
    install(marks)
    try:
        cli.main()
    finally:
        if "end" in marks:  # a model of small tensors only has no large write
            marks.setdefault("first", marks.get("any", marks["end"]))
            report.write_text(json.dumps(marks) + "\n")


if __name__ == "__main__":
    main()
