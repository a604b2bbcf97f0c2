"""Which axes the storage of an unknown tensor may have, and which of them its ranks cut.

Sizes that the configuration names are compared with the shapes over ranks. Where several readings
agree with every shape they all are kept: the mapping then asks instead of guessing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from engine.checkpoint.ranks import RankGrid
from engine.discover.names import Observed, tail
from engine.language.model import FilePattern
from engine.planning.stored import Stored

# Axis → the keys that name its size; the first is the one that Hugging Face's configurations have.
KEYS = {
    "layer": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "hidden": ("hidden_size", "dim", "d_model", "n_embd"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "groups": ("num_key_value_heads", "num_kv_attention_heads", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "ffn_hidden_size", "ffn_dim"),
    "expert": ("num_experts", "n_experts"),
}


@dataclass(frozen=True, slots=True)
class Known:
    """Sizes that the configuration names: the value of each axis and the expression that claims it."""

    sizes: Mapping[str, int]
    dims: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a tensor: `axes` of each storage dimension, the dimension that is cut, and where."""

    axes: tuple[str, ...]
    cut: int | None = None
    split: str | None = None
    sizes: Mapping[str, int] | None = None  # of axes that only this checkpoint's shapes tell

    @property
    def label(self) -> str:
        """The name of the choice for it where shapes leave several."""
        if self.cut is None:
            return "whole"
        where = {0: "rows", 1: "columns"}.get(self.cut, f"dimension_{self.cut}")
        text = self.axes[self.cut]
        return where + ("" if "+" not in text else "_in_blocks" if text.startswith("((") else "_by_turns")


@dataclass(frozen=True, slots=True)
class Readings:
    """Everything that the shapes of a pattern agree with; `sure` when the choice needs no person."""

    listed: tuple[Reading, ...]
    sure: bool
    why: str = ""


def known_sizes(config: Mapping[str, Any]) -> Known:
    """Axes by the usual keys of a configuration.

    >>> known_sizes({"hidden_size": 64, "num_attention_heads": 4}).sizes
    {'hidden': 64, 'heads': 4, 'head_dim': 16}
    """
    sizes: dict[str, int] = {}
    dims: dict[str, str] = {}
    for axis, keys in KEYS.items():
        key = next((k for k in keys if type(config.get(k)) is int and config[k] > 0), None)
        if key is not None:
            sizes[axis], dims[axis] = config[key], key
        elif axis == "head_dim" and "heads" in sizes and "hidden" in sizes and sizes["hidden"] % sizes["heads"] == 0:
            sizes[axis], dims[axis] = sizes["hidden"] // sizes["heads"], "hidden // heads"
        elif axis == "ffn" and "hidden" in sizes and isinstance(config.get("mlp_ratio"), (int, float)):
            multiple = config.get("multiple_of", 256)
            if type(multiple) is int and multiple > 0 and 0 < config["mlp_ratio"] < 1000:
                wanted = int(sizes["hidden"] * config["mlp_ratio"])
                sizes[axis] = -(-wanted // multiple) * multiple
                unit = "multiple_of" if "multiple_of" in config else "256"
                dims[axis] = f"((hidden * mlp_ratio) | int + {unit} - 1) // {unit} * {unit}"
    return Known(sizes, dims)


def read_cuts(observed: Observed, grid: RankGrid, known: Known, stage: str) -> Readings:
    """All readings under which the shapes of every rank agree with the configuration."""
    file = grid.files[observed.stored[0].file].pattern
    dim, by_rows = _cutting(file, grid, stage)
    groups = _groups(observed.stored, grid, dim)
    shapes = {tuple(sorted(group.items())) for group in groups.values()}
    if len({len(shape) for group in groups.values() for shape in group.values()}) > 1 or len(shapes) > 1:
        return Readings((_unnamed(next(iter(groups.values()))),), False, "its shape is not the same in every layer")
    parts = next(iter(groups.values()))
    nodes = _nodes(known, tail(observed.text)[-1].lower(), layered=observed.layered)
    found: list[Reading] = []
    whole = next(iter(parts.values()))
    if len(set(parts.values())) == 1:
        found += list(_named(whole, nodes, None, alone=len(parts) == 1))[:1]
    if len(parts) > 1:
        for at in [0] if by_rows else range(len(whole)):
            rest = {shape[:at] + shape[at + 1 :] for shape in parts.values()}
            if len(rest) == 1:
                total = (*whole[:at], sum(shape[at] for shape in parts.values()), *whole[at + 1 :])
                found += _named(total, nodes, at, by_rows=by_rows)
    if len(parts) == 1 and found:
        return Readings((found[0],), True)
    if len(found) == 1:
        return Readings(tuple(found), True)
    if found and len(whole) == 1 and found[0].cut is None and observed.param != "bias":
        return Readings((found[0],), True)  # replicas are compared, so a cut would show
    if found:
        return Readings(tuple(found), False, "the shapes fit several ways to cut it")
    told = "no sizes of the configuration explain its shape" + (", so no cut is proposed" if len(parts) > 1 else "")
    return Readings((_unnamed(parts),), len(parts) == 1, told)


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


def _nodes(known: Known, name: str, *, layered: bool) -> list[tuple[str, int, str]]:
    """(axes text, size, the axis that a cut means) of what a storage dimension may be.

    Keys and values together can be as large as the queries, so only a `name` with a q says that it is these.
    """
    s = known.sizes
    if not layered:
        return [(axis, s[axis], axis) for axis in ("vocab", "hidden") if axis in s]
    heads, groups, head_dim = s.get("heads", 0), s.get("groups"), s.get("head_dim", 0)
    groups = groups or heads
    found: list[tuple[str, int, str]] = []
    if heads and head_dim:
        found.append(("(heads head_dim)", heads * head_dim, "heads"))
        if groups != heads:
            found.append(("(groups head_dim)", groups * head_dim, "groups"))
    found += [(axis, s[axis], axis) for axis in ("hidden", "ffn", "expert") if axis in s]
    if heads and head_dim:
        if groups == heads:
            found.append(("((q + k + v) heads head_dim)", 3 * heads * head_dim, "heads"))
            found.append(("(heads (q + k + v) head_dim)", 3 * heads * head_dim, "heads"))
        elif heads % groups == 0:
            found.append(("(groups (queries + k + v) head_dim)", (heads + 2 * groups) * head_dim, "groups"))
            found.append(("((queries + k + v) groups head_dim)", (heads + 2 * groups) * head_dim, "groups"))
        if "q" not in name:
            both = "groups" if groups != heads else "heads"
            found.append((f"((k + v) {both} head_dim)", 2 * groups * head_dim, both))
            found.append((f"({both} (k + v) head_dim)", 2 * groups * head_dim, both))
    if "ffn" in s:
        found.append(("((gate + up) ffn)", 2 * s["ffn"], "ffn"))
        found.append(("(ffn (gate + up))", 2 * s["ffn"], "ffn"))
    return found


def _named(
    shape: tuple[int, ...],
    nodes: Sequence[tuple[str, int, str]],
    cut: int | None,
    *,
    by_rows: bool = False,
    alone: bool = False,
) -> Iterator[Reading]:
    """Readings in which every storage dimension has a name, and no axis comes twice; one per order of a fused cut.

    Plain axes of one size copy alike when they are cut, and so does everything that is cut by rows: the
    first stands for all of them. What is stored together is in rows, and no rank has it whole unless it is alone.
    """
    choices = []
    for at, size in enumerate(shape):
        whole = at == len(shape) - 1 if cut is None else at != cut
        fused = at == 0 and (cut == 0 or alone)
        found = [node for node in nodes if node[1] == size and (fused or "+" not in node[0])]
        hidden = [node for node in found if node[0] == "hidden"]
        others = [node for node in found if node not in hidden]
        choices.append(hidden + others if whole else others + hidden)
    seen: set[str] = set()
    for combination in product(*choices):
        words = [word for text, _, _ in combination for word in text.replace("(", " ").replace(")", " ").split()]
        axes = [word for word in words if word != "+"]
        joined = cut is not None and not by_rows and "+" in combination[cut][0]
        kind = combination[cut][0] if cut is not None and joined else "plain"
        if len(set(axes)) != len(axes) or kind in seen:
            continue
        seen.add(kind)
        yield Reading(tuple(text for text, _, _ in combination), cut, None if cut is None else combination[cut][2])


def _unnamed(parts: Mapping[int, tuple[int, ...]]) -> Reading:
    """A reading by sizes alone, not cut: replicas that differ, or shapes that do, are refused in a run."""
    axes: list[str] = []
    sizes: dict[str, int] = {}
    for size in next(iter(parts.values())):
        name = f"n{size}"
        while name in axes:
            name += "_"
        axes.append(name)
        sizes[name] = size
    return Reading(tuple(axes), None, None, sizes)
