"""Writing training checkpoints: the public functions behind `reverse` and `reshard`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, Place
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Mapping as MappingFile
from engine.run.execute import Report, Running, Small, check_dtype, execute, read_checkpoint
from engine.storage.replacing import given_path

if TYPE_CHECKING:
    from engine.planning.destination import Request
    from engine.planning.model import Plan
    from engine.run.meter import Progress


def plan_reverse(
    mapping: str | Path | MappingFile,
    src: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    wp: int | None = None,
    chunks: int | None = None,
    mode: str | None = None,
    like: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    lossy: Sequence[str] = (),
) -> Plan:
    """Compile what `reverse` would do; reads headers only. Arguments as for `reverse`."""
    from engine.checkpoint.hf_folder import read_hf_config, read_hf_folder
    from engine.planning.backward import WholeCheckpoint
    from engine.planning.reverse import make_reverse_plan

    check_dtype(dtype)
    loaded = mapping if isinstance(mapping, MappingFile) else load_mapping(str(mapping))
    layout = load_layout(loaded.layout)
    folder = given_path(src, "the checkpoint")
    checkpoint = WholeCheckpoint(str(src), read_hf_folder(folder), read_hf_config(folder))
    if not checkpoint.config:
        raise EngineError(
            "E304",
            "`config.json` is missing",
            place=Place(str(src)),
            expected="the model's configuration beside the weights",
            fix="Copy it from the model: the training configuration is computed from it.",
        )
    return make_reverse_plan(
        loaded,
        layout,
        checkpoint,
        _request(mode, chunks, tp=tp, pp=pp, wp=wp),
        settings=settings or {},
        like=read_checkpoint(like, layout) if like is not None else None,
        dtype=dtype,
        lossy=lossy,
    )


def plan_reshard(
    mapping: str | Path | MappingFile,
    src: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    wp: int | None = None,
    chunks: int | None = None,
    mode: str | None = None,
    like: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
) -> Plan:
    """Compile what `reshard` would do; reads headers only. Arguments as for `reshard`."""
    from engine.planning.reverse import make_reshard_plan

    check_dtype(dtype)
    loaded = mapping if isinstance(mapping, MappingFile) else load_mapping(str(mapping))
    layout = load_layout(loaded.layout)
    return make_reshard_plan(
        loaded,
        layout,
        read_checkpoint(src, layout),
        _request(mode, chunks, tp=tp, pp=pp, wp=wp),
        settings=settings or {},
        like=read_checkpoint(like, layout) if like is not None else None,
        dtype=dtype,
    )


def _request(mode: str | None, chunks: int | None, **sizes: int | None) -> Request:
    from engine.planning.destination import Request

    return Request(mode, {dim: count for dim, count in sizes.items() if count is not None}, chunks)


def reverse(
    mapping: str | Path | MappingFile,
    src: str | Path,
    out: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    wp: int | None = None,
    chunks: int | None = None,
    mode: str | None = None,
    like: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    lossy: Sequence[str] = (),
    overwrite: bool = False,
    workers: int | None = None,
    resume: bool = False,
    digests: bool = True,
    check_source: bool = False,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write a Hugging Face checkpoint as training rank files.

    Args:
        tp, pp, wp: ranks per dimension; default: as in `like`, else 1.
        chunks: model chunks per pipeline rank.
        mode: a mode of the layout (`mtp`, `isp`); default: as in `like`, else the first.
        like: a training checkpoint whose mode, grid, name prefix and variants to copy.
        settings: variants and options of the mapping and its layout, as `--set` gives them.
        lossy: names of rules that do not invert and are written all the same.
        Others as for `convert`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    started = time.monotonic()
    compiled = plan_reverse(
        mapping, src, tp=tp, pp=pp, wp=wp, chunks=chunks, mode=mode, like=like, settings=settings, dtype=dtype,
        lossy=lossy,
    )  # fmt: skip
    how = Running(overwrite, workers, progress, resume, digests, check_source, max_memory)
    return execute(compiled, Path(src), given_path(out, "the output"), lambda: _small_files(compiled), how, started)


def reshard(
    mapping: str | Path | MappingFile,
    src: str | Path,
    out: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    wp: int | None = None,
    chunks: int | None = None,
    mode: str | None = None,
    like: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    workers: int | None = None,
    resume: bool = False,
    digests: bool = True,
    check_source: bool = False,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write a training checkpoint for other ranks, from shards to shards.

    What is not given stays as it is in `src`, or is as in `like`. Arguments as for `reverse`.
    """
    started = time.monotonic()
    compiled = plan_reshard(
        mapping, src, tp=tp, pp=pp, wp=wp, chunks=chunks, mode=mode, like=like, settings=settings, dtype=dtype
    )
    how = Running(overwrite, workers, progress, resume, digests, check_source, max_memory)
    return execute(compiled, Path(src), given_path(out, "the output"), lambda: _small_files(compiled), how, started)


def _small_files(compiled: Plan) -> Small:
    from engine.formats.configs import encode_config

    return Small({n: encode_config(n, kind, content) for n, (kind, content) in compiled.beside.items()})
