"""Proves that a mapping is total, injective and exactly invertible in every layout.

Tiny models are run through the real planner and runner, a release's own sizes are checked by box arithmetic, and
names and shapes are compared with transformers' model.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from engine.errors import EngineError
from engine.language.layout_file import load_layout
from engine.language.mapping_file import load_mapping
from engine.language.model import MappingFile
from engine.language.search import list_names
from engine.planning.given import check_type, listed
from engine.proving.checks import (
    MODEL,
    REAL_SIZES,
    ROUND_TRIP,
    check_classes,
    check_model,
    check_real_sizes,
    check_round_trip,
    check_rules,
    neighbours,
)  # fmt: skip
from engine.proving.committed import check_meaning
from engine.proving.matrix import combinations_of
from engine.proving.meaning import usual_world
from engine.proving.meta_model import load_classes
from engine.proving.mutants import try_mutants
from engine.proving.proof import Check, Failure, Mutant, Proof, check_of
from engine.proving.tiny import World, Worlds
from engine.run.meter import Listener, Meter
from engine.storage.cores import cores
from engine.storage.store import write_error

_FEW = 4  # up to this many mappings, one process is as fast as several
_ROOM = 1 << 30  # bytes, enough for parallel proofs; a container's /dev/shm often has only 64 MiB


Begun = tuple[Proof, Sequence[World]]  # a proof, and models to compare with transformers' own


def shared_rules(mapping: MappingFile) -> str:
    """The inputs of a round trip: mappings with the same ones are proved together."""
    parts = ("rules", "dims", "variants", "ignore", "refuse", "config", "training_config", "source")
    return json.dumps([mapping.resolved.get(part) for part in parts], default=str, sort_keys=True)


def prove(
    names: str | Path | MappingFile | Sequence[str | Path | MappingFile] = (),
    *,
    mutants: bool = False,
    progress: Listener | None = None,
) -> list[Proof]:
    """Prove mappings: complete, one-to-one, invertible, and equal in every layout; without names, all bundled ones.

    Runs the real planner and runner on tiny tensors of numbered elements in a temporary folder, checks a
    release's own sizes by arithmetic, and compares names and shapes with transformers' model. Many mappings are
    proved in several processes; rules that several share are run once.

    >>> [proof.holds for proof in engine.prove("internlm")]  # doctest: +SKIP
    [True]

    Args:
        names: paths, names of bundled mappings, or loaded ones.
        mutants: also change the mapping in one place at a time, and report which check notices.
        progress: called before each mapping.
    """
    names = listed(names) or sorted(list_names(), key=lambda name: not str(name).startswith("families/"))
    for name in names:
        check_type("names", name, str | Path | MappingFile, "names, paths or loaded mappings")
    found: dict[int, Proof] = {}
    groups: dict[str, list[tuple[int, MappingFile]]] = {}
    for number, name in enumerate(names):
        try:
            mapping = name if isinstance(name, MappingFile) else load_mapping(str(name))
        except EngineError as error:
            failures = [Failure.of(one) for one in error.errors]
            found[number] = Proof(str(name), (check_of("loads", "the file is a mapping", failures),))
            continue
        groups.setdefault(shared_rules(mapping), []).append((number, mapping))
    meter = Meter(len(names), progress, "proving", "mappings")
    ordered = sorted(groups.values(), key=_work, reverse=True)  # so that no long one starts last
    members = [[mapping for _, mapping in group] for group in ordered]
    alone = len(names) <= _FEW or len(ordered) < 2 or cores() < 2
    for number, proofs in _alone(members, mutants, meter) if alone else _together(members, mutants):
        for (i, mapping), begun in zip(ordered[number], proofs, strict=True):
            found[i] = _with_model(mapping, *begun)
            meter.advance(1)
    return [found[i] for i in range(len(names))]


def _work(group: Sequence[tuple[int, MappingFile]]) -> int:
    """An estimate of the time to prove mappings: combinations to try, and layers to plan."""
    layers = {mapping.expect.get("layer", 0) for _, mapping in group}
    return len(combinations_of(group[0][1])) + sum(layers)


def _alone(groups: Sequence[Sequence[MappingFile]], mutants: bool, meter: Meter) -> Iterator[tuple[int, list[Begun]]]:
    for number, group in enumerate(groups):
        meter.begin(f"proving {group[0].name}")
        yield number, prove_group(group, mutants)


def _together(groups: Sequence[Sequence[MappingFile]], mutants: bool) -> Iterator[tuple[int, list[Begun]]]:
    """Prove groups in separate processes, and yield each when it is done; only this process loads transformers."""
    workers = min(cores(), len(groups))
    collecting = gc.get_threshold()  # new processes collect garbage as seldom as this one
    with ProcessPoolExecutor(workers, get_context("spawn"), gc.set_threshold, collecting) as pool:
        running = {pool.submit(prove_group, group, mutants): number for number, group in enumerate(groups)}
        load_classes()
        for done in as_completed(running):
            yield running[done], done.result()


def prove_group(mappings: Sequence[MappingFile], mutants: bool) -> list[Begun]:
    """Prove mappings one after another, without the checks that need transformers."""
    proven: dict[str, str] = {}  # inputs of a check → the mapping that was checked
    found: list[Begun] = []
    for mapping in mappings:
        started = time.monotonic()
        worlds: Sequence[World] = ()
        try:
            checks, tried, worlds = _prove(mapping, proven, mutants=mutants)
        except EngineError as error:
            checks, tried = [check_of("proof", "all checks could be run", [Failure.of(error)])], []
        found.append((Proof(mapping.name, tuple(checks), tuple(tried), time.monotonic() - started), worlds))
    return found


def _with_model(mapping: MappingFile, proof: Proof, worlds: Sequence[World]) -> Proof:
    """The proof, with the check against transformers' models added."""
    started = time.monotonic()
    if mapping.classes:
        told = f"{', '.join(mapping.classes)} are as in transformers"
        try:
            failures = check_classes(mapping.classes)
        except EngineError as error:
            failures = [Failure.of(error)]
        check = check_of(MODEL, told, failures)
    elif worlds:
        check = check_model(mapping, worlds)
    else:
        return proof
    checks = (*proof.checks, check)
    return replace(proof, checks=checks, seconds=proof.seconds + time.monotonic() - started)


def _prove(
    mapping: MappingFile, proven: dict[str, str], *, mutants: bool
) -> tuple[list[Check], list[Mutant], Sequence[World]]:
    layout = load_layout(mapping.layout, mapping.layout_place)
    combinations = combinations_of(mapping)
    checks = [check_rules(mapping, [choices for choices, _ in combinations])]
    if not checks[0].holds:
        return checks, [], ()
    checks.append(check_meaning(mapping))
    worlds = Worlds(mapping)
    possible = [(choices, most) for choices, most in combinations if worlds.used(choices, most=most) is not None]
    tried: list[Mutant] = []
    key = shared_rules(mapping)
    if key in proven:
        checks.append(Check(ROUND_TRIP, True, f"the rules of {proven[key]}, proved there"))
    else:
        proven[key] = mapping.name
        with _temporary() as folder:
            check = check_round_trip(mapping, layout, worlds, possible, folder)
            checks.append(check)
            if mutants and check.holds is not False:
                tried = try_mutants(mapping)
    if not checks[-1].holds:
        return checks, [], ()
    world = usual_world(mapping, worlds, mapping.expect)
    assert world is not None  # a round trip was made
    if mapping.expect:
        told = json.dumps([key, sorted(mapping.expect.items())])
        if told in proven:
            checks.append(Check(REAL_SIZES, True, f"the sizes of {proven[told]}, proved there"))
        else:
            proven[told] = mapping.name
            checks.append(check_real_sizes(mapping, layout, worlds, world))
    return checks, tried, [world] if mapping.expect else neighbours(mapping, worlds, possible, world)


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder for the time of a proof; E403 when there is no room for what a proof writes."""
    try:
        with tempfile.TemporaryDirectory(prefix="prove-", dir=_quick()) as folder:
            yield Path(folder)
    except OSError as error:
        raise write_error(tempfile.gettempdir(), error, "in the folder of temporary files (TMPDIR)") from error


def _quick() -> Path | None:
    """A folder in memory, if there is one with enough room: a proof writes thousands of tiny files with fsync.

    None for the usual folder of temporary files, and if TMPDIR is set.
    """
    memory = Path("/dev/shm")
    if "TMPDIR" in os.environ or not os.access(memory, os.W_OK):
        return None
    return memory if shutil.disk_usage(memory).free >= _ROOM else None
