"""Torch's distributed checkpoints (DCP), indexed by their directory without reading payload and without torch.

A `.distcp` file is a row of small torch files, one for each box of a tensor: `.metadata` says where each begins
and ends. What a small file says of itself must agree. It is read by its ends: the zip's directory is the last
thing in it, and the pickle the first. Where the payload begins is nowhere fixed.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.dcp_metadata import DIRECTORY, Directory, Entry, read_dcp_directory
from engine.formats.headers import FileHeader, Part, TensorHeader
from engine.formats.rank_files import Pickles, tensor_header
from engine.formats.safetensors import read_boxes
from engine.formats.standins import Tensor
from engine.formats.unpickle import big_endian, damaged, load_pickle
from engine.storage.store import File, OpenFile, Store

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_HEAD, _TAIL = 2048, 1536  # bytes of an entry's ends that hold what describes it
_LONG = 0xFFFFFFFF
_KEPT = 4096  # pickles that are kept: boxes of one shape have one

Load = Callable[[bytes, str], Any]


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
    file, offset, length = read_dcp_directory(folder).values[name]
    with folder.open(file) as opened:
        entry = _Small(opened, offset, length, file)
        return load_pickle(entry.pickle(), file)


def _read_file(
    where: File, entries: list[Entry], wanted: Callable[[str], bool], load: Load, directory: Directory
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
            small = _Small(file, entry.offset, entry.length, where.name)
            tensors.append(_tensor(small, entry, load))
            digest.update(small.central)
            summed &= small.summed
    left = tuple(entry.name for entry in entries if not wanted(entry.name))
    return FileHeader(where, state.size, tuple(tensors), digest.hexdigest(), summed, state, left=left)


def _tensor(small: _Small, entry: Entry, load: Load) -> TensorHeader:
    """An entry's tensor, which must be the box that the directory says."""
    value = load(small.pickle(), small.name)
    if not isinstance(value, Tensor):
        raise damaged(small.name, f"a {type(value).__name__} where its directory has a tensor", entry.name)
    if value.shape != entry.shape or (value.dtype or value.storage.dtype) != entry.dtype:
        raise EngineError(
            "E301",
            "a file does not match its `.metadata`",
            place=Place(small.name, tensor=entry.name),
            got=f"{' × '.join(map(str, value.shape))} {value.dtype or value.storage.dtype} at byte {entry.offset}",
            expected=f"{' × '.join(map(str, entry.shape))} {entry.dtype}, from {DIRECTORY}",
            fix="The file is from another save or another rank: copy the folder again.",
        )
    header = tensor_header(entry.name, value, small.payload(), small.name)
    return replace(header, part=Part(entry.starts, entry.whole))


class _Small:
    """A torch file inside a file: its directory and pickle, read from its two ends, distrusting all of it.

    Args:
        file: what it lies in; `name` is for people.
    """

    def __init__(self, file: OpenFile, offset: int, length: int, name: str) -> None:
        self.name, self.offset, self.length = name, offset, length
        self._file = file
        if length < 22 or offset + length > file.state.size:
            raise damaged(name, f"an entry of bytes {offset} to {offset + length} in a file of {file.state.size}")
        self._head = b""
        self._head = self._read(0, min(length, _HEAD))
        self.central, self._members = self._directory()
        self.summed = all(crc for _, size, crc in self._members.values() if size)
        roots = [
            name[: -len("data.pkl")] for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise self._damaged("no torch file: it has no member data.pkl")
        self._root = roots[0]
        order = self._members.get(self._root + "byteorder")
        if order is not None and (found := self._read(*self._place(order))) != b"little":
            raise big_endian(name, found[:16])

    def pickle(self) -> bytes:
        """The pickle, checked against its CRC-32 where there is one."""
        member = self._members[self._root + "data.pkl"]
        data = self._read(*self._place(member))
        if member[2] and zlib.crc32(data) != member[2]:
            raise self._damaged("its pickle has other bytes than were saved")
        return data

    def payload(self) -> dict[str, tuple[int, int]]:
        """Storage key → (offset in the file, bytes)."""
        prefix = self._root + "data/"
        listed = {name[len(prefix) :]: self._place(m) for name, m in self._members.items() if name.startswith(prefix)}
        return {key: (self.offset + at, size) for key, (at, size) in listed.items()}

    def _damaged(self, what: str) -> EngineError:
        return damaged(self.name, f"the entry at byte {self.offset}: {what}")

    def _read(self, at: int, size: int) -> bytes:
        """Bytes of the entry; all of those asked for."""
        if at + size <= len(self._head):
            return self._head[at : at + size]
        if at + size > self.length or size > 1 << 26:
            raise self._damaged(f"bytes {at} to {at + size} of {self.length}")
        self._file.seek(self.offset + at)
        data = self._file.read(size)
        if len(data) != size:
            raise self._damaged(f"bytes {at} to {at + size} cannot be read")
        return data

    def _directory(self) -> tuple[bytes, dict[str, tuple[int, int, int]]]:
        """The zip's directory: its bytes, and member → (offset of its header, size, CRC-32)."""
        start = max(0, self.length - _TAIL)
        tail = self._read(start, self.length - start)
        if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
            raise self._damaged("no zip ends where the entry does")
        count, size, at = struct.unpack("<H2I", tail[-12:-2])
        begin = self.length - 22
        if tail[-42:-38] == b"PK\x06\x07":
            (begin,) = struct.unpack("<Q", tail[-34:-26])
            record = self._read(begin, 56)
            if record[:4] != b"PK\x06\x06":
                raise self._damaged("its zip64 record is not where its locator says")
            count, size, at = struct.unpack("<3Q", record[32:56])
        if at + size != begin or not count or size > _TAIL * 8:
            raise self._damaged(f"its directory of {size} bytes at {at} does not end where its record begins")
        central = self._read(at, size)
        members: dict[str, tuple[int, int, int]] = {}
        position = 0
        for _ in range(min(count, 64)):
            if position + _CENTRAL.size > size:
                break
            found = _CENTRAL.unpack_from(central, position)
            position += _CENTRAL.size
            name = central[position : position + found[10]].decode("utf-8", "replace")
            extra = central[position + found[10] : position + found[10] + found[11]]
            position += sum(found[10:13])
            if found[0] != b"PK\x01\x02" or found[4] or found[3] & 1 or name in members:
                raise self._damaged(f"member {name[:60]!r} is compressed, encrypted, doubled or not a member")
            members[name] = (*_wide(extra, found[9], found[16]), found[7])
        if position != size or len(members) != count:
            raise self._damaged(f"{len(members)} of {count} members in its directory")
        spans = sorted((low, low + long) for low, long, _ in members.values())
        if spans[0][0] != 0 or any(one[1] > two[0] for one, two in zip(spans, [*spans[1:], (at, at)], strict=True)):
            raise self._damaged("its members overlap")
        return central, members

    def _place(self, member: tuple[int, int, int]) -> tuple[int, int]:
        """Where a member's bytes begin, behind its header, and how many they are."""
        at, size, _ = member
        local = _LOCAL.unpack(self._read(at, _LOCAL.size))
        begin = at + _LOCAL.size + local[9] + local[10]
        after = min((other for other, _, _ in self._members.values() if other > at), default=self.length)
        if local[0] != b"PK\x03\x04" or local[3] or begin + size > after:
            raise self._damaged("a member lies elsewhere than its directory says")
        return begin, size


def _wide(extra: bytes, size: int, offset: int) -> tuple[int, int]:
    """A member's offset and size, which stand in an extra field where they do not fit 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, long = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + long - long % 8])]
            if size == _LONG and wide:
                size = wide[0]
                wide = wide[2:] if len(wide) > 2 or offset != _LONG else wide[1:]
            if offset == _LONG and wide:
                offset = wide[0]
        at += 4 + long
    return offset, size


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
