"""Destinations: how a model will be cut over the ranks and pipeline stages to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from engine.checkpoint.ranks import counts_of, expected_files, points, stage_dims, written_dims
from engine.errors import EngineError, first_of
from engine.language.axes import extent, leaves
from engine.language.expressions import evaluate, whole_number
from engine.language.model import FilePattern, Layout, Mode
from engine.language.names import pattern
from engine.language.rules import STORED
from engine.planning.groups import cut_of
from engine.planning.request import RANK_OPTIONS
from engine.planning.stages import Stages, in_order, laid_out
from engine.planning.stored import Instance

_MOST_RANKS = 4096  # numbers of ranks that are tried, to suggest which would work


@dataclass(frozen=True, slots=True)
class Destination:
    """A rank grid to write: its mode and sizes, the stages' layers, and the names for expressions."""

    layout: Layout
    mode: Mode
    sizes: Mapping[str, int]
    stages: Stages
    names: Mapping[str, Any]
    even: tuple[str, ...] = ()  # axes that, by the mapping, training only divides evenly
    given_prefix: int | None = None  # index into the layout's prefixes; default: the first whose `when` holds

    def prefix(self, chunk: int) -> str:
        """The prefix of every tensor name."""
        known = self.layout.prefixes
        fits = (one for one in known if one.when is None or evaluate(one.when, self.names))
        one = next(fits, None) if self.given_prefix is None else known[self.given_prefix]
        return "" if one is None else pattern(one.prefix).format({"chunk": chunk})

    def counts(self) -> dict[str, Any]:
        return {**self.names, **counts_of(self.layout, self.sizes)}

    def ranks(self, file: FilePattern) -> list[dict[str, int]]:
        """The coordinates of every file, with the values of all placeholders."""
        if not file.boxes:
            return list(expected_files(file, self.sizes, self.counts(), main=file is self.mode.files[0]))
        dims = written_dims(file)
        plain = dict.fromkeys(pattern(file.name).placeholders, 0)
        every = points([self.sizes[dim] for dim in dims])
        return [{**plain, "rank": rank, **dict(zip(dims, at, strict=True))} for rank, at in enumerate(every)]

    def sizes_of(self, file: FilePattern) -> Mapping[str, int]:
        """Ranks per dimension in files of a pattern; its rank map may differ from that of the mode's first."""
        if file.ranks is None or file is self.mode.files[0]:
            return self.sizes
        return {**self.sizes, **{dim: 1 + max(one[dim] for one in self.ranks(file)) for dim in file.ranks.dims}}


def shares(count: int, ranks: int, extra: str) -> list[int]:
    """The number of units of each rank; the `first` or `last` ranks may hold one more.

    >>> shares(5, 2, "last"), shares(5, 2, "first")
    ([2, 3], [3, 2])
    """
    few, more = divmod(count, ranks)
    return [few + (r < more if extra == "first" else r >= ranks - more) for r in range(ranks)]


def mode_of(layout: Layout, name: str | None, sizes: Mapping[str, int] | None = None) -> Mode:
    """A mode to write, by its name or alias; E001 for one that the layout does not have or only reads.

    Without a name it is the first one; among modes that `when` distinguishes on reading, the first that has every
    rank dimension that is asked for.
    """
    writable = [mode for mode in layout.modes if mode.only_read is None]
    if name is None and writable:
        asked = {dim for dim, count in (sizes or {}).items() if count > 1}
        unnamed = [writable[0], *(mode for mode in writable[1:] if mode.when is not None)]
        return next((mode for mode in unnamed if asked <= set(written_dims(mode.files[0]))), writable[0])
    known = ", ".join(" = ".join((m.name, *m.aliases)) for m in writable)
    found = next((mode for mode in layout.modes if name in (mode.name, *mode.aliases)), None)
    if found is not None and found.only_read is None:
        return found
    told = f"layout `{layout.name}` has no mode `{name}`"
    if found is not None:
        told = f"mode `{found.name}` of layout `{layout.name}` is only read: {found.only_read}"
    raise EngineError("E001", told, got=name, expected=known, fix="Give one of these to --mode.")


def ranks_of(layout: Layout, mode: Mode, dims: Sequence[str], sizes: Mapping[str, int]) -> dict[str, int]:
    """Ranks for every dimension of a mode's files; E001 for a dimension it does not have."""
    slices = {*dims} - {*written_dims(mode.files[0])}  # which the mapping numbers in names, whatever the mode
    cut = {dim for dim, count in sizes.items() if count > 1} - slices
    having = {one.name: written_dims(one.files[0]) for one in layout.modes if one.only_read is None}
    others = [f"--mode {name}" for name, ranks in having.items() if cut <= {*ranks}]
    for dim, count in sizes.items():
        if count < 1:
            raise EngineError("E001", f"there must be at least one {dim} rank", got=str(count), expected="1 or more")
    if extra := [dim for dim, count in sizes.items() if dim not in dims and count > 1]:
        known = {**having, mode.name: dims}
        leave = f"Leave {extra[0]} out" if len(extra) == 1 else "Give ranks that one mode has"
        raise EngineError(
            "E001",
            f"mode `{mode.name}` of layout `{layout.name}` has no {' or '.join(extra)} ranks",
            got=", ".join(f"{dim} {sizes[dim]}" for dim in extra),
            expected="; ".join(f"{', '.join(ranks)} in mode {name}" for name, ranks in known.items()),
            fix=leave + (f", or give {' or '.join(others)}." if others else "."),
        )
    return {dim: sizes.get(dim, 1) for dim in dims}


def cut_layers(
    layout: Layout, layers: int, sizes: Mapping[str, int], chunks: int, names: Mapping[str, Any], like: Stages | None
) -> Stages:
    """Cut the layers over stages as the framework does.

    Args:
        like: stages to copy if they have the same numbers of layers, chunks and ranks.

    Raises:
        EngineError: E214 when the layers do not divide in this way; suggests numbers that do.
    """
    dims = stage_dims(layout)
    ranks = prod(sizes.get(dim, 1) for dim in dims)
    given = asked({dim: sizes.get(dim, 1) for dim in dims})
    facts = {**names, **counts_of(layout, sizes), "chunks": chunks}
    as_many = like is not None and like.layers == layers and len(like.starts) == chunks * ranks
    if like is not None and as_many and list(like.starts) == in_order(layout, sizes, dims, chunks, names):
        return like
    divides = layout.layers.divides
    step = chunks if divides is None else max(1, whole_number(divides, facts, "layers.divides"))
    if layers % step and layers >= ranks:
        fits = [str(n) for n in range(1, layers + 1) if layers % n == 0 and layers // n >= ranks]
        raise _uncut(
            f"{layers} layers do not divide into {chunks} chunks",
            f"--chunks {chunks}",
            f"chunks that divide {layers}: {', '.join(fits)}",
            f"Give one of these to --chunks, with {given}.",
        )
    held = layers // chunks if layers >= ranks else layers
    if held < ranks and ranks * chunks > 1:  # a single stage holds all, even of a model without layers
        raise _uncut(
            f"{held} layers{' of a chunk' if held < layers else ''} are too few for {ranks} pipeline ranks",
            given,
            f"at most {held}",
            "Every stage needs a layer: give fewer pipeline ranks" + (" or chunks." if held < layers else "."),
        )
    order = in_order(layout, sizes, dims, chunks, names)
    share = shares(layers // chunks, ranks, layout.layers.uneven)
    return laid_out([(stage, share[index % ranks]) for index, stage in enumerate(order)], chunks, dims)


def asked(ranks: Mapping[str, int]) -> str:
    """Ranks as command line flags.

    >>> asked({"tp": 2}), asked({"tp": 2, "ep": 4})
    ('--tp 2', '--tp 2 --ranks ep=4')
    """
    return " ".join(f"{flag(dim)}{count}" for dim, count in ranks.items())


def flag(dim: str) -> str:
    """The command line flag for a rank dimension, up to its number."""
    return f"--{dim} " if dim in RANK_OPTIONS else f"--ranks {dim}="


def check_cuts(
    destination: Destination, used: Sequence[tuple[Instance, FilePattern]], sizes: Mapping[str, int], *, pads: bool
) -> None:
    """E214 for the first axis that cannot be cut over this many ranks; suggests numbers that work.

    Args:
        pads: whether padding is added to fit the ranks.
    """
    for dim, at in [(dim, at) for file in destination.mode.files for dim, at in file.mesh.items()]:
        most = max((extent(one.axes.dims[at], sizes) for one, _ in used if at < len(one.axes.dims)), default=1)
        if destination.sizes[dim] > most:
            raise EngineError(
                "E214",
                f"there are more {dim} ranks than {'columns' if at else 'rows'} of any tensor",
                got=f"{flag(dim)}{destination.sizes[dim]}",
                expected=f"at most {most}",
                fix="The other ranks would hold nothing: give fewer.",
            )
    for instance, file in used:
        _check_apart(instance, file, destination)
        for division in _divisions(instance, file, destination):
            dim = division.dim
            count = destination.sizes_of(file).get(dim, 1)
            why = division.misfit(count, sizes)
            if why is None:
                continue
            bound = [(one, name) for one, name in used if not (pads and one.rule.zeros)]
            every = [other for one, name in bound for other in _divisions(one, name, destination) if other.dim == dim]
            fits = [
                n
                for n in range(1, min(max(sizes.values()), _MOST_RANKS) + 1)
                if all(other.misfit(n, sizes) is None for other in every)
            ]
            told = first_of(fits, 12)
            raise EngineError(
                "E214",
                f"`{instance.sources[0].text}` cannot be cut over {count} {dim} ranks",
                place=instance.rule.place,
                got=why,
                expected=f"{flag(dim)}{told}",
                fix=f"These numbers of {dim} ranks would work for every tensor of this model.",
            )


def _check_apart(instance: Instance, file: FilePattern, destination: Destination) -> None:
    """E214 if ranks would cut two axes of one storage dimension: shapes would not show the size of either."""
    ranks = destination.sizes_of(file)
    cut = {axis: dim for dim, axis in cut_of(instance, file, destination.layout).dims if ranks.get(dim, 1) > 1}
    for node in instance.axes.dims:
        dims = [cut[axis] for axis in dict.fromkeys(leaves(node)) if axis in cut]
        if len(dims) > 1:
            given = [f"{flag(dim)}{ranks[dim]}" for dim in dims]
            raise EngineError(
                "E214",
                f"`{instance.sources[0].text}` cannot be cut over {' and '.join(dims)} ranks at once",
                place=instance.rule.place,
                got=f"{' and '.join(given)}, which cut `{node}`, one dimension",
                expected=" or ".join(f"{flag(dim)}1" for dim in dims),
                fix="Give one rank of either.",
            )


@dataclass(frozen=True, slots=True)
class _Division:
    """What the ranks of one dimension divide: an axis of a tensor, or its storage rows."""

    instance: Instance
    dim: str
    axis: str | None  # None: storage rows, wherever the cut falls
    even: str | None  # why it must divide, if it must
    at: int = 0  # the storage dimension
    inside: bool = False  # rows are cut, so that several ranks may share a unit of the axis

    def misfit(self, count: int, sizes: Mapping[str, int]) -> str | None:
        """Why it cannot be divided among this many ranks, or None."""
        if self.axis is None:
            rows = extent(self.instance.axes.dims[self.at], sizes)
            if self.even is not None and rows % count:
                return f"{rows} rows do not divide by {count}, and {self.even}"
            return None if rows >= count else f"{rows} rows for {count} ranks"
        size = sizes[self.axis]
        if self.inside:
            told = f"axis `{self.axis}` of {size} does not divide by {count}, nor {count} by {size}, and {self.even}"
            return told if size % count and count % size else None
        if count > size:
            times = f"; each would have to be stored {count // size} times" if count % size == 0 else ""
            return f"axis `{self.axis}` has {size} for {count} ranks{times}"
        if self.even is not None and size % count:
            return f"axis `{self.axis}` of {size} does not divide by {count}, and {self.even}"
        return None


def _divisions(instance: Instance, file: FilePattern, destination: Destination) -> list[_Division]:
    """Everything that ranks divide in a tensor: where its shards are cut, and what training divides at run time."""
    kind, even = instance.stage_class, destination.even
    cut = cut_of(instance, file, destination.layout)
    stage = f"tensors of the {kind} stage must" if kind in destination.layout.even else None
    runs = "training runs only where it does"
    held = "each rank holds as many as the others"
    found = [
        _Division(instance, dim, axis, held if dim in instance.numbered else runs if axis in even else stage)
        for dim, axis in cut.dims
    ]
    if cut.rows is not None:
        named = instance.rule.split[0] in STORED
        found.append(_Division(instance, cut.rows, None, stage if named else None, cut.at))
        units = [axis for axis in leaves(instance.axes.dims[cut.at]) if axis in even] if named else []
        found += [_Division(instance, cut.rows, axis, runs, inside=True) for axis in units]
    roles = file.cuts.get(kind, {})
    axis = next((axis for axis in instance.rule.split if axis in even), None)
    return found + [_Division(instance, d, axis, runs) for d, role in roles.items() if axis and role == "runtime"]


def _uncut(message: str, got: str, expected: str, fix: str) -> EngineError:
    return EngineError("E214", message, got=got, expected=expected, fix=fix)


def file_of(instance: Instance, mode: Mode) -> FilePattern:
    """The file pattern that shares the most placeholders with a tensor's name; the first one if several do."""
    named = set(instance.sources[0].placeholders)
    return max(mode.files, key=lambda file: len(named & set(pattern(file.name).placeholders)))
