"""Peak memory of `engine run` for checkpoints larger than any storage at hand.

    python -m benchmarks.footprint [--gb 3,8,200] [--dir FOLDER] [--no-digests]

The rank files are sparse: their payload is holes, which the engine reads like any other bytes. What it
writes is counted and thrown away. With digests, as by default, it has to read and hold all bytes;
without, the system would move most of them unseen, and less would be proved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.generate import write_sparse
from benchmarks.measure import Measured, measure
from benchmarks.rounds import Result
from benchmarks.shapes import MAPPING, Ranks, Spec, slice_of
from benchmarks.table import table

_WIDE = 40e9  # bytes; larger models are cut into more ranks


def swallow(counts: Counter[str]) -> None:
    """Replace, in this process, what writes tensors; small files are written as ever."""

    def pwritev(_: int, parts: Sequence[Any], offset: int) -> int:
        nbytes = sum(map(len, parts))
        counts["written"] += nbytes
        return nbytes

    def copy_file_range(source: int, target: int, count: int, *offsets: int, **named: int) -> int:
        counts["moved"] += count
        return count

    def posix_fallocate(_: int, offset: int, length: int) -> None:
        counts["room"] += length

    def fsync(_: int) -> None:
        counts["syncs"] += 1

    os.pwritev, os.copy_file_range = pwritev, copy_file_range
    os.posix_fallocate, os.fsync = posix_fallocate, fsync  # type: ignore[assignment]
    shutil.disk_usage = lambda path: SimpleNamespace(total=1 << 50, used=0, free=1 << 50)  # type: ignore[assignment]


def swallowing(report: Path, arguments: list[str]) -> None:
    """The engine's command line, with nothing written; the counts go into a report."""
    from engine.commands import main as cli

    counts: Counter[str] = Counter()
    swallow(counts)
    sys.argv[1:] = arguments
    try:
        cli.main()
    finally:
        report.write_text(json.dumps(counts) + "\n")


def footprint(work: Path, gb: float, digests: bool = True) -> tuple[Measured, int, Counter[str]]:
    """Convert a sparse checkpoint of so many GB.

    Returns:
        What was measured, the bytes of the source, and what would have been written.
    """
    source, out, report = work / "step", work / "out", work / "counts.json"
    nbytes = write_sparse(source, Spec(slice_of(gb * 1e9), Ranks(8 if gb * 1e9 > _WIDE else 4)))
    command = [sys.executable, "-m", "benchmarks.footprint", "--swallow", str(report), "run", "--mapping", MAPPING]
    command += ["--quiet", "--src", str(source), "--out", str(out), *([] if digests else ["--no-digests"])]
    try:
        measured = measure(command)
        return measured, nbytes, Counter(json.loads(report.read_text()))
    finally:
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)


def result(work: Path, sizes: Sequence[float], digests: bool = True) -> Result:
    """One run at each size, in GB."""
    runs: dict[str, list[Measured]] = {}
    for gb in sizes:
        measured, nbytes, counts = footprint(work, gb, digests)
        runs[f"{gb:g} GB"] = [measured]
        written = counts["written"] + counts["moved"]
        print(f"footprint: read from {nbytes / 1e9:.2f} GB, {written / 1e9:.2f} GB written", file=sys.stderr)
    return Result("footprint", "run", "sparse files, nothing written", 0, runs, {})


def main() -> None:
    if sys.argv[1:2] == ["--swallow"]:
        swallowing(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", default="3,8,200", help="sizes (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="where to work; takes little room")
    parser.add_argument("--no-digests", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.dir) as work:
        print(table(result(Path(work), [float(gb) for gb in given.gb.split(",")], not given.no_digests)))


if __name__ == "__main__":
    main()
