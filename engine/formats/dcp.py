"""Indexes torch's distributed checkpoints (DCP) from their directory, without reading payload and without torch.

A `.distcp` file is a sequence of small torch files, one for each box of a tensor; `.metadata` says where each
begins and ends. Each small file's own header must agree.

`.metadata` is one pickle of a `Metadata` object (torch/distributed/checkpoint/metadata.py, filesystem.py). It
is written last and by renaming, so a folder without it is an unfinished save. New torch releases and Megatron
add attributes: those that are not needed here are ignored.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.dcp_places import check_numbers, places_of
from engine.formats.headers import FileHeader, Recorded, TensorHeader, damaged
from engine.formats.rank_files import LoadPickle, Pickles, tensor_header
from engine.formats.safetensors import read_boxes
from engine.formats.standins import Instance, Refused, Tensor, attributes, element_type, ints
from engine.formats.unpickle import error_of, load_pickle
from engine.formats.zipdir import TorchZip
from engine.storage.folders import listing
from engine.storage.store import File, OpenFile, State, Store

DIRECTORY = ".metadata"
_OF_RANK = re.compile(r"__[0-9]{1,7}\.metadata")
_SHORTEST = 8  # least bytes of a box in the pickle
_MOST_BYTES = 1 << 30  # of a pickle that is read whole; a save of ten thousand ranks takes a tenth of this
_KEPT = 4096  # pickles that are cached: boxes of one shape share one


@dataclass(frozen=True, slots=True)
class Entry:
    """A box of a tensor, and the bytes of a file that hold it.

    Attributes:
        dtype: safetensors spelling, or torch's name if there is none.
        whole: shape of the tensor; `starts` and `shape` are the box.
        offset, length: the byte range in the file, which is a small torch file.
    """

    name: str
    dtype: str
    whole: tuple[int, ...]
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Directory:
    """The content of `.metadata`.

    Attributes:
        entries: boxes of tensors, in the order of the files and of the bytes in them.
        values: names of Python objects → file, offset and length of the torch file that holds each.
        identity: digest of the file.
    """

    entries: tuple[Entry, ...]
    values: Mapping[str, tuple[str, int, int]]
    identity: str

    def files(self) -> tuple[str, ...]:
        """Every file that it names, sorted."""
        return tuple(sorted({e.file for e in self.entries} | {file for file, _, _ in self.values.values()}))

    def below(self, folder: str) -> Directory:
        """The same of a subfolder."""
        entries = tuple(replace(one, file=f"{folder}/{one.file}") for one in self.entries)
        values = {name: (f"{folder}/{file}", at, size) for name, (file, at, size) in self.values.items()}
        return Directory(entries, values, self.identity)


def read_dcp(
    folder: Store, names: Sequence[str], wanted: Callable[[str], bool] = lambda _: True, *, some: bool = False
) -> tuple[FileHeader, ...]:
    """Index the `.distcp` files of a folder.

    Args:
        names: the existing files, all beside their directory; the result is in their order.
        wanted: whether to read a tensor, by name. Optimizer states are three times the model.
        some: whether more files than these exist.

    Raises:
        EngineError: E201 for a missing file or directory, E301 for a file that is damaged or contradicts its directory,
            E302 when it asks to run code, E303 for an unsupported form, E305 when unreadable.
    """
    directory = read_dcp_directory(folder, names[0].rpartition("/")[0] if names else "")
    missing = [] if some else sorted({*directory.files()} - {*names})
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
    """A Python object of the checkpoint, with inert stand-ins; KeyError when none has that name."""
    file, offset, length = read_dcp_directory(folder, again=True).values[name]  # headers are read next
    with folder.open(file) as opened:
        return load_pickle(TorchZip(opened, file, offset, length).pickle(), file)


def _read_file(
    where: File, entries: list[Entry], wanted: Callable[[str], bool], load: LoadPickle, directory: Directory
) -> FileHeader:
    with where.open() as file:
        if entries and file.read(9)[8:] == b"{":
            return _plain_safetensors(where, entries, wanted)
        digest = hashlib.sha256(struct.pack("<Q", file.state.size) + directory.identity.encode())
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
    return FileHeader(where, file.state.size, tuple(tensors), digest.hexdigest(), summed, file.state, left=left)


def _tensor(small: TorchZip, entry: Entry, file: str, load: LoadPickle) -> TensorHeader:
    """An entry's tensor; it must be the box in the directory."""
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
    return replace(header, recorded=Recorded(entry.starts, entry.whole))


def _plain_safetensors(where: File, entries: list[Entry], wanted: Callable[[str], bool]) -> FileHeader:
    """A file that was saved as safetensors: its own header counts, as the directory has no offsets."""
    header = read_boxes(where)
    listed = {(e.name, e.starts): e for e in entries}
    tensors: list[TensorHeader] = []
    for tensor in header.tensors:
        starts = tensor.recorded.starts if tensor.recorded is not None else (0,) * len(tensor.shape)
        entry = listed.pop((tensor.name, starts), None)
        if entry is None or entry.shape != tensor.shape or entry.dtype != tensor.dtype:
            raise damaged(where.name, f"a box at {starts} of shape {tensor.shape}, unlike its directory", tensor.name)
        if wanted(tensor.name):
            tensors.append(replace(tensor, recorded=Recorded(starts, entry.whole)))
    if listed:
        raise damaged(where.name, "its directory has a tensor that it does not hold", next(iter(listed))[0])
    return replace(header, tensors=tuple(tensors))


def read_dcp_directory(folder: Store, below: str = "", *, again: bool = False) -> Directory:
    """Read `.metadata` without torch, or, for a save without collectives, the directories that each rank wrote.

    Args:
        below: the subfolder that it is in, with its files, whose names begin with this subfolder's then.
        again: it will be read again soon, and is kept until then.

    Raises:
        EngineError: E201 when there is none, E301 when damaged or not in torch's form, E302 when it asks to run code,
            E303 for transformed entries, E305 when unreadable.
    """
    if below and folder.has(f"{below}/{DIRECTORY}"):
        return _read(File(folder, f"{below}/{DIRECTORY}")).below(below)
    if folder.has(DIRECTORY):
        return _read(File(folder, DIRECTORY), again=again)
    with listing(folder):
        names = folder.names()
    every = [_read(File(folder, name)) for name in names if _OF_RANK.fullmatch(name)]
    if not every:
        raise EngineError(
            "E201",
            "`.metadata` is missing: the checkpoint was not saved to its end",
            place=Place(folder.place()),
            got="files of ranks without the directory that says what they hold",
            expected="`.metadata`, which is written last",
            fix="Take the step before, or copy the folder again with its hidden files.",
        )
    entries = sorted((entry for one in every for entry in one.entries), key=lambda e: (e.file, e.offset))
    values = {name: place for one in every for name, place in one.values.items()}
    identity = hashlib.sha256("".join(one.identity for one in every).encode()).hexdigest()
    return Directory(tuple(entries), values, identity)


_kept: dict[tuple[File, State], Directory] = {}  # at most one: reading a hundred thousand boxes takes seconds


def _read(where: File, *, again: bool = False) -> Directory:
    with where.open() as file:
        found = _kept.pop((where, file.state), None) or _parsed(file, where.name)
    _kept.clear()
    if again:
        _kept[where, file.state] = found
    return found


def _parsed(file: OpenFile, name: str) -> Directory:
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise damaged(name, f"more than {_MOST_BYTES} bytes")
    try:
        return _directory(load_pickle(data, name), hashlib.sha256(data).hexdigest(), len(data) // _SHORTEST)
    except Refused as refused:
        raise error_of(refused, name) from None


def _directory(value: Any, identity: str, most: int) -> Directory:
    told = attributes(value, "Metadata")
    tensors, stored = told.get("state_dict_metadata"), told.get("storage_data")
    if type(tensors) is not dict or type(stored) is not dict:
        raise Refused("E301", "a Metadata without state_dict_metadata or storage_data")
    places, numbers = places_of(stored)
    entries: list[Entry] = []
    values: dict[str, tuple[str, int, int]] = {}
    for name, one in tensors.items():
        if type(name) is not str or not name.isprintable():
            raise Refused("E301", f"a name {name!r}"[:100])
        kind = one.kind.name if isinstance(one, Instance) else ""
        if kind == "BytesStorageMetadata":
            if (name, None) not in places:
                raise Refused("E301", f"`{name}` is listed and its bytes are not")
            values[name] = places[name, None]
            continue
        about = attributes(one, "TensorStorageMetadata")
        dtype, whole, chunks = element_type(about.get("properties")), ints(about.get("size")), about.get("chunks")
        if type(chunks) is not list:
            raise Refused("E301", f"`{name}` has no list of its boxes")
        most -= len(chunks)
        if most < 0:
            raise Refused("E301", "the same boxes listed more often than so short a file can")
        boxes = [attributes(chunk, "ChunkStorageMetadata") for chunk in chunks]
        every = [ints(box.get("offsets")) for box in boxes]
        check_numbers(name, every, numbers)
        for box, starts in zip(boxes, every, strict=True):
            shape = ints(box.get("sizes"))
            if not len(starts) == len(shape) == len(whole) or any(
                at + size > all_ for at, size, all_ in zip(starts, shape, whole, strict=True)
            ):
                raise Refused("E301", f"`{name}` of shape {whole} has a box at {starts} of shape {shape}")
            if 0 in shape:
                continue  # a rank that holds nothing
            place = places.get((name, starts))
            if place is None:
                raise Refused("E301", f"the box of `{name}` at {starts} is listed and its bytes are not")
            entries.append(Entry(name, dtype, whole, starts, shape, *place))
    entries.sort(key=lambda e: (e.file, e.offset))
    return Directory(tuple(entries), values, identity)
