"""What the functions of the API share: reading a checkpoint before planning, and reporting."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.language.model import Layout

if TYPE_CHECKING:
    from engine.plan.model import Plan
    from engine.plan.planner import Checkpoint


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    out: Path
    tensors: int
    bytes: int
    seconds: float
    variants: Mapping[str, str]
    files: tuple[str, ...]
    notices: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "variants": dict(self.variants),
            "files": list(self.files),
            "notices": list(self.notices),
        }


def read_checkpoint(src: Path | str, layout: Layout) -> Checkpoint:
    """Index a training checkpoint: the rank grid, every tensor's header and the configurations.

    No payload is read. Raises EngineError E2xx and E3xx.
    """
    from engine.checkpoint.folder import list_folder, read_folder_config, read_headers
    from engine.plan.planner import Checkpoint
    from engine.plan.ranks import check_claims, read_grid

    folder = Path(src)
    grid = read_grid(list_folder(folder), layout, str(folder))
    config = read_folder_config(folder, layout.config_file, layout.config_format, required=True)
    training: dict[str, Any] = {}
    if layout.training_file is not None and layout.training_format is not None:
        training = read_folder_config(folder, layout.training_file, layout.training_format, required=False)
        check_claims(grid, layout, training, str(folder))
    headers = read_headers(folder, [f.name for f in grid.files])
    return Checkpoint(str(folder), grid, headers, config, training, layout.config_file)


def check_dtype(dtype: str) -> None:
    """E001 for an element type that cannot be asked for."""
    from engine.plan.builder import DTYPES

    if dtype != "auto" and dtype not in DTYPES:
        raise EngineError(
            "E001",
            f"there is no dtype `{dtype}`",
            expected=", ".join(["auto", *DTYPES]),
            fix="Give one of these to --dtype.",
        )


def report_of(compiled: Plan, out: Path, started: float, files: tuple[str, ...], notices: tuple[str, ...]) -> Report:
    """What a finished plan did."""
    return Report(
        out=out,
        tensors=len(compiled.outputs),
        bytes=compiled.nbytes,
        seconds=time.monotonic() - started,
        variants={name: d.choice for name, d in compiled.decisions.items()},
        files=files,
        notices=notices,
    )
