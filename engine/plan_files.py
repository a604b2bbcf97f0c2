"""Plans as files: the public functions behind `engine plan -o` and `engine run --plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.planning import DEFAULT_SHARD_SIZE
from engine.run.execute import read_checkpoint
from engine.storage.replacing import check_file_free, given_path

if TYPE_CHECKING:
    from engine.planning.model import Plan


def save_plan(
    path: str | Path,
    mapping: str | Path,
    src: str | Path = ".",
    *,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    strict: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Plan as `plan` does and save it, to be reviewed and run with `run_plan`.

    The file (`schemas/saved-plan.schema.json`) is small for any model. Paths in it are as given here.
    With `overwrite`, a plan that was saved there before is replaced; no other file is.
    """
    from engine.api import plan
    from engine.proving.saved_plan import Request, is_saved_plan, saved_plan, write_saved_plan

    file = given_path(path, "the plan")
    check_file_free(file, overwrite, is_saved_plan)
    compiled = plan(mapping, src, settings=settings, dtype=dtype, max_shard_size=max_shard_size, strict=strict)
    request = Request(str(mapping), str(src), dict(settings or {}), dtype, max_shard_size, strict)
    write_saved_plan(file, saved_plan(compiled, request), overwrite=overwrite)
    return compiled


def load_plan(path: str | Path) -> Plan:
    """The plan that was saved, made anew from what it was made from.

    Raises:
        EngineError: E217 when mapping, layout or what they come to changed since, E405 when the
            checkpoint's files did.
    """
    from engine.planning.planner import make_plan
    from engine.proving.saved_plan import check_files, check_plan, check_rules, read_saved_plan

    saved = read_saved_plan(given_path(path, "the plan"))
    request = saved.request
    loaded = load_mapping(request.mapping)
    layout = load_layout(loaded.layout)
    check_rules(saved, loaded, layout)
    checkpoint = read_checkpoint(request.src, layout)
    check_files(saved, checkpoint.files, request.src)
    compiled = make_plan(
        loaded,
        layout,
        checkpoint,
        settings=request.settings,
        dtype=request.dtype,
        max_shard_size=request.max_shard_size,
        strict=request.strict,
    )
    check_plan(saved, compiled)
    return compiled
