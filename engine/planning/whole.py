"""The whole side: the tensors of a Hugging Face checkpoint as groups of one shard each."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from engine.errors import EngineError, Place
from engine.formats.headers import TensorHeader, dense_strides
from engine.language.axes import extent
from engine.planning.groups import Cut, Group
from engine.planning.pieces import Pieces, TargetSpec
from engine.planning.sizes import check_known
from engine.planning.stored import Instance, Stored


def whole_instances(pieces: Pieces) -> dict[str, Instance]:
    return {text: spec.instance() for text, spec in pieces.targets.items()}


def whole_groups(
    pieces: Pieces,
    instances: Mapping[str, Instance],
    sizes: Mapping[str, int],
    unread: Mapping[str, EngineError],
) -> list[tuple[TargetSpec, Group]]:
    """Every target tensor in the order of the model: first stage, layers, last stage.

    Raises:
        EngineError: E204 for an axis whose size stays unknown, E206 for a name written twice.
    """
    listed: list[tuple[tuple[object, ...], TargetSpec, Group]] = []
    once: dict[object, dict[str, int]] = {}  # placeholder values that all tensors of a layer share
    for order, spec in enumerate(pieces.targets.values()):
        check_known([instances[spec.name.text]], sizes, unread)
        stage = {"first": 0, "layers": 1, "last": 2}[spec.instances[0].stage_class]
        shape = tuple(extent(dim, sizes) for dim in spec.axes.dims)
        strides = dense_strides(shape)
        for values in product(*(range(sizes[p]) for p in spec.name.placeholders)):
            fixed = dict(zip(spec.name.placeholders, values, strict=True))
            fixed = once.setdefault(tuple(fixed.items()), fixed)
            name = spec.name.format(fixed)
            held = Stored(0, TensorHeader(name, "", shape, strides, 0), name, 0)
            group = Group(instances[spec.name.text], fixed, Cut(), {(): (held,)})
            listed.append(((stage, fixed.get("layer", -1), order, values), spec, group))
    listed.sort(key=lambda entry: entry[0])
    seen: dict[str, TargetSpec] = {}
    for _, spec, group in listed:
        if group.name in seen:
            rule = spec.instances[0].rule
            raise EngineError(
                "E206",
                f"two rules write `{group.name}`",
                place=Place(str(rule.place)),
                got=f"{seen[group.name].instances[0].rule.name} and {rule.name}",
                expected="one",
                fix="Change one target's name.",
            )
        seen[group.name] = spec
    return [(spec, group) for _, spec, group in listed]
