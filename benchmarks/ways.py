"""What is compared: groups of ways that share a source, each group with a `cp` of its own bytes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.generate import generate, write_config
from benchmarks.measure import measure
from benchmarks.shapes import MAPPING, Ranks, Shape, Spec

CP = "cp -r"
TOLD = ", digests"  # ends the name of a way that computes them


@dataclass(frozen=True)
class Way:
    """One process to measure.

    Attributes:
        source: what it reads, to be evicted before a cold run.
        writes: bytes of output; `holds`: further bytes of memory that it takes.
        makes: what it leaves, to be removed.
        phases: where it reports to, if it runs with a stopwatch.
    """

    name: str
    command: tuple[str, ...]
    source: Path
    writes: int
    makes: Path
    holds: int = 0
    phases: Path | None = None


@dataclass(frozen=True)
class Group:
    """Ways that are measured in turn, and what they are all compared with."""

    name: str
    title: str
    ways: tuple[Way, ...]

    def only(self, text: str) -> Group:
        """The ways whose name has a text in it, and `cp`."""
        return replace(self, ways=tuple(way for way in self.ways if way.name == CP or text in way.name))


class Bench:
    """Makes groups in a folder."""

    def __init__(self, work: Path, shape: Shape, disk: bool) -> None:
        self.work, self.shape, self.disk = work, shape, disk
        self.out = work / "out"

    def engine(self, name: str, source: Path, arguments: list[str], writes: int | None = None) -> tuple[Way, Way]:
        """An engine's command without and with digests."""
        command = [sys.executable, "-m", "engine", arguments[0], "--mapping", MAPPING, "--quiet"]
        command += ["--src", str(source), "--out", str(self.out), *arguments[1:]]
        way = Way(f"engine {name}", tuple(command), source, writes or self.shape.nbytes, self.out)
        return replace(way, command=(*way.command, "--no-digests")), replace(way, name=way.name + TOLD)

    def stopwatch(self, name: str, source: Path, arguments: list[str]) -> Way:
        way = self.engine(name, source, arguments)[0]
        report = self.work / "phases.json"
        command = (sys.executable, "-m", "benchmarks.phases", str(report), *way.command[3:])
        return replace(way, command=command, phases=report)

    def cp(self, source: Path) -> Way:
        """The baseline: to stable storage on a disk, as the engine writes."""
        command: tuple[str, ...] = ("cp", "-r", str(source), str(self.out))
        if self.disk:
            command = ("sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", str(source), str(self.out))
        return Way(CP, command, source, size_of(source), self.out)

    def source(self, name: str, ranks: Ranks) -> Path:
        folder = self.work / name
        generate(folder, Spec(self.shape, ranks))
        return folder

    def merge(self) -> Group:
        """Four tensor-parallel ranks into one model: the case that everything else is measured against."""
        source = self.source("step", Ranks(4))
        quarter = str(int(self.shape.nbytes / 3.9))
        ways = [
            self.cp(source),
            *self.engine("run, one file", source, ["run", "--max-shard-size", "1TB"]),
            *self.engine("run, default files", source, ["run"]),
            *self.engine("run, four files", source, ["run", "--max-shard-size", quarter]),
            *self.engine("run, one worker", source, ["run", "--workers", "1"]),
            self.stopwatch("run, stopwatch", source, ["run"]),
            self.stopwatch("run, stopwatch, one worker", source, ["run", "--workers", "1"]),
        ]
        return Group("merge", "tp 4 → Hugging Face", tuple(ways))

    def all_of_tp(self) -> Group:
        """As `merge`, with everything else that starts from such a checkpoint, and the peers."""
        group = self.merge()
        source = group.ways[0].source
        normalising = self.work / "norm_head"
        shutil.copytree(source, normalising, copy_function=lambda one, other: Path(other).hardlink_to(one))
        (normalising / "model_config.pt").unlink()
        write_config(normalising, Spec(self.shape, norm_head=True))
        ways = [
            *group.ways,
            *self.engine("run, rotary pairs", source, ["run", "--set", "rotary=pairs"]),
            *self.engine("run, norm_head", normalising, ["run"]),
            *self.engine("reshard, tp 4 to 2", source, ["reshard", "--tp", "2"]),
            *self.engine("reshard, tp 4 to 8", source, ["reshard", "--tp", "8"]),
            *self.engine("reshard, to isp wp 8", source, ["reshard", "--mode", "isp", "--tp", "8", "--wp", "8"]),
            *self.peers(source),
        ]
        return replace(group, ways=tuple(ways))

    def peers(self, source: Path) -> list[Way]:
        size = self.shape.nbytes

        def peer(name: str, what: str, source: Path, holds: int) -> Way:
            command = (sys.executable, "-m", "benchmarks.peers", what, str(source), str(self.out))
            return Way(f"peer: {name}", command, source, size, self.out, holds)

        found = [
            peer("torch.load, cat, save_file", "load", source, 2 * size),
            peer("torch.load(mmap), cat, save_file", "mmap", source, size),
            peer("torch.load(mmap), cat, save_file, four files", "files", source, size // 4),
        ]
        sharded = self.work / "sharded"
        try:
            measure((sys.executable, "-m", "benchmarks.peers", "save", str(source), str(sharded)))
        except SystemExit as error:  # torch is too old, or its processes cannot meet
            print(f"torch's consolidation is left out: {error}", file=sys.stderr)
            shutil.rmtree(sharded, ignore_errors=True)
            return found
        return [*found, peer("torch's consolidation, four files", "consolidate", sharded, size // 4)]

    def cast(self) -> Group:
        """To float32, beside a copy of what that makes, which is twice the size of its source."""
        source = self.source("step", Ranks(4))
        large = self.made(self.engine("", source, ["run", "--dtype", "float32"])[0])
        ways = self.engine("run, to float32", source, ["run", "--dtype", "float32"], size_of(large))
        return Group("cast", "tp 4 → Hugging Face in float32; `cp -r` is of the larger output", (self.cp(large), *ways))

    def reverse(self) -> Group:
        source = self.source("step", Ranks(4))
        whole = self.made(self.engine("", source, ["run"])[0])
        shutil.rmtree(source)
        ways = [
            self.cp(whole),
            *self.engine("reverse, tp 4", whole, ["reverse", "--tp", "4"]),
            *self.engine("reverse, tp 8 pp 2", whole, ["reverse", "--tp", "8", "--pp", "2"]),
        ]
        return Group("reverse", "Hugging Face → rank files", tuple(ways))

    def pipeline(self) -> Group:
        source = self.source("pipeline", Ranks(2, 2))
        ways = self.engine("run, tp 2 pp 2", source, ["run"])
        return Group("pipeline", "tp 2, pp 2 → Hugging Face", (self.cp(source), *ways))

    def chunked(self) -> Group:
        source = self.source("chunked", Ranks(2, 2, 2))
        ways = self.engine("run, tp 2 pp 2, two chunks", source, ["run"])
        return Group("chunked", "tp 2, pp 2, interleaved → Hugging Face", (self.cp(source), *ways))

    def made(self, way: Way) -> Path:
        """The output of a way, kept as a source of others."""
        measure(way.command)
        return self.out.rename(self.work / "made")

    def groups(self) -> tuple[Callable[[], Group], ...]:
        return (self.all_of_tp, self.cast, self.reverse, self.pipeline, self.chunked)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
