"""The training side to be written: groups of shards, one tensor for every rank that holds one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from engine.checkpoint.ranks import RankFile
from engine.errors import EngineError
from engine.formats.headers import Part, TensorHeader, dense_strides
from engine.language.axes import extent
from engine.language.model import FilePattern
from engine.language.names import Pattern, pattern
from engine.planning.destination import Destination, check_cuts, file_of, flag, shares
from engine.planning.groups import Cut, Group, cut_of
from engine.planning.stages import Indices, file_numbers, shared_out
from engine.planning.stored import Instance, Stored

Order = tuple[int, ...]
_Holder = tuple[
    Mapping[str, int], tuple[int, ...], tuple[int, ...], tuple[int, ...], Part | None
]  # ranks, cut, shape …
Held = tuple[Order, Stored, Group, int]  # where it stands in its file, a tensor, its group and its shard's position


class RankGroups:
    """Invents the shards of every tensor: `groups`, the `files` that hold them, and what each file holds in order.

    Args:
        used: rules in the order of the model.
        spellings: for a rule with historical names, the one to write (default: the first).
    """

    def __init__(
        self,
        destination: Destination,
        used: Sequence[Instance],
        sizes: Mapping[str, int],
        spellings: Mapping[str, Pattern],
    ) -> None:
        self.groups: list[Group] = []
        self.files: list[RankFile] = []
        self.held: list[list[Held]] = []  # of each file
        self._destination, self._sizes, self._spellings = destination, sizes, spellings
        self._numbers: dict[tuple[str | int, ...], int] = {}
        self._named: dict[str, int] = {}
        patterns = [(instance, file_of(instance, destination.mode)) for instance in used]
        check_cuts(destination, patterns, sizes)
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
            held.sort(key=lambda entry: (entry[0], entry[1].name))

    def _add(self, position: int, instance: Instance, file: FilePattern) -> None:
        layout = self._destination.layout
        cut = cut_of(instance, file, layout)
        boxes = _Boxes(instance, file, self._destination, self._sizes) if file.boxes else None
        names = instance.axis_names()
        spelling = self._spellings.get(instance.key, instance.sources[0])
        shape = _Shapes(instance, cut, self._destination, self._sizes)
        stage = {"first": 0, "layers": 1, "last": 2}[instance.stage_class]
        holding: dict[tuple[tuple[str, int], ...], list[_Holder]] = {}  # by the ranks that a tensor is bound to
        named = [p for p in pattern(file.name).placeholders if p in names or p == "number"]  # besides ranks
        files: dict[tuple[object, ...], list[int]] = {}
        for values in product(*(range(self._sizes[a]) for a in names)):
            fixed = dict(zip(names, values, strict=True))
            chunk, home, local = self._home(instance, fixed)
            key = self._destination.prefix(chunk) + spelling.format(local)
            bound = tuple(home.items())
            if bound not in holding:
                holding[bound] = [*self._holders(file, cut, home, boxes or shape)]
            shards: dict[tuple[int, ...], list[Stored]] = {}
            given = {**fixed, "number": self._layer_numbers.get((file.name, fixed.get("layer", 0)), 0)}
            which = (bound, *[given[p] for p in named])
            if which not in files:
                files[which] = [self._number(file, {**ranks, **given}) for ranks, *_ in holding[bound]]
            order = (chunk, stage, local.get("layer", 0), position, *values)
            for number, (_, at, local_shape, strides, part) in zip(files[which], holding[bound], strict=True):
                replicas = shards.setdefault(at, [])
                header = replicas[0].header if replicas else TensorHeader(key, "", local_shape, strides, 0, part)
                replicas.append(Stored(number, header, key, chunk))
            ordered = {ranks: tuple(shards[ranks]) for ranks in sorted(shards)}
            group = Group(instance, fixed, cut, ordered)
            self.groups.append(group)
            for place, copies in enumerate(ordered.values()):
                for one in copies:
                    self.held[one.file].append((order, one, group, place))

    def _holders(
        self, file: FilePattern, cut: Cut, home: Mapping[str, int], shape: _Boxes | _Shapes
    ) -> Iterator[_Holder]:
        """The ranks that hold a tensor that is bound to some, and what each holds of it."""
        lone = self._destination.layout.lone_rank if cut.lone else {}
        dims = cut.rank_dims()
        for ranks in self._ranks[file.name]:
            if any(ranks.get(dim, rank) != rank for wanted in (home, lone) for dim, rank in wanted.items()):
                continue
            at, part = tuple(ranks[dim] for dim in dims), None
            if isinstance(shape, _Boxes):
                found = shape(ranks)
                if found is None:
                    continue
                part, local = found
                at = part.starts
            else:
                local = shape(at)
            yield ranks, at, local, dense_strides(local), part

    def _home(self, instance: Instance, fixed: Mapping[str, int]) -> tuple[int, dict[str, int], dict[str, int]]:
        """The chunk of a tensor, the ranks that it is bound to, and the numbers in its name there."""
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
        """(file pattern, layer) → its number; E214 when two layers would write the same file."""
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


class _Boxes:
    """The box of a tensor that each rank of a mesh stores: replicas once, by the first rank that holds one."""

    def __init__(
        self, instance: Instance, file: FilePattern, destination: Destination, sizes: Mapping[str, int]
    ) -> None:
        self._whole = tuple(extent(dim, sizes) for dim in instance.axes.dims)
        self._mesh, self._counts = file.mesh, destination.sizes

    def __call__(self, ranks: Mapping[str, int]) -> tuple[Part, tuple[int, ...]] | None:
        """Where the box lies and its shape, by torch's rule of chunks; None for a rank that stores nothing."""
        starts, shape = [0] * len(self._whole), list(self._whole)
        for dim, at in self._mesh.items():
            if at >= len(shape):
                if ranks[dim]:
                    return None
                continue
            step = -(-self._whole[at] // self._counts[dim])
            low, high = min(ranks[dim] * step, self._whole[at]), min((ranks[dim] + 1) * step, self._whole[at])
            starts[at], shape[at] = low, high - low
        return None if 0 in shape else (Part(tuple(starts), self._whole), tuple(shape))


class _Shapes:
    """Shapes of a tensor's shards, by rank coordinates along its cut."""

    def __init__(self, instance: Instance, cut: Cut, destination: Destination, sizes: Mapping[str, int]) -> None:
        self._axes, self._cut, self._sizes = instance.axes, cut, sizes
        extra = destination.layout.uneven
        self._shares = {axis: shares(sizes[axis], destination.sizes.get(dim, 1), extra) for dim, axis in cut.dims}
        self._rows: list[int] = []
        if cut.rows is not None:
            self._rows = shares(extent(self._axes.dims[cut.at], sizes), destination.sizes.get(cut.rows, 1), extra)

    def __call__(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        local = {axis: self._shares[axis][ranks[i]] for i, (_, axis) in enumerate(self._cut.dims)}
        shape = tuple(extent(dim, {**self._sizes, **local}) for dim in self._axes.dims)
        at = self._cut.at
        return (*shape[:at], self._rows[ranks[0]], *shape[at + 1 :]) if self._rows else shape
