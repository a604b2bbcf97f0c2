"""Proofs at real sizes by box arithmetic: headers are made up, no tensor exists.

Both sides of a plan hold boxes of the rules' pieces, and planning refuses a tensor that they do not fill. If the
boxes of each piece are disjoint on both sides, the copies between them are one to one: nothing is lost, doubled or
left over. Then the copies of the two directions must be equal with the sides exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from engine.formats.dcp import DIRECTORY
from engine.formats.headers import ITEM_SIZES, FileHeader, TensorHeader, dense_strides
from engine.language.documents import grouped
from engine.language.model import Layout, MappingFile
from engine.language.rules import undone
from engine.planning.attempts import Checkpoint, whole_checkpoint
from engine.planning.boxes import Box, common, swap
from engine.planning.groups import Group
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.planning.request import Request
from engine.planning.sides import Side
from engine.planning.zeros import ZEROS
from engine.proving.matrix import Case
from engine.proving.proof import Failure
from engine.proving.roundtrip import with_given
from engine.proving.tiny import World
from engine.storage.store import File
from engine.storage.virtual import VirtualStore


def invented(world: World) -> Checkpoint:
    """The headers of a Hugging Face checkpoint that does not exist."""
    tensors = [(name, shape) for name, shape in world.shapes.items() if name not in world.tied]
    file = _file("model.safetensors", [(name, "BF16", shape) for name, shape in tensors])
    return whole_checkpoint("a checkpoint of these sizes", (file,), world.config)


def _file(name: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> FileHeader:
    headers: list[TensorHeader] = []
    offset = 0
    for tensor, dtype, shape in tensors:
        headers.append(TensorHeader(tensor, dtype, shape, dense_strides(shape), offset))
        offset += math.prod(shape) * ITEM_SIZES[dtype]
    return FileHeader(File(VirtualStore("memory"), name), offset, tuple(headers), name)


def written(plan: Plan, layout: Layout) -> Checkpoint:
    """The training checkpoint that a plan would write, as if it existed."""
    assert plan.written is not None
    files = tuple(
        _file(f.name, [(o.name, o.dtype, o.shape) for o in (plan.outputs[i] for i in f.outputs)]) for f in plan.shards
    )
    if DIRECTORY in plan.beside:
        boxes = {(file, one.name): one.recorded for file, one in plan.beside[DIRECTORY][1]}
        files = tuple(
            replace(f, tensors=tuple(replace(t, recorded=boxes[f.name, t.name]) for t in f.tensors)) for f in files
        )
    training = dict(plan.beside.get(layout.training_file or "", ("", {}))[1])
    return Checkpoint("the ranks of these sizes", plan.written, files, dict(plan.config), training, layout.config_file)


def reverse_of(mapping: MappingFile, layout: Layout, world: World, case: Case) -> Plan:
    """The plan that writes a world's ranks; E214 if it cannot be cut in this way."""
    return make_plan(mapping, layout, invented(world), case.request(mapping, world.choices, world.lossy))


def prove_boxes(mapping: MappingFile, layout: Layout, world: World, case: Case) -> list[Failure]:
    """Check both directions of one layout at the world's sizes, from headers alone.

    Raises:
        EngineError: E214 if the layout does not fit the sizes, else the error of planning.
    """
    back = reverse_of(mapping, layout, world, case)
    shapes = [v.name for v in mapping.variants.values() if v.decide == "shapes"]
    settings = {name: world.choices[name] for name in shapes}
    ranks = with_given(written(back, layout), mapping, world)
    forth = make_plan(mapping, layout, ranks, Request(mapping, settings=settings))
    where = f"{case.label}; {world.label}"
    told = [*inverse(forth, back), *(problem for plan in (forth, back) for problem in one_to_one(plan))]
    return [Failure(message, where=where) for message in dict.fromkeys(told)]


def inverse(forth: Plan, back: Plan) -> Iterator[str]:
    """Copies of one direction that are not those of the other with the sides exchanged, in words.

    Padding that is written as zeros is not read.
    """
    read = [[(plan.files[one.file].name, one.header.name) for one in plan.sources] for plan in (forth, back)]
    zeros = {s for s, one in enumerate(back.sources) if back.files[one.file] is ZEROS}
    replicas = {read[0][s] for one in forth.replicas for s in one.sources[1:]}
    names = [
        {i: (file.name, plan.outputs[i].name) for file in plan.shards for i in file.outputs} for plan in (forth, back)
    ]
    ahead = {
        (read[0][c.source], names[0][i][1], c[2:], output.transform and undone(output.transform))
        for i, output in enumerate(forth.outputs)
        for c in forth.copies(i)
    }
    behind = {
        (names[1][i], read[1][c.source][1], swap(c)[2:], back.outputs[i].transform)
        for i in range(len(back.outputs))
        if names[1][i] not in replicas
        for c in back.copies(i)
        if c.source not in zeros
    }
    for (file, name), target, *_ in sorted(ahead ^ behind, key=repr)[:1]:
        yield f"reading {file} {name} into {target} is not the inverse of writing it"


def one_to_one(plan: Plan) -> Iterator[str]:
    """The reasons why a plan is not one to one, for each class of tensors."""
    seen: set[object] = set()
    sides = (plan.copies.target, plan.copies.source)
    for group in sides[0].groups:
        reaching = sides[1].reaching(group, sides[0])
        key = tuple((g.instance.key, g.cut, g.shapes()) for g in (group, *reaching))
        if key in seen:
            continue
        seen.add(key)
        mine, theirs = _boxes(sides[0], [group]), _boxes(sides[1], reaching)
        for piece, boxes in mine.items():
            yield from _overlaps(boxes, group.name)
            yield from _overlaps(theirs.get(piece, []), f"what fills {group.name}")


def _boxes(side: Side, groups: Sequence[Group]) -> Mapping[object, list[Box]]:
    held = (one for group in groups for held in side.place(group) for one in held)
    return grouped((key, region.box) for key, region in held)


def _overlaps(boxes: Sequence[Box], name: str) -> Iterator[str]:
    """Pairs of boxes of one piece that share an element, in words."""
    varying = [a for a in boxes[0] if len({box[a] for box in boxes}) > 1] if boxes else []
    first = varying[0] if varying else next(iter(boxes[0]), "") if boxes else ""
    open_: list[Box] = []  # earlier boxes that extend beyond the current start along one axis
    for box in sorted(boxes, key=lambda box: box[first][0]):
        open_ = [one for one in open_ if one[first][1] > box[first][0]]
        for one in open_:
            shared = common(box, one)
            if shared is not None:
                at = ", ".join(f"{axis} {low}" for axis, (low, _) in shared.items())
                yield f"two shards of {name} hold the element {at}"
                return
        open_.append(box)
