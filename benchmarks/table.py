"""A group's runs as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.measure import Measured
from benchmarks.rounds import Result
from benchmarks.ways import CP

_HEAD = (
    "| way | wall s, median (min–max) | ratio to `cp`, medians | best runs | CPU s | anonymous | mapped | peak MiB |"
)


def table(result: Result) -> str:
    """Medians with their spread, ratios to `cp` of medians and of best runs, most memory in MiB."""
    plain = [run.wall for run in result.runs.get(CP, ())]
    lines = [f"**{result.scene}: {result.title}**", "", _HEAD, "|---|---|---|---|---|---|---|---|"]
    lines += [_row(way, runs, plain) for way, runs in result.runs.items() if runs]
    if result.nbytes:
        lines[0] += f", {result.nbytes / 1e9:.2f} GB"
    timed = {way: runs for way, runs in result.runs.items() if runs and runs[0].copying is not None}
    if timed:
        lines += [
            "",
            "| way | copying s, median (min–max) | ratio to `cp` | start to first byte s |",
            "|---|---|---|---|",
        ]
        lines += [_phases(way, runs, plain) for way, runs in timed.items()]
    lines += ["", *(f"Left out: {way} {why}." for way, why in result.left_out.items())]
    return "\n".join(lines).rstrip() + "\n"


def _row(way: str, runs: list[Measured], plain: list[float]) -> str:
    walls = [run.wall for run in runs]
    ratios = (_ratio(statistics.median, walls, plain), _ratio(min, walls, plain))
    cells = [f"`{way}`" if way == CP else way, _spread(walls), *ratios]
    cells.append(f"{statistics.median(run.cpu for run in runs):.2f}")
    cells += [f"{max(getattr(run, name) for run in runs):.0f}" for name in ("anonymous", "mapped", "peak")]
    return f"| {' | '.join(cells)} |"


def _phases(way: str, runs: list[Measured], plain: list[float]) -> str:
    copying = [run.copying for run in runs if run.copying is not None]
    first = [run.first for run in runs if run.first is not None]
    ratio = _ratio(statistics.median, copying, plain)
    return f"| {way} | {_spread(copying)} | {ratio} | {_spread(first)} |"


def _ratio(of: Callable[[list[float]], float], walls: list[float], plain: list[float]) -> str:
    return f"{of(walls) / of(plain):.2f}" if plain else "–"


def _spread(values: list[float]) -> str:
    """
    >>> _spread([1.0, 2.0, 4.0])
    '2.00 (1.00–4.00)'
    """
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
