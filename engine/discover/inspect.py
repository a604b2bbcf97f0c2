"""What a checkpoint folder is: layout, mode, ranks, stages, sizes, and which mappings fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine.checkpoint.ranks import Stage
from engine.errors import EngineError
from engine.formats.headers import ITEM_SIZES
from engine.language.model import Layout
from engine.language.model import Mapping as MappingFile
from engine.planning.planner import Checkpoint, make_plan
from engine.planning.stored import strip
from engine.proving.meta_model import fitted


def describe_checkpoint(checkpoint: Checkpoint, layout: Layout, mappings: Sequence[MappingFile]) -> dict[str, Any]:
    """Facts of a checkpoint, JSON-ready. Reads headers only."""
    types: Counter[str] = Counter()
    for file in checkpoint.files:
        for tensor in file.tensors:
            count = 1
            for size in tensor.shape:
                count *= size
            types[tensor.dtype] += count * ITEM_SIZES[tensor.dtype]
    stored = strip(checkpoint.files, layout)
    # Releases say more than families, and a family more than what extends it for another target.
    ranked = sorted(mappings, key=lambda m: (not m.expect, len(m.files), m.name))
    fits = [_fit(checkpoint, layout, mapping) for mapping in ranked if mapping.layout == layout.name]
    stages = next((f.pop("_stages") for f in fits if f.get("_stages")), None)
    for fit in fits:
        fit.pop("_stages", None)
    sizes = checkpoint.grid.sizes
    return {
        "folder": checkpoint.folder,
        "layout": layout.name,
        "mode": checkpoint.grid.mode.name,
        "ranks": dict(sizes),
        "chunks": 1 + max((one.chunk for one in stored), default=0),
        "stages": stages,
        "model_type": checkpoint.training.get("model_type"),
        "files": len(checkpoint.files),
        "tensors": len(stored),
        "bytes": sum(file.size for file in checkpoint.files),
        "dtypes": dict(sorted(types.items())),
        "uneven": _uneven(checkpoint),
        "skipped": list(checkpoint.grid.skipped),
        "unknown": list(checkpoint.grid.unknown),
        "config": {k: v for k, v in checkpoint.config.items() if isinstance(v, (str, int, float, bool))},
        "mappings": fits,
    }


def _fit(checkpoint: Checkpoint, layout: Layout, mapping: MappingFile) -> dict[str, Any]:
    """Whether a mapping can be planned for the checkpoint, or the first reason why not."""
    kind = checkpoint.training.get("model_type")
    if isinstance(kind, str) and mapping.model_types and kind not in mapping.model_types:
        return {"name": mapping.name, "fits": False, "code": "E212",
                "why": f"it is for model_type {' or '.join(mapping.model_types)}, this is {kind}"}  # fmt: skip
    try:
        mapping, checkpoint = fitted(mapping, layout, checkpoint)
        plan = make_plan(mapping, layout, checkpoint, settings={})
    except EngineError as error:
        why = error.message if error.code != "E202" else f"{error.message}; {error.fix}"
        return {"name": mapping.name, "fits": error.code == "E202", "code": error.code, "why": why}
    differ = [a for a, n in mapping.expect.items() if plan.sizes.get(a) != n]
    stages = [
        {"chunk": stage[0], **plan.stages.ranks(stage), "first": first, "layers": plan.stages.counts[stage]}
        for stage, first in sorted(plan.stages.starts.items(), key=lambda item: item[1])
    ]
    why = (
        ""
        if not differ
        else "other sizes: " + ", ".join(f"{a} {plan.sizes.get(a)}, release {mapping.expect[a]}" for a in differ)
    )
    return {"name": mapping.name, "fits": not differ, "code": None, "why": why, "_stages": stages}


def _uneven(checkpoint: Checkpoint) -> list[str]:
    """Names whose shards have different shapes on different ranks of a stage."""
    shapes: dict[tuple[str, Stage], set[tuple[int, ...]]] = {}
    for number, file in enumerate(checkpoint.files):
        for tensor in file.tensors:
            shapes.setdefault((tensor.name, checkpoint.grid.stage(number, 0)), set()).add(tensor.whole)
    return sorted({name for (name, _), seen in shapes.items() if len(seen) > 1})
