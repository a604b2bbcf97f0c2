"""Torch's distributed checkpoints (DCP), indexed by their directory without reading payload and without torch.

A `.distcp` file is a row of small torch files, one for each box of a tensor: `.metadata` says where each begins
and ends. What a small file says of itself must agree.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.dcp_metadata import DIRECTORY, Directory, Entry, read_dcp_directory
from engine.formats.headers import FileHeader, Part, TensorHeader
from engine.formats.rank_files import LoadPickle, Pickles, tensor_header
from engine.formats.safetensors import read_boxes
from engine.formats.standins import Tensor
from engine.formats.unpickle import damaged, load_pickle
from engine.formats.zipdir import TorchZip
from engine.storage.store import File, Store

_KEPT = 4096  # pickles that are kept: boxes of one shape have one


def read_dcp(
    folder: Store, names: Sequence[str], wanted: Callable[[str], bool] = lambda _: True, *, some: bool = False
) -> tuple[FileHeader, ...]:
    """Index the `.distcp` files of a folder.

    Args:
        names: the files that are there; the result is in their order.
        wanted: which tensors to look at, by name. Optimizer states are three times the model.
        some: more files than these are there.

    Raises:
        EngineError: E201 for a file or directory that is missing, E301 damaged, or unlike its directory, E302 asks
            to run code, E303 of a form that is not read, E305 unreadable.
    """
    directory = read_dcp_directory(folder)
    there = set(names)
    missing = [name for name in directory.files() if name not in there and not some]
    if missing:
        raise EngineError(
            "E201",
            f"`{missing[0]}` is missing" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            place=Place(folder.place()),
            got=f"{len(names)} files",
            expected=f"{len(directory.files())} files that {DIRECTORY} names",
            fix="Copy it from the training run; every file holds other parts of the tensors.",
        )
    by_file = {name: list(entries) for name, entries in groupby(directory.entries, lambda e: e.file)}
    load = Pickles(_KEPT)
    return tuple(_read_file(File(folder, name), by_file.get(name, []), wanted, load, directory) for name in names)


def read_dcp_value(folder: Store, name: str) -> Any:
    """A Python object of the checkpoint, with inert stand-ins; KeyError when there is none of that name."""
    file, offset, length = read_dcp_directory(folder, again=True).values[name]  # headers come next
    with folder.open(file) as opened:
        return load_pickle(TorchZip(opened, file, offset, length).pickle(), file)


def _read_file(
    where: File, entries: list[Entry], wanted: Callable[[str], bool], load: LoadPickle, directory: Directory
) -> FileHeader:
    with where.open() as file:
        state = file.state
        if entries and file.read(9)[8:] == b"{":
            return _plain_safetensors(where, entries, wanted)
        digest = hashlib.sha256(struct.pack("<Q", state.size) + directory.identity.encode())
        tensors: list[TensorHeader] = []
        end, summed = 0, True
        for entry in entries:
            if entry.offset < end:
                raise damaged(where.name, f"it begins at byte {entry.offset}, the one before ends at {end}", entry.name)
            end = entry.offset + entry.length
            if not wanted(entry.name):
                continue
            small = TorchZip(file, where.name, entry.offset, entry.length)
            tensors.append(_tensor(small, entry, where.name, load))
            digest.update(small.entries)
            summed &= small.summed
    left = tuple(entry.name for entry in entries if not wanted(entry.name))
    return FileHeader(where, state.size, tuple(tensors), digest.hexdigest(), summed, state, left=left)


def _tensor(small: TorchZip, entry: Entry, file: str, load: LoadPickle) -> TensorHeader:
    """An entry's tensor, which must be the box that the directory says."""
    value = load(small.pickle(), file)
    if not isinstance(value, Tensor):
        raise damaged(file, f"a {type(value).__name__} where its directory has a tensor", entry.name)
    header = tensor_header(entry.name, value, small.payload(), file)
    if header.shape != entry.shape or header.dtype != entry.dtype:
        raise EngineError(
            "E301",
            "a file does not match its `.metadata`",
            place=Place(file, tensor=entry.name),
            got=f"{' × '.join(map(str, header.shape))} {header.dtype} at byte {entry.offset}",
            expected=f"{' × '.join(map(str, entry.shape))} {entry.dtype}, from {DIRECTORY}",
            fix="The file is from another save or another rank: copy the folder again.",
        )
    return replace(header, part=Part(entry.starts, entry.whole))


def _plain_safetensors(where: File, entries: list[Entry], wanted: Callable[[str], bool]) -> FileHeader:
    """A file that was saved as safetensors: its own header counts, and offsets in the directory are not set."""
    header = read_boxes(where)
    listed = {(e.name, e.starts): e for e in entries}
    tensors: list[TensorHeader] = []
    for tensor in header.tensors:
        starts = tensor.part.starts if tensor.part is not None else (0,) * len(tensor.shape)
        entry = listed.pop((tensor.name, starts), None)
        if entry is None or entry.shape != tensor.shape or entry.dtype != tensor.dtype:
            raise damaged(where.name, f"a box at {starts} of shape {tensor.shape}, unlike its directory", tensor.name)
        if wanted(tensor.name):
            tensors.append(replace(tensor, part=Part(starts, entry.whole)))
    if listed:
        raise damaged(where.name, "its directory has a tensor that it does not hold", next(iter(listed))[0])
    return replace(header, tensors=tuple(tensors))
