"""Drafts a stand-alone mapping for a checkpoint that no family explains: one rule per pattern, names kept.

Sizes in the configuration are compared with the shapes over ranks, which shows the axes of a tensor and how ranks
cut it. If several readings agree with every shape, a person must choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from engine.checkpoint.ranks import RankGrid
from engine.discover.geometry import KEYS, Known, known_sizes
from engine.discover.names import Observed, tail
from engine.discover.near import Slot, similarity
from engine.discover.notes import block, comment, flow
from engine.errors import Place
from engine.language.documents import grouped
from engine.language.expressions import names_in
from engine.language.model import Expression, FilePattern, Layout
from engine.planning.attempts import Checkpoint
from engine.planning.stored import Stored

_ALIKE = 0.45


def stage_of(observed: Observed, checkpoint: Checkpoint) -> tuple[str, bool]:
    """The pipeline stage of a tensor without `{layer}`, and whether the files prove it."""
    if checkpoint.grid.pipelined:
        held = {checkpoint.grid.stage(one.file, one.chunk) for one in observed.stored}
        if len(held) == 1:
            return ("last", True) if any(next(iter(held))) else ("first", True)
    name = observed.text.lower()
    return ("first" if any(word in name for word in ("embed", "wte", "wpe", "tok")) else "last"), False


def stand_alone(
    checkpoint: Checkpoint, layout: Layout, observed: Sequence[Observed], slots: Sequence[tuple[str, Slot]]
) -> list[str]:
    """The lines from `source` on.

    Every rule writes the whole tensor under its own name, which is right whatever the tensor means. A person
    decides the names of the target, and which of several rules is right: those are written as comments.
    """
    known = known_sizes(checkpoint.config)
    rules: list[str] = []
    live = False
    for stem, listed in _paired(observed, checkpoint, known).items():
        one = listed[0]
        readings, doubt, stage = _read(one, checkpoint, known)
        rules += comment(f"decide: {_notes(one, doubt, stage, checkpoint, slots)}", "  ")
        for reading in readings:
            between = " | " if stem.endswith(".{param}") and len(reading.axes) == 2 else " "
            rule: dict[str, Any] = {"source": stem, "target": stem, "axes": between.join(reading.axes)}
            if reading.split is not None:
                rule["split"] = reading.split
            if not one.layered:
                rule["stage"] = stage[0]
            rules.append(f"{'#' if doubt else ''}  - {flow(rule)}")  # formatting makes a long one a block
        live |= not doubt
    kind = checkpoint.training.get("model_type")
    source = {"layout": layout.name} | ({"model_types": [kind]} if isinstance(kind, str) and kind else {})
    lines = block("source", source)
    lines += comment("decide: the model class of the target. Until it is named, nothing loads the output.")
    lines += ["target: {model_type: unknown, architecture: Unknown}", ""]
    lines += _declared(known, checkpoint, layout)
    lines += block("dims", known.dims) if known.dims else []
    config = {KEYS[axis][0]: "{{ " + axis + " }}" for axis in known.dims}
    lines += ["", "rules:" if live else "#rules:", *rules, ""]
    lines += block("config", {"model_type": "unknown", "architectures": ["Unknown"], **config})
    lines += comment("decide: the other keys of config.json, and `training_config`, which `engine reverse` needs", "  ")
    return lines


def _declared(known: Known, checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """The `keys` section, for keys that sizes are computed from and the layout does not declare."""
    read = {key for text in known.dims.values() for key in names_in(Expression(text, Place("the draft")))}
    told = layout.keys.get("source", {})
    untold = [key for key in checkpoint.config if key in read and key not in told]
    keys = {key: {"type": "integer", "min": 1} for key in untold}
    return [*block("keys", {"source": keys}), ""] if keys else []


def _read(one: Observed, checkpoint: Checkpoint, known: Known) -> tuple[list[Reading], str, tuple[str, bool]]:
    stage = ("layers", True) if one.layered else stage_of(one, checkpoint)
    return *read_cuts(one, checkpoint.grid, known, stage[0]), stage


def _paired(observed: Sequence[Observed], checkpoint: Checkpoint, known: Known) -> dict[str, list[Observed]]:
    """Source pattern → what it reads: weight and bias together where one rule can read both."""
    result: dict[str, list[Observed]] = {}
    for stem, listed in grouped((one.stem, one) for one in observed).items():
        both = sorted(listed, key=lambda one: one.param != "weight")
        if len(both) == 2 and _together(both[0], both[1], checkpoint, known):
            result[stem] = both
        else:
            result |= {one.text: [one] for one in listed}
    return result


def _together(weight: Observed, bias: Observed, checkpoint: Checkpoint, known: Known) -> bool:
    """Whether the bias has the weight's first axis and is cut as the weight's rule would cut it."""
    (one, doubt, _), (two, other, _) = (_read(o, checkpoint, known) for o in (weight, bias))
    if doubt or other or weight.placeholders != bias.placeholders:
        return False
    ranks = {tuple(checkpoint.grid.slices(s.file).items()) for s in bias.stored}
    return _one_rule(one[0], two[0], len(ranks))


def _one_rule(weight: Reading, bias: Reading, ranks: int) -> bool:
    """Whether the weight's rule, with axes `a | b`, also describes the bias."""
    if len(bias.axes) != 1 or len(weight.axes) > 2 or weight.axes[0] != bias.axes[0]:
        return False
    if len(weight.axes) == 2 and weight.cut == 1:
        return bias.cut is None and ranks == 1
    return weight.cut == bias.cut and weight.split == bias.split


def _notes(
    one: Observed,
    doubt: str,
    stage: tuple[str, bool],
    checkpoint: Checkpoint,
    slots: Sequence[tuple[str, Slot]],
) -> str:
    """What a person must decide about one pattern."""
    best = max(((similarity(one.stem, slot), name, slot) for name, slot in slots), key=lambda b: b[0], default=None)
    told = "the target's name"
    if best is not None and best[0] >= _ALIKE:
        names = sorted({target.name for target in best[2].rules[0].targets})
        told += f"; the name is like that of {best[2].sources[0]} in {best[1]}, which becomes {', '.join(names)}"
    notes = [told, *([doubt] if doubt else [])]
    if not one.layered and not stage[1]:
        notes.append(f"the stage: `{stage[0]}` is a guess from the name, and several stages may hold it")
    grid = checkpoint.grid
    if all(size == 1 for dim, size in grid.sizes.items() if dim not in grid.staged):
        notes[-1] += "; with one rank the files do not show what several ranks would cut (`split`)"
    return "; and ".join(notes)


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a tensor: `axes` of each storage dimension, the dimension that is cut, and on which axis."""

    axes: tuple[str, ...]
    cut: int | None = None
    split: str | None = None


def read_cuts(observed: Observed, grid: RankGrid, known: Known, stage: str) -> tuple[list[Reading], str]:
    """The readings that agree with the shapes of every rank and the configuration, and what a person must decide.

    The latter is empty if there is one reading and no other meaning is possible.
    """
    file = grid.files[observed.stored[0].file].pattern
    dim, by_rows = _cutting(file, grid, stage)
    groups = list(_groups(observed.stored, grid, dim).values())
    parts = groups[0]
    whole = next(iter(parts.values()))
    unnamed = [Reading(_by_size(whole))]
    if any(group != parts for group in groups) or len({len(shape) for shape in parts.values()}) > 1:
        return unnamed, "its shape is not the same in every layer"
    nodes = _nodes(known, layered=observed.layered)
    found = list(_named(whole, nodes, None)) if len(set(parts.values())) == 1 else []
    if len(parts) == 1:
        return found or unnamed, ""
    if found and len(whole) == 1 and observed.param != "bias":
        return found, ""  # replicas are compared, so a cut would show
    together = False
    fused = _fused(known, tail(observed.text)[-1].lower())
    for at in [0] if by_rows else range(len(whole)):
        if len({shape[:at] + shape[at + 1 :] for shape in parts.values()}) == 1:
            total = sum(shape[at] for shape in parts.values())
            more = [(f"n{total}", total, f"n{total}")] if at == 0 and total in fused else []
            named = list(_named((*whole[:at], total, *whole[at + 1 :]), nodes + more, at))
            found, together = found + named, together or bool(more and named and not by_rows)
    if not found:
        return unnamed, "no sizes of the configuration explain its shape, so no cut is proposed"
    if together:
        return found, "whether its rows are several things, as keys and values: ranks are then joined in another way"
    return found, "" if len(found) == 1 else "the shapes fit several ways to cut it: keep one"


def _cutting(file: FilePattern, grid: RankGrid, stage: str) -> tuple[str | None, bool]:
    """The rank dimension with several ranks that cuts tensors of a stage, and whether it cuts rows."""
    for dim, role in file.cuts.get(stage, {}).items():
        # recorded shards say what they are part of
        if grid.sizes.get(dim, 1) > 1 and role not in ("recorded", "runtime"):
            return dim, role == "rows"
    return None, False


def _groups(stored: Sequence[Stored], grid: RankGrid, dim: str | None) -> dict[object, dict[int, tuple[int, ...]]]:
    """For each tensor, its shape by rank along the cutting dimension."""
    result: dict[object, dict[int, tuple[int, ...]]] = {}
    for one in stored:
        ranks, slices = grid.files[one.file].ranks, grid.slices(one.file)
        others = tuple((d, r) for d, r in ranks.items() if d not in slices)
        rank = ranks.get(dim, 0) if dim is not None else 0
        result.setdefault((one.name, one.chunk, others), {}).setdefault(rank, one.header.whole)
    return result


def _nodes(known: Known, *, layered: bool) -> list[tuple[str, int, str]]:
    """What a storage dimension may be: (text of its axes, size, the axis that a cut divides)."""
    s = known.sizes
    if not layered:
        return [(axis, s[axis], axis) for axis in ("vocab", "hidden") if axis in s]
    heads, groups, head_dim = _heads(known)
    found = [("(heads head_dim)", heads * head_dim, "heads")] if heads * head_dim else []
    found += [("(groups head_dim)", groups * head_dim, "groups")] if heads * head_dim and groups != heads else []
    return found + [(axis, s[axis], axis) for axis in ("hidden", "ffn", "expert") if axis in s]


def _heads(known: Known) -> tuple[int, int, int]:
    heads = known.sizes.get("heads", 0)
    return heads, known.sizes.get("groups") or heads, known.sizes.get("head_dim", 0)


def _fused(known: Known, name: str) -> set[int]:
    """Numbers of rows that several things stored together have: queries, keys and values; keys and values; gate and up.

    Keys and values together can be as large as the queries, so they are left out for a `name` with a q.
    """
    heads, groups, head_dim = _heads(known)
    sizes = {(heads + 2 * groups) * head_dim, 2 * known.sizes.get("ffn", 0)}
    return sizes if "q" in name else sizes | {2 * groups * head_dim}


def _named(shape: tuple[int, ...], nodes: Sequence[tuple[str, int, str]], cut: int | None) -> Iterator[Reading]:
    """The reading in which every storage dimension has a name, and no axis occurs twice, if there is one.

    Plain axes of the same size are copied in the same way when they are cut, so the first represents all of them.
    """
    choices = []
    for at, size in enumerate(shape):
        whole = at == len(shape) - 1 if cut is None else at != cut
        found = [node for node in nodes if node[1] == size]
        choices.append(sorted(found, key=lambda node: (node[0] == "hidden") != whole))
    for combination in product(*choices):
        axes = [axis for text, _, _ in combination for axis in text.strip("()").split()]
        if len(set(axes)) == len(axes):
            yield Reading(tuple(text for text, _, _ in combination), cut, None if cut is None else combination[cut][2])
            return


def _by_size(shape: Sequence[int]) -> tuple[str, ...]:
    """Axes by sizes alone.

    >>> _by_size((8, 3, 8))
    ('n8', 'n3', 'n8_')
    """
    axes: list[str] = []
    for size in shape:
        axes.append(f"n{size}" + "_" * sum(axis.rstrip("_") == f"n{size}" for axis in axes))
    return tuple(axes)
