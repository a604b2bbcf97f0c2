"""Explains one tensor of a plan, down to bytes of a file: where an output comes from, where a stored tensor goes."""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import EngineError
from engine.explaining.explanation import Explained, Explanation, Flow, Stretch, Tensor, parse_selection, unknown_name
from engine.explaining.links import Link, Spot, Window, in_bytes, join_lattices, links, spots
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
from engine.language.rules import loses
from engine.planning.boxes import Interval, volume
from engine.planning.groups import Group
from engine.planning.model import Output, Plan
from engine.planning.sides import Shard
from engine.planning.stored import Stored, strip

SHOWN = 8  # stretches and byte ranges that are listed
Held = tuple[Group, Shard, int]  # a stored tensor's place in the plan: group, shard, index among the replicas


def explain(plan: Plan, asked: str) -> Explanation:
    """Explain part of an output, `NAME[slices]`: rule, axes in words, source files and byte ranges.

    Raises:
        EngineError: E001 for a name or slice that does not exist.
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
    # Comparing counts is enough: the plan proved that boxes are disjoint.
    wanted, got = sum(volume(one.box) for one in selected), sum(one.elements for one in flows)
    if wanted != got:
        raise EngineError(
            "E901", "an explanation does not cover what was asked for", got=f"{got} elements", expected=f"{wanted}"
        )
    asked_for = tensor_of(output, window)
    explained = Explained(asked_for, output.rule, output.place, tuple(words), tuple(flows), tuple(notes))
    return Explanation("forward", (explained,))


def explain_source(plan: Plan, asked: str) -> Explanation:
    """Explain part of a stored tensor, `FILE:NAME[slices]`, or `NAME[slices]` in every file that has it.

    Raises:
        EngineError: E001 for a file, name or slice that does not exist.
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
    # Shapes may differ between ranks: only tensors that have these positions are explained.
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
    pieces = f"{group.instance.sources[0].text}, of which this is a piece," if group.cut.pieces > 1 else one.name
    words = [axes_sentence(pieces, group, source.sizes) + "; " + cut_sentence(source, group)]
    here = shard_words(group, shard)
    words += [f"this is {here}"] if here else []
    words += filter(None, [fixed_sentence(group.fixed, source.sizes, plan.stages)])
    words += slice_sentences(group, window, selected)
    notes: list[str] = []
    if replica:
        first = shard.replicas[0]
        origin = plan.files[first.file].name
        notes.append(f"replica: a run compares it with the one in {origin}, which is copied")
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
        lost = sum(volume(spot.box) for spot in selected if axis in spot.box)
        if lost:
            notes.append(f"dropped: {lost} elements of `{axis}`: {why}")
    return Explained(asked, rule.name, str(rule.place), tuple(words), tuple(flows), tuple(notes))


def tensor_of(output: Output, window: Window) -> Tensor:
    return Tensor(output.name, output.dtype, output.shape, slice_text(window, output.shape))


def output_notes(output: Output) -> Iterator[str]:
    """What happens to values on the way."""
    if output.transform is not None:
        operation, takes = output.transform
        if loses(output.transform):
            yield f"{operation} over {takes} changes the values afterwards: each depends on all of its {takes}"
        else:
            yield f"values are changed afterwards, in float32: {operation} {takes}"
    if output.dtype != output.read_dtype:
        yield f"values are cast from {output.read_dtype} to {output.dtype}"


def flow(plan: Plan, held: tuple[Group, Shard], target: Tensor, found: list[Link], replica: int = 0) -> Flow:
    """What goes from a shard (its copy number `replica`) to an output, given their links."""
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
                volume(link.box),
            )
            for link in found[:SHOWN]
        ),
        len(found),
        sum(volume(link.box) for link in found),
        in_bytes(runs, header),
        count,
        tuple(plan.files[one.file].name for one in shard.replicas if one is not first),
    )


def hull(found: list[tuple[Spot, Link]]) -> list[Interval]:
    """The smallest slice of a tensor that holds all links to spots of it."""
    result: list[Interval] = []
    for dim in range(len(found[0][0].dims)):
        lattices = [spot.positions(dim, link.box) for spot, link in found]
        ends = [one.start + sum(stride * (size - 1) for stride, size in one.steps) for one in lattices]
        result.append((min(one.start for one in lattices), max(ends) + 1))
    return result
