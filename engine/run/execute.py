"""What the functions of the API share: reading a checkpoint before planning, and reporting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.language.model import Layout

if TYPE_CHECKING:
    from engine.planning.model import Plan
    from engine.planning.planner import Checkpoint
    from engine.run.meter import Progress


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    out: Path
    tensors: int
    bytes: int
    seconds: float
    variants: Mapping[str, str]
    files: tuple[str, ...]
    content_id: str | None = None  # of all tensors, whatever files they lie in; None without digests
    notices: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "variants": dict(self.variants),
            "files": list(self.files),
            "content_id": self.content_id,
            "notices": list(self.notices),
        }


def read_checkpoint(src: Path | str, layout: Layout) -> Checkpoint:
    """Index a training checkpoint: the rank grid, every tensor's header and the configurations.

    No payload is read. Raises EngineError E2xx and E3xx.
    """
    from engine.checkpoint.folder import list_folder, read_folder_config, read_headers
    from engine.checkpoint.ranks import check_claims, read_grid
    from engine.planning.planner import Checkpoint

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
    from engine.planning.whole import DTYPES

    if dtype != "auto" and dtype not in DTYPES:
        raise EngineError(
            "E001",
            f"there is no dtype `{dtype}`",
            expected=", ".join(["auto", *DTYPES]),
            fix="Give one of these to --dtype.",
        )


@dataclass(frozen=True, slots=True)
class Running:
    """How a plan is run: what the commands that write share."""

    overwrite: bool = False
    workers: int | None = None
    progress: Callable[[Progress], None] | None = None
    resume: bool = False
    digests: bool = True
    check_source: bool = False
    max_memory: int | None = None


def execute(
    compiled: Plan,
    source: Path,
    out: Path,
    small: Callable[[threading.Event], tuple[dict[str, bytes], tuple[str, ...]]],
    how: Running,
    started: float,
    small_memory: int = 0,
) -> Report:
    """Run a plan: weight files, small files and the manifest, complete at `out` or not there.

    Args:
        small: makes the other files of the output, and notices about them, while tensors are written; the
            event is set when they are no longer wanted.
        started: when the command started, for the report.
        small_memory: bytes that `small` takes.
    """
    from engine.run.manifest import NAME, encode_manifest, manifest
    from engine.run.runner import write_bytes, write_weights
    from engine.storage.output import OutputFolder

    notices = list(compiled.notices)
    with OutputFolder(out, source, overwrite=how.overwrite, resume=how.resume, need=compiled.nbytes) as folder:
        if how.check_source:
            notices += check_source(compiled, how.progress)
        files: dict[str, bytes] = {}

        def make_small(stopped: threading.Event) -> None:
            made, told = small(stopped)
            files.update(made)
            notices.extend(told)

        done = write_weights(
            compiled,
            folder,
            workers=how.workers,
            max_memory=how.max_memory,
            listener=how.progress,
            digests=how.digests,
            resume=how.resume,
            beside=[make_small],
            beside_memory=small_memory,
        )
        data = manifest(compiled, done, files)
        for name, content in (*files.items(), (NAME, encode_manifest(data))):
            write_bytes(folder / name, content)
        names = tuple(sorted(path.name for path in folder.iterdir()))
    return Report(
        out=out,
        tensors=len(compiled.outputs),
        bytes=compiled.nbytes,
        seconds=time.monotonic() - started,
        variants={name: d.choice for name, d in compiled.decisions.items()},
        files=names,
        content_id=data.get("content_id"),
        notices=tuple(notices),
    )


def check_source(compiled: Plan, progress: Callable[[Progress], None] | None) -> list[str]:
    """Read the source files once and compare them with the checksums they hold; E301 when they differ."""
    from engine.formats.checksums import check_files
    from engine.run.meter import Meter

    meter = Meter(sum(file.size for file in compiled.files), progress)
    unchecked = check_files([file.path for file in compiled.files], meter.advance)
    return [f"no checksum was saved with {', '.join(unchecked[:4])}; not checked"] if unchecked else []
