"""A Hugging Face checkpoint to be written: its tensors, weight files and config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.safetensors import shard_names, split_shards
from engine.planning.agreement import with_given
from engine.planning.copies import Copy
from engine.planning.groups import Group
from engine.planning.model import Output, OutputFile, Tied
from engine.planning.pieces import TargetSpec
from engine.planning.request import Request
from engine.planning.sides import whole_keys
from engine.planning.source import Source
from engine.planning.whole import whole_groups, whole_instances
from engine.planning.written import Wanted, Written, configuration, fill, main_dtype


def whole_outputs(source: Source, asked: Request) -> Written:
    """Lay out a checkpoint without ranks, and say what fills it.

    Raises:
        EngineError: E204 for an axis without a size, E206 for a name written twice, E209 for a tensor that cannot
            be tied, and as `fill`.
    """
    whole = whole_instances(source.pieces)
    listed = whole_groups(source.pieces, whole, source.side.sizes, source.unread)
    changes = source.checkpoint.end == "training"  # values that a transform changes are so from then on
    wanted = [_wanted(spec, group, changes=changes) for spec, group in listed]
    every, table = fill(wanted, [group for _, group in listed], whole_keys(whole), source, asked.dtype)
    config = whole_configuration(source)
    ties = bool(config.get("tie_word_embeddings"))
    tied_to = [group.instance.rule.tied_to if ties else None for _, group in listed]
    kept = [i for i, to in enumerate(tied_to) if to is None]
    outputs = tuple(every[i] for i in kept)
    tied = _tied([(every[i], table(i), to) for i, to in enumerate(tied_to) if to is not None], outputs)
    config |= dict.fromkeys(("dtype", "torch_dtype"), main_dtype(outputs))  # as transformers 5 and 4 spell it
    split = split_shards([(o.name, o.nbytes) for o in outputs], asked.max_shard_size)
    index = {o.name: i for i, o in enumerate(outputs)}
    files = tuple(
        OutputFile(name, "safetensors", tuple(index[t] for t in group))
        for name, group in zip(shard_names(len(split)), split, strict=True)
    )
    return Written(outputs, table.subset(kept), files, config, source.names, tied, asked.max_shard_size)


def whole_configuration(source: Source) -> dict[str, Any]:
    """config.json of a source, completed by what was given of it; E218, E209 or E219 where that is another model's."""
    mapping = source.mapping
    config = configuration(source, "whole", mapping.config, source.names, mapping.keys.get("target", {}), {})
    return with_given(config, source.checkpoint.target_config, mapping, source.layout)


def _wanted(spec: TargetSpec, group: Group, *, changes: bool) -> Wanted:
    rule = spec.instances[0].rule
    transform = rule.transform if changes else None
    dim = next(i for i, node in enumerate(spec.axes.dims) if str(node) == transform[1]) if transform else None
    return Wanted(group, 0, group.first, " + ".join(i.rule.name for i in spec.instances), transform, dim)


def _tied(listed: Sequence[tuple[Output, list[Copy], str]], outputs: Sequence[Output]) -> tuple[Tied, ...]:
    """Pair each tensor that the config ties with the one it equals."""
    index = {output.name: i for i, output in enumerate(outputs)}
    result: list[Tied] = []
    for output, copies, name in listed:
        if name not in index or outputs[index[name]].shape != output.shape:
            raise EngineError(
                "E209",
                f"`{output.name}` cannot be tied to `{name}`",
                place=Place(output.place),
                got=f"{output.shape} and {outputs[index[name]].shape}" if name in index else "no such target",
                expected="a target of the same shape",
                fix="Correct `tied_to`, or let `tie_word_embeddings` be false.",
            )
        result.append(Tied(output, tuple(copies), index[name]))
    return tuple(result)
