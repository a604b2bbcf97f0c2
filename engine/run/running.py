"""How a plan is run: each option is declared once, as for planning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from engine.errors import EngineError
from engine.planning.given import check_keywords, parse_size
from engine.planning.request import ReshardOptions, ReverseOptions, WholeOptions, option, own
from engine.run.meter import Progress


@dataclass(frozen=True, slots=True)
class Running:
    """How a plan is run; `engine.convert` says what each option is."""

    overwrite: bool = option(False, "Replace the output once the new one is complete.", "flag")
    resume: bool = option(False, "Continue an interrupted run.", "flag")
    workers: int | None = option(None, "Threads that write.", "workers", shown="auto")
    max_memory: int | None = option(None, "Limit memory by using fewer threads.", "size")
    digests: bool = option(True, "Record no digests of tensors; the run cannot be resumed.", "no-flag")
    check_source: bool = option(False, "First read the source and compare it with its own checksums.", "flag")
    tokenizer: str | Path | None = option(
        None, "The SentencePiece model, or a folder with the model's tokenizer.json, if not beside the checkpoint.",
        metavar="FILE|DIR",
    )  # fmt: skip
    code: str | Path | None = option(
        None, "For a target that needs remote code: its official configuration_*.py and modeling_*.py.", metavar="DIR"
    )
    executor: Any = option(None, "Write in parts, on Dask's workers.", metavar="dask[://HOST:PORT]")
    parts: int = option(8, "Number of parts, with --executor.", "count")
    progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "max_memory", None if self.max_memory is None else parse_size(self.max_memory))
        except ValueError as error:
            raise EngineError("E001", "`max_memory` cannot be used as given", fix=f"{error}.") from None


class RunOptions(TypedDict, total=False):
    """Keywords of every function that writes a checkpoint."""

    overwrite: bool
    resume: bool
    workers: int | None
    max_memory: int | str | None
    digests: bool
    check_source: bool
    progress: Callable[[Progress], None] | None


class SpreadOptions(RunOptions, total=False):
    """Keywords of functions that write a whole checkpoint, in this process or by an executor."""

    executor: Any
    parts: int


class CommitOptions(RunOptions, total=False):
    """Keywords of functions that complete a checkpoint."""

    tokenizer: str | Path | None
    code: str | Path | None


class WholeRunOptions(CommitOptions, SpreadOptions, total=False):
    """Keywords of functions that write a Hugging Face checkpoint."""


class ConvertOptions(WholeOptions, WholeRunOptions, total=False):
    """Keywords of `convert`."""


class ReverseRunOptions(ReverseOptions, SpreadOptions, total=False):
    """Keywords of `reverse`."""


class ReshardRunOptions(ReshardOptions, SpreadOptions, total=False):
    """Keywords of `reshard`."""


def running_of(options: Mapping[str, Any], takes: type) -> Running:
    """The `Running` of keywords; those of `Request` are ignored. TypeError as for `request_of`."""
    check_keywords(options, takes)
    return Running(**own(options, Running))
