"""The zip directory of a torch-saved file: where each member's payload lies, distrusting all of it."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from engine.errors import EngineError
from engine.formats.unpickle import damaged as file_damaged
from engine.storage.store import OpenFile

_LOCAL = struct.Struct("<4s5H3I2H")
_ALIGNMENT = 64  # of payloads, as torch writes them
_NEAR = 256  # bytes behind the fixed part of a local header, in which the rest of most ends
_MOST_DIRECTORY = 64 << 20  # bytes of a directory that an identity is taken over
_SMALL = 64 << 20  # bytes of a member that is checked against its CRC-32; torch may leave that out, as zero


def read_directory(file: OpenFile, name: str, size: int) -> tuple[dict[str, tuple[int, int]], bytes, bool]:
    """Member name → (absolute payload offset, bytes), the directory's bytes, and whether it has all checksums.

    Members must be stored uncompressed, lie inside the file, not overlap, and be named once. Those
    that describe the tensors, and are not payload, must have the bytes that were saved.
    """
    damaged = partial(file_damaged, name, expected="a zip as torch.save writes it")
    try:
        archive = zipfile.ZipFile(file)
        infos = archive.infolist()
        start = archive.start_dir
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error, RuntimeError) as error:
        raise damaged(f"{size} bytes; {error}") from None
    headers = sorted({info.header_offset for info in infos})
    ends = dict(zip(headers, [*headers[1:], start], strict=False))  # of members, by where they begin
    members: dict[str, tuple[int, int]] = {}
    spans: list[tuple[int, int, str]] = []
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise damaged(f"member {info.filename} is compressed")
        if info.flag_bits & 0x1:
            raise damaged(f"member {info.filename} is encrypted")
        if info.filename in members:
            raise damaged(f"member {info.filename} occurs twice")
        if not 0 <= info.header_offset <= size - _LOCAL.size:
            raise damaged(f"member {info.filename} lies outside the file")
        at = _payload(file, info, ends[info.header_offset], damaged)
        if at + info.file_size > min(size, start):
            raise damaged(f"member {info.filename} ends at {at + info.file_size}, the file's directory is at {start}")
        end = at + info.file_size
        # torch writes a record behind each payload: it proves where that ends
        if info.flag_bits & 0x8 and file.at_hand(end, end + 4):
            file.seek(end)
            if file.read(4) != b"PK\x07\x08":
                raise damaged(f"member {info.filename} has no record at its end, {end}")
        members[info.filename] = (at, info.file_size)
        spans.append((info.header_offset, at + info.file_size, info.filename))
    spans.sort()
    if spans and spans[0][0] != 0:
        raise damaged(f"its first member is at {spans[0][0]}: there is something else before")
    for (_, end, one), (begin, _, two) in pairwise(spans):
        if begin < end:
            raise damaged(f"members {one} and {two} overlap")
    for info in infos:
        at, length = members[info.filename]
        if info.CRC and length <= _SMALL and not info.filename.rpartition("/")[0].endswith("/data"):
            file.seek(at)
            if zlib.crc32(file.read(length)) != info.CRC:
                raise damaged(f"member {info.filename} has other bytes than were saved")
    file.seek(start)
    summed = size - start <= _MOST_DIRECTORY and all(info.CRC for info in infos if info.file_size)
    return members, file.read(min(size - start, _MOST_DIRECTORY)), summed


def _payload(file: OpenFile, info: zipfile.ZipInfo, end: int, damaged: Callable[[str], EngineError]) -> int:
    """Where a member's payload begins: as its local header says, or where that is not at hand, as torch lays it out.

    torch pads the local header such that the payload lies at a multiple of 64 bytes, and begins the next member
    right behind the payload and its record, which has 16 or 24 bytes. Both must give the same place.
    """
    fixed = info.header_offset + _LOCAL.size
    if not file.at_hand(info.header_offset, min(fixed + _NEAR, end)):
        least = fixed + len(info.orig_filename.encode())
        for record in (16, 24) if info.flag_bits & 0x8 else (0,):
            at = end - record - info.file_size
            if at % _ALIGNMENT == 0 and least <= at < least + 2 * _ALIGNMENT:
                return at
    file.seek(info.header_offset)
    local = _LOCAL.unpack(file.read(_LOCAL.size))
    if local[0] != b"PK\x03\x04":
        raise damaged(f"member {info.filename} has no local header")
    if local[3] != zipfile.ZIP_STORED or not _names_alike(file.read(local[9]), info):
        raise damaged(f"member {info.filename} differs between its local header and the directory")
    if not _records_fill(file.read(local[10]), local[10]):
        raise damaged(f"member {info.filename} has a local header of unclear length")
    begin: int = fixed + local[9] + local[10]
    return begin


def _names_alike(raw: bytes, info: zipfile.ZipInfo) -> bool:
    return raw.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") == info.orig_filename


def _records_fill(extra: bytes, length: int) -> bool:
    """Whether the extra field is whole records: one wrong length byte would shift the payload.

    >>> _records_fill(b"FB\\x02\\x00ZZ", 6), _records_fill(b"FB\\x02\\x00Z", 5)
    (True, False)
    """
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra) == length
