"""Reads a training checkpoint for planning: its ranks, headers and configurations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import list_folder, no_configuration, passed_over, read_configuration, read_headers
from engine.checkpoint.grid import check_ranks, check_refused, either_in, folders_in, read_grid
from engine.checkpoint.identity import check_alike, check_identities, claim_of, said_rank, told_by
from engine.checkpoint.joined import joined_in
from engine.checkpoint.manifests import check_written
from engine.checkpoint.order import check_order
from engine.formats.configs import read_config, read_json
from engine.formats.headers import FileHeader
from engine.language.expressions import names_in
from engine.language.model import Expression, Layout
from engine.planning.attempts import Checkpoint
from engine.planning.config_keys import Side
from engine.planning.config_keys import read_config as read_keys
from engine.storage.folders import one_of_two
from engine.storage.local import local_file
from engine.storage.places import Source, followed, store_at
from engine.storage.replacing import given_path
from engine.storage.store import File, has_changed


def read_some(src: Source, layout: Layout, mode: str, names: Sequence[str]) -> tuple[FileHeader, ...]:
    """The headers of some files of a training checkpoint that was read before; ValueError for files of no mode."""
    (found,) = (one for one in layout.modes if one.name == mode)
    folder, says = store_at(src, "the checkpoint"), told_by(layout)
    return read_headers(folder, names, found, layout.skip_tensors, says, layout.wrappers, some=True)


def _given_config(config: Path | str) -> File:
    path = given_path(config, "the configuration")
    return local_file(path / "config.json" if path.is_dir() else path)


def read_checkpoint(
    src: Source, layout: Layout, config: Path | str | File | None = None, *, needed: bool = True
) -> Checkpoint:
    """Index a training checkpoint: the rank grid, every tensor's header and the configurations.

    Of the payload it reads a few KiB of each file, to check that no file is a copy of another; of files that the engine
    wrote and that do not say their ranks, one tensor of each. Raises EngineError E2xx and E3xx.

    Args:
        config: the target's config.json, or the folder that holds it, for facts that the checkpoint does not hold.
        needed: whether to refuse a checkpoint without any configuration if its framework saves none.
    """
    given = store_at(src, "the checkpoint")
    folder = followed(given)
    file = config if config is None or isinstance(config, File) else _given_config(config)
    target = {}
    if file is not None:
        with one_of_two(file.place, "" if isinstance(config, File) else "--config "):
            target = read_json(file)

    def configurations() -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The file and content of the model's configuration, and the training configuration."""
        name, configuration = read_configuration(folder, layout, file, needed=needed)
        if layout.training_file is None or layout.training_format is None:
            return name, configuration, {}
        beside = File(folder, layout.training_file)
        return name, configuration, read_config(beside, layout.training_format) if beside.exists else {}

    read = cache(configurations)

    def readable(expression: Expression) -> dict[str, Any]:
        """The model's configuration; E218 where an expression of the layout reads a value that cannot be."""
        name, configuration, _ = read()
        keys = {key: one for key, one in layout.keys.get("source", {}).items() if key in names_in(expression)}
        values = {key: configuration[key] for key in keys if key in configuration}
        read_keys(values, Side(keys, frozenset(keys), name), expressed=False)
        return configuration

    grid = read_grid(list_folder(folder, folders_in(layout), either_in(layout)), layout, folder.place(), readable)
    name, configuration, training = read()
    signs = [beside.file for beside in grid.mode.beside]
    if signs and layout.config_from_target and not configuration and not any(map(folder.has, signs)):
        raise no_configuration(folder, layout)  # files with these names alone may be another framework's
    configured = {**configuration, "training": training}
    check_ranks(grid, layout, configured, name, folder.place())
    names = [f.name for f in grid.files]
    headers = read_headers(folder, names, grid.mode, layout.skip_tensors, told_by(layout), layout.wrappers)
    with_tensors = {header.name for header in headers} | {".metadata"}  # their states are known
    if name not in with_tensors and repr(configurations()) != repr(read()):
        raise has_changed(name, "another configuration", "the one that was read before the headers")
    check_refused(headers, layout, lambda when: {**readable(when), "training": training})
    check_alike(headers, layout)
    files = list(zip(grid.files, headers, strict=True))
    said = [said_rank(h, f.pattern, layout) for f, h in files]
    said = said if len(set(said)) > 1 else [None] * len(files)
    claims = [claim_of(h, f.pattern, f.ranks, layout, own) for (f, h), own in zip(files, said, strict=True)]
    check_identities(claims)
    check_written(folder, [claim.header for claim in claims if claim.saved_as is None])
    buffers = grid.mode.format == "torch"
    renamed = check_order(headers, buffers=buffers)
    joined = joined_in(headers, layout.joined) if buffers else {}
    if layout.config_of_target:
        target = configuration
    over = () if file is None else passed_over(folder, layout, target)
    return Checkpoint(
        given.place(), grid, headers, configuration, training, name, target,
        renamed=renamed, passed_over=over, joined=joined,
    )  # fmt: skip
