"""Groups: all the shards of one logical source tensor, and how the layout cuts them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.checkpoint.ranks import RankFile
from engine.errors import EngineError, Place
from engine.language.axes import Product
from engine.language.model import FilePattern, Layout
from engine.language.rules import STORED
from engine.planning.recorded import by_boxes, fold_replicas, unlike_record
from engine.planning.stored import Instance, Stored


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is cut over ranks.

    Attributes:
        dims: (rank dimension, axis) pairs; the axis is cut in the order of ranks, or of its own numbers in names.
        rows: the rank dimension that cuts storage rows, if any; `at` is the storage dimension that it cuts.
        recorded: whether each shard records which box it holds, of the tensor that remains after `dims`.
        lone: whether the tensor is stored undivided on a single rank (a row-parallel bias).
        pieces: how many tensors of each rank hold its rows; if several, coordinates end with the piece's number.
    """

    dims: tuple[tuple[str, str], ...] = ()
    rows: str | None = None
    lone: bool = False
    recorded: bool = False
    at: int = 0
    pieces: int = 1

    def rank_dims(self) -> tuple[str, ...]:
        """The rank dimensions of a shard's coordinates in its group; the one that cuts rows is last."""
        return (*(dim for dim, _ in self.dims), *((self.rows,) if self.rows is not None else ()))

    @property
    def boxes(self) -> bool:
        """Whether only their records distinguish shards."""
        return self.recorded and self.rows is None

    @property
    def by_rows(self) -> bool:
        """Whether ranks cut storage rows wherever that falls, and `dims`, if any, the same rows before them."""
        return self.rows is not None and not self.recorded

    @property
    def axes(self) -> dict[str, int]:
        """The axes of which each shard has its own extent, with their positions in its coordinates."""
        return {} if self.by_rows else {axis: at for at, (_, axis) in enumerate(self.dims)}


GroupKey = tuple[str | int, ...]  # the instance's key, then the placeholder values; unique on each side


@dataclass(frozen=True, slots=True)
class Group:
    """The shards of one logical tensor: coordinates along the cut's rank dimensions → replicas.

    If only recorded boxes distinguish shards, the coordinates are the starts of the boxes.
    """

    instance: Instance
    fixed: Mapping[str, int]  # placeholders: layer, expert
    cut: Cut
    shards: Mapping[tuple[int, ...], tuple[Stored, ...]]
    key: GroupKey = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (self.instance.key, *self.fixed.values()))

    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The ranks of each shard with its shape; with several if its replicas are not alike."""
        return tuple([(ranks, *{one.header.whole: 0 for one in stored}) for ranks, stored in self.shards.items()])

    @property
    def first(self) -> Stored:
        """The first of its stored tensors, which represents all where they are alike."""
        return next(iter(self.shards.values()))[0]

    @property
    def name(self) -> str:
        return self.first.name


def cut_of(instance: Instance, file: FilePattern, layout: Layout, *, recorded: bool = False) -> Cut:
    """Apply a file pattern's cuts to a rule: `split`, `rows`, `recorded` or a named axis per rank dimension.

    A rule without `split` is replicated. An axis whose number is in the tensor's name is cut by that number. A tensor
    of a split rule that lacks the axis is stored where `lone_rank` says, unless the mode cuts rows, which every tensor
    of such a rule has. Tensors of any rule that record which rows they hold (`recorded`) are cut by that record if the
    mode says `recorded`. In files whose tensors record their boxes, only the record counts.
    """
    if file.boxes:
        return Cut(recorded=True)
    cuts = file.cuts.get(instance.stage_class, {})
    rows = next((dim for dim, role in cuts.items() if role == "recorded"), None) if recorded else None
    dims = slices = [(axis, axis) for axis in instance.numbered]
    if not instance.rule.split:
        return Cut(tuple(dims), rows=rows, recorded=rows is not None)
    if instance.rule.split[0] in STORED and instance.rule.split[0] not in instance.axes.names():
        at = STORED.index(instance.rule.split[0])
        dim = next((dim for dim, role in cuts.items() if role in ("split", "rows")), None)
        if dim is not None and at < len(instance.axes.dims):
            return Cut(tuple(slices), dim, at=at)
        return Cut(tuple(dims))
    present = set(instance.axes.names())
    lone = False
    for dim, role in cuts.items():
        if role in ("recorded", "runtime"):
            continue
        if role == "rows":
            return Cut(tuple(slices), dim)
        wanted = instance.rule.split if role == "split" else (role,)
        axis = next((a for a in wanted if a in present and a not in {a for _, a in dims}), None)
        if axis is not None:
            dims = [*dims, (dim, axis)]
        elif role == "split" and dim in layout.lone_rank:
            lone = True
    return Cut(tuple(dims), rows, lone, rows is not None)


def _check_number(slices: Mapping[str, int], stored: Stored, file: RankFile) -> None:
    """E208 when the number of a slice in a tensor's name is not that of its file; 0 where files have no such number."""
    for axis, value in slices.items():
        if file.ranks.get(axis, 0) != value:
            numbered = axis in file.ranks
            raise EngineError(
                "E208",
                f"`{stored.name}` is not in the file of {axis} {value}",
                place=Place(file.name, tensor=stored.header.name),
                got=f"a tensor of `{file.pattern.name}`",
                expected=f"a file whose name has the number of `{axis}` that its tensors' names have"
                + ("" if numbered else ", or 0 alone in names of tensors"),
                fix="Files were renamed or exchanged, or are from another run; copy the folder again."
                if numbered
                else "Slices in such files are not read: save the checkpoint in another mode.",
            )


def _in_pieces(cut: Cut, stored: Stored, file: RankFile, instance: Instance) -> Cut:
    """The cut of a tensor whose rows each rank saved in pieces, which follow each other as the ranks do."""
    dims = cut.rank_dims()
    if (
        len(dims) != 1
        or instance.numbered
        or cut.recorded
        or cut.at
        or any(axis != instance.axes.names()[0] for _, axis in cut.dims)
    ):
        raise EngineError(
            "E208",
            f"`{stored.name}` is one of {len(instance.parts)} pieces of a rank's rows, and here ranks do not cut rows",
            place=Place(file.name, tensor=stored.header.name),
            got=f"a tensor of `{file.pattern.name}`",
            expected="a mode whose ranks cut this tensor's rows, or the tensor whole: "
            + " or ".join(one.text for one in instance.sources),
            fix="Join the pieces, or save the checkpoint in another mode.",
        )
    return Cut(rows=dims[0], pieces=len(instance.parts))


def group_shards(
    matched: Iterable[tuple[Stored, Instance, Mapping[str, int]]],
    files: Sequence[RankFile],
    layout: Layout,
) -> dict[GroupKey, Group]:
    """Collect shards of the same rule, parameter and placeholder values, replicas together."""
    cuts: dict[tuple[str, str, bool], tuple[Cut, tuple[str, ...]]] = {}
    # cached places of a file's tensors of a rule
    places: dict[tuple[object, ...], tuple[Cut, tuple[int, ...]]] = {}
    once: dict[tuple[int, ...], tuple[int, ...]] = {}  # coordinates that all tensors of a rank share
    layers: dict[object, Mapping[str, int]] = {}  # placeholder values that all tensors of a layer share
    found: dict[GroupKey, tuple[Instance, Mapping[str, int], Cut, dict[tuple[int, ...], list[Stored]]]] = {}
    for stored, instance, fixed in matched:
        recorded = stored.header.recorded is not None
        piece = instance.part(stored.name) if instance.parts else None
        slices = {axis: fixed[axis] for axis in instance.numbered}
        place = instance.key, stored.file, recorded, piece, *slices.values()
        at = places.get(place)
        if at is None:
            file = files[stored.file]
            _check_number(slices, stored, file)
            cut_key = (instance.key, file.pattern.name, recorded)
            if cut_key not in cuts:
                cut = cut_of(instance, file.pattern, layout, recorded=recorded)
                cuts[cut_key] = cut, cut.rank_dims()
            cut, dims = cuts[cut_key]
            if piece is not None:
                cut = _in_pieces(cut, stored, file, instance)
                dims = cut.rank_dims()
            here = {**file.ranks, **slices}
            ranks = tuple([here[dim] for dim in dims]) + (() if piece is None else (piece,))
            at = places[place] = cut, once.setdefault(ranks, ranks)
        cut, ranks = at
        if slices:
            fixed = {axis: value for axis, value in fixed.items() if axis not in slices}
        key: GroupKey = (instance.key, *fixed.values())
        group = found.get(key)
        if group is None:
            group = found[key] = instance, layers.setdefault(tuple(fixed.items()), fixed), cut, {}
        if group[2].recorded != cut.recorded or (recorded and not cut.recorded):
            raise unlike_record(stored, files[stored.file])
        group[3].setdefault(ranks, []).append(stored)
    result: dict[GroupKey, Group] = {}
    for key in [*found]:  # free each group before the next is sorted, for large checkpoints
        instance, fixed, cut, shards = found.pop(key)
        ordered = {ranks: tuple(shards[ranks]) for ranks in sorted(shards)}
        if cut.boxes:
            ordered = by_boxes(ordered[()], files)
        elif cut.recorded:
            ordered = fold_replicas(ordered, files)
        result[key] = undivided(Group(instance, fixed, cut, ordered))
    return result


def undivided(group: Group) -> Group:
    """The group without the cut by numbers in names, if there is one number only.

    Raises:
        EngineError: E208 if ranks cut rows of several slices that do not follow each other in the whole tensor.
    """
    cut, numbered = group.cut, group.instance.numbered
    out = [at for at, dim in enumerate(cut.rank_dims()) if dim in numbered]
    if any(ranks[at] for ranks in group.shards for at in out):
        if cut.by_rows:
            _check_slices(group)
        return group
    if not out:
        return group
    dims = tuple(one for one in cut.dims if one[0] not in numbered)
    shards = {tuple(one for at, one in enumerate(ranks) if at not in out): s for ranks, s in group.shards.items()}
    return replace(group, cut=replace(cut, dims=dims), shards=shards)


def _check_slices(group: Group) -> None:
    axes = group.instance.axes
    node = axes.dims[group.cut.at]
    terms = node.terms if isinstance(node, Product) else (node,)
    slices = [axis for _, axis in group.cut.dims]
    if [*map(str, terms[: len(slices)])] != slices:
        told = ", ".join(slices)
        raise EngineError(
            "E208",
            f"{group.cut.rows} ranks cut slices of `{group.name}`, which do not follow each other in the whole tensor",
            place=group.instance.rule.place,
            got=f"`{axes}`, in slices by the number of {told}",
            expected=f"{told} first in the dimension that ranks cut",
            fix="Write the axes in the order in which the elements are stored.",
        )


def share_units(
    group: Group, sizes: Mapping[str, int], units: Collection[str], begins: Callable[[Stored], bytes], *, whole: bool
) -> Group:
    """The group with equal shards folded to replicas, if several consecutive ranks hold the same part.

    For example key and value heads, if there are fewer of them than tensor-parallel ranks, or an embedding that each
    rank holds whole. A run compares the folded shards as replicas.

    Args:
        units: axes that training divides evenly, so that a rank holds whole units only.
        whole: whether each rank may hold all of the axis, as the configuration has it.
        begins: reads the first bytes of a tensor, to see in a first layer whether units are equal at all.
    """
    for at, (_, axis) in enumerate(group.cut.dims):
        ranks, count = {key[at] for key in group.shards}, sizes.get(axis, 0)
        times, left = divmod(len(ranks), max(count, 1))
        alike = {replicas[0].header.whole for replicas in group.shards.values()}
        sides = [*zip(map(str, group.instance.axes.dims), *alike, strict=False)] if len(alike) == 1 else []
        full = whole and (axis, count) in sides
        if full:
            times = len(ranks)
        elif axis not in units or left or count < 1:
            continue
        if times < 2 or ranks != {*range(len(ranks))} or len(alike) > 1:
            continue
        folded: dict[tuple[int, ...], tuple[Stored, ...]] = {}
        for key, replicas in group.shards.items():
            one = (*key[:at], key[at] // times, *key[at + 1 :])
            first = one in folded and not full and not any(group.fixed.values())
            if first and begins(folded[one][0]) != begins(replicas[0]):
                return group  # more units than the configuration says
            folded[one] = (*folded.get(one, ()), *replicas)
        return replace(group, shards=folded)
    return group
