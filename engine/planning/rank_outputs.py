"""Rank files to be written: their tensors, the copies that fill them, and the small files beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.checkpoint.ranks import RankFile, RankGrid, counts_of
from engine.errors import EngineError
from engine.formats.dcp_files import Saved
from engine.formats.dcp_metadata import DIRECTORY
from engine.formats.headers import Part
from engine.formats.pickling import WRITABLE, namespace
from engine.language.expressions import render_tree
from engine.language.model import ConfigFile, Layout
from engine.language.model import Mapping as MappingFile
from engine.language.names import Pattern, pattern
from engine.planning.classes import CopyTable
from engine.planning.destination import Destination
from engine.planning.model import Output, OutputFile
from engine.planning.rank_groups import RankGroups
from engine.planning.sides import Keys, Side
from engine.planning.stored import Instance
from engine.planning.whole import written_dtype


@dataclass(frozen=True, slots=True)
class RankOutputs:
    """Everything a plan says about the rank files it writes."""

    outputs: tuple[Output, ...]
    copies: CopyTable
    shards: tuple[OutputFile, ...]
    grid: RankGrid
    parts: tuple[Part | None, ...] = ()  # of each output, where it records its place


def rank_outputs(
    destination: Destination,
    used: Sequence[Instance],
    keys: Keys,
    spellings: Mapping[str, Pattern],
    source: Side,
    source_files: Sequence[str],
    dtype: str,
) -> RankOutputs:
    """Lay out the rank files of a destination and say what fills them.

    Args:
        used: the rules that have tensors; `keys` are the training side's.
        spellings: for a rule with historical names, the one to write.
        source: the side everything is copied from; `source_files` name its files in errors.
        dtype: `auto` or the type every float tensor is written in, unless its rule keeps it.

    Raises:
        EngineError: E214 when the model cannot be cut so, E208 or E210 when the source does not fill it.
    """
    invented = RankGroups(destination, used, source.sizes, spellings)
    target = Side(tuple(invented.groups), keys, source.sizes)
    listed = [(one, group, position) for held in invented.held for _, one, group, position in held]
    copies = CopyTable(tuple((group, position) for _, group, position in listed), target, source)
    outputs: list[Output] = []
    members: list[list[int]] = [[] for _ in invented.files]
    for index, (one, group, _) in enumerate(listed):
        rule = group.instance.rule
        read = copies.dtype(index, one.name, source_files, rule.place)
        wanted = written_dtype(read, dtype, keep=rule.keep_dtype)
        if wanted not in WRITABLE:
            raise EngineError(
                "E209",
                f"rank files cannot hold `{one.name}`",
                place=rule.place,
                got=wanted,
                expected=", ".join(sorted(WRITABLE)),
                fix="Give --dtype bfloat16.",
            )
        text = group.instance.sources[0].text
        outputs.append(Output(one.name, wanted, read, one.header.shape, rule.name, str(rule.place), text))
        members[one.file].append(index)
    shards = tuple(
        OutputFile(file.name, destination.mode.format, tuple(held))
        for file, held in zip(invented.files, members, strict=True)
    )
    parts = tuple(one.header.part for one, _, _ in listed)
    return RankOutputs(tuple(outputs), copies, shards, _grid(destination, invented.files), parts)


def _grid(destination: Destination, files: Sequence[RankFile]) -> RankGrid:
    return RankGrid(destination.mode, destination.sizes, tuple(files), staged=destination.stages.dims)


def directory_of(destination: Destination, written: RankOutputs) -> dict[str, tuple[str, Any]]:
    """The file that says where the boxes lie, where the mode's format has one: name → (format, content)."""
    if destination.mode.format != "dcp":
        return {}
    saved = [
        Saved(file.name, one.name, one.dtype, one.shape, part)
        for file in written.shards
        for i in file.outputs
        if (one := written.outputs[i]) and (part := written.parts[i]) is not None
    ]
    return {DIRECTORY: ("dcp", saved)}


def with_configuration(
    destination: Destination, shards: Sequence[OutputFile], config: Mapping[str, Any]
) -> tuple[OutputFile, ...]:
    """The weight files with the configuration in each, where that is its place."""
    place = _inside(destination)
    return tuple(shards) if place is None else tuple(replace(one, around=_held(place, config)) for one in shards)


def _inside(destination: Destination) -> ConfigFile | None:
    """The place of the configuration that is in the mode's weight files."""
    first = pattern(destination.mode.files[0].name)
    return next((place for place in destination.layout.configs if first.match(place.file) is not None), None)


def _held(place: ConfigFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it stands in its file: under its key, what stands beside it apart."""
    values = {key: value for key, value in config.items() if key not in place.beside}
    made: Any = namespace(values) if place.kind == "namespace" else values
    if place.key is None:
        return dict(values)
    return {place.key: made, **{key: config[key] for key in place.beside if key in config}}


def small_files(
    destination: Destination, files: Sequence[RankFile], config: Mapping[str, Any]
) -> dict[str, tuple[str, Any]]:
    """Name → (format, content) of the configurations and of what lies beside each rank file."""
    layout = destination.layout
    found: dict[str, tuple[str, Any]] = {}
    if _inside(destination) is None:
        found[layout.config_file] = (layout.config_format, _held(layout.configs[0], config))
    if layout.training_file is not None and layout.training_write:
        found[layout.training_file] = ("python_source", training_text(destination))
    for beside in destination.mode.beside:
        for file in files:
            if file.pattern.name == destination.mode.files[0].name:
                name = pattern(beside.file).format(file.ranks)
                found[name] = (beside.format, render_tree(beside.content, destination.counts()))
    return found


def training_text(destination: Destination) -> dict[str, Any]:
    """What the layout writes of the training configuration."""
    rendered: dict[str, Any] = render_tree(destination.layout.training_write, destination.counts())
    return rendered


def destination_names(
    layout: Layout,
    mapping: MappingFile,
    mode: str,
    sizes: Mapping[str, int],
    chunks: int,
    layers: int,
    training: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What layout expressions and `training_config` see of a destination.

    Every rank dimension that any mode of the layout has is there, as 1 where this mode lacks it.
    """
    names: dict[str, Any] = dict(counts_of(layout, sizes))
    kind = training.get("model_type")
    if kind is None and mapping.model_types:
        kind = mapping.model_types[0]  # as of historical names, the first is the one written
    if kind is not None:
        names["model_type"] = kind
    return {**names, "mode": mode, "chunks": chunks, "layers": layers, "options": options, "training": training}
