"""The builder: an attempt that fits becomes the two sides of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from engine.errors import EngineError, Place
from engine.language.axes import extent
from engine.plan.attempts import Attempt, Checkpoint
from engine.plan.boxes import Part, regions
from engine.plan.copies import Copy
from engine.plan.groups import Group
from engine.plan.model import Output, Replicas, SourceTensor
from engine.plan.sides import Key, Pieces, Side, TargetSpec, copies_into
from engine.plan.sizes import extents, unknown_error
from engine.plan.stored import Instance, Stored

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOATS = ("BF16", "F16", "F32", "F64")


class Copies:
    """`Plan.copies`: computed when asked for, nothing kept."""

    def __init__(self, targets: Sequence[Sequence[tuple[Key, Part]]], side: Side) -> None:
        self._targets = targets
        self._side = side

    def __call__(self, output: int) -> list[Copy]:
        return copies_into(self._targets[output], self._side)


def prove_total(outputs: Sequence[Output], copies: Copies) -> None:
    """Source boxes are disjoint by construction, so a full count proves each element written once."""
    for index, output in enumerate(outputs):
        count = sum(copy.volume() for copy in copies(index))
        if count != output.elements:
            raise EngineError(
                "E208",
                f"shards of `{output.name}` overlap or leave a gap",
                place=Place(output.place),
                got=f"{count} elements",
                expected=f"{output.elements} elements, {' × '.join(map(str, output.shape))}",
                fix="A rank file is missing or from another run; compare the sizes of the rank files.",
            )


class Builder:
    """Turns groups into the two sides of the plan."""

    def __init__(self, checkpoint: Checkpoint, attempt: Attempt, pieces: Pieces, dtype: str) -> None:
        self.checkpoint, self.attempt, self.pieces, self.dtype = checkpoint, attempt, pieces, dtype
        self.sizes = attempt.sizes.values()
        self.sources: list[SourceTensor] = []
        self._ids: dict[int, int] = {}
        self._groups = {(id(i), key): g for (i, key), g in attempt.groups.items()}
        self._orders = {id(i): tuple(g.fixed) for (i, _), g in attempt.groups.items()}
        for group in attempt.groups.values():
            for stored in group.shards.values():
                for one in stored:
                    self._ids[id(one)] = len(self.sources)
                    self.sources.append(SourceTensor(one.file, one.header))
        self._last: tuple[int, dict[frozenset[str], list[Part]]] = (0, {})

    def replicas(self) -> tuple[Replicas, ...]:
        return tuple(
            Replicas(tuple(self._ids[id(one)] for one in stored), group.name, group.instance.rule.name)
            for group in self.attempt.groups.values()
            for stored in group.shards.values()
            if len(stored) > 1
        )

    def outputs(self) -> list[tuple[Output, list[tuple[Key, Part]], str | None]]:
        """Every target tensor in the order of the model: itself, its parts, and what it is tied to."""
        listed: list[tuple[tuple[object, ...], TargetSpec, dict[str, int]]] = []
        for order, spec in enumerate(self.pieces.targets.values()):
            for axis in (*spec.name.placeholders, *spec.axes.names()):
                if axis not in self.sizes:
                    error = unknown_error(axis, spec.instances[0].rule.place)
                    if axis in self.attempt.unread:
                        error = self.attempt.unread[axis]
                    raise error
            stage = {"first": 0, "layers": 1, "last": 2}[spec.instances[0].stage_class]
            for values in product(*(range(self.sizes[p]) for p in spec.name.placeholders)):
                fixed = dict(zip(spec.name.placeholders, values, strict=True))
                listed.append(((stage, fixed.get("layer", -1), order, values), spec, fixed))
        listed.sort(key=lambda entry: entry[0])
        result: list[tuple[Output, list[tuple[Key, Part]], str | None]] = []
        for _, spec, fixed in listed:
            shape = tuple(extent(dim, self.sizes) for dim in spec.axes.dims)
            strides = [1] * len(shape)
            for i in range(len(shape) - 2, -1, -1):
                strides[i] = strides[i + 1] * shape[i + 1]
            parts = regions(spec.axes, self.sizes, strides, fixed=fixed)
            keyed = [((spec.name.text, r.piece), Part(len(result), r)) for r in parts]
            result.append((self._output(spec, fixed, shape), keyed, spec.instances[0].rule.tied_to))
        _unique([output for output, _, _ in result])
        return result

    def _output(self, spec: TargetSpec, fixed: Mapping[str, int], shape: tuple[int, ...]) -> Output:
        name = spec.name.format(fixed)
        dtypes: dict[str, Stored] = {}
        for instance in spec.instances:
            for group in self._matching(instance, fixed):
                for stored in group.shards.values():
                    dtypes.setdefault(stored[0].header.dtype, stored[0])
        rule = spec.instances[0].rule
        if len(dtypes) > 1:
            told = [f"{d} in {self.checkpoint.grid.files[s.file].name}:{s.header.name}" for d, s in dtypes.items()]
            raise EngineError(
                "E210",
                f"element types differ inside `{name}`",
                place=rule.place,
                got="\n".join(told),
                expected="one type",
                fix="The rank files are of different runs or one was cast by hand.",
            )
        read = next(iter(dtypes))
        cast = self.dtype != "auto" and not rule.keep_dtype and read in _FLOATS
        wanted = DTYPES[self.dtype] if cast else read
        dim = None
        if rule.transform is not None:
            axis = rule.transform[1]
            dim = next(i for i, node in enumerate(spec.axes.dims) if str(node) == axis)
        names = " + ".join(i.rule.name for i in spec.instances)
        return Output(name, wanted, read, shape, names, str(rule.place), spec.name.text, rule.transform, dim)

    def _matching(self, instance: Instance, fixed: Mapping[str, int]) -> list[Group]:
        """Groups of a rule under the target's placeholders (all of those the target stacks)."""
        ranges = [[fixed[a]] if a in fixed else range(self.sizes[a]) for a in self._orders[id(instance)]]
        return [self._groups[id(instance), values] for values in product(*ranges)]

    def side(self) -> Side:
        def fixed(key: Key) -> tuple[str, ...]:
            return self._orders[id(self.pieces.owners[key])]

        def parts(key: Key, values: tuple[int, ...]) -> Sequence[Part]:
            instance = self.pieces.owners[key]
            group = self._groups[id(instance), values]
            if self._last[0] != id(group):
                self._last = (id(group), self._parts(group))
            return self._last[1].get(key[1], ())

        return Side(fixed, parts)

    def _parts(self, group: Group) -> dict[frozenset[str], list[Part]]:
        """Place every shard of a group: offsets are running sums of what the ranks before hold."""
        found: dict[frozenset[str], list[Part]] = {}
        local = extents(group, self.sizes) or {}
        starts = {axis: _running(by_rank) for axis, by_rank in local.items()}
        row = 0
        for ranks, stored in group.shards.items():
            header = stored[0].header
            sizes, begin = dict(self.sizes), {}
            for position, (_, axis) in enumerate(group.cut.dims):
                sizes[axis] = local[axis][ranks[position]]
                begin[axis] = starts[axis][ranks[position]]
            rows = None
            if group.cut.rows is not None:
                rows = (row, row + header.shape[0])
                row = rows[1]
            placed = regions(group.instance.axes, sizes, header.strides, rows=rows, starts=begin, fixed=group.fixed)
            for region in placed:
                found.setdefault(region.piece, []).append(Part(self._ids[id(stored[0])], region))
        return found


def _running(by_rank: Mapping[int, int]) -> dict[int, int]:
    result, total = {}, 0
    for rank in sorted(by_rank):
        result[rank] = total
        total += by_rank[rank]
    return result


def _unique(outputs: Sequence[Output]) -> None:
    seen: dict[str, Output] = {}
    for output in outputs:
        if output.name in seen:
            raise EngineError(
                "E206",
                f"two rules write `{output.name}`",
                place=Place(output.place),
                got=f"{seen[output.name].rule} and {output.rule}",
                expected="one",
                fix="Change one target's name.",
            )
        seen[output.name] = output
