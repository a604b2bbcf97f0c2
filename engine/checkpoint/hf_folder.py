"""Hugging Face weights on disk: one file, or shards and an index that names the shard of each tensor.

Safetensors and torch files alike, headers only. The index is checked against the files both ways,
so that what is read later is what the index promises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from engine.checkpoint.folder import check_finished, list_folder, side_by_side
from engine.errors import EngineError, Place, first_of
from engine.formats.configs import read_json
from engine.formats.headers import FileHeader
from engine.formats.rank_files import read_rank_file
from engine.formats.safetensors import read_safetensors
from engine.storage.folders import listing
from engine.storage.json_text import parse_json
from engine.storage.store import File, Store

# In the order transformers looks for them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Files of a tokenizer, a chat template and generation settings.
BESIDE = re.compile(
    r"tokenizer[^/]*\.(?:json|model)|(?:added_tokens|special_tokens_map|generation_config)\.json"
    r"|chat_template\.(?:jinja|json)|vocab\.(?:json|txt)|merges\.txt"
)
_MAX_INDEX = 64 << 20  # bytes: some 500,000 tensors
_TORCH = (".bin", ".pt", ".pth")
_ADAPTER = "adapter_config.json"  # if this file exists, transformers adds the adapter to the weights


def is_whole(names: Sequence[str]) -> bool:
    """Whether files are a Hugging Face checkpoint: weights with names that transformers looks for."""
    return any(name in names for stem in WEIGHTS for name in (stem, f"{stem}.index.json"))


def read_hf_folder(where: Store | File) -> tuple[FileHeader, ...]:
    """Index the weights of a Hugging Face checkpoint without reading any payload.

    Args:
        where: a folder, an index, or one weights file. In a folder safetensors are preferred to torch
            files, as in transformers.

    Returns:
        The files, by name; every tensor name occurs in exactly one of them.

    Raises:
        EngineError: E201 for a missing shard, E207 for a tensor that is not in the file that the index
            names, E208 for a tensor in two files, E301 for a damaged file or index, E303 for a file of
            another kind, E304 when it is not a checkpoint, E305 when it cannot be read.
    """
    if isinstance(where, File):
        return _read_shards(where) if where.name.endswith(".index.json") else (_read_weights(where),)
    if where.folder is not None:  # in a store an unfinished output has no config.json, and a listing costs a request
        with listing(where):
            check_finished(where, where.names())
    if File(where, _ADAPTER).exists:
        raise EngineError(
            "E304",
            "the folder has an adapter beside or instead of its weights",
            place=Place(where.place(_ADAPTER)),
            got=_ADAPTER,
            expected="weights that are the whole model",
            fix="Merge the adapter into the weights first, as peft's `merge_and_unload` does; or move its files away.",
        )
    for name in WEIGHTS:
        single, index = File(where, name), File(where, f"{name}.index.json")
        if not index.exists:
            if single.exists:
                return (_read_weights(single),)
            continue
        if single.exists and set(_read_index(index).values()) != {name}:
            raise EngineError(
                "E304",
                "the folder has two sets of weights",
                place=Place(where.place()),
                got=f"{name} and {name}.index.json with other files",
                expected="one of them",
                fix="Remove the one left over from another save, or give the file itself.",
            )
        return _read_shards(index)
    raise EngineError(
        "E304",
        "the folder is not a Hugging Face checkpoint",
        place=Place(where.place()),
        got=first_of(list_folder(where), 6) or "an empty folder",  # refused if it cannot be listed
        expected=", ".join(f"{name} or {name}.index.json" for name in WEIGHTS),
        fix="Give the folder that `from_pretrained` would take, or a weights file; `engine inspect` says what it is.",
    )


def other_weights(where: Store | File, files: tuple[FileHeader, ...]) -> tuple[str, ...]:
    """Weights files of a folder other than those that were read; some programs read every one in the folder."""
    if isinstance(where, File):
        return ()
    read = {file.name for file in files}
    with listing(where):
        names = where.names()
    return tuple(name for name in names if name.endswith((".safetensors", *_TORCH)) and name not in read)


def read_hf_config(where: Store | File) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder, or beside a weights file; empty when there is none.

    Raises:
        EngineError: E301 when it is not JSON, E303 when it is not an object, E305 when unreadable.
    """
    file = where.beside("config.json") if isinstance(where, File) else File(where, "config.json")
    return read_json(file) if file.exists else {}


def _read_weights(file: File) -> FileHeader:
    """One file, by its suffix; a zip file without a known suffix is torch's."""
    suffix = PurePosixPath(file.name).suffix
    torch = suffix in _TORCH
    if not torch and suffix != ".safetensors":
        with file.open() as opened:
            begin = opened.read(9)
        torch = begin.startswith(b"PK\x03\x04")
        if not torch and not begin.endswith(b"{"):  # after its length, the header of safetensors is JSON
            raise EngineError(
                "E304",
                f"`{file.name}` is no weights file",
                place=Place(file.place),
                expected="a file of safetensors, or one that torch saved",
                fix="Give the folder that it is in, or a weights file.",
            )
    return read_rank_file(file) if torch else read_safetensors(file)


def _read_shards(index: File) -> tuple[FileHeader, ...]:
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not index.beside(name).exists]
    if missing:
        raise EngineError(
            "E201",
            f"`{missing[0]}` is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
            place=Place(index.place),
            got=f"{len(names) - len(missing)} of {len(names)} files that the index names",
            expected=first_of(missing, 8),
            fix="Copy the missing files into the folder: a download may have been interrupted.",
        )
    files = tuple(side_by_side(lambda name: _read_weights(index.beside(name)), names))
    _check(weight_map, files, index)
    return files


def _read_index(file: File) -> dict[str, str]:
    """Tensor name → file name. Every file must be in the folder of the index."""

    def damaged(what: str, tensor: str | None = None) -> EngineError:
        return EngineError(
            "E301",
            f"an index of weights is damaged: {what}",
            place=Place(file.name, tensor=tensor),
            expected='{"weight_map": {"tensor name": "file name", …}}',
            fix="Copy the file again.",
        )

    with file.open() as opened:
        raw = opened.read(_MAX_INDEX + 1)
    if len(raw) > _MAX_INDEX:
        raise damaged(f"it is larger than {_MAX_INDEX >> 20} MiB")
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise damaged(f"it is not JSON: {error}"[:200]) from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged("it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise damaged(f"{name!r} is not the name of a file beside it"[:200], tensor)
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file directly in the folder.

    >>> [_is_plain(name) for name in ("model.safetensors", "../model.safetensors", "/etc/passwd", "..", "")]
    [True, False, False, False, False]
    """
    bad = any(c in "/\\" or not c.isprintable() for c in name)
    return not bad and name not in ("", ".", "..")


def _check(weight_map: Mapping[str, str], files: tuple[FileHeader, ...], index: File) -> None:
    """Check the index against the files, both ways."""
    found: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in found:
                raise EngineError(
                    "E208",
                    f"`{tensor.name}` is in two files",
                    place=Place(index.place, tensor=tensor.name),
                    got=f"{found[tensor.name]}, {file.name}",
                    expected=f"{weight_map.get(tensor.name, 'one file')} alone",
                    fix="The files are of two different saves; copy the folder again.",
                )
            found[tensor.name] = file.name
    for name, file_name in weight_map.items():
        if found.get(name) != file_name:
            raise EngineError(
                "E207",
                f"`{name}` is not in the file that the index names",
                place=Place(index.place, tensor=name),
                got=found.get(name, "in no file"),
                expected=file_name,
                fix="The index and the files are of two different saves; copy the folder again.",
            )
    unlisted = [name for name in found if name not in weight_map]
    if unlisted:
        raise EngineError(
            "E301",
            f"an index of weights is damaged: it leaves out `{unlisted[0]}`"
            + (f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""),
            place=Place(index.place, tensor=unlisted[0]),
            got=f"in {found[unlisted[0]]}",
            expected="every tensor of the files in the index",
            fix="The index and the files are of two different saves; copy the folder again.",
        )
