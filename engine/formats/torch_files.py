"""Writes torch's files as a stream: every offset is known before the first payload byte.

Members of a zip are stored uncompressed, each payload at a multiple of 64 bytes, as torch writes them. The
CRC-32 of a payload goes into a record right after it, and into the directory at the end. Distributed checkpoints are
files made of small such files, and a directory with their places: in the form of torch 2.3, which every later
release reads.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from engine.formats.headers import ITEM_SIZES, TORCH_NAMES, Named, TensorHeader
from engine.formats.pickling import Call, Global, Made, Pairs, dumps, state_dict, tensor
from engine.language.documents import grouped

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF  # from here on a size or offset is written in 64 bits
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_RECORD = struct.Struct("<4s3I")
_RECORD64 = struct.Struct("<4sI2Q")
_UTF8 = 0x800
_BEHIND = 0x8  # a record behind the payload has the checksum
_DATE = 0x21  # 1980-01-01, so that equal content gives equal bytes
_ROOT = "archive"
_METADATA = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, slots=True)
class Member:
    """A zip member: `header` and `payload` are absolute byte offsets; `data` is None for a tensor's."""

    name: bytes
    header: int
    payload: int
    size: int
    data: bytes | None

    @property
    def record(self) -> int:
        """The size in bytes of the record after the payload."""
        if self.data is not None:
            return 0
        return (_RECORD64 if self.size >= _LIMIT else _RECORD).size

    @property
    def end(self) -> int:
        return self.payload + self.size + self.record


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The layout of a rank file.

    Attributes:
        offsets: absolute byte offset of each tensor's payload.
        directory: offset of the zip directory, where the payload ends.
    """

    members: tuple[Member, ...]
    offsets: tuple[int, ...]
    directory: int

    @property
    def size(self) -> int:
        ((at, data),) = self.finish([0] * len(self.offsets))
        return at + len(data)

    def start(self) -> list[tuple[int, bytes]]:
        """Every header, and members other than tensors."""
        return [(member.header, _local(member) + (member.data or b"")) for member in self.members]

    def after(self, tensor: int, checksum: int) -> list[tuple[int, bytes]]:
        """The record after a tensor's payload."""
        member = self.tensors[tensor]
        kind = _RECORD if member.record == _RECORD.size else _RECORD64
        return [(member.payload + member.size, kind.pack(b"PK\x07\x08", checksum, member.size, member.size))]

    def finish(self, checksums: Sequence[int]) -> list[tuple[int, bytes]]:
        """The directory."""
        left = iter(checksums)
        central = [_central(m, next(left) if m.data is None else zlib.crc32(m.data)) for m in self.members]
        directory = b"".join(central)
        return [(self.directory, directory + _end(len(central), len(directory), self.directory))]

    @property
    def tensors(self) -> list[Member]:
        return [member for member in self.members if member.data is None]


def torch_file(tensors: Sequence[Named], root: str, around: Mapping[str, Any] | None = None) -> TorchFile:
    """Lay out a rank file that holds a state dict.

    Args:
        root: the folder inside the zip; torch uses the file's name without its suffix.
        around: the other content of the file, by key; then names begin with the key of their state dict.
    """
    return laid_out(state_dict(tensors, around), tensors, root)


def laid_out(pickled: bytes, tensors: Sequence[Named], root: str) -> TorchFile:
    """Lay out a file of a pickle and its storages, which it names by number, one for each tensor."""
    listed: list[tuple[str, bytes | int]] = [("data.pkl", pickled), ("byteorder", b"little")]
    for index, (_, dtype, shape) in enumerate(tensors):
        listed.append((f"data/{index}", prod(shape) * ITEM_SIZES[dtype]))
    listed.append(("version", b"3\n"))
    members: list[Member] = []
    end = 0
    for name, content in listed:
        member = _member(f"{root}/{name}".encode(), end, content)
        members.append(member)
        end = member.end
    offsets = tuple(m.payload for m in members if m.data is None)
    return TorchFile(tuple(members), offsets, end)


def encode_torch(value: Any, root: str) -> bytes:
    """The bytes of a small file that `torch.load` reads as a plain value."""
    file = laid_out(dumps(value), (), root)
    return b"".join(data for _, data in (*file.start(), *file.finish(())))


def _member(name: bytes, at: int, content: bytes | int) -> Member:
    size = content if isinstance(content, int) else len(content)
    fixed = at + _LOCAL.size + len(name) + len(_sizes64(size)) + 4
    payload = -(-fixed // _ALIGNMENT) * _ALIGNMENT
    return Member(name, at, payload, size, None if isinstance(content, int) else content)


def _sizes64(size: int) -> bytes:
    return struct.pack("<2H2Q", 1, 16, size, size) if size >= _LIMIT else b""


def _local(member: Member) -> bytes:
    crc = 0 if member.data is None else zlib.crc32(member.data)
    large = _sizes64(member.size)
    padding = member.payload - member.header - _LOCAL.size - len(member.name) - len(large) - 4
    extra = large + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    size = 0 if member.record and not large else min(member.size, _LIMIT)
    flags = _UTF8 | (_BEHIND if member.record else 0)
    fields = (b"PK\x03\x04", 45 if large else 20, flags, 0, 0, _DATE, crc, size, size, len(member.name), len(extra))
    return _LOCAL.pack(*fields) + member.name + extra


def _central(member: Member, crc: int) -> bytes:
    large = b""
    if member.size >= _LIMIT:
        large += struct.pack("<2Q", member.size, member.size)
    if member.header >= _LIMIT:
        large += struct.pack("<Q", member.header)
    extra = struct.pack("<2H", 1, len(large)) + large if large else b""
    size, version = min(member.size, _LIMIT), 45 if large else 20
    flags = _UTF8 | (_BEHIND if member.record else 0)
    fields = (b"PK\x01\x02", version, version, flags, 0, 0, _DATE, crc, size, size, len(member.name), len(extra))
    return _CENTRAL.pack(*fields, 0, 0, 0, 0, min(member.header, _LIMIT)) + member.name + extra


def _end(count: int, size: int, start: int) -> bytes:
    """The end of a directory; numbers that are too large for it, or the largest, are in 64 bits before it.

    >>> [len(_end(count, 0, 0)) for count in (0xFFFE, 0xFFFF)]
    [22, 98]
    """
    large = b""
    if count >= 0xFFFF or size >= _LIMIT or start >= _LIMIT:
        record = _END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        large = record + _LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
    short = min(count, 0xFFFF)
    return large + _END.pack(b"PK\x05\x06", 0, 0, short, short, min(size, _LIMIT), min(start, _LIMIT), 0)


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DcpFile:
    """The layout of a `.distcp` file: small torch files one after the other, at `starts`."""

    entries: tuple[TorchFile, ...]
    starts: tuple[int, ...]
    size: int

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(at + entry.offsets[0] for at, entry in zip(self.starts, self.entries, strict=True))

    def start(self) -> list[tuple[int, bytes]]:
        both = zip(self.starts, self.entries, strict=True)
        return [(base + at, data) for base, entry in both for at, data in entry.start()]

    def after(self, tensor: int, checksum: int) -> list[tuple[int, bytes]]:
        """The rest of an entry."""
        base, entry = self.starts[tensor], self.entries[tensor]
        return [(base + at, data) for at, data in (*entry.after(0, checksum), *entry.finish((checksum,)))]

    def finish(self, checksums: Sequence[int]) -> list[tuple[int, bytes]]:
        return []


def dcp_file(tensors: Sequence[Named], root: str, around: object = None) -> DcpFile:
    """Lay out a file of boxes, given name, element type and shape of each; the file does not hold the names."""
    entries, starts, end = [], [], 0
    for _, dtype, shape in tensors:
        entry, length = _entry(dtype, shape)
        entries.append(entry)
        starts.append(end)
        end += length
    return DcpFile(tuple(entries), tuple(starts), end)


@lru_cache(maxsize=4096)
def _entry(dtype: str, shape: Shape) -> tuple[TorchFile, int]:
    """A small torch file of one tensor, and its length in bytes."""
    file = laid_out(dumps(tensor(dtype, shape)), [("", dtype, shape)], _ROOT)
    at, data = file.finish((0,))[-1]
    return file, at + len(data)


def encode_directory(saved: Iterable[tuple[str, TensorHeader]]) -> bytes:
    """`.metadata` for boxes, given with their files in the order in which these hold them."""
    kinds = {
        name: Global(_METADATA, name)
        for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex")
    }
    info = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    size, layout = Global("torch", "Size"), Global("torch.serialization", "_get_layout")
    memory = Global(_METADATA, "_MEM_FORMAT_ENCODING")

    def sized(shape: Shape) -> Call:
        return Call(size, (shape,))

    tensors: dict[str, tuple[TensorHeader, list[Made]]] = {}
    stored: list[tuple[Made, Made]] = []
    for file, boxes in grouped(saved).items():
        laid = dcp_file([(one.name, one.dtype, one.shape) for one in boxes], file)
        ends = (*laid.starts[1:], laid.size)
        for one, start, end in zip(boxes, laid.starts, ends, strict=True):
            chunks = tensors.setdefault(one.name, (one, []))[1]
            key = {"fqn": one.name, "offset": sized(one.starts), "index": len(chunks)}
            place = {"relative_path": file, "offset": start, "length": end - start}
            stored.append((Made(kinds["MetadataIndex"], key), Made(info, place)))
            box = {"offsets": sized(one.starts), "sizes": sized(one.shape)}
            chunks.append(Made(kinds["ChunkStorageMetadata"], box))
    listed = []
    for name, (one, chunks) in tensors.items():
        dtype = Global("torch", TORCH_NAMES[one.dtype])
        properties = (dtype, Call(layout, ("torch.strided",)), False, Call(memory, (0,)), False)
        state = {
            "properties": Made(kinds["TensorProperties"], properties),
            "size": sized(one.whole),
            "chunks": chunks,
        }
        listed.append((name, Made(kinds["TensorStorageMetadata"], state)))
    whole = {"state_dict_metadata": Pairs(tuple(listed)), "planner_data": None, "storage_data": Pairs(tuple(stored))}
    return dumps(Made(kinds["Metadata"], whole))
