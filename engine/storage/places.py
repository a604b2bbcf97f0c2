"""Where a user says that files lie, as a store."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import EngineError, Place
from engine.storage.local import LocalStore
from engine.storage.replacing import given_path
from engine.storage.store import File, Store

Source = str | Path | Store  # where a checkpoint lies: a path as a user gave it, or a store that a program has


def store_at(place: Source, what: str) -> Store:
    """The store at a path as a user gave it; E001 for one that names nothing.

    Args:
        what: what lies there, in words.
    """
    return LocalStore(given_path(place, what)) if isinstance(place, str | Path) else place


def found_at(place: Source, what: str) -> Store | File:
    """A store, or the one file that a path names; E001 as for `store_at`."""
    if not isinstance(place, str | Path):
        return place
    path = given_path(place, what)
    if os.path.isdir(path) or not os.path.lexists(path):
        return LocalStore(path)
    return File(LocalStore(path.parent), path.name)


def file_at(place: str | Path, what: str) -> File:
    """The file that a path names; E001 as for `store_at`."""
    path = given_path(place, what)
    return File(LocalStore(path.parent), path.name)


def on_this_machine(store: Store, option: str) -> Path:
    """The folder of a store; E001 when it is not of this machine, which an option needs."""
    if store.folder is None:
        raise EngineError(
            "E001",
            f"{option} needs files of this machine",
            place=Place(store.place()),
            fix="Copy the checkpoint to a folder first.",
        )
    return store.folder
