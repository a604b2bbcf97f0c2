"""Files that torch saved before the zip format (before 1.6): a sequence of pickles, then the storages."""

from __future__ import annotations

import hashlib
import struct
from typing import Any, BinaryIO

from engine.errors import EngineError, Place
from engine.formats.headers import ITEM_SIZES, big_endian, damaged, unsupported
from engine.formats.unpickle import MAX_PICKLE, load_next

_MAGIC = 0x1950A86A20F9469CFC6C
_TAR = (b"ustar", 257)  # torch's very first format


def load_legacy(file: BinaryIO, name: str, size: int) -> tuple[Any, dict[str, tuple[int, int]], str]:
    """The value, storage key → (offset, bytes) in the file, and an identity.

    A plain pickle of a mapping or text, as configurations may be saved, has no storages.
    """
    limit = min(size, MAX_PICKLE)
    start = file.read(_TAR[1] + 5)
    file.seek(0)
    if start[_TAR[1] :] == _TAR[0]:
        raise EngineError(
            "E303",
            "a tar file, as torch saved before 2017",
            place=Place(name),
            fix="Load it once with an old torch and save it again.",
        )
    if start[:1] != b"\x80":
        raise damaged(
            name,
            f"{size} bytes starting with {start[:4].hex(' ') or 'nothing'}",
            expected="a file that torch.save wrote",
        )
    magic, _ = load_next(file, name, limit)
    if magic != _MAGIC:
        if isinstance(magic, (dict, str)):
            return magic, {}, _identity(file, size, file.tell())
        raise EngineError("E303", "a pickle, but not one that torch saved", place=Place(name), fix="Is it a rank file?")
    load_next(file, name, limit)  # protocol version
    system, _ = load_next(file, name, limit)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise big_endian(name)
    value, storages = load_next(file, name, limit)
    keys, _ = load_next(file, name, limit)
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise damaged(name, "its list of storages is not a list of different keys")
    headers = position = file.tell()
    payload: dict[str, tuple[int, int]] = {}
    for key in keys:
        file.seek(position)
        raw = file.read(8)
        storage = storages.get(key)
        if len(raw) < 8 or storage is None:
            raise damaged(name, f"storage {key[:40]} is not in the file")
        (count,) = struct.unpack("<q", raw)
        if count != storage.count:
            raise damaged(name, f"storage {key[:40]} of {count} elements, its tensors say {storage.count}")
        nbytes = count * ITEM_SIZES.get(storage.dtype or "U8", 0)
        if nbytes == 0 < count:
            raise unsupported("storage", storage.dtype, Place(name))
        if position + 8 + nbytes > size:
            raise damaged(name, f"storage {key[:40]} ends outside the file of {size} bytes")
        payload[key] = (position + 8, nbytes)
        position += 8 + nbytes
    return value, payload, _identity(file, size, headers)


def _identity(file: BinaryIO, size: int, headers: int) -> str:
    file.seek(0)
    return hashlib.sha256(struct.pack("<Q", size) + file.read(headers)).hexdigest()
