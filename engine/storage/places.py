"""The store at a path or URL that a user gave."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from engine.errors import EngineError, Place
from engine.storage.client import no_store
from engine.storage.local import LocalStore, local_file
from engine.storage.objects import SCHEMES, ObjectStore
from engine.storage.replacing import given_path
from engine.storage.sources import WINDOW
from engine.storage.store import File, Store

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"\$?[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth")
_MOST_COPIED = 256 << 20  # bytes
_options: dict[str, str] = {}
_window = WINDOW


def is_url(place: str | Path) -> bool:
    return _URL.match(str(place)) is not None


def last_name(place: str | Path) -> str:
    """The name of the folder that a user gave.

    >>> last_name("s3://bucket/ckpt/20000/"), last_name("ckpt/20000")
    ('20000', '20000')
    """
    return str(place).rstrip("/").rpartition("/")[2] if is_url(place) else os.path.basename(os.path.realpath(place))


@contextmanager
def store_options(options: Mapping[str, str] | None = None, window: int | None = None) -> Iterator[None]:
    """Options of every store that is opened inside this context.

    Args:
        options: as obstore names them, such as `region` and `endpoint`.
        window: bytes that are read ahead at once; default: 16 MiB.
    """
    global _options, _window
    before = _options, _window
    _options, _window = dict(before[0] if options is None else options), window or before[1]
    try:
        yield
    finally:
        _options, _window = before


Source = str | Path | Store  # a checkpoint's place: a path or URL that a user gave, or a store of the caller


def options_now() -> tuple[dict[str, str], int]:
    """The current arguments of `store_options`, for another process."""
    return dict(_options), _window


def store_at(place: Source, what: str) -> Store:
    """The store at a path or URL that a user gave; E001 for an invalid one, in words for `what` it holds."""
    if not isinstance(place, str | Path):
        if hasattr(place, "names"):
            return place
        raise EngineError(
            "E001",
            f"{what} is neither a path nor a URL",
            got=f"{place!r:.80}, of type {type(place).__name__}",
            expected="a path or a URL",
            fix="Give the path as text or as a pathlib.Path.",
        )
    found = _URL.match(str(place))
    if found is None:
        return LocalStore(given_path(place, what))
    if found[1] not in SCHEMES:
        raise EngineError(
            "E001",
            f"there are no stores of kind `{found[1]}`",
            place=Place(str(place)),
            expected=", ".join(f"{name}://" for name in SCHEMES),
            fix="Give a path, or a URL of one of these.",
        )
    url = str(place).rstrip("/")
    try:
        urlsplit(url)
        url.encode()
    except ValueError as error:  # also raised for half characters
        raise no_store(url, str(error)) from None
    bucket, *folders = url[found.end() :].split("/")
    if not found[1].startswith("http") and (not _BUCKET.fullmatch(bucket) or {"", ".", ".."}.intersection(folders)):
        raise no_store(url, "an invalid bucket, or a folder without a name or named `.` or `..`")
    return ObjectStore(url, tuple(sorted(_options.items())), _window)


def followed(store: Store) -> Store:
    """The real folder of a store: links such as `latest`, or the current folder, may change later."""
    folder = store.folder
    try:
        real = None if folder is None else folder.resolve()
    except (OSError, RuntimeError):  # circular links, which reading it will report
        return store
    return store if folder is None or real is None or real == folder else LocalStore(real, folder)


def found_at(place: Source) -> Store | File:
    """The store or the single file of a checkpoint that a path or URL names; E001 as for `store_at`."""
    what = "the checkpoint"
    if not isinstance(place, str | Path):
        return store_at(place, what)
    if is_url(place):
        above, _, name = str(place).rstrip("/").rpartition("/")
        return File(store_at(above, what), name) if name.endswith(_FILES) else store_at(place, what)
    path = given_path(place, what)
    if os.path.isdir(path) or not os.path.lexists(path):
        return LocalStore(path)
    return local_file(path)


def on_this_machine(store: Store, option: str) -> Path:
    """The local folder of a store; E001 when it is not local, which an option needs."""
    if store.folder is None:
        raise EngineError(
            "E001",
            f"{option} needs local files",
            place=Place(store.place()),
            fix="Copy the checkpoint to a folder first.",
        )
    return store.folder


def local_copy(file: File) -> Path | None:
    """A small file of a store as a local file, a copy that lasts until the program ends; None when it does not exist.

    For libraries that take only a path.
    """
    if file.store.folder is not None:
        return file.store.folder / file.name
    if not file.exists:
        return None
    path = Path(_copies().name) / hashlib.sha256(file.place.encode()).hexdigest()[:16] / file.name
    path.parent.mkdir(exist_ok=True)
    with file.open() as opened:
        if opened.state.size > _MOST_COPIED:
            raise EngineError(
                "E305", "a file is too large to be copied", place=Place(file.place), got=f"{opened.state.size} bytes",
                expected=f"at most {_MOST_COPIED}", fix="Is it the right file?",
            )  # fmt: skip
        path.write_bytes(opened.read())
    return path


@cache
def _copies() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="engine-")
