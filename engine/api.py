"""The public Python functions. Each is what one command of the command line does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Mapping as MappingFile
from engine.plan_files import load_plan, save_plan
from engine.planning import DEFAULT_SHARD_SIZE
from engine.proving.mapping_diff import diff
from engine.reviewing import (
    clean,
    compare,
    describe_plan,
    explain,
    format_mapping,
    inspect,
    lint,
    new_mapping,
    prove,
    verify,
    view,
    write_facts,
)
from engine.run.execute import Report, Running, check_dtype, execute, read_checkpoint
from engine.storage.replacing import given_path
from engine.training import plan_reshard, plan_reverse, reshard, reverse

if TYPE_CHECKING:
    import torch

    from engine.planning.model import Plan
    from engine.run.meter import Progress

__all__ = [
    "Report",
    "clean",
    "compare",
    "convert",
    "describe_plan",
    "diff",
    "explain",
    "format_mapping",
    "inspect",
    "iter_tensors",
    "lint",
    "load_layout",
    "load_mapping",
    "new_mapping",
    "load_plan",
    "plan",
    "plan_reshard",
    "plan_reverse",
    "prove",
    "read_checkpoint",
    "reshard",
    "reverse",
    "run_plan",
    "save_plan",
    "verify",
    "view",
    "write_facts",
]


def plan(
    mapping: str | Path | MappingFile,
    src: str | Path = ".",
    *,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    strict: bool = False,
) -> Plan:
    """Compile what `convert` would do; reads headers only.

    Args:
        mapping: a path, the name of a bundled mapping, or a loaded one.
        src: the checkpoint folder.
        settings: variants and options, as `--set` gives them.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        max_shard_size: bytes of tensors per output file.
        strict: refuse when sizes differ from those the release expects.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    from engine.planning.planner import make_plan

    check_dtype(dtype)
    if max_shard_size <= 0:
        raise EngineError("E001", "the shard size must be positive", got=str(max_shard_size), fix="For example 2GB.")
    loaded = mapping if isinstance(mapping, MappingFile) else load_mapping(str(mapping))
    layout = load_layout(loaded.layout)
    checkpoint = read_checkpoint(src, layout)
    return make_plan(
        loaded,
        layout,
        checkpoint,
        settings=settings or {},
        dtype=dtype,
        max_shard_size=max_shard_size,
        strict=strict,
    )


def convert(
    mapping: str | Path | MappingFile,
    src: str | Path = ".",
    out: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    strict: bool = False,
    tokenizer: str | Path | None = None,
    workers: int | None = None,
    resume: bool = False,
    digests: bool = True,
    check_source: bool = False,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Convert a training checkpoint to a Hugging Face checkpoint.

    The output is complete at `out` (default: `<src>-hf`) when this returns, or not there at all.

    Args:
        tokenizer: a SentencePiece model; default: the one beside the checkpoint, if any.
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
    compiled = plan(mapping, src, settings=settings, dtype=dtype, max_shard_size=max_shard_size, strict=strict)
    how = Running(overwrite, workers, progress, resume, digests, check_source, max_memory)
    return _write(compiled, Path(src), out, tokenizer, how, started)


def _write(
    compiled: Plan, source: Path, out: str | Path | None, tokenizer: str | Path | None, how: Running, started: float
) -> Report:
    """Run a plan that writes a Hugging Face checkpoint."""
    from engine.assets.bundle import make_assets

    real = source.resolve()
    final = given_path(out, "the output") if out is not None else real.with_name(real.name + "-hf")
    model = Path(tokenizer) if tokenizer else None
    return execute(compiled, source, final, lambda: make_assets(compiled, model), how, started)


def run_plan(
    path: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    tokenizer: str | Path | None = None,
    workers: int | None = None,
    resume: bool = False,
    digests: bool = True,
    check_source: bool = False,
    max_memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Run a saved plan, exactly as it was saved, or not at all. Arguments as for `convert`."""
    started = time.monotonic()
    compiled = load_plan(path)
    how = Running(overwrite, workers, progress, resume, digests, check_source, max_memory)
    return _write(compiled, Path(compiled.folder), out, tokenizer, how, started)


def iter_tensors(compiled: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a plan's outputs one after another, without writing files.

    Each tensor owns its memory; replicas are compared before the first one is yielded.

    >>> for name, tensor in iter_tensors(plan("internlm-7b.yaml", "ckpt/1000")):  # doctest: +SKIP
    ...     model.get_parameter(name).data.copy_(tensor)
    """
    import numpy as np
    import torch

    from engine.formats.headers import ITEM_SIZES
    from engine.move.blocks import output_blocks
    from engine.move.gather import Gatherer
    from engine.move.values import Converter, check_transform
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
        gatherer, converter = Gatherer(files, compiled.sources), Converter()
        for index, output in enumerate(compiled.outputs):
            check_transform(output)
            tensor = torch.empty(output.shape, dtype=kinds[output.dtype])
            raw = tensor.view(-1).view(torch.uint8).numpy() if output.elements else np.empty(0, np.uint8)
            item = ITEM_SIZES[output.dtype]
            copies = compiled.copies(index)
            for block in output_blocks(output, copies):
                written = converter.convert(output, gatherer.gather(block, output.read_dtype))
                raw[block.low * item : block.high * item] = np.frombuffer(written, np.uint8)
            yield output.name, tensor
    check_unchanged(compiled.files)
