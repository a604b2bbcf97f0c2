"""What a conversion costs whatever its size: planning many small files, checking mappings."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.generate import write_sparse
from benchmarks.shapes import MAPPING, Ranks, Shape, Spec
from benchmarks.targets import PLANS
from benchmarks.ways import Group, Way

STAGES = 16
TINY = Shape(layers=64, hidden=128, ffn=768, vocab=1024, heads=64, groups=64)


def planning(work: Path, shape: Shape = TINY) -> Group:
    """`engine plan` of checkpoints of 16 pipeline stages and ever more tensor-parallel ranks, and `engine lint`."""
    ways = []
    for files, name in PLANS.items():
        folder = work / f"step{files}"
        write_sparse(folder, Spec(shape, Ranks(files // STAGES, STAGES)))
        ways.append(_way(name, folder, ["plan", "--mapping", MAPPING, "--src", str(folder)]))
    ways.append(replace(_way("engine lint", work, ["lint"]), source=work))
    return Group("plan", "without any payload", tuple(ways))


def _way(name: str, source: Path, arguments: list[str]) -> Way:
    return Way(name, (sys.executable, "-m", "engine", *arguments), source, 0, source / "none")
