"""The public Python functions. Each is what one command of the command line does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Mapping as MappingFile
from engine.mapping_diff import diff
from engine.operations import Report, Running, check_dtype, execute, read_checkpoint
from engine.plan_files import load_plan, save_plan
from engine.training import plan_reshard, plan_reverse, reshard, reverse

if TYPE_CHECKING:
    import torch

    from engine.language.lint import Finding
    from engine.plan.model import Plan
    from engine.review.compare import Comparison
    from engine.review.explanation import Explanation
    from engine.review.proof import Proof
    from engine.review.scaffold import Scaffold
    from engine.review.verify import Verified
    from engine.run.runner import Progress

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

DEFAULT_SHARD_SIZE = 5_000_000_000


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
    from engine.plan.planner import make_plan

    check_dtype(dtype)
    if max_shard_size <= 0:
        raise EngineError("E001", "the shard size must be positive", got=str(max_shard_size), fix="For example 5GB.")
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
    final = Path(out) if out is not None else real.with_name(real.name + "-hf")
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


def describe_plan(compiled: Plan) -> dict[str, Any]:
    """A plan as JSON-ready data, as `engine plan --json` prints it (`schemas/plan.schema.json`)."""
    from engine.review.describe import describe_plan as describe

    return describe(compiled)


def explain(
    what: str,
    mapping: str | Path | MappingFile,
    src: str | Path = ".",
    *,
    backward: bool = False,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
) -> Explanation:
    """Where the elements of a tensor come from, or with `backward` where they go; reads headers only.

    Args:
        what: an output and slices of it, `model.norm.weight[0:4]`; with `backward` a stored tensor,
            `FILE:NAME[slices]`, or without the file the tensor of every file that has it.
        Others as for `plan`.

    Raises:
        EngineError: E001 for a name or a slice that is not there, else as for `plan`.
    """
    from engine.review.explain import explain as forward
    from engine.review.explain_source import explain_source

    compiled = plan(mapping, src, settings=settings, dtype=dtype)
    return explain_source(compiled, what) if backward else forward(compiled, what)


def inspect(src: str | Path = ".") -> dict[str, Any]:
    """What a checkpoint folder is: layout, mode, ranks, sizes, and which bundled mappings fit.

    Reads headers only. The first layout whose files are there is taken.

    Raises:
        EngineError: E2xx and E3xx, of the layout that came closest.
    """
    from engine.language.search import layout_names, list_names
    from engine.review.inspect import describe_checkpoint

    first: EngineError | None = None
    for name in layout_names():
        layout = load_layout(name)
        try:
            checkpoint = read_checkpoint(src, layout)
        except EngineError as error:
            # Another layout may fit, unless this one knows the files and says what is wrong.
            if error.code != "E304":
                raise
            first = first or error
            continue
        return describe_checkpoint(checkpoint, layout, [load_mapping(m) for m in list_names()])
    raise first or EngineError("E002", "there are no layouts", fix="Reinstall the package.")


def compare(out: str | Path, ref: str | Path, *, progress: Callable[[Progress], None] | None = None) -> Comparison:
    """Compare two Hugging Face checkpoints tensor by tensor, and say what the differences mean.

    Each is a folder, an index or one weight file; safetensors and torch files may be mixed.

    Args:
        progress: called with bytes of `out` compared and in all, a few times a second.

    Raises:
        EngineError: E2xx and E3xx when either cannot be read.
    """
    from engine.checkpoint.hf_folder import read_hf_config, read_hf_folder
    from engine.review.compare import Comparison, compare_files
    from engine.review.diagnoses import diagnose
    from engine.review.guesses import geometries
    from engine.run.runner import Meter

    paths = Path(out), Path(ref)
    ours, theirs = (read_hf_folder(path) for path in paths)
    configs = [read_hf_config(path) for path in paths]
    meter = Meter(sum(tensor.nbytes for file in ours for tensor in file.tensors), progress)
    verdicts = compare_files(ours, theirs, configs, meter.advance)
    return Comparison(str(out), str(ref), verdicts, diagnose(verdicts, heads_known=bool(geometries(configs))))


def format_mapping(text: str) -> str:
    """A mapping file in its usual form: keys in order, long rules in block form, comments kept."""
    from engine.language.format import format_mapping as reformat

    return reformat(text)


def clean(out: str | Path) -> list[Path]:
    """Remove what interrupted runs left beside an output; returns what was removed."""
    from engine.run.output import clean as remove

    return remove(Path(out))


def verify(
    out: str | Path,
    progress: Callable[[Progress], None] | None = None,
    *,
    src: str | Path | None = None,
    mapping: str | Path | MappingFile | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    sample: str | None = None,
    load: bool = False,
    logits: bool = False,
) -> Verified:
    """Verify an output: against its own manifest, and in whatever other way is asked for.

    Args:
        src: the training checkpoint it was made from.
        mapping: plan again with this mapping, and compare every tensor with what `src` gives.
        settings: variants and options, as `--set` gives them.
        dtype: as for `convert`; default: what the manifest says, else `auto`.
        sample: compare some blocks of each tensor only: a share like `5%`, or a number like `8`.
        load: load the model with transformers, without remote code, and run a forward pass.
        logits: compare its forward pass, layer by layer, with one computed from the rank files of
            `src` the way training computes it. No mapping is used for it.

    Raises:
        EngineError: E304 or E301 when there is no manifest and nothing else to compare with, E0xx
            for arguments that do not go together, E2xx and E3xx when either side cannot be read.
    """
    from engine.review.verify import Asked, check_asked, verify_output, written_dtype

    check_asked(src is not None, mapping is not None, logits, sample is not None)
    compiled = None
    if src is not None and mapping is not None:
        compiled = plan(mapping, src, settings=settings, dtype=dtype or written_dtype(Path(out)))
    source = Path(src) if src is not None and logits else None
    return verify_output(Path(out), Asked(compiled, sample, load, source, settings or {}), progress)


def lint(paths: Sequence[str | Path] = ()) -> list[Finding]:
    """Findings of mapping files; without paths, of every bundled one. Touches no checkpoint."""
    from engine.language.lint import lint_file
    from engine.language.search import list_names

    names = [str(path) for path in paths] or list_names()
    return list(dict.fromkeys(finding for name in names for finding in lint_file(name)))


def view(
    mapping: str | Path | MappingFile,
    src: str | Path,
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one HTML page that shows what `convert` would do, and say how large it is; reads headers only.

    The page needs nothing else: it loads nothing, and works without scripts.

    Raises:
        EngineError: E401 when `out` exists, else as for `plan`.
    """
    from engine.review.view import view_page, write_page

    return write_page(view_page(plan(mapping, src, settings=settings, dtype=dtype)), Path(out), overwrite=overwrite)


def new_mapping(
    src: str | Path = ".",
    *,
    name: str | None = None,
    like: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Scaffold:
    """A first draft of a mapping for a checkpoint: what fits, what is guessed, what a person must decide.

    Args:
        name: the mapping's; default: that of the file or of the folder.
        like: the family to extend, by name or path; default: the nearest bundled one.
        out: the file to write; without it the text is only returned.
        overwrite: replace a file that exists.

    Raises:
        EngineError: E401 when the file exists; E2xx and E3xx for what cannot be read.
    """
    from engine.review.scaffold_files import new_mapping as make

    return make(src, read_checkpoint, name=name, like=like, out=out, overwrite=overwrite)


def prove(names: Sequence[str | Path | MappingFile] = (), *, mutants: bool = False) -> list[Proof]:
    """Prove mappings: total, injective, exactly invertible, alike in every layout; without names, all bundled ones.

    Runs the real planner and runner on tiny index tensors in a temporary folder, checks a release's
    own sizes by box arithmetic, and compares names and shapes with transformers' model. Rules that
    several mappings share are run once.

    Args:
        names: paths, names of bundled mappings, or loaded ones.
        mutants: perturb each rule too, and say what would have caught it.
    """
    from engine.language.search import list_names
    from engine.review.prove import prove as prove_each

    bundled = sorted(list_names(), key=lambda name: not name.startswith("families/"))
    return prove_each(list(names) or bundled, mutants=mutants)


def write_facts(names: Sequence[str | Path]) -> list[Path]:
    """Write beside each mapping file what its targets take from where, for `prove` to compare with later."""
    from engine.review.facts import write_facts as write

    return [write(name) for name in names]


def iter_tensors(compiled: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a plan's outputs one after another, without writing files.

    Each tensor owns its memory; replicas are compared before the first one is yielded.

    >>> for name, tensor in iter_tensors(plan("internlm-7b.yaml", "ckpt/1000")):  # doctest: +SKIP
    ...     model.get_parameter(name).data.copy_(tensor)
    """
    import numpy as np
    import torch

    from engine.checkpoint.headers import ITEM_SIZES
    from engine.checkpoint.sources import SourceFiles
    from engine.run.blocks import blocks
    from engine.run.gather import Gatherer
    from engine.run.replicas import compare_replicas
    from engine.run.runner import block_elements, row_quantum
    from engine.run.values import Converter, check_transform

    kinds = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
        "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    }  # fmt: skip
    with SourceFiles(compiled.files) as files:
        compare_replicas(compiled, files, lambda _: None)
        gatherer, converter = Gatherer(files, compiled.sources), Converter()
        for index, output in enumerate(compiled.outputs):
            check_transform(output)
            tensor = torch.empty(output.shape, dtype=kinds[output.dtype])
            raw = tensor.view(-1).view(torch.uint8).numpy() if output.elements else np.empty(0, np.uint8)
            item = ITEM_SIZES[output.dtype]
            copies = compiled.copies(index)
            for block in blocks(copies, output.elements, block_elements(output, len(copies)), row_quantum(output)):
                written = converter.convert(output, gatherer.gather(block, output.read_dtype))
                raw[block.low * item : block.high * item] = written.view(np.uint8)
            yield output.name, tensor
