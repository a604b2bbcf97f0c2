"""Round trips of index tensors: the real planner and runner, to rank files and back.

A tiny Hugging Face checkpoint, in which every element is a different number, is written for a layout,
read back and compared. The numbers show where each element came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.hf_folder import read_hf_folder
from engine.errors import EngineError, shape_text
from engine.formats.configs import encode_config
from engine.formats.headers import span
from engine.language.expressions import names_in
from engine.language.model import Layout, MappingFile
from engine.language.rules import loses
from engine.planning.attempts import Checkpoint, whole_checkpoint
from engine.planning.model import Plan
from engine.planning.planner import make_plan
from engine.planning.reading import read_checkpoint
from engine.planning.request import Request
from engine.proving.matrix import Case
from engine.proving.proof import Failure
from engine.proving.tiny import World, decided_by_names
from engine.run.angles import first_values
from engine.run.runner import write_weights
from engine.run.running import Running
from engine.storage.local import LocalStore


@dataclass(frozen=True, slots=True)
class Trip:
    """A world written for one layout and left on disk."""

    world: World
    case: Case
    checkpoint: Checkpoint
    values: list[list[float]]  # of tensors that are not written, as the world's configuration gives them

    @property
    def where(self) -> str:
        return f"{self.case.label}; {self.world.label}"


def write_world(world: World, folder: Path) -> Checkpoint:
    """The world as a Hugging Face checkpoint on disk."""
    from safetensors.numpy import save

    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save(world.arrays()))
    return whole_checkpoint("the tiny checkpoint", read_hf_folder(LocalStore(folder)), world.config)


def write_ranks(
    mapping: MappingFile, layout: Layout, world: World, whole: Checkpoint, case: Case, folder: Path
) -> Trip:
    """Write rank files with the real planner and runner, and read the folder again.

    Raises:
        EngineError: E214 if the layout does not fit the sizes, else an error of the mapping.
    """
    plan = make_plan(mapping, layout, whole, case.request(mapping, world.choices, world.lossy))
    folder.mkdir(parents=True)
    write_weights(plan, LocalStore(folder), Running(workers=1, digests=False))
    for name, (kind, content) in plan.beside.items():
        (folder / name).write_bytes(encode_config(name, kind, content))
    checkpoint = with_given(read_checkpoint(folder, layout), mapping, world)
    return Trip(world, case, checkpoint, first_values(plan))


def with_given(checkpoint: Checkpoint, mapping: MappingFile, world: World) -> Checkpoint:
    """Rank files with the world's config.json, if sizes of the mapping depend on one that is given."""
    given = any("given" in names_in(dim) for dim in mapping.dims.values())
    return replace(checkpoint, target_config=world.config) if given else checkpoint


def plan_back(mapping: MappingFile, layout: Layout, trip: Trip) -> Plan:
    """The plan back; choices of variants that shapes do not decide are set."""
    try:
        return make_plan(mapping, layout, trip.checkpoint)
    except EngineError as error:
        if error.code != "E202":
            raise
    given = {
        n: c
        for n, c in trip.world.choices.items()
        if n not in decided_by_names(mapping) and mapping.variants[n].decide == "shapes"
    }
    return make_plan(mapping, layout, trip.checkpoint, Request(mapping, settings=given))


def compare_trip(trip: Trip, plan: Plan, out: Path) -> list[Failure]:
    """Elements that the plan back does not restore, or that the rank files do not hold exactly once."""
    failures = [*_counted(trip, plan), *_choices(trip, plan), *_values(trip, plan)]
    if failures:
        return failures
    return [*differences(trip.world, plan, convert(plan, out), trip.where)][:1]


def convert(plan: Plan, out: Path) -> dict[str, np.ndarray]:
    """Run a plan with the real runner, without digests; returns the tensors, read by the safetensors library."""
    from safetensors.numpy import load_file

    out.mkdir(parents=True)
    write_weights(plan, LocalStore(out), Running(workers=1, digests=False))
    return {name: array for file in plan.shards for name, array in load_file(str(out / file.name)).items()}


def _counted(trip: Trip, plan: Plan) -> Iterator[Failure]:
    """Check that every number is in the rank files exactly once, apart from replicas."""
    replicas = {source for one in plan.replicas for source in one.sources[1:]}
    added = {
        copy.source: np.float32(output.transform[1])
        for i, output in enumerate(plan.outputs)
        if output.transform is not None and not loses(output.transform)
        for copy in plan.copies(i)
    }
    held = [stored_numbers(plan, i).ravel() + added.get(i, 0) for i in range(len(plan.sources)) if i not in replicas]
    numbers = np.concatenate(held) if held else np.empty(0)
    whole = (numbers >= 0) & (numbers < trip.world.elements)
    counts = np.bincount(numbers[whole].astype(np.int64), minlength=trip.world.elements)
    arrays = trip.world.arrays()
    wanted = np.ones(trip.world.elements, np.int64)
    for name, to in trip.world.tied.items():
        spec = next(one for one in trip.world.pieces.targets.values() if one.name.match(name) is not None)
        if not spec.instances[0].rule.optional:  # else one copy is enough
            wanted[arrays[to].ravel().astype(np.int64)] = 2
    if any(rule.zeros for rule in plan.mapping.rules):
        counts[0] = min(counts[0], wanted[0])  # padding is zeros
    for number in np.flatnonzero(counts == 0)[:1]:
        yield Failure(f"{element_of(arrays, float(number))} is in no rank file", where=trip.where)
    for number in np.flatnonzero((counts != wanted) & (counts > 0))[:1]:
        told = f"{element_of(arrays, float(number))} is in the rank files {counts[number]} times"
        yield Failure(told, where=trip.where)
    for number in numbers[~whole][:1]:
        yield Failure(f"{element_of(arrays, float(number))} is in the rank files", where=trip.where)


def _choices(trip: Trip, plan: Plan) -> Iterator[Failure]:
    for name, choice in trip.world.choices.items():
        read = plan.decisions[name].choice
        reached = any(name in rule.when for rule in plan.mapping.rules)
        if read != choice and reached and plan.mapping.variants[name].decide == "expression":
            yield Failure(f"`{name}` was written as {choice} and is read as {read}", where=trip.where)


def _values(trip: Trip, plan: Plan) -> Iterator[Failure]:
    back = first_values(plan)
    if trip.values and back and trip.values != back:
        told = f"`values` of `ignore` are {trip.values[0]} on one side and {back[0]} on the other"
        yield Failure(told, str(plan.mapping.ignore[0].place), where=trip.where)


def stored_numbers(plan: Plan, source: int) -> np.ndarray:
    """The elements of a stored tensor, read by its own header, without the plan."""
    tensor = plan.sources[source]
    header = tensor.header
    count = span(header.shape, header.strides)
    if not all(header.shape):
        return np.empty(header.shape, np.float32)
    with plan.files[tensor.file].file.open() as file:
        file.seek(header.offset)
        flat = np.frombuffer(file.read(4 * count), np.float32)
    return np.lib.stride_tricks.as_strided(flat, header.shape, [s * 4 for s in header.strides])


def element_of(arrays: Mapping[str, Any], number: float) -> str:
    """The element that has this number: `model.norm.weight[3]`."""
    for name, array in arrays.items():
        first = float(array.flat[0]) if array.size else -1
        if array.size and first <= number < first + array.size:
            return f"{name}{index(np.unravel_index(int(number - first), array.shape))}"
    return f"an element that was not written ({number:g})"


def index(values: Any) -> str:
    return "[" + ",".join(str(int(v)) for v in values) + "]"


def differences(world: World, plan: Plan, got: Mapping[str, np.ndarray], where: str) -> Iterator[Failure]:
    """Tensors that did not return intact, each with its first wrong element."""
    wanted = world.arrays()
    changed = {output.name for output in plan.outputs if loses(output.transform)}
    outputs = {output.name: output for output in plan.outputs}
    for name in wanted.keys() | got.keys():
        if name not in got or name not in wanted:
            yield Failure(
                f"`{name}` is {'not written' if name in wanted else 'written and should not be'}", where=where
            )
    for name in wanted.keys() & got.keys():
        there, array = wanted[name], got[name]
        output = outputs[name]
        if array.shape != there.shape:
            told = f"`{name}` is {shape_text(array.shape)}, not {shape_text(there.shape)}"
            yield Failure(told, output.place, where)
        elif name not in changed and array.tobytes() != there.tobytes():
            at = np.unravel_index(int(np.flatnonzero(array.ravel() != there.ravel())[0]), there.shape)
            claimed = element_of(wanted, float(array[at]))
            yield Failure(f"{name}{index(at)} comes back as {claimed}", output.place, where)
