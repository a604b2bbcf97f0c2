"""Reading a checkpoint folder: what files it has, their headers and configurations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.checkpoint.config_files import read_config
from engine.checkpoint.headers import FileHeader
from engine.checkpoint.rank_files import read_rank_file
from engine.errors import EngineError, Place

_READERS = 4  # threads: indexing waits on storage, not on the processor


def list_folder(folder: Path) -> list[str]:
    """File names of a checkpoint folder, sorted; E304/E305 when there is none."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except NotADirectoryError:
        raise EngineError(
            "E304",
            "the checkpoint is a file, not a folder",
            place=Place(str(folder)),
            fix="Point --src at the folder that holds the rank files.",
        ) from None
    except FileNotFoundError:
        raise EngineError(
            "E304", "there is no such checkpoint folder", place=Place(str(folder)), fix="Check the path given to --src."
        ) from None
    except OSError as error:
        raise EngineError(
            "E305",
            "the checkpoint folder cannot be read",
            place=Place(str(folder)),
            got=error.strerror,
            fix="Check its permissions.",
        ) from error
    return names


def read_headers(folder: Path, names: Sequence[str]) -> tuple[FileHeader, ...]:
    """Index rank files without reading their payload, a few at a time."""
    if len(names) == 1:
        return (read_rank_file(folder / names[0]),)
    with ThreadPoolExecutor(_READERS) as pool:
        return tuple(pool.map(lambda name: read_rank_file(folder / name), names))


def read_folder_config(folder: Path, name: str, format: str, *, required: bool) -> dict[str, Any]:
    """A configuration file of the folder; an empty mapping when it may be absent and is."""
    path = folder / name
    if not os.path.lexists(path):
        if required:
            raise EngineError(
                "E304",
                f"`{name}` is missing",
                place=Place(str(folder)),
                expected="the model's configuration beside the rank files",
                fix="Copy it from the training run; sizes are checked against it.",
            )
        return {}
    return read_config(path, format)
