"""The engine beside `cp -r` of the same bytes and beside its peers: time, memory, and whether targets are met.

    python -m benchmarks.bench [--scenes small,large,disk] [--gb 3] [--rounds 5] [--json FILE]

Scenes:
    small       every case and every peer, in memory-backed storage, --gb in size
    large       the tp merge, in memory-backed storage, --large-gb in size
    disk        the tp merge on a disk, from a cold cache to stable storage, --disk-gb in size
    fixed       `engine plan` of many files, `engine lint` of all mappings
    virtual     reading without converting: open, serve and mount beside real files, --gb in size
    cold        the same on a disk, from a cold cache
    footprint   peak memory for 3, 8 and 200 GB of sparse files

Only ratios within one run mean anything. Progress goes to stderr, the tables to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import footprint, virtual
from benchmarks.fixed import planning
from benchmarks.measure import file_system, machine
from benchmarks.rounds import Result, run_group, run_scene
from benchmarks.shapes import slice_of
from benchmarks.table import table
from benchmarks.targets import COLD, DISK, FIXED, FOOTPRINT, LARGE, SMALL, VIRTUAL, judged, verdicts
from benchmarks.ways import Bench

SCENES = (SMALL, LARGE, DISK, FIXED, FOOTPRINT, VIRTUAL, COLD)
SIZES = (3, 8, 8)  # GB of the scenes that convert, as the targets mean them
_MEMORY = Path("/dev") / "shm"


@contextmanager
def folder_in(base: Path) -> Iterator[Path]:
    """A temporary folder."""
    work = Path(tempfile.mkdtemp(prefix="bench-", dir=base))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def memory() -> Path:
    """Memory-backed storage, if there is any."""
    return _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())


def in_memory(folder: Path) -> bool:
    return file_system(folder) in ("tmpfs", "ramfs")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", default=",".join(SCENES), help="what to measure (default: %(default)s)")
    parser.add_argument("--disk", action="store_true", help="the scene `disk` only, in --dir if that is given")
    parser.add_argument("--dir", type=Path, help="where to work (default: memory-backed storage)")
    parser.add_argument("--disk-dir", type=Path, help="a folder on a disk (default: for temporary files)")
    parser.add_argument("--gb", type=float, default=SIZES[0], help="size of the scene `small`, in GB")
    parser.add_argument("--large-gb", type=float, default=SIZES[1])
    parser.add_argument("--disk-gb", type=float, default=SIZES[2])
    parser.add_argument("--footprint-gb", default="3,8,200", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more warms up")
    parser.add_argument("--only", default="", metavar="TEXT", help="ways whose name has this text in it, and cp")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs there, with machine and verdicts")
    found = parser.parse_args(given)
    found.scenes = [DISK] if found.disk else found.scenes.split(",")
    if unknown := set(found.scenes) - set(SCENES):
        parser.error(f"no such scene: {', '.join(sorted(unknown))}")
    found.disk_dir = found.disk_dir or (found.dir if found.disk else None) or Path(tempfile.gettempdir())
    found.dir = found.dir or memory()
    return found


def measured(given: argparse.Namespace) -> Iterator[Result]:
    """The results of every scene asked for, as they come."""

    def small() -> Iterator[Result]:
        with folder_in(given.dir) as work:
            bench = Bench(work, slice_of(given.gb * 1e9), not in_memory(work))
            yield from run_scene(SMALL, bench, bench.groups(), given.rounds, given.only)

    def large() -> Iterator[Result]:
        with folder_in(given.dir) as work:
            bench = Bench(work, slice_of(given.large_gb * 1e9), not in_memory(work))
            yield from run_scene(LARGE, bench, [bench.merge], given.rounds, given.only)

    def disk() -> Iterator[Result]:
        with folder_in(given.disk_dir) as work:
            bench = Bench(work, slice_of(given.disk_gb * 1e9), disk=True)
            yield from run_scene(DISK, bench, [bench.merge], given.rounds, given.only)

    def fixed() -> Iterator[Result]:
        with folder_in(given.dir) as work:
            yield run_group(FIXED, planning(work), given.rounds, disk=False)

    def sparse() -> Iterator[Result]:
        with folder_in(given.dir) as work:
            yield footprint.result(work, [float(gb) for gb in given.footprint_gb.split(",")])

    def unconverted(scene: str, base: Path) -> Iterator[Result]:
        with folder_in(base) as work:
            for group in virtual.groups(work, slice_of(given.gb * 1e9)):
                yield run_group(scene, group.only(given.only), given.rounds, disk=scene == COLD)

    scenes: dict[str, Callable[[], Iterator[Result]]] = {
        SMALL: small, LARGE: large, DISK: disk, FIXED: fixed, FOOTPRINT: sparse,
        VIRTUAL: lambda: unconverted(VIRTUAL, given.dir), COLD: lambda: unconverted(COLD, given.disk_dir),
    }  # fmt: skip
    for scene in given.scenes:
        yield from scenes[scene]()


def main() -> None:
    given = arguments()
    facts: dict[str, Any] = machine() | {"file_systems": {"dir": file_system(given.dir)}}
    if {DISK, COLD} & set(given.scenes):
        facts["file_systems"]["disk"] = file_system(given.disk_dir)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if not isinstance(value, dict)))
    print(", ".join(f"{name}: {value}" for name, value in facts["file_systems"].items()) + "\n")
    results = []
    for result in measured(given):
        print(table(result), flush=True)
        results.append(result)
    found = verdicts(results)
    judged(found)
    if (given.gb, given.large_gb, given.disk_gb) != SIZES:
        print("\nThe targets are meant for the usual sizes; these are others, for trying things out.")
    if given.json:
        data = {"machine": facts, "rounds": given.rounds, "results": [one.as_dict() for one in results]}
        given.json.write_text(json.dumps(data | {"verdicts": found}, indent=1) + "\n")
    if any(one["met"] is False for one in found):
        print("\nnot every target is met", file=sys.stderr)


if __name__ == "__main__":
    main()
