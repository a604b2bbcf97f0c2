"""The public functions that run plans: each writes a checkpoint, or hands out its tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from engine.api.outputs import default_out, small_files
from engine.api.plans import load_plan, planned, saved_as
from engine.language.model import Mapping as MappingFile
from engine.planning.request import Request, ReshardOptions, ReverseOptions, WholeOptions, keywords, request_of
from engine.run.execute import Report, execute
from engine.run.running import (
    ConvertOptions,
    ReshardRunOptions,
    ReverseRunOptions,
    Running,
    WholeRunOptions,
    running_of,
)
from engine.show.notebook import displayed
from engine.storage.places import Source

if TYPE_CHECKING:
    import torch

    from engine.planning.model import Plan

__all__ = ["convert", "iter_tensors", "reshard", "reverse", "run_plan"]


@displayed
def convert(
    mapping: str | Path | MappingFile,
    src: Source = ".",
    out: str | Path | None = None,
    **options: Unpack[ConvertOptions],
) -> Report:
    """Convert a training checkpoint to a Hugging Face checkpoint.

    >>> convert("internlm2-7b", "ckpt/1000", "hf", max_shard_size="5GB", progress=print)  # doctest: +SKIP
    Report(out=PosixPath('hf'), tensors=291, …)

    The output is complete at `out` (default: `<src>-hf`) when this returns, or not there at all.

    Args:
        tokenizer: a SentencePiece model; default: the one beside the checkpoint, if any.
        code: a folder with the official `configuration_*.py` and `modeling_*.py`, where the mapping's target is
            remote code: they are copied and named in `auto_map`, and never run.
        overwrite: replace the output once the new one is complete.
        workers: threads that write; default: as many as cores and output files allow.
        resume: go on with what an interrupted run of the same conversion left.
        digests: record a digest of every tensor in `conversion.json`; resuming needs them.
        check_source: read the checkpoint once before, and compare it with the checksums it holds.
        max_memory: bytes resident at most, kept by fewer workers, or refused.
        progress: called with bytes done and in all, a few times a second; or with parts, of an executor.
        executor: does it in parts, anywhere: an executor of `concurrent.futures`, anything else with its `submit`, or
            `dask` or `dask://host:port`. Paths must mean the same to every worker. What it loses leaves the parts
            that are done: the same call goes on with the others.
        parts: how many, by an executor.
        Others as for `plan`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    started = time.monotonic()
    how = running_of(options, ConvertOptions)
    return _write(request_of(mapping, src, keywords(options, WholeOptions), "run"), out, how, started)


@displayed
def reverse(
    mapping: str | Path | MappingFile, src: Source, out: str | Path, **options: Unpack[ReverseRunOptions]
) -> Report:
    """Write a Hugging Face checkpoint as training rank files.

    >>> reverse("internlm2-7b", "hf", "ranks", tp=4, pp=2)  # doctest: +SKIP
    Report(out=PosixPath('ranks'), tensors=908, …)

    Args:
        ranks: ranks per dimension, such as `{"tp": 8}`; `tp`, `pp` and `wp` may be given by themselves.
            Default: as in `like`, else 1.
        chunks: model chunks per pipeline rank.
        mode: a mode of the layout (`mtp`, `isp`); default: as in `like`, else the first.
        like: a training checkpoint whose mode, ranks, name prefix and variants to copy.
        settings: variants and options of the mapping and its layout, as `--set` gives them.
        lossy: names of rules that do not invert and are written all the same.
        Others as for `convert`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    started = time.monotonic()
    how = running_of(options, ReverseRunOptions)
    return _write(request_of(mapping, src, keywords(options, ReverseOptions), "reverse"), out, how, started)


@displayed
def reshard(
    mapping: str | Path | MappingFile, src: Source, out: str | Path, **options: Unpack[ReshardRunOptions]
) -> Report:
    """Write a training checkpoint for other ranks, from shards to shards.

    >>> reshard("internlm2-7b", "ckpt/1000", "tp4", tp=4)  # doctest: +SKIP
    Report(out=PosixPath('tp4'), tensors=908, …)

    Ranks, chunks and mode that are not given are as in `like`, else as in `src`. Other arguments as for `reverse`.

    Args:
        to: the mapping that writes, for rank files of another framework; `mapping` reads. Both have the same Hugging
            Face checkpoint in between, which is read from the source and never written.

    >>> reshard("internlm2-7b", "ckpt/1000", "dcp", to="transformers", ranks={"dp": 8})  # doctest: +SKIP

    Raises:
        EngineError: as for `reverse`.
    """
    started = time.monotonic()
    how = running_of(options, ReshardRunOptions)
    return _write(request_of(mapping, src, keywords(options, ReshardOptions), "reshard"), out, how, started)


@displayed
def run_plan(path: str | Path, out: str | Path | None = None, **options: Unpack[WholeRunOptions]) -> Report:
    """Run a saved plan, exactly as it was saved, or not at all. Arguments as for `convert`."""
    started = time.monotonic()
    how = running_of(options, WholeRunOptions)
    compiled = load_plan(path)
    return _run(compiled, lambda: Path(path).read_bytes(), compiled.folder, out, how, started)


def _write(asked: Request, out: str | Path | None, how: Running, started: float) -> Report:
    """Plan and run what is asked for."""
    compiled = planned(asked)
    return _run(compiled, lambda: saved_as(compiled, asked), str(asked.src), out, how, started)


def _run(
    compiled: Plan, saved: Callable[[], bytes], source: str, out: str | Path | None, how: Running, started: float
) -> Report:
    """Run a plan, with the small files that belong to what it writes, here or by an executor."""
    if out is None and compiled.written is None:
        out = default_out(source)
    small = partial(small_files, compiled, how.tokenizer, how.code)
    if how.executor is not None:
        from engine.api.spread import check_spread, do_parts

        check_spread(how)
        do_parts(saved(), str(out or ""), how)
    return execute(compiled, source, out or "", small, how, started, parts=how.executor is not None)


def iter_tensors(compiled: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a plan's outputs one after another, without writing files.

    Each tensor owns its memory; replicas are compared before the first one is yielded.

    >>> for name, tensor in iter_tensors(plan("internlm-7b.yaml", "ckpt/1000")):  # doctest: +SKIP
    ...     model.get_parameter(name).data.copy_(tensor)
    """
    from engine.serve.tensors import Tensors

    with Tensors(compiled) as tensors:
        tensors.compare_all()
        yield from tensors.items()
