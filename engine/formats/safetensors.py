"""Safetensors files: strict reading of headers, deterministic writing of headers and indices."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.headers import (
    ITEM_SIZES,
    FileHeader,
    Named,
    Recorded,
    TensorHeader,
    damaged,
    dense_strides,
    unsupported,
)
from engine.language.documents import portions
from engine.storage.json_text import parse_json
from engine.storage.store import File, Store

_MAX_HEADER = 100_000_000  # the format's own limit, in bytes
_OTHER_TYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")  # of the format


def encode_header(tensors: Sequence[Named], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The header of a file, and the absolute byte offset of each tensor.

    Payload is laid out by element size, largest first, and then in the given order, so that every
    tensor is aligned to its elements. Keys are written in payload order, metadata first and sorted.

    >>> header, offsets = encode_header([("a", "F32", (2,))], {"format": "pt"})
    >>> header[8:].rstrip()
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[int, int] = {}
    end = 0
    for index in sorted(range(len(tensors)), key=lambda i: -ITEM_SIZES[tensors[i][1]]):
        name, dtype, shape = tensors[index]
        size = math.prod(shape) * ITEM_SIZES[dtype]
        starts[index] = end
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, [len(header) + starts[i] for i in range(len(tensors))]


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The layout of a safetensors file: `offsets` of tensors and its `size`, in bytes."""

    header: bytes
    offsets: tuple[int, ...]
    size: int

    def start(self) -> list[tuple[int, bytes]]:
        return [(0, self.header)]

    def after(self, tensor: int, checksum: int) -> list[tuple[int, bytes]]:
        return []

    def finish(self, checksums: Sequence[int]) -> list[tuple[int, bytes]]:
        return []


def safetensors_file(tensors: Sequence[Named], root: str, around: object = None) -> SafetensorsFile:
    """Lay out a file for transformers, with `METADATA`."""
    header, offsets = encode_header(tensors, METADATA)
    sizes = [math.prod(shape) * ITEM_SIZES[dtype] for _, dtype, shape in tensors]
    return SafetensorsFile(header, tuple(offsets), len(header) + sum(sizes))


def split_shards(tensors: Sequence[tuple[str, int]], max_bytes: int) -> list[list[str]]:
    """Names per file, in order: as few files as `max_bytes` of tensors allows, of about equal size.

    A tensor larger than `max_bytes` gets its own file.

    >>> split_shards([("a", 4), ("b", 4), ("c", 4), ("d", 4)], 12)
    [['a', 'b'], ['c', 'd']]
    """
    files = list(portions(tensors, max_bytes))
    if len(files) < 2:
        return files
    low = max(size for _, size in tensors)
    # the smallest limit with the same number of files balances them
    more = bisect_left(range(low, max_bytes), True, key=lambda limit: len(list(portions(tensors, limit))) <= len(files))
    return list(portions(tensors, max(min(low + more, max_bytes), 1)))


def shard_names(count: int) -> list[str]:
    """The file names that transformers expects.

    >>> shard_names(2)
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # for torch weights


def index_json(files: Mapping[str, str], total_size: int) -> bytes:
    """`model.safetensors.index.json`: tensor name → file, and the bytes of all tensors."""
    data = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def read_safetensors(where: File) -> FileHeader:
    """Index a safetensors file. E301 for a header that is not exactly valid, E305 when unreadable."""
    return read_safetensors_metadata(where)[0]


def read_safetensors_metadata(where: File) -> tuple[FileHeader, Mapping[str, str]]:
    """The same with the file's `__metadata__`."""

    def wrong(what: str, tensor: str | None = None) -> EngineError:
        return EngineError(
            "E301",
            f"a safetensors file is damaged: {what}",
            place=Place(where.name, tensor=tensor),
            fix="Copy the file again.",
        )

    with where.open() as file:
        state = file.state
        size = state.size
        start = file.read(8)
        if len(start) < 8:
            raise wrong("shorter than 8 bytes")
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER or 8 + length > size:
            raise wrong(f"its header claims {length} bytes of {size}")
        text = file.read(length)
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise wrong(f"its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise wrong("its header is not an object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise wrong("its metadata is not text")
    tensors: list[tuple[int, int, TensorHeader]] = []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            integers = isinstance(entry["shape"], list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            raise wrong("an entry lacks dtype, shape or data_offsets", name) from None
        if dtype in _OTHER_TYPES:
            raise unsupported("tensor", dtype, Place(where.name, tensor=name))
        if not integers or not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            raise wrong(f"dtype {dtype}, shape {list(shape)}"[:200], name)
        wanted = math.prod(shape) * ITEM_SIZES[dtype]
        if end - begin != wanted:
            raise wrong(f"{end - begin} bytes for {list(shape)} of {dtype}, which needs {wanted}", name)
        tensors.append((begin, end, TensorHeader(name, dtype, shape, dense_strides(shape), 8 + length + begin)))
    position = 0
    for begin, end, header in sorted(tensors, key=lambda t: t[:2]):
        if begin != position:
            raise wrong(f"its data starts at {begin}, the one before ends at {position}", header.name)
        position = end
    if 8 + length + position != size:
        raise wrong(f"{size} bytes, its header describes {8 + length + position}")
    identity = hashlib.sha256(start + text).hexdigest()
    return FileHeader(where, size, tuple(h for _, _, h in tensors), identity, state=state), metadata


# Files with boxes of tensors, as torch's Hugging Face writer saves them, one or more for each rank. They record for
# each box its start in the whole tensor, but not the shape of the whole: that is where the last box ends. Boxes that
# are missing in the middle leave a gap; missing boxes at the end cannot be detected.
_INFO = "DCP_SHARDING_INFO"


def read_boxes(where: File) -> FileHeader:
    """Index a file; each tensor's part has its start, and an end as if it were the last box.

    Raises:
        EngineError: E301 damaged, or with a record of boxes that does not fit its tensors, E303 without one, E305.
    """
    header, metadata = read_safetensors_metadata(where)
    if _INFO not in metadata:
        raise EngineError(
            "E303",
            "a safetensors file does not say which parts of tensors it holds",
            place=Place(where.name),
            got=", ".join(metadata) or "no metadata",
            expected=_INFO,
            fix="A file of whole tensors is no shard. Is it a Hugging Face checkpoint?",
        )
    try:
        info = parse_json(metadata[_INFO].encode())
    except ValueError as error:
        raise damaged(where.name, f"{_INFO} is not JSON: {error}"[:200]) from None
    if not isinstance(info, dict) or set(info) != {t.name for t in header.tensors}:
        raise damaged(where.name, f"{_INFO} is not of the tensors that the file holds")
    tensors = []
    for tensor in header.tensors:
        one = info[tensor.name]
        starts: Any = one.get("saved_offsets") if isinstance(one, dict) else None
        listed = isinstance(starts, list) and all(type(at) is int and 0 <= at < 1 << 62 for at in starts)
        if not listed or len(starts) != len(tensor.shape):
            raise damaged(where.name, f"saved_offsets {starts!r}"[:200], tensor.name)
        whole = tuple(at + size for at, size in zip(starts, tensor.shape, strict=True))
        tensors.append(replace(tensor, recorded=Recorded(tuple(starts), whole)))
    return replace(header, tensors=tuple(tensors))


def read_sharded_safetensors(folder: Store, names: Sequence[str]) -> tuple[FileHeader, ...]:
    """Index the files of a checkpoint; each whole tensor ends where the last of its boxes ends."""
    headers = [read_boxes(File(folder, name)) for name in names]
    wholes: dict[str, tuple[int, ...]] = {}
    for header in headers:
        for tensor in header.tensors:
            known = wholes.get(tensor.name, tensor.whole)
            if len(known) != len(tensor.whole):
                raise damaged(header.name, f"{len(tensor.whole)} dimensions, elsewhere {len(known)}", tensor.name)
            wholes[tensor.name] = tuple(map(max, known, tensor.whole))

    def completed(one: TensorHeader) -> TensorHeader:
        return replace(one, recorded=Recorded(one.starts, wholes[one.name]))

    return tuple(replace(header, tensors=tuple(map(completed, header.tensors))) for header in headers)
