"""Explaining a plan: where the elements of an output come from, down to bytes of a file."""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import EngineError
from engine.explaining.explanation import Explained, Explanation, Flow, Stretch, Tensor
from engine.explaining.lattice import join_lattices
from engine.explaining.links import Link, Spot, Window, in_bytes, links, spots
from engine.explaining.selection import parse_selection, unknown_name
from engine.explaining.words import (
    axes_sentence,
    cut_sentence,
    fixed_sentence,
    index_texts,
    order_sentences,
    shard_words,
    slice_sentences,
    slice_text,
)
from engine.planning.boxes import Interval
from engine.planning.groups import Group
from engine.planning.model import Output, Plan
from engine.planning.sides import Shard
from engine.planning.stored import strip

SHOWN = 8  # stretches and byte ranges that are listed


def explain(plan: Plan, asked: str) -> Explanation:
    """Explain part of an output, `NAME[slices]`: rule, axes in words, source files and byte ranges.

    Raises:
        EngineError: E001 for a name or a slice that is not there.
    """
    table = plan.copies
    selection = parse_selection(asked)
    names = {output.name: index for index, output in enumerate(plan.outputs)}
    ties = {tied.output.name: tied for tied in plan.tied}
    notes: list[str] = []
    name = selection.name
    if name in ties:
        name = plan.outputs[ties[name].same_as].name
        notes.append(f"{selection.name} is not written: the configuration ties it to {name}; a run compares the two")
    if name not in names:
        stored = any(name in (one.header.name, one.name) for one in strip(plan.files, plan.layout))
        other = f"`{name}` is a source tensor: give it with --from." if stored else None
        raise unknown_name(name, "output", [*names, *ties], otherwise=other)
    index = names[name]
    output = plan.outputs[index]
    window = selection.window(output.shape)
    group, position = table.outputs[index]
    source, target = table.source, table.target
    shard = target.shards(group)[position]
    selected = spots(target, group, shard, window)
    words = [axes_sentence(output.name, group, target.sizes)]
    words += filter(None, [fixed_sentence(group.fixed, target.sizes, plan.stages)])
    words += slice_sentences(group, window, selected)
    flows: list[Flow] = []
    told: set[str] = set()
    for one in source.reaching(group, target):
        for held in source.shards(one):
            stretches = list(links(spots(source, one, held), selected))
            if not stretches:
                continue
            flows.append(flow(plan, (one, held), tensor_of(output, window), stretches))
            sentence = f"{axes_sentence('in training ' + one.instance.sources[0].text, one, source.sizes)}; "
            told.add(sentence + cut_sentence(source, one))
    words += sorted(told)
    notes += output_notes(output)
    # By count: the plan proved that boxes are disjoint.
    wanted, got = sum(one.volume() for one in selected), sum(one.elements for one in flows)
    if wanted != got:
        raise EngineError(
            "E901", "an explanation does not cover what was asked for", got=f"{got} elements", expected=f"{wanted}"
        )
    asked_for = tensor_of(output, window)
    explained = Explained(asked_for, output.rule, output.place, tuple(words), tuple(flows), tuple(notes))
    return Explanation("forward", (explained,))


def tensor_of(output: Output, window: Window) -> Tensor:
    return Tensor(output.name, output.dtype, output.shape, slice_text(window, output.shape))


def output_notes(output: Output) -> Iterator[str]:
    """What happens to values on the way."""
    if output.transform is not None:
        operation, axis = output.transform
        yield f"{operation} over {axis} changes the values afterwards: each depends on all of its {axis}"
    if output.dtype != output.read_dtype:
        yield f"values are cast from {output.read_dtype} to {output.dtype}"


def flow(plan: Plan, held: tuple[Group, Shard], target: Tensor, found: list[Link], replica: int = 0) -> Flow:
    """What goes from a shard, of which `replica` is looked at, to an output, given their links."""
    group, shard = held
    first = shard.replicas[replica]
    header = first.header
    file = plan.files[first.file].name
    runs, count = join_lattices([link.source_elements(header) for link in found], SHOWN)
    window = hull([(link.source, link) for link in found])
    return Flow(
        Tensor(header.name, header.dtype, header.shape, slice_text(window, header.shape), file),
        target,
        shard_words(group, shard),
        tuple(
            Stretch(
                index_texts(link.source, link.box),
                index_texts(link.target, link.box),
                dict(link.box),
                tuple(order_sentences(link)),
                link.volume(),
            )
            for link in found[:SHOWN]
        ),
        len(found),
        sum(link.volume() for link in found),
        in_bytes(runs, header),
        count,
        tuple(plan.files[one.file].name for one in shard.replicas if one is not first),
    )


def hull(found: list[tuple[Spot, Link]]) -> list[Interval]:
    """The smallest slice of a tensor that holds all links to spots of it."""
    result: list[Interval] = []
    for dim in range(len(found[0][0].bases)):
        lattices = [spot.positions(dim, link.box) for spot, link in found]
        ends = [one.start + sum(stride * (size - 1) for stride, size in one.steps) for one in lattices]
        result.append((min(one.start for one in lattices), max(ends) + 1))
    return result
