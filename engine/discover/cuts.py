"""Which axes the storage of an unknown tensor may have, and which of them its ranks cut.

Sizes that the configuration names are compared with the shapes over ranks. Where several readings
agree with every shape a person must choose.
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
    """One way to read a tensor: `axes` of each storage dimension, the dimension that is cut, and on which axis."""

    axes: tuple[str, ...]
    cut: int | None = None
    split: str | None = None


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
    return Known(sizes, dims)


def read_cuts(observed: Observed, grid: RankGrid, known: Known, stage: str) -> tuple[list[Reading], str]:
    """The readings under which the shapes of every rank agree with the configuration; and what a person must decide.

    What is to be decided is empty where there is one reading, and nothing else can be meant.
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
        return found, "whether its rows are several things of one rank, as keys and values, which are not joined so"
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
    """(axes text, size, the axis that a cut means) of what a storage dimension may be."""
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
    """Sizes of what may be stored together in rows: queries, keys and values; keys and values; gate and up.

    Keys and values together can be as large as the queries, so only a `name` with a q says that it is these.
    """
    heads, groups, head_dim = _heads(known)
    sizes = {(heads + 2 * groups) * head_dim, 2 * known.sizes.get("ffn", 0)}
    return sizes if "q" in name else sizes | {2 * groups * head_dim}


def _named(shape: tuple[int, ...], nodes: Sequence[tuple[str, int, str]], cut: int | None) -> Iterator[Reading]:
    """The reading in which every storage dimension has a name, and no axis comes twice, if there is one.

    Plain axes of one size copy alike when they are cut: the first stands for all of them.
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
