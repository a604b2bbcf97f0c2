"""A Hugging Face checkpoint to write: its tensors, weights files and config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.headers import TensorHeader, dense_strides
from engine.formats.safetensors import shard_names, split_shards
from engine.language.axes import extent
from engine.planning.agreement import with_given, with_parts
from engine.planning.boxes import Copy
from engine.planning.completeness import check_known
from engine.planning.groups import Cut, Group
from engine.planning.model import Output, OutputFile, Tied
from engine.planning.pieces import Pieces
from engine.planning.request import Request
from engine.planning.sides import keys_at
from engine.planning.source import Source
from engine.planning.stored import Stored
from engine.planning.written import Wanted, Written, configuration, fill, main_dtype


def whole_outputs(source: Source, asked: Request) -> Written:
    """Lay out a checkpoint without ranks, with the copies that fill it.

    Raises:
        EngineError: E204 for an axis without a size, E206 for a name written twice, E209 for a tensor that cannot
            be tied, and as for `fill`.
    """
    groups = whole_groups(source.pieces, source.side.sizes, source.unread)
    changes = source.checkpoint.end == "training"  # only then does a transform change values
    wanted: list[Wanted] = []
    for group in groups:
        rules = " + ".join(one.rule.name for one in source.pieces.targets[group.instance.key].instances)
        wanted.append(Wanted(group, 0, group.first, rules, group.instance.rule.transform if changes else None))
    every, table = fill(wanted, groups, keys_at("whole", source.used, source.pieces), source, asked.dtype)
    config = whole_configuration(source)
    ties = bool(config.get("tie_word_embeddings", source.read.config.get("tie_word_embeddings")))  # or by default
    tied_to = [group.instance.rule.tied_to if ties else None for group in groups]
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
    """config.json of a source, completed by the given one; E218, E209 or E219 if that is another model's."""
    mapping = source.mapping
    config = configuration(source, "whole", mapping.config, source.names, mapping.keys.get("target", {}), {})
    config = with_given(config, source.checkpoint.target_config, mapping, source.layout)
    if mapping.as_model:
        return with_parts(config, mapping, source.layout)
    rows, padding = config.get("vocab_size"), config.get("pad_token_id")
    if isinstance(rows, int) and isinstance(padding, int) and not -rows <= padding < rows:
        raise EngineError(
            "E218",
            "the token for padding is beyond the vocabulary, so that transformers does not load the model",
            place=Place("config.json"),
            got=f"pad_token_id: {padding}",
            expected=f"an id from 0 to {rows - 1}, or null",
            fix="Correct it in the configuration, or give a corrected one with --config FILE.",
        )
    return config


def whole_groups(pieces: Pieces, sizes: Mapping[str, int], unread: Mapping[str, EngineError]) -> list[Group]:
    """Every target tensor in the order of the model: first stage, layers, last stage.

    Raises:
        EngineError: E204 for an axis whose size stays unknown, E206 for a name written twice.
    """
    listed: list[tuple[tuple[object, ...], Group]] = []
    uncut = Cut()
    once: dict[object, dict[str, int]] = {}  # placeholder values that all tensors of a layer share
    for order, own in enumerate(spec.own for spec in pieces.targets.values()):
        check_known([own], sizes, unread)
        stage = {"first": 0, "layers": 1, "last": 2}[own.stage_class]
        shape = tuple(extent(dim, sizes) for dim in own.axes.dims)
        strides = dense_strides(shape)
        for values in product(*(range(sizes[p]) for p in own.axis_names)):
            fixed = dict(zip(own.axis_names, values, strict=True))
            fixed = once.setdefault(tuple(fixed.items()), fixed)
            name = own.sources[0].format(fixed)
            held = Stored(0, TensorHeader(name, "", shape, strides, 0), name, 0)
            listed.append(((stage, fixed.get("layer", -1), order, values), Group(own, fixed, uncut, {(): (held,)})))
    listed.sort(key=lambda entry: entry[0])
    seen: dict[str, Group] = {}
    for _, group in listed:
        other, rule = seen.setdefault(group.name, group), group.instance.rule
        if other is not group:
            raise EngineError(
                "E206",
                f"two rules write `{group.name}`",
                place=Place(str(rule.place)),
                got=f"{other.instance.rule.name} and {rule.name}",
                expected="one",
                fix="Change one target's name.",
            )
    return list(seen.values())


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
