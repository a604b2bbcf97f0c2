"""The public functions that run plans: each writes a checkpoint, or hands out its tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from engine.api.plans import load_plan, plan, plan_reshard, plan_reverse
from engine.language.model import Mapping as MappingFile
from engine.planning.request import RankOptions, ReverseOptions, WholeOptions, keywords
from engine.run.execute import Report, Small, execute
from engine.run.running import (
    ConvertOptions,
    ReshardRunOptions,
    ReverseRunOptions,
    Running,
    WholeRunOptions,
    running_of,
)
from engine.storage.replacing import given_path

if TYPE_CHECKING:
    import torch

    from engine.planning.model import Plan

__all__ = ["convert", "iter_tensors", "reshard", "reverse", "run_plan"]


def convert(
    mapping: str | Path | MappingFile,
    src: str | Path = ".",
    out: str | Path | None = None,
    **options: Unpack[ConvertOptions],
) -> Report:
    """Convert a training checkpoint to a Hugging Face checkpoint.

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
        progress: called with bytes done and in all, a few times a second.
        Others as for `plan`.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    started = time.monotonic()
    how = running_of(options, ConvertOptions)
    return _write(plan(mapping, src, **keywords(options, WholeOptions)), Path(src), out, how, started)


def reverse(
    mapping: str | Path | MappingFile, src: str | Path, out: str | Path, **options: Unpack[ReverseRunOptions]
) -> Report:
    """Write a Hugging Face checkpoint as training rank files.

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
    return _write(plan_reverse(mapping, src, **keywords(options, ReverseOptions)), Path(src), out, how, started)


def reshard(
    mapping: str | Path | MappingFile, src: str | Path, out: str | Path, **options: Unpack[ReshardRunOptions]
) -> Report:
    """Write a training checkpoint for other ranks, from shards to shards.

    Ranks, chunks and mode that are not given are as in `like`, else as in `src`. Arguments as for `reverse`.
    """
    started = time.monotonic()
    how = running_of(options, ReshardRunOptions)
    return _write(plan_reshard(mapping, src, **keywords(options, RankOptions)), Path(src), out, how, started)


def run_plan(path: str | Path, out: str | Path | None = None, **options: Unpack[WholeRunOptions]) -> Report:
    """Run a saved plan, exactly as it was saved, or not at all. Arguments as for `convert`."""
    started = time.monotonic()
    how = running_of(options, WholeRunOptions)
    compiled = load_plan(path)
    return _write(compiled, Path(compiled.folder), out, how, started)


def _write(compiled: Plan, source: Path, out: str | Path | None, how: Running, started: float) -> Report:
    """Run a plan, with the small files that belong to what it writes."""
    if compiled.written is not None:
        from engine.formats.configs import encode_config

        beside = {name: encode_config(name, kind, content) for name, (kind, content) in compiled.beside.items()}
        return execute(compiled, source, given_path(out or "", "the output"), lambda: Small(beside), how, started)
    from engine.assets.bundle import make_assets

    final = given_path(out, "the output") if out is not None else default_out(source)
    model = Path(how.tokenizer) if how.tokenizer else None
    code = None if how.code is None else Path(how.code)
    return execute(compiled, source, final, lambda: make_assets(compiled, model, code), how, started)


def default_out(src: str | Path) -> Path:
    """Where `convert` writes when it is not told."""
    real = Path(src).resolve()
    return real.with_name(real.name + "-hf")


def iter_tensors(compiled: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a plan's outputs one after another, without writing files.

    Each tensor owns its memory; replicas are compared before the first one is yielded.

    >>> for name, tensor in iter_tensors(plan("internlm-7b.yaml", "ckpt/1000")):  # doctest: +SKIP
    ...     model.get_parameter(name).data.copy_(tensor)
    """
    import torch

    from engine.move.reader import Reader
    from engine.move.values import check_transform
    from engine.run.replicas import compare_replicas
    from engine.storage.sources import SourceFiles, check_unchanged

    kinds = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
        "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    }  # fmt: skip
    compare_replicas(compiled, lambda _: None)
    with SourceFiles(compiled.files) as files:
        reader = Reader(compiled, files)
        for index, output in enumerate(compiled.outputs):
            check_transform(output)
            tensor = torch.empty(output.shape, dtype=kinds[output.dtype])
            raw = tensor.view(-1).view(torch.uint8).numpy().data if output.elements else memoryview(b"")
            for at, data in reader.blocks(index):
                raw[at : at + len(data)] = data
            yield output.name, tensor
    check_unchanged(compiled.files)
