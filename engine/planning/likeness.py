"""What a new training checkpoint takes from an existing one: mode, ranks, names, choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from engine.checkpoint.ranks import counts_of, stage_dims, written_dims
from engine.errors import EngineError
from engine.language.declared import paths_in
from engine.language.model import Layout, MappingFile, Mode
from engine.language.names import pattern
from engine.planning.destination import Destination, cut_layers, mode_of, ranks_of
from engine.planning.request import Request
from engine.planning.source import Source
from engine.planning.stages import Stages
from engine.planning.stored import instances, prefix_of
from engine.planning.variants import decide, option_value


@dataclass(frozen=True, slots=True)
class Like:
    """What is taken from a checkpoint: facts that no configuration holds."""

    mode: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    stages: Stages | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    spelt: frozenset[str] = frozenset()  # source patterns that the checkpoint uses
    prefix: int | None = None  # index into the layout's prefixes
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return self.stages.chunks if self.stages is not None else 1


def like_of(source: Source) -> Like:
    """The facts of a checkpoint that a new one can share; none from a checkpoint without ranks."""
    checkpoint, layout = source.checkpoint, source.layout
    if checkpoint.end != "training":
        return Like()
    spelt = {s.text for g in source.side.groups for s in g.instance.sources if s.match(g.name) is not None}
    names = [header.name for file in checkpoint.files for header in file.tensors]
    return Like(
        checkpoint.grid.mode.name,
        {**checkpoint.grid.sizes, **_slices(source)},
        source.stages,
        {n: d.choice for n, d in source.decisions.items()},
        frozenset(spelt),
        prefix_of(names, layout),
        checkpoint.training,
    )


def _slices(source: Source) -> dict[str, int]:
    """How many slices there are of each axis whose number is in names."""
    found: dict[str, int] = {}
    for group in source.side.groups:
        for at, dim in enumerate(group.cut.rank_dims()):
            if dim in group.instance.numbered:
                found[dim] = 1 + max(ranks[at] for ranks in group.shards)
    return found


def laid_out_as(other: Like, own: Like, mapping: MappingFile) -> Like:
    """The layout facts of another checkpoint, with those of the source's own tensors and model where they are known."""
    models = {path.split(".")[1] for path in paths_in(mapping.config) if path.startswith("training.")}
    training = {**own.training, **{key: value for key, value in other.training.items() if key not in models}}
    return replace(other, choices=own.choices or other.choices, spelt=own.spelt or other.spelt, training=training)


def grid_of(mapping: MappingFile, layout: Layout, asked: Request, like: Like) -> tuple[Mode, dict[str, int]]:
    """The mode to write and its ranks: as asked for, else those of `like`, else one rank.

    Among modes that the configuration distinguishes, the ranks select one. An axis whose slices are numbered in names
    counts as a rank dimension where the mode's files have that number too.
    """
    numbered = {axis for one in instances(mapping) for axis in one.numbered}
    told = any(mode.name == like.mode and mode.when is not None for mode in layout.modes)
    name = asked.mode if asked.mode is not None or told else like.mode
    wanted = {**like.sizes, **asked.ranks} if told else asked.ranks
    mode = mode_of(layout, name, {dim: count for dim, count in wanted.items() if dim not in numbered})
    staged = stage_dims(layout)  # modes have stages in common
    alike = mode.name == like.mode or (told and mode.when is not None)
    files = {one for file in mode.files for one in pattern(file.name).placeholders}
    dims = (*written_dims(mode.files[0]), *sorted(numbered & files))
    shared = {d: n for d, n in like.sizes.items() if (alike or d in {*staged, *numbered}) and d in dims}
    return mode, ranks_of(layout, mode, dims, {**shared, **asked.ranks})


def cut_of_model(mapping: MappingFile, layout: Layout, asked: Request, like: Like) -> dict[str, Any]:
    """The names for expressions about how a model will be cut, as far as known before its layers are counted."""
    mode, ranks = grid_of(mapping, layout, asked, like)
    return {**counts_of(layout, ranks), "mode": mode.name, "chunks": asked.chunks or like.chunks}


def destination_of(mapping: MappingFile, layout: Layout, asked: Request, like: Like, layers: int) -> Destination:
    """The destination of rank files: as asked for, else that of `like`, else one rank."""
    mode, sizes = grid_of(mapping, layout, asked, like)
    staged = stage_dims(layout)
    chunks = asked.chunks
    if chunks is None:
        ranks = {d: sizes.get(d, 1) for d in staged}
        same = ranks == {d: like.sizes.get(d) for d in staged}
        chunks = like.chunks if same or prod(ranks.values()) > 1 else 1
    if chunks < 1:
        raise EngineError("E001", "there must be at least one chunk", got=str(chunks), expected="1 or more")
    values = {name: option_value(o, asked.settings.get(name, o.default)) for name, o in layout.options.items()}
    options = {name: value for name, value in values.items() if value is not None}  # an expression has its default
    names: dict[str, Any] = {**counts_of(layout, sizes), "mode": mode.name, "chunks": chunks, "layers": layers}
    names |= {"options": options, "training": like.training}
    kind = like.training.get("model_type") or next(iter(mapping.model_types), None)  # the first of historical ones
    names |= {} if kind is None else {"model_type": kind}
    given = {name: value for name, value in asked.settings.items() if name in layout.layers.variants}
    names |= {n: d.choice for n, d in decide(layout.layers.variants, given, names).items()}
    read = paths_in([one.when for one in layout.prefixes])
    told = any(f"options.{name}" in read for name in asked.settings)
    other = (chunks > 1) != (like.chunks > 1) or ("mode" in read and mode.name != like.mode)
    prefix = None if told or other else like.prefix  # without, the layout's `when` picks it
    found = Destination(layout, mode, sizes, Stages({}, {}, chunks), names, mapping.even, prefix)
    if chunks > 1 and found.prefix(0) == found.prefix(1):
        raise EngineError(
            "E001",
            f"mode `{mode.name}` of layout `{layout.name}` has no chunks",
            got=f"{chunks} chunks",
            expected="1, as names in this mode do not contain the chunk",
            fix="Leave --chunks out.",
        )
    if chunks > 1 and prod(sizes.get(dim, 1) for dim in staged) == 1:
        raise EngineError(
            "E214",
            "one pipeline rank cannot have several chunks: training interleaves chunks only over several ranks",
            got=f"--chunks {chunks}",
            expected="--chunks 1",
            fix=f"Give --chunks 1, or several ranks of {', '.join(staged)}.",
        )
    return replace(found, stages=cut_layers(layout, layers, sizes, chunks, names, like.stages))
