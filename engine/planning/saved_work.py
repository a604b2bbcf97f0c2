"""The copies in a saved plan, so that a part finds its work without planning the whole.

Outputs that are filled in the same way share a list of copies; each names the stored tensors that fill it, by file
and name. All of it is numbers and names: only the part's own files are opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from engine.formats.headers import ITEM_SIZES, FileHeader, span
from engine.language.model import Layout
from engine.language.rules import TRANSFORMS
from engine.planning.boxes import Copy
from engine.planning.classes import Template, template_of
from engine.planning.model import Output, OutputFile, Plan, Replicas, Slices, Tied, Work
from engine.planning.rank_outputs import around_data, around_of
from engine.planning.stored import Stored
from engine.planning.zeros import ZEROS, zeros_of

Row = list[Any]  # an output: its name, the index of its kind, then its places
Places = list[list[int]]  # sources grouped by name: the index of the name, and the file of each


def work_data(plan: Plan, scattered: Callable[[], Sequence[Sequence[int]]]) -> dict[str, Any] | None:
    """The copies of a plan as JSON data; None if only planning again can make them.

    Args:
        scattered: returns the sets of outputs that are scattered together from their sources.
    """
    named = [len({t.name for t in file.tensors}) == len(file.tensors) for file in plan.files]
    around = around_data(plan)
    if not all(named) or json.loads(json.dumps(around)) != around:
        return None
    coded = _Coded(plan)
    homes: dict[int, int] = {}  # source → the first output that reads it
    outputs: list[Row] = []
    for index, output in enumerate(plan.outputs):
        template, sources = plan.copies.filled(index)
        outputs.append(coded.output(output, template, sources, id(template)))
        for source in sources:
            homes.setdefault(source, index)
    compared = [(one.sources, one.name, coded.name(one.rule)) for one in plan.replicas]
    compared += [(one.sources, one.name, -1 - one.repeats) for one in plan.slices]
    checks = [
        [next((homes[s] for s in sources if s in homes), 0), coded.name(name), kind, *coded.places(sources)]
        for sources, name, kind in compared
    ]
    tied = [
        [one.same_as, coded.output(one.output, left_out := template_of(one.copies), left_out.used, one.copies)]
        for one in plan.tied
    ]
    return {
        "names": list(coded.names),
        "kinds": coded.kinds,
        "outputs": outputs,
        "files": [[file.name, file.format, list(file.outputs)] for file in plan.shards],
        "scattered": [list(one) for one in scattered()],
        "checks": checks,
        "tied": tied,
        **({} if around is None else {"around": around}),
    }


class _Coded:
    """The rows of a plan's outputs, with shared parts stored once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.names: dict[object, int] = {}
        self.kinds: list[Row] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def output(self, output: Output, template: Template, sources: Sequence[int], key: object) -> Row:
        """The row of an output that is filled from sources; equal keys mean equal templates."""
        fixed = (
            output.dtype, output.read_dtype, output.shape, output.rule, output.pattern, output.transform,
            output.transform_dim,
        )  # fmt: skip
        kind = self._numbers.setdefault((fixed, key), len(self.kinds))
        if kind == len(self.kinds):
            copies = [
                [c.source, c.source_offset, c.target_offset, c.shape, c.source_strides, c.target_strides]
                for c in template.copies
            ]
            self.kinds.append([*fixed, copies])
        return [output.name, kind, *self.places(sources)]

    def places(self, sources: Iterable[int]) -> Places:
        """The places of sources, in order; zeros are named by their type and shape."""
        plan = self._plan

        def named(one: Stored) -> int:
            zeros = plan.files[one.file] == ZEROS
            return self.name((one.header.dtype, one.header.shape) if zeros else one.header.name)

        runs = groupby((plan.sources[source] for source in sources), named)
        return [[name, *(one.file for one in held)] for name, held in runs]

    def name(self, name: object) -> int:
        """The index of a name."""
        return self.names.setdefault(name, len(self.names))


@dataclass(frozen=True, slots=True)
class SavedWork:
    """The work of a saved plan before its sources are known.

    Attributes:
        outline: its outputs and files; of its sources only the names of files.
        scattered: sets of outputs that are scattered together from their sources.
    """

    outline: Work
    scattered: Sequence[Sequence[int]]
    _data: Mapping[str, Any]
    _output: Callable[[Row], Output]

    def read_for(self, outputs: Collection[int], begun: Collection[int]) -> dict[int, set[str]]:
        """The files that some outputs are read from, and files to compare, with the tensors of each.

        Args:
            begun: the outputs for which the comparisons that belong to them are made too.
        """
        rows = [self._data["outputs"][output][2:] for output in outputs]
        rows += [row[2:] for home, row in self._data["tied"] if home in begun]
        rows += [places for home, _, _, *places in self._data["checks"] if home in begun]
        zeros, names = len(self.outline.files) - 1, self._data["names"]
        found: dict[int, set[str]] = {}
        for name, file in {(name, file) for row in rows for name, *files in row for file in files if file != zeros}:
            found.setdefault(file, set()).add(names[name])
        return dict(sorted(found.items()))

    def compared_with(self, outputs: Collection[int]) -> set[int]:
        """Some outputs, and those to which the comparisons of their sources belong."""
        held = {(name, file) for o in outputs for name, *files in self._data["outputs"][o][2:] for file in files}
        return {*outputs} | {
            home
            for home, _, _, *places in self._data["checks"]
            if any((name, file) in held for name, *files in places for file in files)
        }

    def of(self, outputs: Collection[int], begun: Collection[int], headers: Mapping[int, FileHeader]) -> Work:
        """The work that moves some outputs, and makes the comparisons that belong to those that are begun.

        Args:
            headers: the headers of the files that `read_for` names.

        Raises:
            ValueError, LookupError, TypeError: for invalid copies.
        """
        found = _Sources(self._data["names"], headers, len(self.outline.files) - 1)
        copies = _Copies(self._data["kinds"])
        for output in outputs:
            row = self._data["outputs"][output]
            copies.rows[output] = row[1], found.numbers(row[2:])
        tied: list[Tied] = []
        for home, row in self._data["tied"]:
            if home in begun:
                copies.rows[-1] = row[1], found.numbers(row[2:])
                tied.append(Tied(self._output(row), tuple(copies(-1)), home))
        names = self._data["names"]
        if any(sum(len(place) - 1 for place in at) < 2 for _, _, _, *at in self._data["checks"]):
            raise ValueError("a tensor is compared with nothing")
        checks = [
            (found.numbers(at), names[name], kind) for home, name, kind, *at in self._data["checks"] if home in begun
        ]
        work = replace(
            self.outline,
            files=tuple(headers.get(number, file) for number, file in enumerate(self.outline.files)),
            sources=tuple(found.tensors),
            copies=copies,
            replicas=tuple(Replicas(at, name, names[kind]) for at, name, kind in checks if kind >= 0),
            slices=tuple(Slices(at, name, -1 - kind) for at, name, kind in checks if kind < 0),
            tied=tuple(tied),
        )
        for output in outputs:
            _check(work.outputs[output], copies(output), work.sources)
        for one in tied:
            _check(one.output, one.copies, work.sources)
        return work


class _Sources:
    """The stored tensors that are read, numbered on demand."""

    def __init__(self, names: Sequence[Any], headers: Mapping[int, FileHeader], zeros: int) -> None:
        self._names = names
        self._held = {file: {one.name: one for one in header.tensors} for file, header in headers.items()}
        self._zeros = zeros
        self._numbers: dict[tuple[int, int], int] = {}
        self.tensors: list[Stored] = []

    def numbers(self, places: Places) -> tuple[int, ...]:
        return tuple(self._number(file, name) for name, *files in places for file in files)

    def _number(self, file: int, name: int) -> int:
        found = self._numbers.get((file, name))
        if found is None:
            found = self._numbers[file, name] = len(self.tensors)
            told = self._names[name]
            header = zeros_of(told[0], tuple(told[1])) if file == self._zeros else self._held[file][told]
            _check_whole(file, ITEM_SIZES[header.dtype], *header.shape)
            self.tensors.append(Stored(file, header, header.name))
        return found


class _Copies:
    """`Work.copies` of some outputs: for each its kind, and its sources in the kind's order."""

    def __init__(self, kinds: Sequence[Row]) -> None:
        self._kinds = kinds
        self.rows: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __call__(self, output: int) -> list[Copy]:
        kind, sources = self.rows[output]
        return [
            Copy(sources[one], output, at, to, tuple(shape), tuple(there), tuple(here))
            for one, at, to, shape, there, here in self._kinds[kind][-1]
        ]


def _check_whole(*numbers: Any) -> None:
    """ValueError unless all are whole numbers from 0 on; JSON's 1.0, which passes a schema for 1, is none."""
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} are no whole numbers")


def _check(output: Output, copies: Sequence[Copy], sources: Sequence[Stored]) -> None:
    """ValueError unless copies fill an output, and read nothing outside their sources."""
    filled = 0
    for copy in copies:
        header = sources[copy.source].header
        for at, strides, end in (
            (copy.source_offset, copy.source_strides, span(header.shape, header.strides)),
            (copy.target_offset, copy.target_strides, output.elements),
        ):
            _check_whole(at, *copy.shape, *strides)
            if at + span(copy.shape, strides) > end or header.dtype != output.read_dtype:
                raise ValueError(f"{output.name} is filled from beyond a tensor")
        filled += copy.volume()
    if filled != output.elements:
        raise ValueError(f"{output.name} is not filled")


def saved_work(
    data: Mapping[str, Any], files: tuple[FileHeader, ...], folder: str, places: Mapping[str, str], layout: Layout
) -> SavedWork:
    """The work of a plan from its `work_data`.

    Args:
        files: the source's files, without their tensors.
        places: the place of each rule, for errors.
        layout: the layout of the target.

    Raises:
        ValueError, LookupError, TypeError: for invalid data.
    """

    def facts(kind: Row) -> tuple[Any, ...]:
        dtype, read_dtype, shape, rule, pattern, transform, dim, _ = kind
        _check_whole(*shape, dim or 0)
        change = None if transform is None else tuple(transform)
        if change is not None and (change[0] not in TRANSFORMS or dim is None or dim >= len(shape)):
            raise ValueError(f"{pattern} is changed in no known way")
        if change is not None and change[0] == "add" and not math.isfinite(float(change[1])):
            raise ValueError(f"{pattern} is changed by no number")
        return dtype, read_dtype, tuple(shape), rule, places.get(rule.partition(" + ")[0], ""), pattern, change, dim

    kinds = list(map(facts, data["kinds"]))

    def output(row: Row) -> Output:
        return Output(row[0], *kinds[row[1]])

    def nothing(index: int) -> list[Copy]:
        raise LookupError(index)

    around = around_of(layout.configs[data["around"][0]], data["around"][1]) if "around" in data else None
    shards = tuple(OutputFile(name, kind, tuple(held), around) for name, kind, held in data["files"])
    outline = Work(
        folder=folder,
        files=(*files, ZEROS),
        sources=(),
        outputs=tuple(map(output, data["outputs"])),
        copies=nothing,
        shards=shards,
    )
    _check_whole(*(one for file in shards for one in file.outputs))
    if sorted(one for file in shards for one in file.outputs) != list(range(len(outline.outputs))):
        raise ValueError("files do not hold each tensor once")
    return SavedWork(outline, data["scattered"], data, output)
