"""A plan as data, for people and for `--json`: rules with layers folded, decisions, outputs; and copies as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import span
from engine.language.documents import even_runs, grouped
from engine.language.names import is_number, pattern
from engine.planning.boxes import Copy
from engine.planning.model import Plan
from engine.planning.zeros import ZEROS
from engine.run.memory import predicted_memory
from engine.storage.cores import cores
from engine.storage.sources import join


def fold(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs folded.

    >>> fold([0, 1, 2, 3, 7])
    '0…3,7'
    """
    return ",".join(map(span, join(((number, number + 1) for number in numbers), 0)))


def folded(text: str, values: Sequence[Mapping[str, int]]) -> str:
    """A name pattern with the values of its placeholders, such as `model.layers.{0…31}`."""
    for placeholder in pattern(text).placeholders:
        text = text.replace(f"{{{placeholder}}}", f"{{{fold([v[placeholder] for v in values])}}}")
    return text


def leaf(name: str) -> str:
    """The module that a parameter belongs to.

    >>> leaf("model.layers.3.mlp.up_proj.weight"), leaf("norm")
    ('up_proj', 'norm')
    """
    parts = [part for part in name.split(".") if not is_number(part)]
    return parts[-2] if len(parts) > 1 else parts[-1]


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-ready data, as `engine plan --json` prints it (`schemas/plan.schema.json`)."""
    files = {number: file for number, file in enumerate(plan.files) if file != ZEROS}  # which is not there
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
            "files": len(files),
            "bytes": sum(file.size for file in files.values()),
            "tensors": sum(one.file in files for one in plan.sources),
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
        "predicted_memory": predicted_memory(plan, min(cores(), len(plan.shards))),
        "notices": list(plan.notices),
    }


def own_sizes(plan: Plan) -> dict[str, int]:
    """The sizes that are specific to this model: not those that are constants in the mapping or repeat their name."""
    always = {name for name, size in (plan.mapping.resolved.get("dims") or {}).items() if str(size).isdigit()}
    named = {name for name, size in plan.sizes.items() if name.rstrip("_") == f"n{size}"}
    return {name: plan.sizes[name] for name in sorted(plan.sizes.keys() - always - named)}


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
                "target": folded(text, [_numbers(plan, index) for index in outputs]),
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


def _numbers(plan: Plan, index: int) -> Mapping[str, int]:
    """The layer, expert, … of an output, and the number in its name if that is a slice's."""
    output = plan.outputs[index]
    parts, named = output.name.split("."), pattern(output.pattern)  # the name may have a prefix
    found = next(filter(None, (named.match(".".join(parts[at:])) for at in range(len(parts)))), {})
    return {**found, **plan.copies.outputs[index][0].fixed}


Label = tuple[tuple[str, int], ...]  # distinguishes a source from an output's other sources: (("tp", 1),)


def copy_texts(copies: Sequence[Copy], labels: Sequence[Label], names: Sequence[str]) -> list[str]:
    """Copies as text; those that differ by equal steps share a line.

    `tp0…1 @0 → @0+8i: 4 (8→16) × 8 (1→1)` are two copies: from element 0 of shards tp0 and tp1, to
    elements 0 and 8; each has four rows of 8 elements, 8 apart in the source and 16 apart in the target.

    >>> row = Copy(0, 0, 0, 0, (4, 8), (8, 1), (16, 1))
    >>> copy_texts([row, Copy(1, 0, 0, 8, (4, 8), (8, 1), (16, 1))], [(("tp", 0),), (("tp", 1),)], ["a", "a"])
    ['tp0…1 @0 → @0+8i: 4 (8→16) × 8 (1→1)']
    >>> copy_texts([row, Copy(1, 0, 0, 8, (4, 8), (8, 1), (16, 1))], [(("tp", 0),), (("tp", 2),)], ["a", "a"])
    ['tp0 @0 → @0: 4 (8→16) × 8 (1→1)', 'tp2 @0 → @8: 4 (8→16) × 8 (1→1)']
    """

    def step(index: int) -> tuple[object, ...] | None:
        a, b = copies[index], copies[index + 1]
        alike = all(getattr(a, name) == getattr(b, name) for name in ("shape", "source_strides", "target_strides"))
        if not alike or names[a.source] != names[b.source]:
            return None
        moved = tuple(y - x for (_, x), (_, y) in zip(labels[a.source], labels[b.source], strict=True))
        if sorted(moved)[-1:] not in ([], [0], [1]) or sum(map(abs, moved)) > 1:
            return None
        return moved, b.source_offset - a.source_offset, b.target_offset - a.target_offset

    several = len(set(names)) > 1
    result: list[str] = []
    for start, end in even_runs(len(copies), step):
        first, last = copies[start], copies[end - 1]
        count = end - start
        label = " ".join(
            f"{dim}{low}" if low == high else f"{dim}{low}…{high}"
            for (dim, low), (_, high) in zip(labels[first.source], labels[last.source], strict=True)
        )
        told = [names[first.source]] if several else []
        told += [label] if label else []
        told.append(f"@{_offsets(first.source_offset, last.source_offset, count)}")
        told.append(f"→ @{_offsets(first.target_offset, last.target_offset, count)}:")
        shape = zip(first.shape, first.source_strides, first.target_strides, strict=True)
        told.append(" × ".join(f"{size} ({a}→{b})" for size, a, b in shape) or "1 element")
        same = all(labels[c.source] == labels[first.source] for c in copies[start:end])
        result.append(" ".join(told) + (f", {count} times" if count > 1 and same else ""))
    return result


def _offsets(first: int, last: int, count: int) -> str:
    if first == last:
        return str(first)
    step = (last - first) // (count - 1)
    return f"{first}{'+' if step > 0 else '-'}{abs(step)}i"
