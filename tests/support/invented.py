"""Checkpoints that were never written: headers and configurations of any size, from a mapping alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.checkpoint.ranks import read_grid
from engine.formats.headers import ITEM_SIZES, FileHeader, TensorHeader
from engine.language.model import Layout
from engine.language.model import Mapping as MappingFile
from engine.planning.attempts import Checkpoint, claims
from engine.planning.backward import render_known
from engine.planning.destination import Request
from engine.planning.likeness import Like, destination_of
from engine.planning.matching import is_active
from engine.planning.rank_groups import RankGroups
from engine.planning.rank_outputs import training_text
from engine.planning.stored import instances
from engine.planning.variants import options_of
from engine.storage.memory import MemoryStore
from engine.storage.store import File


def invent(
    mapping: MappingFile,
    layout: Layout,
    request: Request,
    *,
    sizes: Mapping[str, int],
    choices: Mapping[str, str],
    biased: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """What a training run of these sizes would leave in its rank files, as read back.

    Args:
        sizes: of the axes that no dim computes; the training configuration is worked out from them.
        choices: of every variant.
        biased: linears with a bias, by a part of their source name.
        training: keys of the training configuration that no size tells.
    """
    options = options_of(mapping, {})
    destination = destination_of(mapping, layout, request, Like(), {}, sizes["layer"])
    known = {**(training or {}), **sizes, **choices, "options": options, "training": {}}
    whole = render_known(mapping.config, known)
    names = {**whole, **choices, **destination.names, "options": options, "dtype": "torch.bfloat16"}
    config = {**render_known(mapping.training_config, names), **(training or {})}
    facts, _ = claims(mapping, {**config, **choices, "options": options, "training": {}}, layout.config_file)
    solved = {**sizes, **{axis: fact.value for axis, fact in facts.items()}}
    used = [
        one
        for one in instances(mapping)
        if is_active(one, choices)
        and not one.rule.optional
        and (one.param != "bias" or any(part in one.sources[0].text for part in biased))
    ]
    groups = RankGroups(destination, used, solved, {})
    held: dict[str, list[tuple[TensorHeader, str]]] = {
        file.name: [(one.header, "F32" if group.instance.rule.keep_dtype else "BF16") for _, one, group, _ in entries]
        for file, entries in zip(groups.files, groups.held, strict=True)
    }
    grid = read_grid(list(held), layout, "invented")
    headers = tuple(_file(file.name, held[file.name]) for file in grid.files)
    text = training_text(destination) if layout.training_file is not None else {}
    return Checkpoint("invented", grid, headers, config, text, layout.config_file)


def _file(name: str, held: list[tuple[TensorHeader, str]]) -> FileHeader:
    tensors: list[TensorHeader] = []
    offset = 0
    for header, dtype in held:
        tensors.append(TensorHeader(header.name, dtype, header.shape, header.strides, offset))
        offset = -(-(offset + tensors[-1].nbytes) // 64) * 64
    assert set(ITEM_SIZES) >= {t.dtype for t in tensors}
    return FileHeader(File(MemoryStore(), name), offset, tuple(tensors), "0" * 64)
