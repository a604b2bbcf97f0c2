"""The manifest that the engine writes with an output: read, and compared with the rank files beside it.

Megatron's rank files all have one name, and entries of distributed checkpoints have none. In a folder that the engine
wrote, the digests of the manifest still tell which file is which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import xxhash

from engine.checkpoint.folder import list_folder
from engine.checkpoint.identity import blocks
from engine.errors import EngineError, Place, first_of
from engine.formats.headers import FileHeader
from engine.language.documents import grouped
from engine.language.validation import first_violation
from engine.storage.json_text import parse_json
from engine.storage.store import Store

NAME = "conversion.json"
VERSION = 1
_MOST = 1 << 30  # bytes of a manifest
_SMALL = 1 << 28  # bytes of the largest file without tensors: `.metadata`


def read_manifest(folder: Store) -> dict[str, Any]:
    """The manifest of an output, checked against its schema; E304 when there is none, E301 when it is not valid."""
    place = folder.place(NAME)
    if not folder.has(NAME):
        raise EngineError(
            "E304",
            f"there is no `{NAME}`",
            place=Place(folder.place()),
            got=first_of(list_folder(folder), 6) or "an empty folder",  # refused if there is no folder
            expected="an output of this engine",
            fix="Only the output of `engine run`, `reverse` or `reshard` can be verified.",
        )
    with folder.open(NAME) as file:
        raw = file.read(min(_MOST, file.state.size))  # as much memory is taken at once
    try:
        data: dict[str, Any] = parse_json(raw, own=True)
        wrong = first_violation(data, "conversion")
    except ValueError as error:
        wrong = str(error)
    if wrong is not None:
        raise EngineError(
            "E301",
            f"`{NAME}` cannot be read",
            place=Place(place),
            got=wrong[:200],
            expected=f"a manifest of version {VERSION}",
            fix="Convert again.",
        )
    return data


def check_written(folder: Store, headers: Sequence[FileHeader]) -> None:
    """E306 for a rank file that holds what the engine wrote as another one, or did not write, unlike other files.

    One tensor of each file is read: the smallest of those that are different in every file. If a program wrote to the
    folder since, as its small files or all of those tensors tell, nothing is refused.

    Args:
        headers: the files that do not say themselves which rank they are.
    """
    if len(headers) < 2 or not folder.has(NAME):
        return
    written: Mapping[str, Mapping[str, str]] = {}  # tensor → digest → file
    with suppress(EngineError):  # a manifest that cannot be read: it proves nothing
        data = read_manifest(folder)
        if all(_as_written(folder, name, wanted) for name, wanted in data["files"].items()):
            written = _telling(data["tensors"])
    found: dict[str, tuple[str, str]] = {}  # file → the tensor that was read, and the file that it was written to
    for header in headers:
        tensor = min((t for t in header.tensors if t.name in written), key=lambda t: t.nbytes, default=None)
        if tensor is None:
            continue
        total = xxhash.xxh3_128()
        for block in blocks(header, tensor):
            total.update(block)
        found[header.name] = tensor.name, written[tensor.name].get(total.hexdigest(), "")
    if not any(original for _, original in found.values()):
        return  # a program wrote all of them since
    for name, (tensor_name, original) in found.items():
        if original != name:
            raise EngineError(
                "E306",
                f"`{name}` was written as `{original}`" if original else f"`{name}` is not as the engine wrote it",
                place=Place(name, tensor=tensor_name),
                got=f"what the engine wrote to {original}, by {NAME} beside it"
                if original
                else f"another content than {NAME} beside it says, while other files are as it says",
                expected=name if original else "all files of one conversion",
                fix="Files were exchanged, renamed or copied over each other. Copy the folder again from where the "
                f"engine wrote it. If a program of yours changed this file alone, remove {NAME}.",
            )


def _telling(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The file of each digest, for every tensor that is in several files and different in all of them."""
    found = grouped((key.removeprefix(f"{entry['file']}:"), entry) for key, entry in tensors.items())
    files = {name: {one.get("digest", ""): one["file"] for one in entries} for name, entries in found.items()}
    return {name: told for name, told in files.items() if 1 < len(told) == len(found[name])}


def _as_written(folder: Store, name: str, wanted: str) -> bool:
    """Whether a small file is missing or as the manifest says; anybody may have written the manifest."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        return False
    if not folder.has(name):
        return True
    with folder.open(name) as file:
        return file.state.size <= _SMALL and hashlib.file_digest(file, "sha256").hexdigest() == wanted
