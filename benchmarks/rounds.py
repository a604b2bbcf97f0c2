"""Rounds: every way of a group in turn, in another order each round, so that a slow moment meets all alike."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Measured, available, evict, measure, touch_memory
from benchmarks.ways import CP, Bench, Group, Way

_SPARE = 1 << 30  # bytes of memory left to the system

Say = Callable[[str], None]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Result:
    """The runs of a group's ways.

    Attributes:
        scene: where and at what size it was measured.
        nbytes: of the source that `cp` copies.
        left_out: ways without room, and why.
    """

    scene: str
    group: str
    title: str
    nbytes: int
    runs: dict[str, list[Measured]]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_group(scene: str, group: Group, rounds: int, disk: bool, say: Say = _say) -> Result:
    """Measure a group's ways: one round to warm up, then so many that count."""
    ways, left_out = with_room(group.ways, disk)
    order = random.Random(group.name)
    runs: dict[str, list[Measured]] = {way.name: [] for way in ways}
    for round_ in range(rounds + 1):
        say(f"{scene}, {group.name}: {f'round {round_} of {rounds}' if round_ else 'warming up'}, {len(ways)} ways")
        for way in order.sample(ways, len(ways)):
            measured = run_way(way, disk)
            if round_:
                runs[way.name].append(measured)
    nbytes = next((way.writes for way in group.ways if way.name == CP), 0)
    return Result(scene, group.name, group.title, nbytes, runs, left_out)


def run_way(way: Way, disk: bool) -> Measured:
    """One measured run, prepared and cleaned up after."""
    shutil.rmtree(way.makes, ignore_errors=True)
    if disk:
        evict([way.source])
    else:
        touch_memory(way.writes + way.holds)
    try:
        return measure(way.command, way.phases)
    finally:
        shutil.rmtree(way.makes, ignore_errors=True)


def with_room(ways: Sequence[Way], disk: bool) -> tuple[list[Way], dict[str, str]]:
    """The ways that fit the memory there is: in memory-backed storage the output takes some too."""
    there, fit, left_out = available() - _SPARE, [], {}
    for way in ways:
        need = way.holds + (0 if disk else way.writes)
        if need <= there:
            fit.append(way)
        else:
            left_out[way.name] = f"needs {need / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are there"
    return fit, left_out


def run_scene(scene: str, bench: Bench, makers: Sequence[Callable[[], Group]], rounds: int, only: str) -> list[Result]:
    """Measure groups one after the other, each with storage of its own."""
    results = []
    for make in makers:
        group = make().only(only)
        if len(group.ways) > 1:
            results.append(run_group(scene, group, rounds, bench.disk))
        empty(bench.work)
    return results


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
