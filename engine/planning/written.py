"""The output of a plan, on either side: tensors, the copies that fill them, files, and the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.checkpoint.ranks import RankGrid
from engine.errors import counted
from engine.formats.headers import DTYPES, FLOATS, TORCH_NAMES
from engine.language.expressions import compile_expression, evaluate, render_tree, valued_in
from engine.language.keys import Key, as_declared
from engine.language.model import Expression
from engine.language.rules import TRANSFORMS, loses
from engine.planning.classes import CopyTable
from engine.planning.groups import Group
from engine.planning.model import Output, OutputFile, Tied
from engine.planning.sides import Keys, Side
from engine.planning.source import Source
from engine.planning.stages import Stages
from engine.planning.stored import Stored


class Wanted(NamedTuple):
    """A tensor to write, before its element type is known: a shard of a group on the target side."""

    group: Group
    position: int
    stored: Stored  # the shard's tensor
    rules: str
    transform: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """The target side of a plan.

    Attributes:
        config: the configuration beside the weights, with the names that its expressions used.
        beside: small files: name → (format, content).
        grid, stages: for rank files.
        notices: what the user should know of them.
    """

    outputs: tuple[Output, ...]
    copies: CopyTable
    files: tuple[OutputFile, ...]
    config: Mapping[str, Any]
    names: Mapping[str, Any]
    tied: tuple[Tied, ...] = ()
    max_shard_size: int = 0
    grid: RankGrid | None = None
    stages: Stages | None = None
    beside: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def fill(
    wanted: Sequence[Wanted], groups: Sequence[Group], keys: Keys, source: Source, dtype: str
) -> tuple[list[Output], CopyTable]:
    """Outputs, and the copies that fill them.

    Args:
        dtype: `auto` keeps each tensor's own type; else the type of every float tensor whose rule does not keep it.

    Raises:
        EngineError: E208 or E210 when the source does not fill an output, E209 when it holds no weights.
    """
    side = Side(tuple(groups), keys, source.side.sizes)
    copies = CopyTable(tuple((one.group, one.position) for one in wanted), side, source.side)
    outputs: list[Output] = []
    files = source.files
    alike: dict[str, tuple[str, str, bool]] = {}  # by rule: its place, its pattern as one text, whether it is cast
    for index, one in enumerate(wanted):
        instance = one.group.instance
        if instance.key not in alike:
            rule = instance.rule
            alike[instance.key] = str(rule.place), instance.sources[0].text, dtype != "auto" and not rule.keep_dtype
        place, pattern, cast = alike[instance.key]
        name = one.stored.name
        read = copies.dtype(index, name, files, instance.rule.place)
        kept = (TRANSFORMS[one.transform[0]].written if one.transform else None) or read
        outputs.append(
            Output(
                name, DTYPES[dtype] if cast and read in FLOATS else kept, read, one.stored.header.shape, one.rules,
                place, pattern, one.transform, _changed_along(one),
            )
        )  # fmt: skip
    return outputs, copies


def _changed_along(one: Wanted) -> int | None:
    """The storage dimension whose rows a transform needs whole; the last one if it needs none."""
    if one.transform is None:
        return None
    dims = [str(node) for node in one.group.instance.axes.dims]
    return dims.index(one.transform[1]) if one.transform[1] in dims else len(dims) - 1


def summed(outputs: Sequence[Output]) -> list[str]:
    """Notices on how exact tensors are whose values are sums: one sentence for each number and type."""
    changed = ((one.transform, TORCH_NAMES.get(one.dtype, one.dtype)) for one in outputs)
    found = Counter((change[1], dtype) for change, dtype in changed if change is not None and not loses(change))
    exact = "which holds the sums: a program that loads them in a narrower type rounds them"
    rounded = "which rounds the sums: what is stored does not come back exactly"
    return [
        f"values of {counted(count, 'tensor')}: {number} was added to what is stored, in {dtype}, "
        f"{exact if dtype == 'float32' else rounded}"
        for (number, dtype), count in found.items()
    ]


def configuration(
    source: Source, end: str, tree: Mapping[str, Any], names: Mapping[str, Any], keys: Mapping[str, Key],
    grid: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The configuration to write: computed by the mapping, or the source's own if it is of the target's kind.

    Args:
        tree, keys: those of the target side.
        grid: names for how the model is cut: some keys of a kept configuration depend on them.
    """
    if source.checkpoint.end == end:
        replicas = [(group, [*map(len, group.shards.values())]) for group in source.side.groups if group.cut.dims]
        held = [group.instance.stage_class for group, count in replicas if len(count) == 1 and count[0] > 1]
        anew = {source.layout.whole.get(one) for one in held}  # it was whole on every rank, and is written cut
        how = {
            key: evaluate(child, names if key in anew else grid)
            for key, child in tree.items()
            if isinstance(child, Expression)
            and (key in anew or ((read := compile_expression(child).names) and read <= set(grid)))
        }
        return {**source.checkpoint.config, **how}
    with valued_in(source.read.side.file):
        return as_declared(render_tree(tree, names), keys)


def main_dtype(outputs: Sequence[Output]) -> str:
    """The element type of most written elements, as config.json spells it."""
    count = Counter[str]()
    for output in outputs:
        count[output.dtype] += output.elements
    best = max(count, key=lambda d: (count[d], d))
    return TORCH_NAMES.get(best, best.lower())
