"""The public functions that make plans. They read headers and configurations only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from engine.errors import EngineError, Place
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Mapping as MappingFile
from engine.planning.request import RankOptions, Request, ReverseOptions, WholeOptions, request_of
from engine.run.execute import read_checkpoint
from engine.show.notebook import displayed
from engine.storage.places import Source, found_at
from engine.storage.replacing import check_file_free, given_path

if TYPE_CHECKING:
    from engine.language.model import Layout
    from engine.planning.backward import WholeCheckpoint
    from engine.planning.model import Plan

__all__ = ["load_plan", "plan", "plan_reshard", "plan_reverse", "read_whole", "save_plan"]


@displayed
def plan(mapping: str | Path | MappingFile, src: Source = ".", **options: Unpack[WholeOptions]) -> Plan:
    """Compile what `convert` would do.

    >>> plan("internlm2-7b", "ckpt/1000", dtype="bf16")  # doctest: +SKIP
    <Plan of internlm2-7b 1.0.0: 'ckpt/1000' (tp 8) to 291 tensors, 15,475,417,088 bytes in 8 files>

    Args:
        mapping: a path, the name of a bundled mapping, or a loaded one.
        src: the training checkpoint's folder, or a store, as `engine.virtual` makes one.
        settings: variants and options, as `--set` gives them.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        max_shard_size: bytes of tensors per output file.
        strict: refuse when sizes differ from those the release expects.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    from engine.planning.planner import make_plan
    from engine.proving.meta_model import fitted

    asked = request_of(mapping, src, options, WholeOptions)
    loaded, layout = _rules(asked)
    checkpoint = read_checkpoint(src, layout, asked.config)
    loaded, layout, checkpoint = fitted(loaded, layout, checkpoint)
    return make_plan(
        loaded,
        layout,
        checkpoint,
        settings=asked.settings,
        dtype=asked.dtype,
        max_shard_size=asked.max_shard_size,
        strict=asked.strict,
    )


@displayed
def plan_reverse(mapping: str | Path | MappingFile, src: Source, **options: Unpack[ReverseOptions]) -> Plan:
    """Compile what `reverse` would do. Arguments as for `reverse`."""
    from engine.planning.destination import Request as Grid
    from engine.planning.reverse import make_reverse_plan
    from engine.proving.meta_model import fitted, written_as_model

    asked = request_of(mapping, src, options, ReverseOptions)
    loaded, layout = _rules(asked)
    whole = read_whole(src)
    like = None if asked.like is None else read_checkpoint(asked.like, layout, asked.config)
    if like is not None:
        loaded, layout, like = fitted(loaded, layout, like)
    loaded = written_as_model(loaded, whole.config)
    return make_reverse_plan(
        loaded,
        layout,
        whole,
        Grid(asked.mode, asked.ranks, asked.chunks),
        settings=asked.settings,
        like=like,
        dtype=asked.dtype,
        lossy=asked.lossy,
    )


@displayed
def plan_reshard(mapping: str | Path | MappingFile, src: Source, **options: Unpack[RankOptions]) -> Plan:
    """Compile what `reshard` would do. Arguments as for `reshard`."""
    from engine.planning.destination import Request as Grid
    from engine.planning.reverse import make_reshard_plan
    from engine.proving.meta_model import fitted

    asked = request_of(mapping, src, options, RankOptions)
    loaded, layout = _rules(asked)
    loaded, layout, checkpoint = fitted(loaded, layout, read_checkpoint(src, layout, asked.config))
    return make_reshard_plan(
        loaded,
        layout,
        checkpoint,
        Grid(asked.mode, asked.ranks, asked.chunks),
        settings=asked.settings,
        like=None if asked.like is None else read_checkpoint(asked.like, layout, asked.config),
        dtype=asked.dtype,
    )


def read_whole(src: Source) -> WholeCheckpoint:
    """A Hugging Face checkpoint's headers and configuration; E304 when `config.json` is missing."""
    from engine.checkpoint.hf_folder import other_weights, read_hf_config, read_hf_folder
    from engine.planning.backward import WholeCheckpoint

    folder = found_at(src, "the checkpoint")
    files = read_hf_folder(folder)
    checkpoint = WholeCheckpoint(str(src), files, read_hf_config(folder), other_weights(folder, files))
    if not checkpoint.config:
        raise EngineError(
            "E304",
            "`config.json` is missing",
            place=Place(str(src)),
            expected="the model's configuration beside the weights",
            fix="Copy it from the model: the training configuration is computed from it.",
        )
    return checkpoint


def _rules(asked: Request) -> tuple[MappingFile, Layout]:
    loaded = asked.mapping if isinstance(asked.mapping, MappingFile) else load_mapping(asked.mapping)
    return loaded, load_layout(loaded.layout, loaded.layout_place)


def save_plan(
    path: str | Path,
    mapping: str | Path,
    src: str | Path = ".",
    *,
    overwrite: bool = False,
    **options: Unpack[WholeOptions],
) -> Plan:
    """Plan as `plan` does and save it, to be reviewed and run with `run_plan`.

    The file (`schemas/saved-plan.schema.json`) is small for any model. Paths in it are as given here.
    With `overwrite`, a plan that was saved there before is replaced; no other file is.
    """
    from engine.proving.saved_plan import Request as Saved
    from engine.proving.saved_plan import is_saved_plan, saved_plan, write_saved_plan

    file = given_path(path, "the plan")
    check_file_free(file, overwrite, is_saved_plan)
    compiled = plan(mapping, src, **options)
    asked = request_of(mapping, src, options, WholeOptions)
    request = Saved(
        str(mapping),
        str(src),
        dict(asked.settings),
        asked.dtype,
        asked.max_shard_size,
        asked.strict,
        None if asked.config is None else str(asked.config),
    )
    write_saved_plan(file, saved_plan(compiled, request), overwrite=overwrite)
    return compiled


def load_plan(path: str | Path) -> Plan:
    """The plan that was saved, made anew from what it was made from.

    Raises:
        EngineError: E217 when mapping, layout or what they come to changed since, E405 when the
            checkpoint's files did.
    """
    from engine.planning.planner import make_plan
    from engine.proving.meta_model import fitted
    from engine.proving.saved_plan import check_files, check_plan, check_rules, read_saved_plan

    saved = read_saved_plan(given_path(path, "the plan"))
    request = saved.request
    loaded = load_mapping(request.mapping)
    layout = load_layout(loaded.layout, loaded.layout_place)
    check_rules(saved, loaded, layout)
    checkpoint = read_checkpoint(request.src, layout, request.config)
    check_files(saved, checkpoint.files, request.src)
    loaded, layout, checkpoint = fitted(loaded, layout, checkpoint)
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
