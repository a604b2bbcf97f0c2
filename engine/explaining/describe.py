"""A plan as data for people and for `--json`: rules with layers folded, decisions, outputs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from engine.language.documents import grouped
from engine.language.names import pattern
from engine.planning.model import Plan
from engine.run.memory import predicted_memory


def fold(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs folded.

    >>> fold([0, 1, 2, 3, 7])
    '0…3,7'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}…{b}" for a, b in runs)


def folded(text: str, values: Sequence[Mapping[str, int]]) -> str:
    """A name pattern with the values that its placeholders have, as `model.layers.{0…31}`."""
    for placeholder in pattern(text).placeholders:
        text = text.replace(f"{{{placeholder}}}", f"{{{fold([v[placeholder] for v in values])}}}")
    return text


def describe_plan(plan: Plan) -> dict[str, Any]:
    """What `run` would do, JSON-ready; the shape is `schemas/plan.schema.json`."""
    return {
        "mapping": {
            "name": plan.mapping.name,
            "version": plan.mapping.version,
            "digest": plan.mapping.digest,
            "files": list(plan.mapping.files),
        },
        "layout": {"name": plan.layout.name, "version": plan.layout.version, "mode": plan.grid.mode.name},
        "source": {
            "folder": plan.folder,
            "ranks": dict(plan.grid.sizes),
            "chunks": plan.stages.chunks,
            "files": len(plan.files),
            "bytes": sum(file.size for file in plan.files),
            "tensors": len(plan.sources),
        },
        "sizes": {name: plan.sizes[name] for name in sorted(plan.sizes)},
        "variants": {
            name: {"choice": d.choice, "how": d.how, "evidence": d.evidence, "expression": d.expression}
            for name, d in plan.decisions.items()
        },
        "options": dict(plan.options),
        "rules": describe_rules(plan),
        "replicas": {"sets": len(plan.replicas), "tensors": sum(len(r.sources) for r in plan.replicas)},
        "ignored": dict(plan.ignored),
        "unread": dict(plan.noted),
        "outputs": plan.written_files(),
        "bytes": plan.nbytes,
        "tensors": len(plan.outputs),
        "config": dict(plan.config),
        "predicted_memory": predicted_memory(plan, min(os.cpu_count() or 1, len(plan.shards))),
        "notices": list(plan.notices),
    }


def describe_rules(plan: Plan) -> list[dict[str, Any]]:
    """One row per target pattern and shape, placeholders folded: `model.layers.{0…31}.…`."""
    rows = grouped(((one.pattern, one.shape, one.dtype), index) for index, one in enumerate(plan.outputs))
    result: list[dict[str, Any]] = []
    for (text, shape, dtype), outputs in rows.items():
        first, copies = plan.outputs[outputs[0]], plan.copies(outputs[0])
        sources = sorted({plan.files[plan.sources[c.source].file].name for c in copies})
        result.append(
            {
                "rule": first.rule,
                "place": first.place,
                "target": folded(text, [plan.copies.outputs[index][0].fixed for index in outputs]),
                "shape": list(shape),
                "dtype": dtype,
                "count": len(outputs),
                "sources": len({c.source for c in copies}),
                "copies": len(copies),
                "source": plan.sources[copies[0].source].header.name if copies else "",
                "source_files": sources[:4],
                "transform": None if first.transform is None else ":".join(first.transform),
            }
        )
    return result
