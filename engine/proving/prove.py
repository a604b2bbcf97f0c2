"""Proving a mapping: that it is total, injective and exactly invertible, in every layout.

At tiny sizes by running the real planner and runner on index tensors, at a release's own sizes by
box arithmetic, and against the names and shapes that transformers has.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engine.errors import EngineError, EngineErrors
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import Layout
from engine.language.model import Mapping as MappingFile
from engine.proving.committed import check_meaning
from engine.proving.counterexamples import counter_examples
from engine.proving.finding import Finding
from engine.proving.lint import lint
from engine.proving.matrix import Case, Combination, Row, cases, combinations_of, real_cases, rows
from engine.proving.meaning import usual_world
from engine.proving.meta_model import load_classes, misfits, wanted
from engine.proving.proof import Check, Failure, Mutant, Proof, check_of
from engine.proving.roundtrip import Trip, compare_trip, plan_back, write_ranks, write_world
from engine.proving.symbolic import prove_boxes
from engine.proving.tiny import DIVISIBLE, World, Worlds, guess_sizes
from engine.proving.told_classes import check_classes
from engine.proving.trying import try_mutants
from engine.run.meter import Listener, Meter

RULES, ROUND_TRIP, REAL_SIZES, MODEL = "rules", "round trip", "real sizes", "model"
_MOST_FAILURES = 5  # counter-examples told of one check


_FEW = 4  # mappings that one process proves as quickly as several


@dataclass(slots=True)
class _Proven:
    """What one mapping's proof leaves for the next."""

    names: dict[str, str]  # what a round trip depends on → the mapping it was proved for


@dataclass(frozen=True, slots=True)
class _Begun:
    """A proof, and the models that are still to be held against transformers' own."""

    proof: Proof
    worlds: Sequence[World]


def _shared(mapping: MappingFile) -> str:
    """What a round trip depends on: mappings that say the same of it are proved together."""
    parts = ("rules", "dims", "variants", "ignore", "refuse", "config", "training_config", "source")
    return json.dumps([mapping.resolved.get(part) for part in parts], default=str, sort_keys=True)


def prove(
    names: Sequence[str | Path | MappingFile], *, mutants: bool = False, progress: Listener | None = None
) -> list[Proof]:
    """Prove mappings, many of them in several processes; rules that several share are run once."""
    found: dict[int, Proof] = {}
    groups: dict[str, list[tuple[int, MappingFile]]] = {}
    for number, name in enumerate(names):
        try:
            mapping = name if isinstance(name, MappingFile) else load_mapping(str(name))
        except EngineError as error:
            errors = error.errors if isinstance(error, EngineErrors) else [error]
            failures = [Failure.of(one) for one in errors]
            found[number] = Proof(str(name), (check_of("loads", "the file is a mapping", failures),))
            continue
        groups.setdefault(_shared(mapping), []).append((number, mapping))
    meter = Meter(len(names), progress, "proving", "mappings")
    listed = sorted(groups.values(), key=_work, reverse=True)  # so that no long one is begun last
    members = [[mapping for _, mapping in group] for group in listed]
    alone = len(names) <= _FEW or len(listed) < 2 or (os.cpu_count() or 1) < 2
    for number, proofs in _alone(members, mutants, meter) if alone else _together(members, mutants):
        for (i, mapping), begun in zip(listed[number], proofs, strict=True):
            found[i] = _with_model(mapping, begun)
            meter.advance(1)
    return [found[i] for i in range(len(names))]


def _work(group: Sequence[tuple[int, MappingFile]]) -> int:
    """A guess of how long mappings take to prove: combinations to try, and layers to plan."""
    layers = {mapping.expect.get("layer", 0) for _, mapping in group}
    return len(combinations_of(group[0][1])) + sum(layers)


def _alone(groups: Sequence[Sequence[MappingFile]], mutants: bool, meter: Meter) -> Iterator[tuple[int, list[_Begun]]]:
    for number, group in enumerate(groups):
        meter.begin(f"proving {group[0].name}")
        yield number, prove_group(group, mutants)


def _together(groups: Sequence[Sequence[MappingFile]], mutants: bool) -> Iterator[tuple[int, list[_Begun]]]:
    """Groups in processes of their own, each as soon as it is proved; transformers is loaded in this one alone."""
    workers = min(os.cpu_count() or 1, len(groups))
    collecting = gc.get_threshold()  # a new process looks for cycles as seldom as this one does
    with ProcessPoolExecutor(workers, get_context("spawn"), gc.set_threshold, collecting) as pool:
        running = {pool.submit(prove_group, group, mutants): number for number, group in enumerate(groups)}
        load_classes()
        for done in as_completed(running):
            yield running[done], done.result()


def prove_group(mappings: Sequence[MappingFile], mutants: bool) -> list[_Begun]:
    """Prove mappings one after another, but for what transformers has to say."""
    proven = _Proven({})
    found: list[_Begun] = []
    for mapping in mappings:
        started = time.monotonic()
        worlds: Sequence[World] = ()
        try:
            checks, tried, worlds = _prove(mapping, proven, mutants=mutants)
        except EngineError as error:
            checks, tried = [check_of("proof", "everything could be tried", [Failure.of(error)])], []
        found.append(_Begun(Proof(mapping.name, tuple(checks), tuple(tried), time.monotonic() - started), worlds))
    return found


def _with_model(mapping: MappingFile, begun: _Begun) -> Proof:
    """A proof with the check of the models that are left to hold against transformers'."""
    proof, started = begun.proof, time.monotonic()
    if mapping.classes:
        told = f"{', '.join(mapping.classes)} are told as transformers has them"
        check = check_of(MODEL, told, check_classes(mapping.classes))
    elif begun.worlds:
        check = check_model(mapping, begun.worlds)
    else:
        return proof
    checks = (*proof.checks, check)
    return replace(proof, checks=checks, seconds=proof.seconds + time.monotonic() - started)


def _prove(
    mapping: MappingFile, proven: _Proven, *, mutants: bool
) -> tuple[list[Check], list[Mutant], Sequence[World]]:
    layout = load_layout(mapping.layout, mapping.layout_place)
    combinations = combinations_of(mapping)
    checks = [check_rules(mapping, [choices for choices, _ in combinations])]
    checks.append(check_meaning(mapping))
    if not checks[0].holds:
        return checks[:1], [], ()
    worlds = Worlds(mapping)
    possible = [(choices, most) for choices, most in combinations if worlds.shows(choices, most=most)]
    tried: list[Mutant] = []
    key = _shared(mapping)
    if key in proven.names:
        checks.append(Check(ROUND_TRIP, True, f"the rules of {proven.names[key]}, proved there"))
    else:
        proven.names[key] = mapping.name
        with tempfile.TemporaryDirectory(prefix="prove-", dir=_quick()) as folder:
            check = check_round_trip(mapping, layout, worlds, possible, Path(folder))
            checks.append(check)
            if mutants and check.holds is not False:
                tried = try_mutants(mapping)
    if not checks[-1].holds:
        return checks, [], ()
    world = usual_world(mapping, worlds, mapping.expect)
    assert world is not None  # a round trip was made
    if mapping.expect:
        told = json.dumps([key, sorted(mapping.expect.items())])
        if told in proven.names:
            checks.append(Check(REAL_SIZES, True, f"the sizes of {proven.names[told]}, proved there"))
        else:
            proven.names[told] = mapping.name
            checks.append(check_real_sizes(mapping, layout, world))
    return checks, tried, [world] if mapping.expect else neighbours(mapping, worlds, possible, world)


def _quick() -> Path | None:
    """A folder in memory, where there is one: thousands of tiny files are brought to stable storage."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else None


def check_rules(mapping: MappingFile, combinations: Sequence[Mapping[str, str]]) -> Check:
    """Every source piece in one target, every target piece from one source, under all choices."""
    errors = [finding for finding in lint(mapping) if finding.severity == "error"]
    failures: list[Failure] = []
    if errors:
        distinct = {json.dumps(_whens(mapping, one)): one for one in combinations}
        failures += counter_examples(mapping, list(distinct.values()))[:_MOST_FAILURES]
        failures += [_of_finding(finding) for finding in errors[:_MOST_FAILURES]]
    told = f"{len(mapping.rules)} rules, each piece in exactly one place on either side"
    return check_of(RULES, told, failures)


def _whens(mapping: MappingFile, choices: Mapping[str, str]) -> list[bool]:
    """Which rules a combination of choices makes active."""
    return [all(choices[name] in allowed for name, allowed in rule.when.items()) for rule in mapping.rules]


def _of_finding(finding: Finding) -> Failure:
    return Failure(f"{finding.code} {finding.message}", None if finding.place is None else str(finding.place))


def check_round_trip(
    mapping: MappingFile, layout: Layout, worlds: Worlds, possible: Sequence[Combination], folder: Path
) -> Check:
    """Index tensors to rank files and back, over a matrix of layouts and choices."""
    if not mapping.training_config and not (layout.config_of_target and mapping.rules):
        told = "not checked: the mapping has no `training_config`, so nothing can be written"
        return Check(ROUND_TRIP, None, told)
    if not possible:
        failure = Failure("no set of tensors shows any combination of choices", str(mapping.place))
        return check_of(ROUND_TRIP, "no combination of choices can be reached", [failure])
    mapping = replace(mapping, expect={})  # tiny sizes are no release's
    free = guess_sizes(mapping, DIVISIBLE)
    refused: set[str] = set()
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
            trip = _trip(mapping, layout, world, row.case, folder / str(number))
            plan = plan_back(mapping, layout, trip)
            failures += compare_trip(trip, plan, folder / str(number) / "back")
        except EngineError as error:
            if error.code == "E214":  # too many ranks for sizes so small
                refused.add(row.case.label)
            else:
                failures.append(Failure.of(error, f"{row.case.label}; {_told(row)}"))
            continue
        trips += 1
        ran.add(row.case.label)
        lossy |= set(world.lossy)
    told = f"{trips} round trips of {free_of(free)} over {len(ran)} layouts, every element back at its place"
    if lossy:
        told += f"; totality only for {', '.join(sorted(lossy))}, which change or drop values"
    missed = _never(mapping, possible)
    if missed:
        told += f"; shown by no set of tensors: {', '.join(missed)}"
    if not trips and not failures:
        failures.append(Failure("no layout can hold a tiny model", str(mapping.place)))
    return check_of(ROUND_TRIP, told, failures)


def _never(mapping: MappingFile, possible: Sequence[Combination]) -> list[str]:
    """Choices that occur in no possible combination."""
    reached = {(name, choice) for choices, _ in possible for name, choice in choices.items()}
    every = [(v.name, choice) for v in mapping.variants.values() for choice in v.choices]
    return [f"{name}={choice}" for name, choice in every if (name, choice) not in reached]


def _in_words(elements: int) -> str:
    """
    >>> _in_words(7_737_708_544), _in_words(48_000)
    ('7.7 billion', '48,000')
    """
    return f"{elements / 1e9:.1f} billion" if elements >= 1e9 else f"{elements:,}"


def check_real_sizes(mapping: MappingFile, layout: Layout, world: World) -> Check:
    """The sizes a release names follow from its configuration, and both directions are exact at them."""
    failures = [
        Failure(
            f"`{axis}` would be {world.sizes.get(axis)}, the release has {size}",
            str(mapping.expect_place or mapping.place),
        )
        for axis, size in mapping.expect.items()
        if world.sizes.get(axis) != size
    ]
    ran: list[str] = []
    for tried in real_cases(layout) if not failures else ():
        for case in tried:
            try:
                failures += prove_boxes(mapping, layout, world, case)
            except EngineError as error:
                if error.code == "E214":
                    continue
                failures.append(Failure.of(error, f"{case.label}; {world.label}"))
            ran.append(case.label)
            break
    told = f"{_in_words(world.elements)} elements over {' and '.join(ran)}, boxes tiled and inverse both ways"
    return check_of(REAL_SIZES, told, failures)


def check_model(mapping: MappingFile, worlds: Sequence[World]) -> Check:
    """The names and shapes that transformers' own model has, for each configuration once."""
    failures: list[Failure] = []
    counted: dict[str, int] = {}
    for world in worlds:
        key = json.dumps(world.config, sort_keys=True, default=str)
        if key in counted:
            continue
        try:
            model = wanted(world.config, mapping.architecture)
        except EngineError as error:
            failures.append(Failure.of(error, world.label))
            break
        if isinstance(model, str):
            return Check(MODEL, None, model)
        counted[key] = len(model)
        told = misfits(world.shapes, model, world.pieces, mapping.model_type)
        failures += [replace(failure, where=world.label) for failure in told]
        if told:
            break
    told_of = f"{max(counted.values(), default=0)} names and shapes of transformers' {mapping.model_type} model"
    if len(counted) > 1:
        told_of += f", in {len(counted)} configurations"
    return check_of(MODEL, told_of, failures)


def neighbours(mapping: MappingFile, worlds: Worlds, possible: Sequence[Combination], first: World) -> list[World]:
    """Tiny worlds in which one choice is another than in the usual world: with biases, with a reward head."""
    free = guess_sizes(mapping)
    found = [first]
    for choices, most in possible:
        if sum(first.choices[name] != choice for name, choice in choices.items()) == 1:
            world = worlds.make(choices, free, most=most)
            found += [world] if world is not None else []
    return found


def _trip(mapping: MappingFile, layout: Layout, world: World, case: Case, folder: Path) -> Trip:
    whole = write_world(world, folder / "hf")
    return write_ranks(mapping, layout, world, whole, case, folder / "ranks")


def _told(row: Row) -> str:
    return ", ".join(f"{name}={choice}" for name, choice in row.choices.items())


def free_of(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())
