"""What the engine has to keep to, as data, and whether it did."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Measured
from benchmarks.rounds import Result
from benchmarks.ways import CP

SMALL, LARGE, DISK, FIXED, FOOTPRINT = "small", "large", "disk", "fixed", "footprint"
VIRTUAL, COLD = "virtual", "cold"

Runs = dict[tuple[str, str, str], list[Measured]]  # (scene, group, way) → its runs
MERGE, STOPWATCH = "engine run, default files", "engine run, stopwatch"
PLANS = {16: "engine plan, 16 files", 256: "engine plan, 256 files", 1024: "engine plan, 1024 files"}


@dataclass(frozen=True)
class Figure:
    """A measure of a way: the median of a time, the most of a memory."""

    scene: str
    group: str
    way: str
    measure: str = "wall"

    def of(self, runs: Runs) -> float | None:
        """None when it was not measured."""
        values = [getattr(run, self.measure) for run in runs.get((self.scene, self.group, self.way), ())]
        if not values or None in values:
            return None
        return float(max(values) if self.measure == "peak" else statistics.median(values))


@dataclass(frozen=True)
class Target:
    """A figure at most `bound`; with `against`, as a ratio to another."""

    text: str
    figure: Figure
    bound: float
    unit: str = ""
    against: Figure | None = None

    def value(self, runs: Runs) -> float | None:
        found = self.figure.of(runs)
        if self.against is None or found is None:
            return found
        other = self.against.of(runs)
        return found / other if other else None


@dataclass(frozen=True)
class Linear:
    """Time per rank file of large checkpoints, as a ratio to that of smaller ones; the smallest is the fixed cost."""

    text: str
    bound: float
    unit: str = ""

    def value(self, runs: Runs) -> float | None:
        least, some, many = (Figure(FIXED, "plan", way).of(runs) for way in PLANS.values())
        low, middle, high = PLANS
        if least is None or some is None or many is None or some <= least:
            return None
        return ((many - least) / (high - low)) / ((some - least) / (middle - low))


def _cp(scene: str, group: str = "merge") -> Figure:
    return Figure(scene, group, CP)


def _reading(scene: str, where: str) -> tuple[Target, ...]:
    """What reading without converting has to keep to, beside the real files read the same way."""

    def read(way: str) -> Figure:
        return Figure(scene, "read", f"read, {way}", "copying")

    real = read("safe_open of the real file"), read("real file"), read("served real file")
    return (
        Target(f"open, all tensors{where}", read("open"), 1.25, "× safe_open", real[0]),
        Target(f"mount, all bytes{where}", read("mount"), 1.25, "× the real file", real[1]),
        Target(f"serve, all bytes{where}", read("serve"), 1.0, "× the real file, served", real[2]),
    )


_WHOLE = Figure(SMALL, "merge", MERGE)
_PEAK = Figure(FOOTPRINT, "run", "3 GB", "peak")

TARGETS: tuple[Target | Linear, ...] = (
    Target("copying phase, tp merge, as many workers as cores",
           Figure(SMALL, "merge", STOPWATCH, "copying"), 1.0, "× cp", _cp(SMALL)),
    Target("copying phase, tp merge, one worker",
           Figure(SMALL, "merge", f"{STOPWATCH}, one worker", "copying"), 1.25, "× cp", _cp(SMALL)),
    Target("whole process, tp merge", _WHOLE, 1.5, "× cp", _cp(SMALL)),
    Target("whole process, large tp merge", Figure(LARGE, "merge", MERGE), 1.15, "× cp", _cp(LARGE)),
    Target("rotary permutation", Figure(SMALL, "merge", "engine run, rotary pairs"), 1.10, "× without", _WHOLE),
    Target("to float32", Figure(SMALL, "cast", "engine run, to float32"), 1.3, "× cp of the output",
           _cp(SMALL, "cast")),
    Target("on disk, cold, to stable storage", Figure(DISK, "merge", MERGE), 1.1, "× cp", _cp(DISK)),
    Target("peak memory, tp merge", Figure(SMALL, "merge", MERGE, "peak"), 128, "MiB"),
    Target("peak memory, 3 GB of sparse files", _PEAK, 128, "MiB"),
    Target("peak memory, 8 GB", Figure(FOOTPRINT, "run", "8 GB", "peak"), 1.1, "× 3 GB", _PEAK),
    Target("peak memory, 200 GB", Figure(FOOTPRINT, "run", "200 GB", "peak"), 1.1, "× 3 GB", _PEAK),
    Target("start to first byte written", Figure(SMALL, "merge", STOPWATCH, "first"), 0.5, "s"),
    Target("plan, 1,024 rank files", Figure(FIXED, "plan", PLANS[1024]), 3, "s"),
    Linear("plan, time per file of 1,024", 1.25, "× of 256"),
    *_reading(VIRTUAL, ""),
    *_reading(COLD, ", on disk, cold"),
    Target("lint of all mappings", Figure(FIXED, "plan", "engine lint"), 1, "s"),
)  # fmt: skip


def runs_of(results: Sequence[Result]) -> Runs:
    return {(one.scene, one.group, way): runs for one in results for way, runs in one.runs.items()}


def verdicts(results: Sequence[Result], targets: Sequence[Target | Linear] = TARGETS) -> list[dict[str, Any]]:
    """For each target its figure, the bound, and whether it was met; None when it was not measured."""
    runs = runs_of(results)
    found = []
    for target in targets:
        value = target.value(runs)
        met = None if value is None else value <= target.bound
        found.append({"target": target.text, "value": value, "bound": target.bound, "unit": target.unit, "met": met})
    return found


def judged(found: Sequence[dict[str, Any]], write: Callable[[str], None] = print) -> None:
    """Print verdicts as a table."""
    write("| target | figure | bound | |\n|---|---|---|---|")
    for one in found:
        value = "–" if one["value"] is None else f"{one['value']:.3g} {one['unit']}"
        word = {True: "met", False: "**NOT met**", None: "not measured"}[one["met"]]
        write(f"| {one['target']} | {value} | ≤ {one['bound']:g} | {word} |")
