"""The public functions that make plans. They read only headers and configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from engine.api.outputs import tokenizer_beside
from engine.assets.chat import chat_template
from engine.checkpoint.hf_folder import other_weights, read_hf_config, read_hf_folder
from engine.checkpoint.identity import check_files
from engine.discover.steps import step_below
from engine.errors import EngineError, Place
from engine.explaining.describe import describe_rules
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Layout, MappingFile
from engine.planning.attempts import Checkpoint, whole_checkpoint
from engine.planning.effects import check_effects
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.planning.reading import read_checkpoint
from engine.planning.request import AnyOptions, Request, ReshardOptions, ReverseOptions, WholeOptions, request_of
from engine.planning.saved_plan import (
    AGAIN,
    MAX_BYTES,
    SavedPlan,
    check_plan,
    check_rules,
    encode,
    is_saved_plan,
    parse_saved_plan,
    request_data,
    saved_plan,
)
from engine.planning.saved_work import work_data
from engine.proving.meta_model import fitted, written_as_model
from engine.proving.own import checked
from engine.run.angles import check_values
from engine.run.execute import Small
from engine.run.schedule import scattered_outputs
from engine.show.notebook import displayed
from engine.storage.folders import one_of_two
from engine.storage.local import open_regular
from engine.storage.places import Source, followed, found_at, store_at
from engine.storage.replacing import check_file_free, given_path, write_file
from engine.storage.store import File


@displayed
def plan(mapping: str | Path | MappingFile, src: Source = ".", **options: Unpack[WholeOptions]) -> Plan:
    """Compile what `convert` would do.

    >>> engine.plan("internlm", "ckpt/1000", dtype="bf16")
    <Plan of internlm 1.0.0: 'ckpt/1000' (tp 2 × pp 2) to 55 tensors, 593,024 bytes in 1 file>

    Args:
        mapping: a path, the name of a bundled mapping, or a loaded one.
        src: the training checkpoint's folder, or a store such as `engine.virtual` makes.
        settings: values of variants and options by name, as with `--set`.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        max_shard_size: the most bytes of tensors per output file.
        strict: refuse a checkpoint whose sizes differ from those that the release expects.

    Raises:
        EngineError: with a code, the place, got against expected and what to do.
    """
    return planned(request_of(mapping, src, options, "run"))


@displayed
def plan_reverse(mapping: str | Path | MappingFile, src: Source, **options: Unpack[ReverseOptions]) -> Plan:
    """Compile what `reverse` would do. Arguments as for `reverse`.

    >>> report = engine.convert("internlm", "ckpt/1000", "hf")
    >>> engine.plan_reverse("internlm", "hf", tp=4)
    <Plan of internlm 1.0.0: 'hf' (tp 4 × pp 1) to 144 tensors, ...>
    """
    return planned(request_of(mapping, src, options, "reverse"))


@displayed
def plan_reshard(mapping: str | Path | MappingFile, src: Source, **options: Unpack[ReshardOptions]) -> Plan:
    """Compile what `reshard` would do. Arguments as for `reshard`.

    >>> engine.plan_reshard("internlm", "ckpt/1000", tp=4, pp=1)
    <Plan of internlm 1.0.0: 'ckpt/1000' (tp 2 × pp 2) to ...>
    """
    return planned(request_of(mapping, src, options, "reshard"))


def planned(asked: Request) -> Plan:
    """The plan of a request, whatever it reads and writes."""
    through = None if asked.to is None else _read_by_first(asked)
    made = asked if through is None else _by_second(asked, through[0])
    loaded, layout = rules_of_request(made)
    return _compiled(asked, made, loaded, layout, _read(made, layout), through)


def _read_by_first(asked: Request) -> tuple[Plan, Request]:
    """The plan and request of the mapping that reads, where another one (`to`) writes.

    Settings go to the mapping that has them, to both if both have them. A choice that contradicts the checkpoint's
    own configuration is for the mapping that writes.
    """
    other = _settings_of_second(asked)
    mine = {name: value for name, value in asked.settings.items() if _takes(asked, name, value) or name not in other}
    whole = planned(first := Request(asked.mapping, asked.src, config=asked.config, settings=mine))
    against = {name for name, one in whole.decisions.items() if name in other and one.instead_of is not None}
    if against:
        first = replace(first, settings={name: value for name, value in mine.items() if name not in against})
        whole = planned(first)
    return whole, first


def _by_second(asked: Request, whole: Plan) -> Request:
    """The request for the mapping that writes: it reads the files that a run of the first mapping would write."""
    from engine.assets.generation import as_json
    from engine.serve.virtual import VirtualFolder

    folder = VirtualFolder(whole, lambda: Small({"config.json": as_json(whole.config)}))
    return replace(of_second(asked), src=folder.store, reads="whole", config=None, settings=_settings_of_second(asked))


def of_second(asked: Request) -> Request:
    """The request of the mapping that writes, without its source."""
    return replace(asked, mapping=asked.to or "", to=None)


def _settings_of_second(asked: Request) -> dict[str, Any]:
    return {name: value for name, value in asked.settings.items() if _takes(of_second(asked), name, value)}


def _takes(asked: Request, name: str, value: Any) -> bool:
    """Whether the mapping of a request has such a setting, or its layout if this mapping writes."""
    mapping, layout = rules_of_request(asked)
    variants, options = {**mapping.variants}, {*mapping.options}
    if asked.to is None:
        variants, options = {**layout.layers.variants, **variants}, options | {*layout.options}
    return name in options or (name in variants and str(value) in variants[name].choices)


def _read(asked: Request, layout: Layout) -> Checkpoint:
    if asked.reads == "whole":
        if asked.config is not None and asked.like is None:
            raise no_effect(asked.config, " without --like")
        return read_whole(asked.src)
    try:
        return read_checkpoint(asked.src, layout, asked.config)
    except EngineError as error:
        raise step_below(error, store_at(asked.src, "the checkpoint"), asked.config, layout) from None


def no_effect(config: str | Path, without: str = "") -> EngineError:
    """E001 for a configuration given for a Hugging Face checkpoint, which has its own."""
    return EngineError("E001", f"--config has no effect{without}: `config.json` beside the weights is used",
                       got=str(config), fix="Leave it out, or put it beside the weights.")  # fmt: skip


def _compiled(
    given: Request,
    asked: Request,
    loaded: MappingFile,
    layout: Layout,
    checkpoint: Checkpoint,
    through: tuple[Plan, Request] | None,
) -> Plan:
    """The plan for `asked`, which one mapping can do. `given` is the user's request, `through` the plan that reads."""
    config: Path | str | File | None = asked.config
    if config is None and asked.reads == "whole" and (layout.config_of_target or layout.config_from_target):
        found = found_at(asked.src)
        config = found.beside("config.json") if isinstance(found, File) else File(found, "config.json")
    mapping, plain, like = loaded, layout, None
    if asked.like is not None:
        with one_of_two(asked.like, "--like "):
            loaded, layout, like = fitted(mapping, plain, read_checkpoint(asked.like, layout, config))
    if asked.reads == "training":
        loaded, layout, checkpoint = fitted(mapping, plain, checkpoint)
    else:
        loaded = written_as_model(loaded, checkpoint)
    made = checked(make_plan(loaded, layout, checkpoint, asked, like=like))
    check_values(made)
    if through is None:
        check_effects(made, asked.settings)
        return made
    alone = [name for name, value in asked.settings.items() if not _takes(given, name, value)]
    check_effects(made, alone)  # a setting of both mappings may affect only the first
    told = (*through[0].notices, *made.notices)
    return replace(made, folder=str(given.src), notices=told, through=through)


def read_whole(src: Source) -> Checkpoint:
    """A Hugging Face checkpoint's headers and configuration; E304 when `config.json` is missing."""
    found = found_at(src)
    folder = found if isinstance(found, File) else followed(found)
    files = read_hf_folder(folder)
    checkpoint = whole_checkpoint(str(src), files, read_hf_config(folder), other_weights(folder, files))
    if not checkpoint.config:
        raise EngineError(
            "E304",
            "`config.json` is missing",
            place=Place(str(src)),
            expected="the model's configuration beside the weights",
            fix="Copy it from the model: the training configuration is computed from it.",
        )
    return checkpoint


def rules_of_request(asked: Request) -> tuple[MappingFile, Layout]:
    loaded = asked.mapping if isinstance(asked.mapping, MappingFile) else load_mapping(asked.mapping)
    return loaded, load_layout(loaded.layout, loaded.layout_place)


def save_plan(
    path: str | Path,
    mapping: str | Path,
    src: str | Path = ".",
    *,
    job: str = "run",
    overwrite: bool = False,
    **options: Unpack[AnyOptions],
) -> Plan:
    """Make a plan and save it, to be reviewed and run with `run_plan`.

    >>> saved = engine.save_plan("plan.json", "internlm", "ckpt/1000")
    >>> engine.run_plan("plan.json", "hf").tensors
    55

    The file (`schemas/saved-plan.schema.json`) is small for any model. Paths in it are as given here.
    With `overwrite`, an older saved plan is replaced, but no other kind of file.

    Args:
        job: `run`, `reverse` or `reshard`; the other options are those of that function.
    """
    file = given_path(path, "the plan")
    check_file_free(file, overwrite, is_saved_plan)
    asked = request_of(mapping, src, options, job)
    request_data(asked)
    compiled = planned(asked)
    taken, notices = tokenizer_beside(compiled)
    data = {**_content(compiled, asked), **({"tokenizer": taken} if taken else {})}
    write_file(file, encode(data), overwrite=overwrite, ours=is_saved_plan)
    return replace(compiled, notices=(*compiled.notices, *notices))


def saved_as(compiled: Plan, asked: Request) -> bytes:
    """The file of a saved plan.

    Raises:
        EngineError: E001 for what another process cannot read: a loaded mapping, a store.
    """
    return encode(_content(compiled, asked))


def _content(compiled: Plan, asked: Request) -> dict[str, Any]:
    through = None if compiled.through is None else _content(*compiled.through)
    return saved_plan(compiled, asked, *_told(compiled), through)


def _told(compiled: Plan) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None, str | None]:
    """What a saved plan records about a plan: its rules, its work and its chat template."""
    name = compiled.mapping.chat_template
    template = None if name is None or compiled.written is not None else chat_template(name)
    return describe_rules(compiled), work_data(compiled, lambda: scattered_outputs(compiled)), template


def read_saved(path: str | Path) -> SavedPlan:
    """Read a saved plan; E102 for any other file."""
    file = given_path(path, "the plan")
    with open_regular(file) as opened:
        return parse_saved_plan(file, opened.read(MAX_BYTES + 1))


def load_plan(path: str | Path) -> Plan:
    """Plan again from the sources of a saved plan.

    Raises:
        EngineError: E217 when the mapping, the layout or their result has changed since, E405 when the
            checkpoint's files have.
    """
    return loaded_plan(read_saved(path))


def loaded_plan(saved: SavedPlan) -> Plan:
    """As `load_plan`, for a saved plan that has been read."""
    through = None if saved.through is None else (loaded_plan(saved.through), saved.through.request)
    asked = saved.request if through is None else _by_second(saved.request, through[0])
    loaded, layout = rules_of_request(asked)
    check_rules(saved, loaded, layout)
    checkpoint = _read(asked, layout)
    check_files(saved.data["files"], checkpoint.files, str(saved.request.src), saved.path, AGAIN)
    compiled = _compiled(saved.request, asked, loaded, layout, checkpoint, through)
    check_plan(saved, compiled, *_told(compiled))
    return compiled
