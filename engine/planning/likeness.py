"""What a new training checkpoint takes over from another: mode, ranks, names, choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from engine.checkpoint.ranks import stage_dims
from engine.errors import EngineError
from engine.language.model import Layout, Mode
from engine.language.model import Mapping as MappingFile
from engine.language.names import Pattern
from engine.planning.attempts import Checkpoint
from engine.planning.destination import Destination, Request, cut_layers, mode_of, ranks_of
from engine.planning.planner import Understood
from engine.planning.rank_outputs import destination_names
from engine.planning.stages import Stages
from engine.planning.stored import Instance, prefix_of
from engine.planning.variants import decide, option_value


@dataclass(frozen=True, slots=True)
class Like:
    """What is copied from a checkpoint: facts that no configuration carries."""

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


def like_of(understood: Understood, checkpoint: Checkpoint, layout: Layout) -> Like:
    """The facts of a training checkpoint that a new one can share."""
    groups = understood.attempt.groups.values()
    spelt = {s.text for g in groups for s in g.instance.sources if s.match(g.name) is not None}
    names = [header.name for file in checkpoint.files for header in file.tensors]
    return Like(
        checkpoint.grid.mode.name,
        checkpoint.grid.sizes,
        understood.stages,
        {n: d.choice for n, d in understood.attempt.decisions.items()},
        frozenset(spelt),
        prefix_of(names, layout),
        checkpoint.training,
    )


def grid_of(layout: Layout, request: Request, like: Like) -> tuple[Mode, dict[str, int]]:
    """The mode that is written and its ranks: what is asked for, else as in `like`, else one rank."""
    asked = dict(request.sizes or {})
    mode = mode_of(layout, request.mode if request.mode is not None else like.mode, asked)
    known = {d: n for d, n in like.sizes.items() if d not in asked} if mode.name == like.mode else {}
    staged = stage_dims(layout)  # stages are what modes share
    shared = {d: n for d, n in like.sizes.items() if d in staged and d not in asked}
    return mode, ranks_of(layout, mode, {**shared, **known, **asked})


def destination_of(
    mapping: MappingFile, layout: Layout, request: Request, like: Like, settings: Mapping[str, Any], layers: int
) -> Destination:
    """Where the rank files go: what is asked for, else as in `like`, else one rank."""
    mode, sizes = grid_of(layout, request, like)
    staged = stage_dims(layout)
    chunks = request.chunks
    if chunks is None:
        ranks = {d: sizes.get(d, 1) for d in staged}
        same = ranks == {d: like.sizes.get(d) for d in staged}
        chunks = like.chunks if same or prod(ranks.values()) > 1 else 1
    if chunks < 1:
        raise EngineError("E001", "there must be at least one chunk", got=str(chunks), expected="1 or more")
    options = _layout_options(layout, settings)
    names = destination_names(layout, mapping, mode.name, sizes, chunks, layers, like.training, options)
    given = {name: value for name, value in settings.items() if name in layout.layers.variants}
    names |= {n: d.choice for n, d in decide(layout.layers.variants, given, names).items()}
    stages = cut_layers(layout, layers, sizes, chunks, names, like.stages)
    told = any(name in settings for name in layout.options)  # then the layout's `when` picks the prefix
    prefix = like.prefix if (stages.chunks > 1) == (like.chunks > 1) and not told else None
    return Destination(layout, mode, sizes, stages, names, mapping.even, prefix)


def _layout_options(layout: Layout, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: option_value(o, settings.get(name, o.default)) for name, o in layout.options.items()}


def spellings_of(used: Sequence[Instance], like: Like) -> dict[str, Pattern]:
    """For rules with historical names, the one that a checkpoint uses."""
    return {
        one.key: next((s for s in one.sources if s.text in like.spelt), one.sources[0])
        for one in used
        if len(one.sources) > 1
    }
