"""The readers of formats and folders, for files of this machine by their paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint import folder as folders
from engine.checkpoint import hf_folder
from engine.formats import configs, rank_files, safetensors
from engine.formats.headers import FileHeader
from engine.storage.local import LocalStore, local_file
from engine.storage.places import found_at


def read_rank_file(path: Path, *load: rank_files.LoadPickle) -> FileHeader:
    return rank_files.read_rank_file(local_file(path), *load)


def read_safetensors(path: Path) -> FileHeader:
    return safetensors.read_safetensors(local_file(path))


def read_config(path: Path, format: str) -> dict[str, Any]:
    return configs.read_config(local_file(path), format)


def read_json(path: Path) -> dict[str, Any]:
    return configs.read_json(local_file(path))


def read_pickled_mapping(path: Path) -> dict[str, Any]:
    return configs.read_pickled_mapping(local_file(path))


def read_python_source(path: Path) -> dict[str, Any]:
    return configs.read_python_source(local_file(path))


def read_headers(folder: Path, names: Sequence[str]) -> tuple[FileHeader, ...]:
    return folders.read_headers(LocalStore(folder), names)


def read_hf_folder(path: Path) -> tuple[FileHeader, ...]:
    return hf_folder.read_hf_folder(found_at(path))


def read_hf_config(path: Path) -> dict[str, Any]:
    return hf_folder.read_hf_config(found_at(path))
