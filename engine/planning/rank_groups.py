"""The training side to write: groups of shards, one tensor for every rank that holds one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product

from engine.checkpoint.ranks import RankFile
from engine.errors import EngineError
from engine.formats.headers import Recorded, TensorHeader, dense_strides
from engine.language.axes import extent
from engine.language.model import FilePattern
from engine.language.names import pattern
from engine.language.rules import undone
from engine.planning.destination import Destination, check_cuts, file_of, flag, shares
from engine.planning.groups import Cut, Group, cut_of, undivided
from engine.planning.stages import Indices, file_numbers, shared_out
from engine.planning.stored import Instance, Stored
from engine.planning.written import Wanted

Order = tuple[int, ...]
# The slice of a tensor, the ranks that hold a shard of it, its coordinates, shape, strides and recorded box.
_Holder = tuple[int, Mapping[str, int], tuple[int, ...], tuple[int, ...], tuple[int, ...], Recorded | None]
_Share = tuple[tuple[int, ...], tuple[int, ...], Recorded | None]  # coordinates in its group, shape, recorded box
_Shares = Callable[[Mapping[str, int]], _Share | None]  # gives a rank's share of a tensor; None if it holds none


class RankGroups:
    """Creates the shards of every tensor: `groups`, the `files` that hold them, and the content of each file in order.

    Args:
        used: rules in the order of the model.
        spelt: the historical names to write (default: the first of each rule).
        pads: whether padding is added anew, and changes of values are undone: neither is taken from the source.
    """

    def __init__(
        self,
        destination: Destination,
        used: Sequence[Instance],
        sizes: Mapping[str, int],
        spelt: frozenset[str],
        *,
        pads: bool,
    ) -> None:
        self.groups: list[Group] = []
        self.files: list[RankFile] = []
        self.held: list[list[tuple[Order, Wanted]]] = []  # by file, in order
        self._destination, self._sizes, self._spelt, self._pads = destination, sizes, spelt, pads
        self._prefixes = [destination.prefix(chunk) for chunk in range(destination.stages.chunks)]
        self._numbers: dict[tuple[str | int, ...], int] = {}
        self._named: dict[str, int] = {}
        patterns = [(instance, file_of(instance, destination.mode)) for instance in used]
        check_cuts(destination, patterns, sizes, pads=pads)
        self._ranks = {file.name: destination.ranks(file) for file in destination.mode.files}
        for ranks in self._ranks[destination.mode.files[0].name]:
            self._number(destination.mode.files[0], ranks)
        self._layer_numbers = self._file_numbers(patterns)
        layout, dims = destination.layout, destination.sizes
        local = {axis: shared_out(axis, sizes.get(axis, 0), layout, dims) for axis in layout.indices}
        indices = Indices(layout, dims, local)
        self._homes = {axis: indices.homes(axis) for axis in layout.indices}
        for position, (instance, file) in enumerate(patterns):
            self._add(position, instance, file)
        for held in self.held:
            held.sort(key=lambda entry: (entry[0], entry[1].stored.name))

    def _add(self, position: int, instance: Instance, file: FilePattern) -> None:
        rule, cut = instance.rule, cut_of(instance, file, self._destination.layout)
        change = undone(rule.transform) if self._pads and rule.transform else None
        share = (_boxes if file.boxes else _shards)(instance, file, cut, self._destination, self._sizes)
        names, slices = instance.axis_names, self._slices(instance)
        spelling = next((s for s in instance.sources if s.text in self._spelt), instance.sources[0])
        stage = {"first": 0, "layers": 1, "last": 2}[instance.stage_class]
        holding: dict[tuple[tuple[str, int], ...], list[_Holder]] = {}  # by the ranks that a tensor is fixed to
        named = [p for p in pattern(file.name).placeholders if p in names or p == "number"]  # besides ranks
        files: dict[tuple[object, ...], list[int]] = {}
        for values in product(*(range(self._sizes[a]) for a in names)):
            fixed = dict(zip(names, values, strict=True))
            chunk, home, local = self._home(instance, fixed)
            keys = [self._prefixes[chunk] + spelling.format({**local, **one}) for one in slices]
            bound = tuple(home.items())
            if bound not in holding:
                holding[bound] = [*self._holders(file, cut, home, share, slices)]
            shards: dict[tuple[int, ...], list[Stored]] = {}
            given = {**fixed, "number": self._layer_numbers.get((file.name, fixed.get("layer", 0)), 0)}
            which = (bound, *[given[p] for p in named])
            if which not in files:
                files[which] = [self._number(file, {**ranks, **given}) for _, ranks, *_ in holding[bound]]
            order = (chunk, stage, local.get("layer", 0), position, *values)
            for number, (nth, _, at, local_shape, strides, part) in zip(files[which], holding[bound], strict=True):
                replicas = shards.setdefault(at, [])
                key = keys[nth]
                header = replicas[0].header if replicas else TensorHeader(key, "", local_shape, strides, 0, part)
                replicas.append(Stored(number, header, key, chunk))
            ordered = {ranks: tuple(shards[ranks]) for ranks in sorted(shards)}
            group = undivided(Group(instance, fixed, cut, ordered))
            self.groups.append(group)
            for place, copies in enumerate(group.shards.values()):
                for one in copies:
                    self.held[one.file].append((order, Wanted(group, place, one, rule.name, change)))

    def _holders(
        self, file: FilePattern, cut: Cut, home: Mapping[str, int], share: _Shares, slices: Sequence[Mapping[str, int]]
    ) -> Iterator[_Holder]:
        """The ranks that hold a tensor which is fixed to the ranks in `home`, and each one's share.

        Args:
            slices: the numbers in names of the slices that the tensor is saved in.
        """
        lone = self._destination.layout.lone_rank if cut.lone else {}
        for ranks, (nth, numbers) in product(self._ranks[file.name], enumerate(slices)):
            if any(ranks.get(dim, rank) != rank for wanted in (home, lone) for dim, rank in wanted.items()):
                continue
            if (found := share({**ranks, **numbers})) is not None:
                at, shape, part = found
                yield nth, {**ranks, **numbers}, at, shape, dense_strides(shape), part

    def _slices(self, instance: Instance) -> list[dict[str, int]]:
        """The numbers in names of the slices that a tensor is saved in; one slice without numbers for most."""
        every = (range(self._destination.sizes.get(axis, 1)) for axis in instance.numbered)
        return [dict(zip(instance.numbered, numbers, strict=True)) for numbers in product(*every)]

    def _home(self, instance: Instance, fixed: Mapping[str, int]) -> tuple[int, dict[str, int], dict[str, int]]:
        """The chunk of a tensor, the ranks that it is fixed to, and the numbers in its name there."""
        stages = self._destination.stages
        kind = instance.stage_class
        if kind == "layers":
            stage, at = stages.find(fixed.get("layer", 0))
        else:  # the last stage may have no layer
            stage, at = list(stages.starts)[0 if kind == "first" else -1], 0
        home, local = stages.ranks(stage), dict(fixed)
        if "layer" in fixed:
            local["layer"] = at
        for axis, homes in self._homes.items():
            if axis in fixed:
                ranks, local[axis] = homes[fixed[axis]]
                home |= ranks
        return stage[0], home, local

    def _number(self, file: FilePattern, values: Mapping[str, int]) -> int:
        """The index of a file, added when it is new."""
        compiled = pattern(file.name)
        key: tuple[str | int, ...] = (file.name, *(values[p] for p in compiled.placeholders))
        if key not in self._numbers:
            name = compiled.format(values)
            self._numbers[key] = self._named.setdefault(name, len(self.files))
            if self._numbers[key] == len(self.files):
                self.held.append([])
                self.files.append(RankFile(name, file, {p: values[p] for p in compiled.placeholders}))
        return self._numbers[key]

    def _file_numbers(self, patterns: Sequence[tuple[Instance, FilePattern]]) -> dict[tuple[str, int], int]:
        """(file pattern, layer) → file number; E214 when two layers would write the same file."""
        stages, result = self._destination.stages, dict[tuple[str, int], int]()
        for file in {f.name: f for _, f in patterns}.values():
            seen: dict[int, tuple[str, int]] = {}
            for stage, local, number in file_numbers(file, stages, self._destination.counts()):
                layer, name = stages.starts[stage] + local, stages.name(stage)
                if number in seen:
                    raise EngineError(
                        "E214",
                        "two layers would write the same expert files, and one would be lost",
                        place=file.place,
                        got=f"layer {seen[number][1]} on {seen[number][0]} and layer {layer} on {name}: "
                        f"{file.name} with number {number}",
                        expected="layers that divide by the pipeline ranks",
                        fix=f"Give a {' or '.join(flag(dim).strip() for dim in stages.dims)} that divides the layers: "
                        + ", ".join(str(n) for n in range(1, stages.layers + 1) if stages.layers % n == 0)
                        + ".",
                    )
                seen[number] = name, layer
                result[file.name, layer] = number
        return result


def _boxes(
    instance: Instance, file: FilePattern, cut: Cut, destination: Destination, sizes: Mapping[str, int]
) -> _Shares:
    """Shares of a mesh, by torch's chunking: replicas once, on the first rank that holds one."""
    whole = tuple(extent(dim, sizes) for dim in instance.axes.dims)

    def share(ranks: Mapping[str, int]) -> _Share | None:
        starts, shape = [0] * len(whole), list(whole)
        for dim, at in file.mesh.items():
            if at >= len(shape):
                if ranks[dim]:
                    return None
                continue
            step = -(-whole[at] // destination.sizes[dim])
            low, high = min(ranks[dim] * step, whole[at]), min((ranks[dim] + 1) * step, whole[at])
            starts[at], shape[at] = low, high - low
        return None if 0 in shape else (tuple(starts), tuple(shape), Recorded(tuple(starts), whole))

    return share


def _shards(
    instance: Instance, file: FilePattern, cut: Cut, destination: Destination, sizes: Mapping[str, int]
) -> _Shares:
    """Shares by rank coordinates along a cut."""
    dims, extra, ranked = instance.axes.dims, destination.layout.uneven, destination.sizes_of(file)
    parts = {axis: shares(sizes[axis], ranked.get(dim, 1), extra) for dim, axis in cut.dims}
    held = {**sizes, **{axis: part[0] for axis, part in parts.items()}}  # rows are cut in slices of one size
    rows = [] if cut.rows is None else shares(extent(dims[cut.at], held), ranked.get(cut.rows, 1), extra)

    ranks_of = cut.rank_dims()

    @cache
    def shape_of(at: tuple[int, ...]) -> tuple[int, ...]:
        here = dict(zip(ranks_of, at, strict=True))
        local = {**sizes, **{axis: parts[axis][here[dim]] for dim, axis in cut.dims}}
        shape = [extent(dim, local) for dim in dims]
        if cut.rows is not None:
            shape[cut.at] = rows[here[cut.rows]]
        return tuple(shape)

    def share(ranks: Mapping[str, int]) -> _Share:
        at = tuple([ranks[dim] for dim in ranks_of])
        return at, shape_of(at), None

    return share
