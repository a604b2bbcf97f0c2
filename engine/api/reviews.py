"""The public functions that check outputs and compare models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.api.plans import plan
from engine.assets.bundle import make_assets
from engine.comparing.comparison import Comparison, Side, compare_sides, read_side
from engine.comparing.verify import Verified, check_asked, verify_output, written_dtype
from engine.errors import EngineError
from engine.language.model import MappingFile
from engine.planning.given import check_type
from engine.planning.model import Plan
from engine.run.meter import Meter, Progress
from engine.run.replicas import compare_replicas
from engine.show.notebook import displayed
from engine.storage.folders import one_of_two
from engine.storage.places import found_at, on_this_machine, store_at


@displayed
def compare(
    out: str | Path,
    ref: str | Path,
    *,
    mapping: str | Path | MappingFile | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Compare all that defines two models; report what differs and the effect on the model.

    >>> one = engine.convert("internlm", "ckpt/1000", "one")
    >>> other = engine.convert("internlm", "ckpt/1000", "other", settings={"rotary": "pairs"})
    >>> done = engine.compare("other", "one")
    >>> done.same(), done.diagnoses
    (False, ('k_proj and q_proj in layers {0…3} equal the reference after ...',))

    Tensors, configuration, generation settings, tokenizer, chat template and code files are compared. Each side is a
    folder, an index or one weights file; safetensors and torch files may be mixed. A training checkpoint is compared
    as its mapping would convert it, without writing anything.

    Args:
        mapping: converts each side that is a training checkpoint.
        config: as for `convert`, if the trainer saves no configuration, or an incomplete one.
        settings: values of the mapping's variants and options by name, as with `--set`.
        dtype: the type that a training checkpoint's tensors are converted to, as for `convert`.
        progress: called a few times a second with the bytes of `out` compared so far, and in all.

    Raises:
        EngineError: E2xx and E3xx when either cannot be read, E402 when replicas of a training checkpoint differ.
    """

    def planned(where: str | Path) -> Callable[[], tuple[Plan, Mapping[str, bytes]]] | None:
        def made() -> tuple[Plan, Mapping[str, bytes]]:
            compiled = plan(mapping or "", where, config=config, settings=settings, dtype=dtype)
            compare_replicas(compiled)
            return compiled, make_assets(compiled, None).whole()

        return None if mapping is None else made

    sides: list[Side] = []
    for one in (out, ref):
        with one_of_two(one):
            sides.append(read_side(found_at(one), planned(one)))
    if mapping is not None and not any(side.training for side in sides):
        raise EngineError("E001", "neither side is a training checkpoint, so a mapping has no effect",
                          fix="Leave --mapping out.")  # fmt: skip
    meter = Meter(sum(one.nbytes for one in sides[0].listed), progress, "comparing")
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
    """Verify an output against its own manifest, and in each other way that the arguments ask for.

    >>> report = engine.convert("internlm", "ckpt/1000", "hf")
    >>> engine.verify("hf", src="ckpt/1000", mapping="internlm").problems
    ()

    Args:
        src: the training checkpoint it was made from.
        mapping: plan again with this mapping, and compare every tensor, the configuration, generation settings,
            tokenizer and chat template with what `src` gives.
        config: as for `convert`.
        settings: values of variants and options by name, as with `--set`.
        dtype: as for `convert`; default: that of the manifest, else `auto`.
        sample: compare only some blocks of each tensor: a share like `5%`.
        load: load the model with transformers, without remote code, and run a forward pass.
        logits: compare its forward pass, layer by layer, with one computed from the rank files of
            `src` the way training computes it. This uses no mapping.

    Raises:
        EngineError: E304 or E301 when there is no valid manifest and nothing else to compare with, E0xx
            for arguments that do not fit together, E2xx and E3xx when either side cannot be read.
    """
    check_type("sample", sample, str | None)
    check_asked(src is not None, mapping is not None, logits, sample is not None)
    written = store_at(out, "the output")
    compiled, small = None, {}
    if src is not None and mapping is not None:
        dtype = dtype or written_dtype(written)
        with one_of_two(src, "--src "):
            compiled = plan(mapping, src, config=config, settings=settings, dtype=dtype)
            small = make_assets(compiled, None).whole()
    source = on_this_machine(store_at(src, "the checkpoint"), "--logits") if src is not None and logits else None
    return verify_output(
        written, progress, plan=compiled, small=small, sample=sample, load=load, source=source, settings=settings or {}
    )
