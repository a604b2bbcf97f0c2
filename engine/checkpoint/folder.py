"""Reading a checkpoint folder: what files it has, their headers and configurations."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.configs import read_config
from engine.formats.headers import FileHeader
from engine.formats.rank_files import read_rank_file
from engine.formats.unpickle import load_pickle
from engine.storage.store import File, Store

_KEPT = 256  # pickles of a folder that are kept while it is read
_READERS = 4  # threads: indexing waits on storage, not on the processor


def list_folder(folder: Store) -> list[str]:
    """File names of a checkpoint folder, sorted; E304/E305 when there is none."""
    try:
        names = [name for name in folder.names() if not name.startswith(".")]
    except NotADirectoryError:
        raise EngineError(
            "E304",
            "the checkpoint is a file, not a folder",
            place=Place(folder.place()),
            fix="Point --src at the folder that holds the rank files.",
        ) from None
    except FileNotFoundError:
        raise EngineError(
            "E304",
            "there is no such checkpoint folder",
            place=Place(folder.place()),
            fix="Check the path given to --src.",
        ) from None
    except OSError as error:
        raise EngineError(
            "E305",
            "the checkpoint folder cannot be read",
            place=Place(folder.place()),
            got=error.strerror,
            fix="Check its permissions.",
        ) from error
    return names


def read_headers(folder: Store, names: Sequence[str]) -> tuple[FileHeader, ...]:
    """Index rank files without reading their payload, a few at a time."""
    if len(names) == 1:
        return (read_rank_file(File(folder, names[0])),)
    load = _Pickles()
    with ThreadPoolExecutor(_READERS) as pool:
        return tuple(pool.map(lambda name: read_rank_file(File(folder, name), load), names))


class _Pickles:
    """Reads each pickle once: the ranks of a stage mostly have the same, but for the device they were on."""

    def __init__(self) -> None:
        self._known: dict[bytes, Any] = {}

    def __call__(self, data: bytes, name: str) -> Any:
        key = hashlib.sha256(data).digest()
        found = self._known.get(key)
        if found is None:
            found = load_pickle(data, name)
            if len(self._known) < _KEPT:
                self._known[key] = found  # which nobody changes
        return found


def read_folder_config(folder: Store, name: str, format: str, *, required: bool) -> dict[str, Any]:
    """A configuration file of the folder; an empty mapping when it may be absent and is."""
    file = File(folder, name)
    if not file.exists:
        if required:
            raise EngineError(
                "E304",
                f"`{name}` is missing",
                place=Place(folder.place()),
                expected="the model's configuration beside the rank files",
                fix="Copy it from the training run; sizes are checked against it.",
            )
        return {}
    return read_config(file, format)
