"""Time against bytes, against tensor-parallel ranks, against layers; `cp -r` beside the engine. Draws plots.

    python -m benchmarks.scaling [--gb 8] [--rounds 3] [--series bytes,ranks,layers]
    python -m benchmarks.scaling --draw-only

Figures go to scaling.json beside this file, and a plot of each series to scaling-*.svg there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench import folder_in, in_memory, memory
from benchmarks.generate import generate
from benchmarks.measure import machine
from benchmarks.rounds import empty, run_group
from benchmarks.shapes import Ranks, Shape, Spec, slice_of
from benchmarks.ways import Bench, Group

HERE = Path(__file__).parent
DATA = HERE / "scaling.json"
RUN, REVERSE = "engine run", "engine reverse"

Point = tuple[float, Shape, int]  # where it is on the axis, the model, tensor-parallel ranks


def by_bytes(gb: float) -> Iterator[Point]:
    """A model and its halves, quarters and eighths, all with layers of the same width."""
    wide = slice_of(gb * 1e9)
    for part in (8, 4, 2, 1):
        layers = max(1, wide.layers // part)
        shape = replace(wide, layers=layers, vocab=wide.vocab * layers // wide.layers // 256 * 256)
        yield shape.nbytes / 1e9, shape, 4


def by_ranks(gb: float) -> Iterator[Point]:
    """One model of a quarter of the size, cut into 1 to 64 ranks: it has a group of queries for each."""
    wide = Shape(1, 4096, 14336, 8192, 64, 64) if gb >= 2 else Shape(1, 1024, 3584, 2048, 64, 64)
    shape = replace(wide, layers=max(1, round(gb / 4 * 1e9 / wide.layer_bytes)))
    for power in range(7):
        yield 2**power, shape, 2**power


def by_layers(gb: float) -> Iterator[Point]:
    """The same bytes in ever more and narrower layers."""
    least = max(1, round(gb / 4 * 1e9 / Shape(1, groups=32).layer_bytes))
    for power in range(4):
        hidden, layers = 4096 >> power, least * 4**power
        yield layers, Shape(layers, hidden, hidden * 7 // 2, 4096 << power, hidden // 64, hidden // 64), 4


SERIES: dict[str, tuple[Callable[[float], Iterator[Point]], str]] = {
    "bytes": (by_bytes, "size of the checkpoint, GB"),
    "ranks": (by_ranks, "tensor-parallel ranks"),
    "layers": (by_layers, "layers, at the same bytes in all"),
}


def group_of(bench: Bench, name: str, tp: int) -> Group:
    """`cp`, the engine's merge into one file, and its way back."""
    source, whole = bench.work / "step", bench.work / "whole"
    generate(source, Spec(bench.shape, Ranks(tp)))
    settings = ["--set", "mlp_letters=w2_is_down"]  # at some widths shapes alone do not tell
    one = [*settings, "--max-shard-size", "1TB"]
    run = bench.engine("run", source, ["run", *one])[0]
    bench.made(run).rename(whole)
    back = bench.engine("reverse", whole, ["reverse", *settings, "--tp", str(tp)])[0]
    return Group(name, "", (bench.cp(source), run, back))


def measure_series(name: str, gb: float, rounds: int, base: Path) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    with folder_in(base) as work:
        for x, shape, tp in SERIES[name][0](gb):
            bench = Bench(work, shape, not in_memory(work))
            result = run_group("scaling", group_of(bench, f"{name} {x:.4g}", tp), rounds, bench.disk)
            walls = {way: [run.wall for run in runs] for way, runs in result.runs.items()}
            points.append({"x": x, "tp": tp, "layers": shape.layers, "bytes": shape.nbytes, "seconds": walls})
            empty(work)
    return points


def draw(data: dict[str, Any], folder: Path = HERE) -> list[Path]:
    """One plot per series: medians as lines, best and worst runs as bars."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "font.size": 10, "axes.spines.top": False,
                                "axes.spines.right": False, "legend.frameon": False})  # fmt: skip
    from matplotlib import pyplot

    drawn = []
    for name, points in data["series"].items():
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        for number, way in enumerate(points[0]["seconds"]):
            kept = [point for point in points if point["seconds"].get(way)]
            runs = [point["seconds"][way] for point in kept]
            middle = [statistics.median(one) for one in runs]
            spread = [[m - min(one) for m, one in zip(middle, runs, strict=True)],
                      [max(one) - m for m, one in zip(middle, runs, strict=True)]]  # fmt: skip
            style = {"color": f"C{number}", "marker": "os^"[number % 3], "linestyle": ("--", "-", "-")[number % 3]}
            axes.errorbar([p["x"] for p in kept], middle, spread, label=way, markersize=4, capsize=2, **style)
        axes.set_xlabel(SERIES[name][1])
        axes.set_ylabel("seconds, whole process")
        axes.set_ylim(bottom=0)
        if name == "bytes":
            axes.set_xlim(left=0)
        else:
            axes.set_xscale("log", base=2)
            ticks = [point["x"] for point in points]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            size = max(point["bytes"] for point in points) / 1e9
            axes.set_title(f"{size:.1f} GB" if size >= 1 else f"{size * 1000:.0f} MB", fontsize=10)
        axes.grid(axis="y", linewidth=0.4)
        axes.legend()
        path = folder / f"scaling-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8, help="the largest size; ranks and layers take a quarter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--series", default=",".join(SERIES), help="default: %(default)s")
    parser.add_argument("--dir", type=Path, default=memory(), help="where to work (default: memory-backed storage)")
    parser.add_argument("--out", type=Path, default=HERE, help="where figures and plots go (default: beside this file)")
    parser.add_argument("--draw-only", action="store_true", help="draw the figures that are there")
    given = parser.parse_args()
    file = given.out / DATA.name
    if not given.draw_only:
        old = json.loads(file.read_text())["series"] if file.exists() else {}
        for name in given.series.split(","):
            old[name] = measure_series(name, given.gb, given.rounds, given.dir)
            file.write_text(json.dumps({"machine": machine(), "rounds": given.rounds, "series": old}, indent=1) + "\n")
    for path in draw(json.loads(file.read_text()), given.out):
        print(path)


if __name__ == "__main__":
    main()
