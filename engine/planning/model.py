"""Plans: what a run will do, as data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from engine.checkpoint.ranks import RankGrid
from engine.errors import counted
from engine.formats.headers import ITEM_SIZES, FileHeader
from engine.language.model import Layout, MappingFile
from engine.planning.boxes import Copy
from engine.planning.classes import CopyTable
from engine.planning.request import Request
from engine.planning.stages import Stages
from engine.planning.stored import End, Stored
from engine.planning.variants import Decision


@dataclass(frozen=True, slots=True)
class Output:
    """A contiguous tensor to write.

    Attributes:
        dtype: element type to write; `read_dtype` is that of its sources.
        transform: (operation, axis) applied to the assembled tensor, if any; `transform_dim` is
            the storage dimension of that axis.
        rule: the rules that write it, with the file and line of the first.
    """

    name: str
    dtype: str
    read_dtype: str
    shape: tuple[int, ...]
    rule: str
    place: str
    pattern: str
    transform: tuple[str, str] | None = None
    transform_dim: int | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_SIZES[self.dtype]

    @property
    def unchanged(self) -> bool:
        """Whether its bytes are those of its sources, only moved."""
        return self.dtype == self.read_dtype and self.transform is None


@dataclass(frozen=True, slots=True)
class Replicas:
    """Stored tensors that must be equal element by element: indices into `Plan.sources`."""

    sources: tuple[int, ...]
    name: str
    rule: str


@dataclass(frozen=True, slots=True)
class Slices:
    """Stored slices of one tensor, of one shape: no two are equal, except those of few values, unless one is a copy.

    Attributes:
        repeats: so many may be equal if they follow each other, and each is repeated as often: all experts of a layer;
            0: any number but all, like key and value heads that were cut over more ranks than there are heads.
    """

    sources: tuple[int, ...]
    name: str
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Tied:
    """A tensor that is left out because the config ties it to another; a run compares the two."""

    output: Output
    copies: tuple[Copy, ...]
    same_as: int  # index into `Plan.outputs`


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A weights file to write: its name, its format (`safetensors`, `torch` or `dcp`) and its outputs.

    `around` is its other content, by key.
    """

    name: str
    format: str
    outputs: tuple[int, ...]  # indices into `Plan.outputs`
    around: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Departure:
    """A size in which a model differs from the chosen release."""

    key: str
    got: int
    expected: int


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Work:
    """What moves the bytes of a plan: what to read, to write, and to compare first.

    `copies(i)` gives the copies that fill `outputs[i]`, computed on demand.
    """

    folder: str
    files: tuple[FileHeader, ...]
    sources: tuple[Stored, ...]
    outputs: tuple[Output, ...]
    copies: Callable[[int], list[Copy]]
    shards: tuple[OutputFile, ...]
    replicas: tuple[Replicas, ...] = ()
    slices: tuple[Slices, ...] = ()
    tied: tuple[Tied, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def written_files(self) -> list[dict[str, Any]]:
        """The content of each file to write, as data."""
        held = [(one, sum(self.outputs[i].nbytes for i in one.outputs)) for one in self.shards]
        return [{"file": one.name, "tensors": len(one.outputs), "bytes": nbytes} for one, nbytes in held]


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Plan(Work):
    """Everything a run needs: it decides nothing itself.

    A plan is plain data: it can be pickled, copied and run in another process.
    """

    mapping: MappingFile
    layout: Layout
    grid: RankGrid  # of the training checkpoint that is read; if none is, of the one written
    stages: Stages
    copies: CopyTable
    decisions: Mapping[str, Decision]
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    config: Mapping[str, Any]
    names: Mapping[str, Any]  # names for expressions, without functions
    ignored: Mapping[str, str]
    notices: tuple[str, ...]
    dtype: str
    max_shard_size: int
    reads: End = "training"
    written: RankGrid | None = None  # the rank grid that is written, when the target is a training checkpoint
    noted: Mapping[str, Any] = field(default_factory=dict)  # keys of the source's configuration that nothing reads
    beside: Mapping[str, tuple[str, Any]] = field(default_factory=dict)  # small files: name → (format, content)
    departures: tuple[Departure, ...] = ()  # how the model differs from the mapping's release
    through: tuple[Plan, Request] | None = None  # the plan whose output is read, if that is never written

    def __repr__(self) -> str:
        """One line: mapping, checkpoint and output. The fields have the whole plan."""
        ranks = " × ".join(f"{name} {size}" for name, size in self.grid.sizes.items()) or "any number of ranks"
        files = counted(len(self.shards), "file")
        return (
            f"<Plan of {self.mapping.name} {self.mapping.version}: {self.folder!r} ({ranks}) to "
            f"{len(self.outputs):,} tensors, {self.nbytes:,} bytes in {files}>"
        )


def digest_of_plan(plan: Plan) -> str:
    """The SHA-256 of all that a plan decides: plans with equal digests write equal bytes from equal sources."""
    total = hashlib.sha256()

    def add(*facts: object) -> None:
        total.update(repr(facts).encode())

    def told(source: int) -> tuple[str, str]:
        return plan.files[plan.sources[source].file].name, plan.sources[source].header.name

    def add_output(output: Output, copies: Iterable[Copy]) -> None:
        add(output.name, output.dtype, output.read_dtype, output.shape, output.transform, output.transform_dim)
        for c in copies:
            add(told(c.source), c.source_offset, c.target_offset, c.shape, c.source_strides, c.target_strides)

    for index, output in enumerate(plan.outputs):
        add_output(output, plan.copies(index))
    for tied in plan.tied:
        add_output(tied.output, tied.copies)
        add("tied", tied.same_as)
    for one in sorted(tuple(told(s) for s in replicas.sources) for replicas in plan.replicas):
        add("replicas", one)
    for shard in plan.shards:
        add(shard.name, shard.format, [plan.outputs[i].name for i in shard.outputs])
    add(sorted((key, repr(value)) for key, value in plan.config.items()), sorted(plan.ignored))
    return total.hexdigest()
