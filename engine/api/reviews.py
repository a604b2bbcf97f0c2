"""The public functions that read plans, mappings and outputs and change nothing but what they are told to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from engine.api.plans import no_effect, plan
from engine.errors import EngineError
from engine.language.model import MappingFile
from engine.planning.given import check_type
from engine.planning.model import Plan
from engine.planning.request import PlanOptions
from engine.run.meter import Meter, Progress
from engine.show.notebook import displayed
from engine.storage.places import found_at, on_this_machine, store_at
from engine.storage.replacing import check_file_free, given_path, write_file

if TYPE_CHECKING:
    from engine.comparing.comparison import Comparison
    from engine.comparing.verify import Verified
    from engine.discover.fits import Fit
    from engine.discover.inspect import Inspection
    from engine.explaining.explanation import Explanation


def describe_plan(compiled: Plan) -> dict[str, Any]:
    """A plan as JSON-ready data, as `engine plan --json` prints it (`schemas/plan.schema.json`)."""
    from engine.explaining.describe import describe_plan as describe

    return describe(compiled)


def explain(
    what: str,
    mapping: str | Path | MappingFile,
    src: str | Path = ".",
    *,
    backward: bool = False,
    **options: Unpack[PlanOptions],
) -> Explanation:
    """Where the elements of a tensor come from, or with `backward` where they go; reads headers only.

    >>> told = engine.explain("model.norm.weight[0:4]", "internlm", "ckpt/1000").as_dict()
    >>> told["tensors"][0]["rule"]
    'norm.weight'

    Args:
        what: an output and slices of it, `model.norm.weight[0:4]`; with `backward` a stored tensor,
            `FILE:NAME[slices]`, or without the file the tensor of every file that has it.
        Others as for `plan`.

    Raises:
        EngineError: E001 for a name or a slice that is not there, else as for `plan`.
    """
    from engine.explaining.tensors import explain as forward
    from engine.explaining.tensors import explain_source

    check_type("what", what, str)
    compiled = plan(mapping, src, **options)
    return explain_source(compiled, what) if backward else forward(compiled, what)


@displayed
def inspect(src: str | Path = ".", config: str | Path | None = None, *, every: bool = False) -> Inspection:
    """What a folder is: a training checkpoint, a Hugging Face checkpoint, or a folder of steps.

    Reads headers only. Of a training checkpoint it tells layout, ranks and sizes, and which mappings fit.

    >>> [fit.name for fit in engine.inspect("ckpt/1000").fitting]
    ['internlm']

    Args:
        config: as for `convert`.
        every: look at every step of a folder of steps; else at the newest 20.

    Raises:
        EngineError: E304 when it is none of these, E2xx and E3xx for a checkpoint that is not whole.
    """
    from engine.discover.inspect import inspect as look

    found = look(src, config, every=every)
    if found.kind == "whole" and config is not None:
        raise no_effect(config)
    return found


def find_mapping(src: str | Path = ".", config: str | Path | None = None) -> Fit:
    """The only bundled mapping that fits a training checkpoint.

    >>> engine.find_mapping("ckpt/1000").name
    'internlm'

    Raises:
        EngineError: E003 when none fits, or several do, with what tells these apart; else as for `inspect`.
    """
    from engine.discover.inspect import choose, describe_training
    from engine.discover.steps import read_any

    layout, checkpoint = read_any(src, config=config)
    return choose(describe_training(checkpoint, layout))


def mappings() -> list[MappingFile]:
    """Every bundled mapping, and those in the folders of `ENGINE_MAPPINGS`: releases first, then families.

    >>> "internlm2-7b" in [mapping.name for mapping in engine.mappings()]
    True
    """
    from engine.discover.inspect import load_all

    return load_all()[0]


@displayed
def compare(
    out: str | Path,
    ref: str | Path,
    *,
    mapping: str | Path | MappingFile | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Compare everything that makes two models, and say what differs and what that changes.

    >>> one = engine.convert("internlm", "ckpt/1000", "one")
    >>> other = engine.convert("internlm", "ckpt/1000", "other", settings={"rotary": "pairs"})
    >>> done = engine.compare("other", "one")
    >>> done.same(), done.diagnoses
    (False, ('k_proj and q_proj in layers {0…3} equal the reference after ...',))

    Tensors, configuration, generation settings, tokenizer, chat template and code files are compared. Each side is a
    folder, an index or one weight file; safetensors and torch files may be mixed. A training checkpoint is compared
    by what a mapping makes of it, without writing it.

    Args:
        mapping: for a side that is a training checkpoint, or for both.
        settings: variants and options of the mapping, as `--set` gives them.
        dtype: the type that a training checkpoint's tensors are taken in, as for `convert`.
        progress: called with bytes of `out` compared and in all, a few times a second.

    Raises:
        EngineError: E2xx and E3xx when either cannot be read, E402 when replicas of a training checkpoint differ.
    """
    from engine.assets.bundle import make_assets
    from engine.comparing.comparison import compare_sides, read_side
    from engine.run.replicas import compare_replicas

    def planned(where: str | Path) -> Callable[[], tuple[Plan, Mapping[str, bytes]]] | None:
        def made() -> tuple[Plan, Mapping[str, bytes]]:
            compiled = plan(mapping or "", where, settings=settings, dtype=dtype)
            compare_replicas(compiled, lambda _: None)
            return compiled, make_assets(compiled, None).whole()

        return None if mapping is None else made

    sides = [read_side(found_at(one, "the checkpoint"), planned(one)) for one in (out, ref)]
    if mapping is not None and not any(side.training for side in sides):
        raise EngineError("E001", "neither side is a training checkpoint, so a mapping has no use",
                          fix="Leave --mapping out.")  # fmt: skip
    meter = Meter(sides[0].nbytes, progress, "comparing")
    return compare_sides(sides[0], sides[1], (str(out), str(ref)), meter.advance)


@displayed
def verify(
    out: str | Path,
    progress: Callable[[Progress], None] | None = None,
    *,
    src: str | Path | None = None,
    mapping: str | Path | MappingFile | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    sample: str | None = None,
    load: bool = False,
    logits: bool = False,
) -> Verified:
    """Verify an output: against its own manifest, and in whatever other way is asked for.

    >>> report = engine.convert("internlm", "ckpt/1000", "hf")
    >>> engine.verify("hf", src="ckpt/1000", mapping="internlm").problems
    ()

    Args:
        src: the training checkpoint it was made from.
        mapping: plan again with this mapping, and compare every tensor, the configuration, generation settings,
            tokenizer and chat template with what `src` gives.
        config: as for `convert`.
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
    from engine.assets.bundle import make_assets
    from engine.comparing.verify import check_asked, verify_output, written_dtype

    check_type("sample", sample, str | None)
    check_asked(src is not None, mapping is not None, logits, sample is not None)
    written = store_at(out, "the output")
    compiled, small = None, {}
    if src is not None and mapping is not None:
        compiled = plan(mapping, src, config=config, settings=settings, dtype=dtype or written_dtype(written))
        small = make_assets(compiled, None).whole()
    source = on_this_machine(store_at(src, "the checkpoint"), "--logits") if src is not None and logits else None
    return verify_output(
        written, progress, plan=compiled, small=small, sample=sample, load=load, source=source, settings=settings or {}
    )


def view(
    mapping: str | Path | MappingFile,
    src: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    **options: Unpack[PlanOptions],
) -> dict[str, Any]:
    """Write one HTML page that shows what `convert` would do, and say how large it is; reads headers only.

    The page needs nothing else: it loads nothing, and works without scripts.

    Raises:
        EngineError: E401 when `out` exists, else as for `plan`.
    """
    from engine.show.page import is_page, view_page

    file = given_path(out, "the page")
    check_file_free(file, overwrite, is_page)
    page = view_page(plan(mapping, src, **options)).encode()
    write_file(file, page, overwrite=overwrite, ours=is_page)
    return {"out": str(file), "bytes": len(page)}
