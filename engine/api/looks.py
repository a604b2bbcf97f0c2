"""The public functions that show what a checkpoint holds and what a plan does with it. Only headers are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from engine.api.plans import no_effect, plan
from engine.discover.inspect import Inspection, load_all
from engine.discover.inspect import inspect as look
from engine.explaining.explanation import Explanation
from engine.explaining.tensors import explain as forward
from engine.explaining.tensors import explain_source
from engine.language.model import MappingFile
from engine.planning.given import check_type
from engine.planning.request import PlanOptions
from engine.show.notebook import displayed
from engine.show.page import is_page, view_page
from engine.storage.replacing import check_file_free, given_path, write_file


def explain(
    what: str,
    mapping: str | Path | MappingFile,
    src: str | Path = ".",
    *,
    backward: bool = False,
    **options: Unpack[PlanOptions],
) -> Explanation:
    """Where the elements of a tensor come from; with `backward`, where they go. Reads headers only.

    >>> told = engine.explain("model.norm.weight[0:4]", "internlm", "ckpt/1000").as_dict()
    >>> told["tensors"][0]["rule"]
    'norm.weight'

    Args:
        what: an output, with or without slices, `model.norm.weight[0:4]`; with `backward` a stored tensor,
            `FILE:NAME[slices]`; without FILE, the tensor in every file that has it.
        Others as for `plan`.

    Raises:
        EngineError: E001 for a name or slice that does not exist, else as for `plan`.
    """
    check_type("what", what, str)
    compiled = plan(mapping, src, **options)
    return explain_source(compiled, what) if backward else forward(compiled, what)


@displayed
def inspect(src: str | Path = ".", config: str | Path | None = None, *, every: bool = False) -> Inspection:
    """What a folder is: a training checkpoint, a Hugging Face checkpoint, or a folder of steps.

    Reads headers only. For a training checkpoint it reports layout, ranks and sizes, and which mappings fit.

    >>> [fit.name for fit in engine.inspect("ckpt/1000").fitting]
    ['internlm']

    Args:
        config: as for `convert`.
        every: look at every step of a folder of steps, not only at the newest 20.

    Raises:
        EngineError: E304 when it is none of these, E2xx and E3xx for an incomplete checkpoint.
    """
    found = look(src, config, every=every)
    if found.kind == "whole" and config is not None:
        raise no_effect(config)
    return found


def mappings() -> list[MappingFile]:
    """Every bundled mapping, and those in the folders that `ENGINE_MAPPINGS` names: releases first, then families.

    >>> "internlm2-7b" in [mapping.name for mapping in engine.mappings()]
    True
    """
    return load_all()[0]


def view(
    mapping: str | Path | MappingFile,
    src: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    **options: Unpack[PlanOptions],
) -> dict[str, Any]:
    """Write one HTML page that shows what `convert` would do; returns its path and size. Reads headers only.

    The page is self-contained: it loads nothing, and works without scripts.

    Raises:
        EngineError: E401 when `out` exists, else as for `plan`.
    """
    file = given_path(out, "the page")
    check_file_free(file, overwrite, is_page)
    page = view_page(plan(mapping, src, **options)).encode()
    write_file(file, page, overwrite=overwrite, ours=is_page)
    return {"out": str(file), "bytes": len(page)}
