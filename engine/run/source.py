"""Checks a source before a run: by checksums in its files or beside them, and by the manifest of what the engine wrote.

A manifest has a digest of each tensor, which safetensors have not, and of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.checkpoint.manifests import NAME, read_manifest
from engine.errors import EngineError, Place, first_of
from engine.formats.checksums import check_files
from engine.planning.model import Plan
from engine.run.meter import Meter, Progress
from engine.run.written import read_contents
from engine.storage.store import Store


def check_source(compiled: Plan, progress: Callable[[Progress], None] | None) -> list[str]:
    """Read the source files once and compare them with their checksums; E301 when they differ.

    What the engine wrote is compared with its manifest: a program that changes a zip writes new checksums too.
    """
    files = {header.name: header for header in compiled.files if header.size}
    meter = Meter(sum(file.size for file in files.values()), progress, "checking the source")
    told: list[str] = []
    for store, data in _manifests(compiled):
        if not data:
            told.append(f"{store.place(NAME)} cannot be read; the source was not compared with it")
        tensors = {k: one for k, one in data.get("tensors", {}).items() if one["file"] in files and "digest" in one}
        headers = {name: files.pop(name) for name in dict.fromkeys(one["file"] for one in tensors.values())}
        *_, problems = read_contents(store, {**data, "files": {}, "tensors": tensors}, meter.advance, headers=headers)
        if problems:
            raise EngineError(
                "E301",
                "a folder that the engine wrote was changed",
                place=Place(store.place()),
                got=problems[0],
                expected=f"what its {NAME} says",
                fix=f"Copy the folder again. If it was changed on purpose, move its {NAME} away, which is old.",
            )
    unchecked = check_files([header.file for header in files.values()], meter.advance)
    return told + ([f"no checksum was saved in {first_of(unchecked, 4)}; not checked"] if unchecked else [])


def changed_configuration(compiled: Plan) -> list[str]:
    """What to say of the source's configurations that are not what the engine wrote with the weights."""
    names = ("config.json", compiled.layout.config_file, compiled.layout.training_file)
    for store, data in _manifests(compiled):
        wanted = {name: one for name, one in data.get("files", {}).items() if name in names and store.has(name)}
        *_, problems = read_contents(store, {**data, "files": wanted, "tensors": {}})
        if problems:
            return [f"{problems[0]} since the engine wrote it with the weights, by {NAME} beside it"]
    return []


def _manifests(compiled: Plan) -> list[tuple[Store, Mapping[str, Any]]]:
    """The folder of the source with its manifest, if the engine wrote it; an empty one if it cannot be read."""
    for store in {id(file.file.store): file.file.store for file in compiled.files if file.size}.values():
        try:
            return [(store, read_manifest(store))] if store.has(NAME) else []
        except EngineError:
            return [(store, {})]
    return []
