"""What is wrong with a folder: it cannot be listed, or it is one of two that have files of the same names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EngineError, Place
from engine.storage.store import Store

_UNLISTED: dict[type[OSError], tuple[str, str, str]] = {
    NotADirectoryError: (
        "E304", "the checkpoint is a file, not a folder",
        "Give the folder that it is in. A training state in one file is read as model.pt in a folder of its own.",
    ),
    FileNotFoundError: ("E304", "there is no such checkpoint folder", "Check the path."),
    OSError: ("E305", "the checkpoint folder cannot be read", "Check its permissions."),
}  # fmt: skip


@contextmanager
def listing(folder: Store) -> Iterator[None]:
    """E304/E305 if a folder that is listed inside is not there, or was removed meanwhile."""
    try:
        yield
    except OSError as error:
        code, message, fix = _UNLISTED.get(type(error), _UNLISTED[OSError])
        got = error.strerror if code == "E305" else None
        raise EngineError(code, message, place=Place(folder.place()), got=got, fix=fix) from error


@contextmanager
def one_of_two(folder: object, option: str = "") -> Iterator[None]:
    """Errors about a folder name it, with the option that gave it, unless their place does."""
    try:
        yield
    except EngineError as error:
        for one in {error, *error.errors}:
            if one.place is None or str(folder) not in one.place.file:
                one.message = f"{option}{folder}: {one.message}"
        raise
