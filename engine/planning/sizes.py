"""Sizes: what config and shards claim, solved one unknown at a time, contradictions collected.

Every `dims` entry and every storage dimension of every shard is an equation. Extents of a cut axis
are read off the shards; their sum is the axis. An axis has one size in the whole checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.checkpoint.ranks import RankFile
from engine.errors import EngineError, Place
from engine.language.axes import Axis, Node, Product, leaves
from engine.planning.groups import Group
from engine.planning.stored import Instance


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
    file: str  # what stands out: a rank's file, a stage; empty where all ranks agree


@dataclass(slots=True)
class Sizes:
    """The state of solving: facts by axis, local extents by (group signature, rank, axis)."""

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
    """Solve to a fixed point. Groups of the same rule, ranks and shapes are looked at once."""
    distinct: dict[tuple[object, ...], Group] = {}
    for group in groups:
        distinct.setdefault((group.instance.key, group.shapes()), group)
    state = Sizes(dict(known))
    pending = list(distinct.values())
    while pending:
        left = [g for g in pending if not _look(g, state, files)]
        if len(left) == len(pending):
            break
        pending = left
    return state


def extents(group: Group, sizes: Mapping[str, int]) -> dict[str, dict[int, int]] | None:
    """Local extents of each cut axis by rank, read off the shards; None while they are unknown."""
    result: dict[str, dict[int, int]] = {}
    for position, (_, axis) in enumerate(group.cut.dims):
        others = {name: size for name, size in sizes.items() if name not in {a for _, a in group.cut.dims}}
        result[axis] = {}
        for ranks, stored in group.shards.items():
            for node, size in zip(group.instance.axes.dims, stored[0].header.whole, strict=False):
                form = linear(node, others)
                if form is not None and form[2] == axis and form[1]:
                    local, rest = divmod(size - form[0], form[1])
                    if rest or local < 0:
                        return None
                    result[axis].setdefault(ranks[position], local)
            if ranks[position] not in result[axis]:
                return None
    return result


def _look(group: Group, state: Sizes, files: Sequence[RankFile]) -> bool:
    """Draw what can be drawn from one group; True when nothing more can be learnt from it."""
    axes = group.instance.axes
    shards = list(group.shards.items())
    if group.cut.boxes:
        shards = shards[:1]  # all record the same whole
    for ranks, stored in shards:
        for one in stored:
            if len(one.header.whole) != len(axes.dims) or one.header.whole != stored[0].header.whole:
                wanted = f"{len(axes.dims)} dimensions, `{axes}`"
                if len(one.header.whole) == len(axes.dims):
                    wanted = f"{_shape(stored[0].header.whole)}, as in {files[stored[0].file].name}"
                _contradict(
                    state,
                    group,
                    [ranks],
                    "shape",
                    f"{_shape(one.header.whole)} in {files[one.file].name}",
                    wanted,
                    files,
                )
                return True
    if group.cut.rows is not None and not group.cut.recorded:
        return _look_rows(group, state, files)
    cut_axes = {axis for _, axis in group.cut.dims}
    sizes = state.values()
    others = {name: size for name, size in sizes.items() if name not in cut_axes}
    done = True
    local: dict[str, dict[int, int]] = {axis: {} for axis in cut_axes}
    for ranks, stored in shards:
        for node, size in zip(axes.dims, stored[0].header.whole, strict=True):
            form = linear(node, others)
            if form is None:
                done = False
                continue
            constant, factor, unknown = form
            if unknown is None:
                if constant != size:
                    _contradict(
                        state,
                        group,
                        [ranks],
                        str(node),
                        f"{size} from {_where(group, ranks, files)}",
                        f"{constant}{_because(node, state)}",
                        files,
                    )
                    return True
                continue
            value, rest = divmod(size - constant, factor) if factor else (0, 1)
            if rest or value < (0 if unknown in cut_axes else 1):  # a rank may hold nothing of a small axis
                _contradict(
                    state,
                    group,
                    [ranks],
                    unknown,
                    f"{size} rows from {_where(group, ranks, files)}",
                    f"a multiple of {factor}: `{node}` with {_because(node, state).strip(' ()')}",
                    files,
                )
                return True
            if unknown in cut_axes:
                position = [a for _, a in group.cut.dims].index(unknown)
                before = local[unknown].setdefault(ranks[position], value)
                if before != value:
                    _contradict(
                        state,
                        group,
                        [ranks],
                        unknown,
                        f"{value} from {_where(group, ranks, files)}",
                        f"{before} as in its other ranks",
                        files,
                    )
                    return True
            else:
                state.facts[unknown] = Fact(unknown, value, _where(group, ranks, files), group.instance.rule.place)
                others[unknown] = value
    for axis, parts in local.items():
        position = [a for _, a in group.cut.dims].index(axis)
        held = {ranks[position] for ranks in group.shards}
        if set(parts) != held:
            done = False
            continue
        if not _learn(state, group, axis, sum(parts.values()), files):
            return True
    return done


def _look_rows(group: Group, state: Sizes, files: Sequence[RankFile]) -> bool:
    """Where storage rows are cut, wherever that falls: the shards' rows add up to the whole dimension."""
    axes, at = group.instance.axes, group.cut.at
    rows = sum(stored[0].header.shape[at] for stored in group.shards.values())
    done = True
    first = next(iter(group.shards))
    checks: list[tuple[Node, int, tuple[int, ...]]] = [(axes.dims[at], rows, first)]
    checks += [
        (node, size, ranks)
        for ranks, stored in group.shards.items()
        for other, (node, size) in enumerate(zip(axes.dims, stored[0].header.shape, strict=True))
        if other != at
    ]
    for node, size, ranks in checks:
        form = linear(node, state.values())
        if form is None:
            done = False
            continue
        constant, factor, unknown = form
        value, rest = divmod(size - constant, factor) if factor else (size, size - constant)
        if rest or value < 0 or (unknown is None and constant != size):
            where = _where(group, ranks, files) if node is not axes.dims[at] else _all(group, files)
            _contradict(
                state,
                group,
                [ranks],
                str(node),
                f"{size} from {where}",
                f"{constant}{_because(node, state)}",
                files,
            )
            return True
        if unknown is not None:
            state.facts[unknown] = Fact(unknown, value, _all(group, files), group.instance.rule.place)
    return done


def _learn(state: Sizes, group: Group, axis: str, value: int, files: Sequence[RankFile]) -> bool:
    known = state.facts.get(axis)
    why = _all(group, files)
    if known is None:
        state.facts[axis] = Fact(axis, value, why, group.instance.rule.place)
        return True
    if known.value != value:
        _contradict(
            state,
            group,
            _odd(group),
            axis,
            f"{value} from {why}",
            f"{known.value} from {known.why}",
            files,
        )
        return False
    return True


def _contradict(
    state: Sizes,
    group: Group,
    odd: Sequence[tuple[int, ...]],
    axis: str,
    got: str,
    expected: str,
    files: Sequence[RankFile],
) -> None:
    stored = next(iter(group.shards.values()))[0]
    place = group.instance.rule.place
    cut = ", ".join(f"cut on {a} over {d}" for d, a in group.cut.dims) or (
        f"rows cut over {group.cut.rows}" if group.cut.rows else "not cut"
    )
    rule = f"{stored.name} is `{group.instance.axes}`, {cut}"
    told = " or ".join(files[group.shards[ranks][0].file].name for ranks in odd[:2])
    state.contradictions.append(Contradiction(axis, got, expected, place, rule, told))


def _odd(group: Group) -> list[tuple[int, ...]]:
    """The ranks whose shapes are rarest; none where all have the same."""
    shapes = {ranks: stored[0].header.whole for ranks, stored in group.shards.items()}
    counts = Counter(shapes.values())
    fewest = min(counts.values())
    return [ranks for ranks, shape in shapes.items() if counts[shape] == fewest] if len(counts) > 1 else []


def _because(node: Node, state: Sizes) -> str:
    facts = [state.facts[name] for name in dict.fromkeys(leaves(node)) if name in state.facts]
    return f" ({'; '.join(f'{f.axis} = {f.value} from {f.why}' for f in facts)})" if facts else ""


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(str(n) for n in shape) or "a scalar"


def _where(group: Group, ranks: tuple[int, ...], files: Sequence[RankFile]) -> str:
    stored = group.shards[ranks][0]
    return f"{stored.header.name} in {files[stored.file].name} ({_shape(stored.header.whole)})"


def _all(group: Group, files: Sequence[RankFile]) -> str:
    first = next(iter(group.shards.values()))[0]
    if len(group.shards) == 1:
        return _where(group, next(iter(group.shards)), files)
    shapes = [stored[0].header.whole for stored in group.shards.values()]
    told = _shape(shapes[0]) + " each" if len(set(shapes)) == 1 else ", ".join(_shape(s) for s in shapes)
    return f"{first.name} in all {len(group.shards)} ranks ({told})"


def size_error(found: Contradiction) -> EngineError:
    """E203 as users read it."""
    axis = "the number of dimensions" if found.axis == "shape" else f"axis `{found.axis}`"
    return EngineError(
        "E203",
        f"sizes disagree: {axis}",
        place=found.place,
        got=found.got,
        expected=found.expected,
        fix=f"{found.rule}. Either the mapping is not the one for this checkpoint, or {found.file} is from "
        "another run (compare its date and training step with the others), or rank files are missing at the end."
        if found.file
        else f"{found.rule}. All its ranks agree: either the mapping is not the one for this checkpoint, or the "
        "configuration is of another model, or the last rank files are missing.",
    )


def check_known(used: Sequence[Instance], sizes: Mapping[str, int], unread: Mapping[str, EngineError]) -> None:
    """E204, or why it could not be computed, for the first axis of some tensors whose size is not known."""
    for one in used:
        for axis in (*one.axis_names(), *one.axes.names()):
            if axis not in sizes:
                raise unread.get(axis) or unknown_error(axis, one.rule.place)


def unknown_error(axis: str, place: Place | None) -> EngineError:
    return EngineError(
        "E204",
        f"the size of axis `{axis}` stays unknown",
        place=place,
        fix="Give it in `dims`, or write the axes of a tensor that determines it.",
    )
