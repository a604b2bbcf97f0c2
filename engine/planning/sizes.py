"""Sizes: solves what config and shards claim, one unknown at a time, and collects contradictions.

Every `dims` entry and every storage dimension of every shard is an equation. Extents of a cut axis
are taken from the shards; their sum is the axis. An axis has one size in the whole checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from engine.checkpoint.ranks import RankFile, RankGrid
from engine.errors import EngineError, Place, shape_text
from engine.language.axes import Axes, Axis, Node, Product, leaves
from engine.planning.groups import Group
from engine.planning.stored import Stored

Ranks = tuple[int, ...]  # a shard's coordinates in its group


@dataclass(frozen=True, slots=True)
class Fact:
    """A size and where it comes from."""

    axis: str
    value: int
    why: str
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Contradiction:
    axis: str
    got: str
    expected: str
    place: Place | None
    rule: str
    file: str  # the odd one out: a rank's file, a stage; empty if all ranks agree


@dataclass(slots=True)
class Sizes:
    """The state of solving: facts by axis, and what contradicts them."""

    facts: dict[str, Fact] = field(default_factory=dict)
    contradictions: list[Contradiction] = field(default_factory=list)

    def values(self) -> dict[str, int]:
        return {name: fact.value for name, fact in self.facts.items()}


def linear(node: Node, sizes: Mapping[str, int]) -> tuple[int, int, str | None] | None:
    """A node's extent as `constant + factor * unknown`; None with two unknowns or a product of them.

    >>> from engine.language.axes import parse_axes
    >>> linear(parse_axes("(groups (queries + k) head_dim)").dims[0], {"queries": 2, "k": 1, "head_dim": 4})
    (0, 12, 'groups')
    """
    if isinstance(node, Axis):
        return (sizes[node.name], 0, None) if node.name in sizes else (0, 1, node.name)
    parts = [linear(term, sizes) for term in node.terms]
    constant, factor, unknown = (1, 0, None) if isinstance(node, Product) else (0, 0, None)
    for part in parts:
        if part is None:
            return None
        if part[2] is not None and unknown not in (None, part[2]):
            return None
        if isinstance(node, Product):
            if factor and part[1]:
                return None
            constant, factor = constant * part[0], factor * part[0] + constant * part[1]
        else:
            constant, factor = constant + part[0], factor + part[1]
        unknown = unknown or part[2]
    return constant, factor, unknown


def solve(groups: Sequence[Group], known: Mapping[str, Fact], files: Sequence[RankFile]) -> Sizes:
    """Solve to a fixed point. Groups with the same rule, ranks and shapes are processed once."""
    distinct: dict[tuple[object, ...], Group] = {}
    for group in groups:
        distinct.setdefault((group.instance.key, group.shapes()), group)
    state = Sizes(dict(known))
    pending = list(distinct.values())
    while pending:
        left: list[Group] = []
        for group in pending:
            try:
                if not _Look(group, state, files).learn():
                    left.append(group)
            except _Contradicts as contradicts:
                state.contradictions.append(contradicts.found)
        if len(left) == len(pending):
            break
        pending = left
    return state


def extents(group: Group, sizes: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Local extents of each cut axis by rank, from the shards of a group whose sizes are solved."""
    position = group.cut.axes
    if not position:
        return {}
    others = {name: size for name, size in sizes.items() if name not in position}
    forms = [linear(node, others) for node in group.instance.axes.dims]
    result: dict[str, dict[int, int]] = {axis: {} for axis in position}
    for ranks, stored in group.shards.items():
        for form, size in zip(forms, stored[0].header.whole, strict=True):
            constant, factor, axis = form or (0, 0, None)
            if axis is not None and axis in position and factor:
                result[axis].setdefault(ranks[position[axis]], (size - constant) // factor)
    unknown = next((axis for axis, by_rank in result.items() if not by_rank), None)
    if unknown is not None:
        raise EngineError(
            "E204",
            f"the size of axis `{unknown}` on each rank stays unknown",
            place=group.instance.rule.place,
            got=f"`{group.instance.axes}`, of which {' and '.join(position)} are cut",
            expected="at most one axis of a dimension that is cut",
            fix="Write the axes as dimensions of their own if they are stored so, or `split: rows`.",
        )
    return result


class _Contradicts(Exception):
    """Raised when the shards of a group contradict each other, or known sizes."""

    def __init__(self, found: Contradiction) -> None:
        self.found = found


@dataclass(frozen=True, slots=True)
class _Look:
    """One pass over a group: what its shards add to the known sizes."""

    group: Group
    state: Sizes
    files: Sequence[RankFile]

    def learn(self) -> bool:
        """Deduce what is possible; True when the group can give nothing more.

        Raises:
            _Contradicts: shapes that do not fit the rule's axes, or sizes that disagree.
        """
        cut = self.group.cut
        self._check_shapes()
        sizes = self.state.values()
        position = cut.axes
        others = {name: size for name, size in sizes.items() if name not in position}
        local: dict[str, dict[int, int]] = {axis: {} for axis in position}
        least = 0 if cut.by_rows else 1
        done = True
        for node, size, ranks in self._equations():
            form = linear(node, others)
            if form is None:
                done = False
                continue
            constant, factor, unknown = form
            if unknown is None:
                if constant != size:
                    got = f"{size} from {self._where(ranks)}{self._split(size, constant, summed=ranks is None)}"
                    raise self._contradicts([ranks], str(node), got, f"{constant}{_because(node, self.state)}")
                continue
            value, rest = divmod(size - constant, factor) if factor else (0, 1)
            if rest or value < (0 if unknown in local else least):  # a rank may hold nothing of a small axis
                known = _because(node, self.state).strip(" ()")
                got = f"{size} rows from {self._where(ranks)}"
                raise self._contradicts([ranks], unknown, got, f"a multiple of {factor}: `{node}` with {known}")
            if unknown not in local:
                self._know(unknown, value, self._where(None if self.group.cut.by_rows else ranks))
                others[unknown] = value
            elif ranks is not None:
                before = local[unknown].setdefault(ranks[position[unknown]], value)
                if before != value:
                    got = f"{value} from {self._where(ranks)}"
                    raise self._contradicts([ranks], unknown, got, f"{before} as in its other ranks")
        for axis, parts in local.items():
            if set(parts) == {ranks[position[axis]] for ranks in self.group.shards}:
                self._sum(axis, sum(parts.values()))
            else:
                done = False
        return done

    def _shards(self) -> Sequence[tuple[Ranks, Sequence[Stored]]]:
        shards = list(self.group.shards.items())
        return shards[:1] if self.group.cut.boxes else shards  # with boxes all record the same whole

    def _check_shapes(self) -> None:
        axes, pieces = self.group.instance.axes, self.group.cut.pieces > 1
        leads: dict[Ranks, Stored] = {}  # a piece is alike on all ranks
        for ranks, stored in self._shards():
            lead = leads.setdefault(ranks[-1:] if pieces else ranks, stored[0])
            first = lead.header.whole
            for one in stored:
                whole, name = one.header.whole, self.files[one.file].name
                if len(whole) != len(axes.dims):
                    expected = f"{len(axes.dims)} dimensions, `{axes}`"
                elif whole != first:
                    expected = f"{shape_text(first)}, as in {self.files[lead.file].name}"
                else:
                    continue
                raise self._contradicts([ranks], "shape", f"{shape_text(whole)} in {name}", expected)

    def _equations(self) -> Iterator[tuple[Node, int, Ranks | None]]:
        """Each storage dimension, its length, and its ranks; None for all together."""
        dims, at = self.group.instance.axes.dims, self.group.cut.at
        if self.group.cut.pieces > 1:  # each of them has the rows of one term of the sum
            for number, names in enumerate(Axes(dims[:1]).pieces()):
                held = (stored[0].header.shape[0] for ranks, stored in self._shards() if ranks[-1] == number)
                yield Product(tuple(map(Axis, names))), sum(held), None
        elif self.group.cut.by_rows:
            yield dims[at], sum(stored[0].header.shape[at] for stored in self.group.shards.values()), None
        for ranks, stored in self._shards():
            for dim, (node, size) in enumerate(zip(dims, stored[0].header.whole, strict=True)):
                if not (self.group.cut.by_rows and dim == at):
                    yield node, size, ranks

    def _sum(self, axis: str, value: int) -> None:
        known = self.state.facts.get(axis)
        if known is None:
            self._know(axis, value, self._where(None))
        elif known.value != value:
            got = f"{value} from {self._where(None)}{self._split(value, known.value, summed=True)}"
            raise self._contradicts(self._odd(), axis, got, f"{known.value} from {known.why}")

    def _split(self, size: int, whole: int, *, summed: bool) -> str:
        """What may be wrong with a rule's `split` if a size of one rank, or `summed` of all, is not the whole one."""
        cut = self.group.cut.rank_dims()
        held = [self.files[one.file].ranks for stored in self.group.shards.values() for one in stored]
        for dim in held[0]:
            ranks = len({one.get(dim) for one in held})
            if not cut and size < whole == size * ranks:
                return f"; {ranks} {dim} ranks make {whole} together: its rule may lack `split`"
            if summed and dim in cut and whole < size == whole * ranks:
                return f"; each of {ranks} {dim} ranks has {whole}: its rule may have a `split` too many"
        return ""

    def _know(self, axis: str, value: int, why: str) -> None:
        self.state.facts[axis] = Fact(axis, value, why, self.group.instance.rule.place)

    def _contradicts(self, odd: Sequence[Ranks | None], axis: str, got: str, expected: str) -> _Contradicts:
        group = self.group
        cut = ", ".join(f"cut on {axis} over {group.cut.dims[at][0]}" for axis, at in group.cut.axes.items()) or (
            f"rows cut over {' and '.join(group.cut.rank_dims())}" if group.cut.rows else "not cut"
        )
        rule = f"{group.first.name} is `{group.instance.axes}`, {cut}"
        some = (group.first if ranks is None else group.shards[ranks][0] for ranks in odd[:2])
        told = " or ".join(self.files[one.file].name for one in some)
        return _Contradicts(Contradiction(axis, got, expected, group.instance.rule.place, rule, told))

    def _odd(self) -> list[Ranks]:
        """The ranks with the rarest shapes; none if all have the same."""
        shapes = {ranks: stored[0].header.whole for ranks, stored in self.group.shards.items()}
        counts = Counter(shapes.values())
        fewest = min(counts.values())
        return [ranks for ranks, shape in shapes.items() if counts[shape] == fewest] if len(counts) > 1 else []

    def _where(self, ranks: Ranks | None) -> str:
        """The shards of some ranks, or of all, in words."""
        shards = self.group.shards
        if ranks is not None or len(shards) == 1:
            stored = self.group.first if ranks is None else shards[ranks][0]
            return f"{stored.header.name} in {self.files[stored.file].name} ({shape_text(stored.header.whole)})"
        shapes = [stored[0].header.whole for stored in shards.values()]
        told = shape_text(shapes[0]) + " each" if len(set(shapes)) == 1 else ", ".join(shape_text(s) for s in shapes)
        held = f"and its like, {len(shards)} pieces" if self.group.cut.pieces > 1 else f"in all {len(shards)} ranks"
        return f"{self.group.name} {held} ({told})"


def _because(node: Node, state: Sizes) -> str:
    facts = [state.facts[name] for name in dict.fromkeys(leaves(node)) if name in state.facts]
    return f" ({'; '.join(f'{f.axis} = {f.value} from {f.why}' for f in facts)})" if facts else ""


def size_error(found: Contradiction, grid: RankGrid) -> EngineError:
    """E203 with the text for users: what may be wrong depends on which files and ranks there are."""
    agree = "All ranks agree. " if grid.sizes and not found.file else ""
    another = f", or {found.file} is from another run (compare its date and training step with the others)"
    axis = "the shape" if found.axis == "shape" else f"axis `{found.axis}`"
    return EngineError(
        "E203",
        f"sizes disagree: {axis}",
        place=found.place,
        got=found.got,
        expected=found.expected,
        fix=f"{found.rule}. {agree}Either the mapping or the configuration is not the one for this checkpoint"
        + (another if found.file and len(grid.files) > 1 else "")
        + (", or rank files are missing at the end." if grid.sizes else "."),
    )
