"""The public functions that run plans: each writes a checkpoint, or yields its tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from engine.api.outputs import default_out, small_files, small_files_as_saved
from engine.api.plans import loaded_plan, planned, read_saved, saved_as
from engine.api.spread import check_spread, do_parts
from engine.language.model import MappingFile
from engine.planning.given import check_type
from engine.planning.model import Plan
from engine.planning.request import JOBS, keywords, request_of
from engine.run.execute import Report, Small, execute
from engine.run.running import (
    ConvertOptions,
    ReshardRunOptions,
    ReverseRunOptions,
    Running,
    WholeRunOptions,
    running_of,
)
from engine.serve.tensors import Tensors
from engine.show.notebook import displayed
from engine.storage.places import Source

if TYPE_CHECKING:
    import torch


@displayed
def convert(
    mapping: str | Path | MappingFile,
    src: Source = ".",
    out: str | Path | None = None,
    **options: Unpack[ConvertOptions],
) -> Report:
    """Convert a training checkpoint to a Hugging Face checkpoint.

    >>> engine.convert("internlm", "ckpt/1000", "hf", dtype="float32", max_shard_size="5GB")
    Report(out='hf', tensors=55, ...)

    When this returns, the output is complete at `out` (default: `<src>-hf`). When it raises, there is no output.

    Args:
        tokenizer: a SentencePiece model, which is converted; or a folder with `tokenizer.json`, whose tokenizer,
            template and generation settings are copied. Default: what lies beside the checkpoint, if anything.
        code: a folder with the official `configuration_*.py` and `modeling_*.py`, for a mapping whose target is
            remote code. They are copied and named in `auto_map`, and never run.
        overwrite: replace the output once the new one is complete.
        workers: threads that write; default: as many as cores and output files allow.
        resume: continue an interrupted run of the same conversion.
        digests: record a digest of every tensor in `conversion.json`; resuming needs them.
        check_source: first read the whole checkpoint and check it against the checksums that it holds.
        max_memory: most bytes of resident memory: fewer workers run, or the run is refused.
        progress: called a few times a second with bytes done and in all; with an executor, with parts done and in all.
        executor: runs it in parts, anywhere: an executor of `concurrent.futures`, any object with the same `submit`,
            or `dask` or `dask://host:port`. Paths must mean the same to every worker. If the executor is lost, finished
            parts are kept, and the same call continues with the others.
        parts: how many parts, with an executor.
        Others as for `plan`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    return _write("run", mapping, src, out, options, ConvertOptions)


@displayed
def reverse(
    mapping: str | Path | MappingFile, src: Source, out: str | Path, **options: Unpack[ReverseRunOptions]
) -> Report:
    """Write a Hugging Face checkpoint as training rank files.

    >>> report = engine.convert("internlm", "ckpt/1000", "hf")
    >>> engine.reverse("internlm", "hf", "ranks", tp=4, pp=2)
    Report(out='ranks', tensors=...)

    Args:
        ranks: ranks per dimension, such as `{"tp": 8}`; `tp`, `pp` and `wp` may be given by themselves.
            Default: those of `like`, else 1.
        chunks: model chunks per pipeline rank.
        mode: a mode of the layout (`mtp`, `isp`); default: that of `like`, else the first.
        like: a training checkpoint to take mode, ranks, name prefix and variants from.
        settings: values of variants and options of the mapping and its layout by name, as with `--set`.
        lossy: names of rules to apply although they cannot be inverted.
        Others as for `convert`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    return _write("reverse", mapping, src, out, options, ReverseRunOptions)


@displayed
def reshard(
    mapping: str | Path | MappingFile, src: Source, out: str | Path, **options: Unpack[ReshardRunOptions]
) -> Report:
    """Write a training checkpoint for other ranks, directly from shards to shards.

    >>> engine.reshard("internlm", "ckpt/1000", "tp4", tp=4)
    Report(out='tp4', tensors=...)

    Ranks, chunks and mode default to those of `like`, else of `src`. Other arguments as for `reverse`.

    Args:
        to: to write rank files of another framework, its mapping; `mapping` then only reads. Both describe the
            same Hugging Face checkpoint, which is never written.

    >>> engine.reshard("internlm", "ckpt/1000", "dcp", to="transformers", ranks={"dp": 8})
    Report(out='dcp', tensors=...)

    Raises:
        EngineError: as for `reverse`.
    """
    return _write("reshard", mapping, src, out, options, ReshardRunOptions)


@displayed
def run_plan(path: str | Path, out: str | Path | None = None, **options: Unpack[WholeRunOptions]) -> Report:
    """Run a saved plan exactly as it was saved, or refuse it. Arguments as for `convert`.

    >>> saved = engine.save_plan("plan.json", "internlm", "ckpt/1000")
    >>> engine.run_plan("plan.json", "hf")
    Report(out='hf', tensors=55, ...)
    """
    started = time.monotonic()
    how = running_of(options, WholeRunOptions)
    saved = read_saved(path)
    compiled = loaded_plan(saved)
    small = partial(small_files_as_saved, saved, compiled, how.tokenizer, how.code)
    return _run(compiled, lambda: saved.raw, compiled.folder, out, small, how, started)


def _write(
    job: str,
    mapping: str | Path | MappingFile,
    src: Source,
    out: str | Path | None,
    options: Mapping[str, Any],
    takes: type,
) -> Report:
    """Plan and run a job."""
    started = time.monotonic()
    how = running_of(options, takes)
    asked = request_of(mapping, src, keywords(options, JOBS[job].takes), job)
    compiled = planned(asked)
    small = partial(small_files, compiled, how.tokenizer, how.code)
    return _run(compiled, lambda: saved_as(compiled, asked), str(asked.src), out, small, how, started)


def _run(
    compiled: Plan,
    saved: Callable[[], bytes],
    source: str,
    out: str | Path | None,
    small: Callable[[], Small],
    how: Running,
    started: float,
) -> Report:
    """Run a plan, in this process or by an executor, and write the small files that go with its output."""
    if out is None and compiled.written is None:
        out = default_out(source)
    parts = None
    if how.executor is not None:
        check_spread(how)
        parts = do_parts(saved(), str(out or ""), how)
    return execute(compiled, source, out or "", small, how, started, parts=parts)


def iter_tensors(compiled: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for each output of a plan, one after another, without writing files.

    Each tensor owns its memory; replicas are compared before the first one is yielded.

    >>> tensors = dict(engine.iter_tensors(engine.plan("internlm", "ckpt/1000")))
    >>> tensors["model.norm.weight"].shape
    torch.Size([64])
    """
    check_type("compiled", compiled, Plan, "a plan, as `engine.plan` gives it")
    with Tensors(compiled) as tensors:
        tensors.compare_all()
        yield from tensors.items()
