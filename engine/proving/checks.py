"""The checks of a proof: rules, round trips at tiny sizes, boxes at real sizes, and the target's own model.

Model classes whose tensors a mapping lists, so that transformers is not needed, are checked against transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engine.errors import EngineError, counted, rounded
from engine.language.documents import changed
from engine.language.mapping_file import load_mapping
from engine.language.model import Layout, MappingFile
from engine.planning.stored import instances
from engine.planning.wanted import Wanted, wanted_by_mapping
from engine.proving.counterexamples import counter_examples
from engine.proving.lint import lint
from engine.proving.matrix import STAGES, Combination, cases, real_cases, rows
from engine.proving.meaning import usual_world
from engine.proving.meta_model import asked, load_classes, misfits, wanted
from engine.proving.proof import Check, Failure, check_of
from engine.proving.roundtrip import compare_trip, plan_back, write_ranks, write_world
from engine.proving.symbolic import prove_boxes
from engine.proving.tiny import APART, DIVISIBLE, EVEN, NAMED, NESTED, World, Worlds, choices_text, guess_sizes

RULES, ROUND_TRIP, REAL_SIZES, MODEL = "rules", "round trip", "real sizes", "model"
_FEW_LAYERS = 12  # a number of two digits that STAGES divide
_MOST_FAILURES = 5  # counter-examples reported per check


def check_rules(mapping: MappingFile, combinations: Sequence[Mapping[str, str]]) -> Check:
    """Check that every source piece goes to one target, and every target piece has one source, under all choices."""
    errors = [finding for finding in lint(mapping) if finding.severity == "error"]
    failures: list[Failure] = []
    if errors:
        distinct = {tuple(rule.active(one) for rule in mapping.rules): one for one in combinations}
        failures += counter_examples(mapping, list(distinct.values()))[:_MOST_FAILURES]
        failures += map(Failure.of, errors[:_MOST_FAILURES])
    told = f"{len(mapping.rules)} rules, each piece in exactly one place on either side"
    return check_of(RULES, told, failures)


def check_round_trip(
    mapping: MappingFile, layout: Layout, worlds: Worlds, possible: Sequence[Combination], folder: Path
) -> Check:
    """Check that tensors of numbered elements return from rank files, over a matrix of layouts and choices."""
    if not mapping.training_config and not (layout.config_of_target and mapping.rules):
        told = "not checked: the mapping has no `training_config`, so nothing can be written"
        return Check(ROUND_TRIP, None, told)
    if not possible:
        failure = Failure("no set of tensors shows any combination of choices", str(mapping.place))
        return check_of(ROUND_TRIP, "no combination of choices is possible", [failure])
    mapping = replace(mapping, expect={})  # tiny sizes match no release
    apart = EVEN if "layers" in layout.even else APART
    # Where ranks number their own experts from 0, each must hold several, or all would have number 0.
    numbered = DIVISIBLE if layout.indices else NAMED
    free = guess_sizes(mapping, DIVISIBLE, apart, numbered=numbered)
    refused: dict[str, str] = {}
    failures: list[Failure] = []
    trips = 0
    lossy: set[str] = set()
    ran: set[str] = set()
    for number, row in enumerate(rows(mapping, cases(layout), possible, refused)):
        if len(failures) >= _MOST_FAILURES:
            break
        try:
            world = worlds.make(row.choices, free, most=row.most)
            if world is None:
                continue
            own = folder / str(number)
            trip = write_ranks(mapping, layout, world, write_world(world, own / "hf"), row.case, own / "ranks")
            failures += compare_trip(trip, plan_back(mapping, layout, trip), own / "back")
        except EngineError as error:
            if error.code == "E214":  # too many ranks for sizes so small
                refused.setdefault(row.case.label, error.message)
            else:
                failures.append(Failure.of(error, f"{row.case.label}; {choices_text(row.choices)}"))
            continue
        trips += 1
        ran.add(row.case.label)
        lossy |= set(world.lossy)
    sizes = ", ".join(f"{axis} {size}" for axis, size in free.items())
    told = f"{trips} round trips of {sizes} over {len(ran)} layouts, every element back at its place"
    told += _unfit({label: why for label, why in refused.items() if label not in ran})
    if lossy:
        told += f"; only totality for {', '.join(sorted(lossy))}: values are changed or dropped"
    reached = {one for choices, _ in possible for one in choices.items()}
    every = [(v.name, choice) for v in mapping.variants.values() for choice in v.choices]
    missed = [f"{name}={choice}" for name, choice in every if (name, choice) not in reached]
    if missed:
        told += f"; shown by no set of tensors: {', '.join(missed)}"
    if not trips and not failures:
        failures.append(Failure("no layout can hold a tiny model", str(mapping.place)))
    return check_of(ROUND_TRIP, told, failures)


def _unfit(refused: Mapping[str, str]) -> str:
    """How many layouts a check left out, with the first one and its reason."""
    if not refused:
        return ""
    label, why = next(iter(refused.items()))
    return f"; not over {counted(len(refused), 'other')}, such as {label}: {why}"


def check_real_sizes(mapping: MappingFile, layout: Layout, worlds: Worlds, world: World) -> Check:
    """Check that a release's sizes follow from its configuration, and that both directions are exact at them.

    Boxes are computed for a few layers, as all layers are alike.
    """
    failures = [
        Failure(
            f"`{axis}` would be {world.sizes.get(axis)}, the release has {size}",
            str(mapping.expect_place or mapping.place),
        )
        for axis, size in mapping.expect.items()
        if world.sizes.get(axis) != size
    ]
    ran: list[str] = []
    refused: dict[str, str] = {}
    layers = world.sizes.get("layer", 0)
    few = {**mapping.expect, "layer": _FEW_LAYERS + layers % STAGES}
    shallow = usual_world(mapping, worlds, few) if "layer" in mapping.expect and layers > few["layer"] else None
    mapping = replace(mapping, expect={})  # a release has more layers
    for tried in real_cases(layout) if not failures else ():
        for case in tried:
            try:
                failures += prove_boxes(mapping, layout, shallow or world, case)
            except EngineError as error:
                if error.code == "E214":
                    why = error.message
                    continue
                failures.append(Failure.of(error, f"{case.label}; {world.label}"))
            ran.append(case.label)
            break
        else:
            refused[case.label] = why
    told = f"{rounded(world.elements)} elements over {' and '.join(ran)}, boxes tiled and inverse both ways"
    told += _unfit(refused)
    if not ran and not failures:
        failures.append(Failure("no layout can hold the release", str(mapping.expect_place or mapping.place)))
    return check_of(REAL_SIZES, told, failures)


def check_model(mapping: MappingFile, worlds: Sequence[World]) -> Check:
    """Compare names and shapes with transformers' own model, once for each configuration."""
    failures: list[Failure] = []
    counted: dict[str, int] = {}
    for world in worlds:
        key = json.dumps(world.config, sort_keys=True, default=str)
        if key in counted:
            continue
        try:
            world, model = _accepted(mapping, world)
        except EngineError as error:
            failures.append(Failure.of(error, world.label))
            break
        if isinstance(model, str):
            return Check(MODEL, None, model)
        counted[key] = len(model.shapes)
        forms = (model, *model.others)  # current names, and other names that transformers loads too
        written = {name: shape for name, shape in world.shapes.items() if name not in world.tied}
        told = min((misfits(written, form.shapes, world.pieces, instances(mapping)) for form in forms), key=len)
        failures += [replace(failure, where=world.label) for failure in told]
        if told:
            break
    told_of = f"{max(counted.values(), default=0)} names and shapes of transformers' {mapping.model_type} model"
    if len(counted) > 1:
        told_of += f", in {len(counted)} configurations"
    return check_of(MODEL, told_of, failures)


def _accepted(mapping: MappingFile, world: World) -> tuple[World, Wanted | str]:
    """A world and its model; one whose sizes divide each other if transformers refuses the first one's configuration.

    A class may want one size to be a multiple of another though no dim of the mapping says so.
    """
    try:
        return world, wanted(world.config, mapping.architecture)
    except EngineError as error:
        worlds = Worlds(mapping)
        sizes = guess_sizes(mapping, apart=NESTED)
        for most in () if mapping.expect else (False, True):  # a release has sizes of its own
            other = worlds.make(world.choices, sizes, most=most)
            if other is not None and {*other.shapes} == {*world.shapes}:
                with suppress(EngineError):
                    return other, wanted(other.config, mapping.architecture)
        raise error from None


def neighbours(mapping: MappingFile, worlds: Worlds, possible: Sequence[Combination], first: World) -> list[World]:
    """Tiny worlds in which one choice differs from the usual world: with biases, with a reward head."""
    free = guess_sizes(mapping)
    found = [first]
    for choices, most in possible:
        if sum(first.choices[name] != choice for name, choice in choices.items()) == 1:
            world = worlds.make(choices, free, most=most)
            found += [world] if world is not None else []
    return found


def check_told(told: MappingFile) -> list[Failure]:
    """How a listed class differs from transformers' own, at a tiny size, with a separate head and with a tied one."""
    world = usual_world(told, Worlds(told))
    if world is None:
        return [Failure("no set of tensors shows any combination of choices", str(told.place))]
    failures: list[Failure] = []
    for ties in (False, True):
        config = {**world.config, "tie_word_embeddings": ties}
        known, model = wanted_by_mapping(told, config), asked(config)
        message = _difference(known, model)
        if message:
            failures.append(Failure(f"{told.architecture}: {message}", str(told.place), f"tie_word_embeddings: {ties}"))
    return failures


def check_classes(classes: Mapping[str, str]) -> list[Failure]:
    """The same for every class that a mapping lists."""
    load_classes()  # once, not for each configuration
    failures: list[Failure] = []
    for name, file in classes.items():
        told = load_mapping(file)
        if told.architecture != name:
            failures.append(Failure(f"{file} describes {told.architecture}, not {name}", str(told.place)))
        failures += check_told(told)
    return failures


def _difference(known: Wanted | None, model: Wanted) -> str:
    """The first difference; empty if they are equal."""
    if known is None:
        return "it does not know this configuration, so it is never used for it"
    absent = "not there"
    differ = [*changed(known.shapes, model.shapes, absent), *changed(known.tied, model.tied, absent)]
    return "".join(f"`{name}` is {got} in the file, transformers has {expected}" for name, got, expected in differ[:1])
