"""Matching: every stored tensor to exactly one active rule, with layer numbers of the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import product
from typing import Any

from engine.checkpoint.ranks import RankFile, RankGrid, Stage, counts_of, layout_dims
from engine.errors import EngineError, Place, shape_text
from engine.language.documents import grouped
from engine.language.model import Exclusion, Layout, MappingFile
from engine.language.names import form, pattern
from engine.planning.stages import Indices, Stages, alike, file_numbers, number_layers
from engine.planning.stored import End, Instance, Stored
from engine.planning.variants import decide, untold

Match = tuple[Stored, Instance, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Matches:
    """The candidate instances of each distinct name, with their placeholder values."""

    candidates: Mapping[str, tuple[tuple[Instance, Mapping[str, int]], ...]]
    ignored: Mapping[str, str]
    refused: Mapping[str, Exclusion]


SIDES = {"training": "source", "whole": "target"}  # the names of the two sides in `ignore` and `refuse`
_CANNOT = {"training": "the target cannot express this model", "whole": "training files cannot express this model"}


def find_candidates(names: Sequence[str], all_instances: Sequence[Instance], mapping: MappingFile, end: End) -> Matches:
    """Match each distinct name once against every rule's tensors on one side, for any variants."""
    distinct = dict.fromkeys(names)
    compiled = grouped(
        (form(source.sample()), (one, source)) for one in all_instances for source in (*one.sources, *one.parts)
    )
    candidates: dict[str, tuple[tuple[Instance, Mapping[str, int]], ...]] = {}
    for name in distinct:
        alike = compiled.get(form(name), ())
        found = tuple((one, values) for one, source in alike if (values := source.match(name)) is not None)
        if found:
            candidates[name] = found

    def among(entries: Sequence[Exclusion]) -> dict[str, Exclusion]:
        known = [(pattern(entry.pattern), entry) for entry in entries if entry.side == SIDES[end]]
        return {name: entry for name in distinct for one, entry in known if one.match(name) is not None}

    ignored = {name: entry.why for name, entry in among(mapping.ignore).items()}
    return Matches(candidates, ignored, among(mapping.refuse))


def check_refused(stored: Sequence[Stored], matches: Matches, files: Sequence[RankFile], end: End) -> None:
    """E209 for the first tensor that shows that the other side cannot express the model."""
    for one in stored:
        entry = matches.refused.get(one.name)
        if entry is not None:
            raise EngineError(
                "E209",
                f"{_CANNOT[end]}: {entry.why}",
                place=Place(files[one.file].name, tensor=one.header.name),
                got=f"{shape_text(one.header.shape)} {one.header.dtype}",
                expected=f"no such tensor ({entry.place})",
                fix="Use a mapping that can express it on both sides.",
            )


def check_names(
    stored: Sequence[Stored], matches: Matches, choices: Mapping[str, str], files: Sequence[RankFile]
) -> None:
    """Refuse tensors that no rule matches, or several."""
    seen: set[str] = set()
    for one in stored:
        if one.name in seen:
            continue
        seen.add(one.name)
        place = Place(files[one.file].name, tensor=one.header.name)
        shape = f"{shape_text(one.header.shape)} {one.header.dtype}"
        if one.name in matches.ignored:
            continue
        found = matches.candidates.get(one.name, ())
        active = {i: None for i, _ in found if i.rule.active(choices)}  # rules may share a target
        if len(active) == 1:
            continue
        if len(active) > 1:
            rules = ", ".join(f"`{i.rule.name}` ({i.rule.place})" for i in active)
            raise EngineError(
                "E206",
                f"tensor `{one.name}` is matched by {len(active)} rules",
                place=place,
                got=rules,
                expected="exactly one",
                fix="Give the rules different `when`, or remove one.",
            )
        if found:
            rule = found[0][0].rule
            when = ", ".join(f"{name}: {'|'.join(allowed)}" for name, allowed in rule.when.items())
            raise EngineError(
                "E205",
                f"tensor `{one.name}` is matched by no active rule",
                place=place,
                got=shape,
                expected=f"rule `{rule.name}` ({rule.place}) would match when {when}; "
                f"decided: {', '.join(f'{n}={choices[n]}' for n in rule.when if n in choices)}",
                fix="Check the decision with `engine plan`, or override it with --set.",
            )
        raise EngineError(
            "E205",
            f"tensor `{one.name}` is matched by no rule",
            place=place,
            got=shape,
            expected="one rule, or an `ignore` entry that says why it is not needed",
            fix=f"Write a rule for it in the mapping{_like(one.name, matches)}; or take another mapping: "
            "`engine inspect` shows which fit this checkpoint.",
        )


def _like(name: str, matches: Matches) -> str:
    """Text to append that names the rule that reads the most similar name."""
    near = get_close_matches(name, [known for known, found in matches.candidates.items() if found], 1)
    if not near:
        return ""
    rule = matches.candidates[near[0]][0][0].rule
    return f", like rule `{rule.name}` ({rule.place}), which reads `{near[0]}`"


def check_spellings(stored: Sequence[Stored], active: Sequence[Instance]) -> None:
    """Check that a checkpoint uses exactly one of a rule's historical names, or its pieces."""
    names = {one.name for one in stored}
    for instance in active:
        if len(instance.sources) < 2 and not instance.parts:
            continue
        spelled = (*((one,) for one in instance.sources), instance.parts)
        used = [" and ".join(s.text for s in each) for each in spelled
                if any(s.match(n) is not None for s in each for n in names)]  # fmt: skip
        if len(used) > 1:
            pieces = used[-1] == " and ".join(one.text for one in instance.parts)
            twice = "both whole and in pieces" if pieces else "two historical names at once"
            raise EngineError(
                "E206",
                f"rule `{instance.rule.name}` matches {twice}",
                place=instance.rule.place,
                got=" and ".join(used),
                expected="the whole tensor or its pieces, not both" if pieces else "exactly one per checkpoint",
                fix="The folder mixes files of two checkpoints.",
            )


def stages_of(
    stored: Sequence[Stored], matches: Matches, grid: RankGrid, layout: Layout, names: Mapping[str, Any]
) -> Stages:
    """Count each stage's layers, file by file, in files that hold whole stages.

    What decides their order in the layout is seen by the first and the last stage's tensors if no configuration tells.

    Raises:
        EngineError: E211 if these tensors are in other stages.
    """
    local: dict[Stage, dict[int, int]] = {}
    stage_of = cache(grid.stage)
    for one in stored:
        file = grid.files[one.file]
        if file.pattern.number is not None or one.name not in matches.candidates:
            continue
        layer = matches.candidates[one.name][0][1].get("layer")
        if layer is None:
            continue
        counts = local.setdefault(stage_of(one.file, one.chunk), {})
        seen_in = 0 if file.pattern.boxes else one.file  # a file of boxes may hold boxes of any layers
        counts[seen_in] = max(counts.get(seen_in, 0), layer + 1)
    variants = layout.layers.variants
    decided = {name: one.choice for name, one in decide(variants, {}, names).items()}
    stages = number_layers(local, grid, layout, {**names, **decided})
    wrong = _wrong_order(stored, matches, grid, stages)
    if wrong is None:
        return stages
    open_to = {name: one.choices for name, one in variants.items() if untold(one, names)}
    others = [{**names, **decided, **dict(zip(open_to, chosen, strict=True))} for chosen in product(*open_to.values())]
    found = [number_layers(local, grid, layout, other) for other in others]
    right = [one for one in found if _wrong_order(stored, matches, grid, one) is None]
    if len(right) != 1:
        raise wrong
    return right[0]


def _wrong_order(stored: Sequence[Stored], matches: Matches, grid: RankGrid, stages: Stages) -> EngineError | None:
    """E211 if a tensor of the first or last stage is in another stage: files were renamed or exchanged.

    Nothing else shows this: every layer would be present, but in another order.
    """
    order = list(stages.starts)
    found: dict[tuple[str, str], list[tuple[int, Stored]]] = {}
    ends = {name: kind for name, ((one, _), *_) in matches.candidates.items() if (kind := one.stage_class) != "layers"}
    for one in stored:
        if one.name in ends and grid.files[one.file].pattern.number is None:
            place = grid.stage(one.file, one.chunk)
            if place in stages.starts:
                found.setdefault((ends[one.name], one.name), []).append((order.index(place), one))
    for (kind, name), places in found.items():
        wanted = 0 if kind == "first" else len(order) - 1
        if all(at != wanted for at, _ in places):
            return EngineError(
                "E211",
                f"the pipeline stages are in another order than their files say: `{name}` belongs to the {kind} one",
                place=Place(grid.files[places[0][1].file].name, tensor=name),
                got=f"in {stages.name(order[places[0][0]])}",
                expected=f"in {stages.name(order[wanted])}",
                fix="Files were renamed or exchanged, or are from another run; copy the folder again.",
            )
    return None


def indices_of(stored: Sequence[Stored], matches: Matches, grid: RankGrid, layout: Layout) -> Indices:
    """How rank-local numbers in names become numbers of the whole model, if the layout declares them local."""
    seen: dict[str, dict[int, int]] = {}
    first: dict[tuple[tuple[str, int], ...], int] = {}  # a rank's first file; without ranks there may be many files
    whose = [first.setdefault(tuple(file.ranks.items()), number) for number, file in enumerate(grid.files)]
    for one in stored if layout.indices else ():
        for axis, value in matches.candidates[one.name][0][1].items() if one.name in matches.candidates else ():
            if axis in layout.indices:
                counts, file = seen.setdefault(axis, {}), whose[one.file]
                counts[file] = max(counts.get(file, 0), value + 1)
    told = "files hold different numbers of axis `{}`"
    local = {axis: alike(seen.get(axis, {}), grid.files, told.format(axis)) for axis in layout.indices}
    return Indices(layout, grid.sizes, local)


def assign(
    stored: Sequence[Stored],
    matches: Matches,
    grid: RankGrid,
    layout: Layout,
    stages: Stages,
) -> Iterator[Match]:
    """Pair each tensor with its first candidate, and with its placeholder values in the whole model."""
    positions: dict[int, dict[int, set[int]]] = {}  # for each expert file: local layer → whole-model layers that fit
    known: dict[tuple[Stage, tuple[int, ...]], dict[str, tuple[Instance, Mapping[str, int]]]] = {}
    indices, dims = indices_of(stored, matches, grid, layout), layout_dims(layout) if layout.indices else ()
    at: tuple[int, int] | None = None  # the file and chunk that `stage` and `here` (the names known there) belong to
    for one in stored:
        found = matches.candidates.get(one.name)
        if found is None or one.name in matches.ignored:
            continue
        file = grid.files[one.file]
        if file.pattern.number is not None:
            instance, values = found[0]
            if one.file not in positions:
                positions[one.file] = {}
                for stage, local, number in file_numbers(file.pattern, stages, counts_of(layout, grid.sizes)):
                    if number == file.ranks["number"]:
                        positions[one.file].setdefault(local, set()).add(stages.starts[stage] + local)
            yield one, instance, {**values, "layer": _expert_layer(one, values, positions[one.file], file)}
            continue
        if at != (one.file, one.chunk):
            at, stage = (one.file, one.chunk), grid.stage(one.file, one.chunk)
            here = known.setdefault((stage, tuple(file.ranks.get(dim, 0) for dim in dims)), {})
        if one.name not in here:
            instance, values = found[0]
            if "layer" in values:
                values = {**values, "layer": values["layer"] + stages.starts[stage]}
            here[one.name] = (instance, indices.whole(values, file.ranks))
        yield one, *here[one.name]


def _expert_layer(
    one: Stored,
    values: Mapping[str, int],
    positions: Mapping[int, set[int]],
    file: RankFile,
) -> int:
    """The whole-model layer of an expert file's tensor: exactly one position must fit number and key."""
    local = values["layer"]
    fits = positions.get(local, set())
    if len(fits) == 1:
        return next(iter(fits))
    every = sorted(layer for layers in positions.values() for layer in layers)
    raise EngineError(
        "E211",
        "the layer of an expert file cannot be determined",
        place=Place(file.name, tensor=one.header.name),
        got=f"file number {file.ranks['number']} with local layer {local}",
        expected=f"a number that fits one layer; it fits {every or 'none'}",
        fix="Two pipeline stages wrote the same file number, so one layer's experts were lost at saving; "
        "they cannot be recovered from this folder. Save again with layers divisible by the pipeline size."
        if len(every) > 1
        else "The file was renamed or is another layer's: copy the folder again.",
    )
