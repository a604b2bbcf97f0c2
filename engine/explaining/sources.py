"""Explaining a plan from the other end: where the elements of a stored source tensor go."""

from __future__ import annotations

from engine.errors import EngineError
from engine.explaining.explanation import Explained, Explanation, Flow, Tensor
from engine.explaining.links import Window, links, spots
from engine.explaining.selection import parse_selection, unknown_name
from engine.explaining.targets import flow, hull, output_notes, tensor_of
from engine.explaining.words import (
    axes_sentence,
    cut_sentence,
    fixed_sentence,
    shard_words,
    slice_sentences,
    slice_text,
)
from engine.planning.groups import Group
from engine.planning.model import Plan
from engine.planning.sides import Shard
from engine.planning.stored import Stored, strip

Held = tuple[Group, Shard, int]  # a stored tensor's place in the plan: group, shard, number among the replicas


def explain_source(plan: Plan, asked: str) -> Explanation:
    """Explain part of a stored tensor, `FILE:NAME[slices]`, or `NAME[slices]` in every file that has it.

    Raises:
        EngineError: E001 for a file, a name or a slice that is not there.
    """
    selection = parse_selection(asked, file=True)
    files = [file.name for file in plan.files]
    if selection.file is not None and selection.file not in files:
        raise unknown_name(selection.file, "checkpoint file", files)
    stored = [
        one for one in strip(plan.files, plan.layout) if selection.file is None or files[one.file] == selection.file
    ]
    named = [one for one in stored if selection.name in (one.header.name, one.name)]
    if not named:
        where = f" in {selection.file}" if selection.file is not None else ""
        written = any(selection.name == output.name for output in plan.outputs)
        raise unknown_name(
            selection.name,
            f"source tensor{where} named",
            [one.header.name for one in stored],
            otherwise=f"`{selection.name}` is an output: give it without --from." if written else None,
        )
    places = find_places(plan, named)
    # Ranks hold tensors of several shapes: only those that have the positions are explained.
    fitting: list[tuple[Stored, Window]] = []
    refused: EngineError | None = None
    for one in named:
        try:
            fitting.append((one, selection.window(one.header.shape)))
        except EngineError as error:
            refused = refused or error
    if not fitting and refused is not None:
        raise refused
    return Explanation("backward", tuple(_explained(plan, one, window, places) for one, window in fitting))


def find_places(plan: Plan, wanted: list[Stored]) -> dict[tuple[int, str], Held]:
    """(file, name in the file) → where the plan uses it."""
    source = plan.copies.source
    keys = {(one.file, one.header.name) for one in wanted}
    result: dict[tuple[int, str], Held] = {}
    for group in source.groups:
        if not any((one.file, one.header.name) in keys for held in group.shards.values() for one in held):
            continue
        for shard in source.shards(group):
            for number, one in enumerate(shard.replicas):
                result[one.file, one.header.name] = group, shard, number
    return result


def _explained(plan: Plan, one: Stored, window: Window, places: dict[tuple[int, str], Held]) -> Explained:
    header = one.header
    file = plan.files[one.file].name
    asked = Tensor(header.name, header.dtype, header.shape, slice_text(window, header.shape), file)
    held = places.get((one.file, header.name))
    if held is None:
        why = plan.ignored.get(one.name, "no rule uses it")
        return Explained(asked, None, None, (), (), (f"ignored: {why}",))
    source, target = plan.copies.source, plan.copies.target
    group, shard, replica = held
    rule = group.instance.rule
    selected = spots(source, group, shard, window)
    words = [axes_sentence(one.name, group, source.sizes) + "; " + cut_sentence(source, group)]
    here = shard_words(group, shard)
    words += [f"this is {here}"] if here else []
    words += filter(None, [fixed_sentence(group.fixed, source.sizes, plan.stages)])
    words += slice_sentences(group, window, selected)
    notes: list[str] = []
    if replica:
        first = shard.replicas[0]
        origin = plan.files[first.file].name
        notes.append(f"replica: a run compares it with the one in {origin}, which is the one that is copied")
    flows: list[Flow] = []
    reached = {other.key: other for other in target.reaching(group, source)}
    for index, output in enumerate(plan.outputs):
        found, position = plan.copies.outputs[index]
        if found.key in reached:
            landing = spots(target, found, target.shards(found)[position])
            shared = list(links(selected, landing))
            if shared:
                reaches = tensor_of(output, hull([(link.target, link) for link in shared]))
                flows.append(flow(plan, (group, shard), reaches, shared, replica))
                notes += [f"{output.name}: {note}" for note in output_notes(output)]
    written = {flow.target.name for flow in flows}
    for tied in plan.tied:
        if any(other.name == tied.output.name for other in reached.values()) and tied.output.name not in written:
            same = plan.outputs[tied.same_as].name
            notes.append(f"it would be {tied.output.name}, which is tied to {same}: compared, not written")
    for axis, why in rule.drop.items():
        lost = sum(spot.volume() for spot in selected if axis in spot.box)
        if lost:
            notes.append(f"dropped: {lost} elements of `{axis}`: {why}")
    return Explained(asked, rule.name, str(rule.place), tuple(words), tuple(flows), tuple(notes))
