"""A zip as torch saves it: finds the payload of each storage, and trusts nothing in the file.

A rank file is one zip, and a file of a distributed checkpoint is a sequence of them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from engine.errors import EngineError, Place, first_of
from engine.formats.headers import big_endian, damaged
from engine.formats.unpickle import MAX_PICKLE
from engine.storage.store import OpenFile

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END, _LOCATOR, _RECORD = 22, 20, 56  # bytes of the records that end a zip; the latter two for 64-bit numbers
_RECORDS = (16, 24)  # bytes of a record after a payload
_ALIGNMENT = 64  # of payloads, as torch writes them
_HEAD, _TAIL = 2048, 1536  # bytes at either end that are read at once: enough to describe a small zip
_NEAR = 256  # bytes after the fixed part of a local header: the rest of most headers fits in them
_MOST_DIRECTORY = 64 << 20  # bytes of a directory
_CLOSED = 0x2061  # flags of encrypted or patched members, which torch does not read either
_LONG = 0xFFFFFFFF  # means that the number is in the extra field


class _Member(NamedTuple):  # a NamedTuple: there can be a hundred thousand
    """A member, as in the directory: `header` is the offset of its local header."""

    name: str
    raw: bytes
    header: int
    size: int
    crc: int
    recorded: bool  # whether a record after its payload holds its CRC-32


class TorchZip:
    """The members of a zip: uncompressed, inside the zip, without overlaps, each name once.

    Attributes:
        root: the folder inside it.
        entries: the bytes of its directory; `ends`: those of the records after it.
        summed: whether the directory has checksums of all members.
    """

    def __init__(self, file: OpenFile, name: str, offset: int, length: int) -> None:
        """Args: offset, length: its place in the file; `name` is the file's name, for messages.

        Raises:
            EngineError: E301 for a zip that is damaged, E303 for one that torch did not save.
        """
        if length < _END or offset + length > file.state.size:
            raise damaged(name, f"bytes {offset} to {offset + length} of a file of {file.state.size}")
        self._file, self._name, self._offset, self._length = file, name, offset, length
        self._head, self._tail = b"", b""
        self._head = self._read(0, min(length, _HEAD))
        self._tail = self._read(max(length - _TAIL, 0), min(length, _TAIL))
        self._start, self.entries, self.ends, count = self._directory()
        members = self._listed(count)
        headers = sorted(one.header for one in members.values())
        if headers and headers[0] != 0:
            raise self._damaged(f"its first member is at {headers[0]}: there is something else before")
        self._next = dict(zip(headers, [*headers[1:], self._start], strict=False))
        if len(self._next) != len(headers):
            raise self._damaged("two of its members begin at one place")
        self._members = members
        self.summed = all(one.crc for one in members.values() if one.size)
        self.root = self._root()
        if f"{self.root}/byteorder" in members and (order := self._content("byteorder")) != b"little":
            raise big_endian(name, order[:16])

    def pickle(self) -> bytes:
        """The pickle, checked against its CRC-32."""
        return self._content("data.pkl")

    def payload(self) -> dict[str, tuple[int, int]]:
        """Storage key → (offset in the file, bytes)."""
        prefix = f"{self.root}/data/"
        listed = {name: one for name, one in self._members.items() if name.startswith(prefix)}
        return {name[len(prefix) :]: (self._offset + self._place(one), one.size) for name, one in listed.items()}

    def _damaged(self, what: str) -> EngineError:
        where = f"the zip at byte {self._offset}: " if self._offset else ""
        return damaged(self._name, where + what, expected="a zip as torch.save writes it")

    def _read(self, at: int, size: int) -> bytes:
        """Exactly these bytes of the zip."""
        if at + size <= len(self._head):
            return self._head[at : at + size]
        tail = self._length - len(self._tail)
        if at >= tail and at + size <= self._length:
            return self._tail[at - tail : at - tail + size]
        self._file.seek(self._offset + at)
        data = self._file.read(size) if at + size <= self._length else b""
        if len(data) != size:
            raise self._damaged(f"bytes {at} to {at + size} of {self._length} cannot be read")
        return data

    def _root(self) -> str:
        roots = [m[: -len("/data.pkl")] for m in self._members if m.endswith("/data.pkl") and m.count("/") == 1]
        if len(roots) != 1:
            raise EngineError(
                "E303",
                "a zip, but not one that torch saved",
                place=Place(self._name),
                got=first_of(list(self._members), 5),
                expected="one member NAME/data.pkl",
                fix="TorchScript archives and other zips are not checkpoints.",
            )
        if other := next((name for name in self._members if not name.startswith(f"{roots[0]}/")), None):
            raise self._damaged(f"member {other} is not in {roots[0]}/, where all others are")
        return roots[0]

    def _content(self, name: str) -> bytes:
        """The bytes of a member that describes the tensors, checked by CRC-32; torch may omit that, as zero."""
        one = self._members[f"{self.root}/{name}"]
        if one.size > MAX_PICKLE:
            raise self._damaged(f"{name} of {one.size} bytes")
        data = self._read(self._place(one), one.size)
        if one.crc and zlib.crc32(data) != one.crc:
            raise self._damaged(f"member {one.name} has other bytes than were saved")
        return data

    def _directory(self) -> tuple[int, bytes, bytes, int]:
        """The offset of the directory, its bytes, those of the records that end it, and its number of members."""
        begin = self._length - _END
        end = self._read(begin, _END)
        if not end.startswith(b"PK\x05\x06") or not end.endswith(b"\0\0"):
            raise self._damaged(f"{self._length} bytes, cut short or with something after it")
        disks, here, count, length, at = struct.unpack("<I2H2I", end[4:20])
        locator = self._read(begin - _LOCATOR, _LOCATOR) if begin >= _LOCATOR + _RECORD else b""
        if locator.startswith(b"PK\x06\x07"):
            begin -= _LOCATOR + _RECORD
            record = self._read(begin, _RECORD)
            if not record.startswith(b"PK\x06\x06") or locator[8:16] != begin.to_bytes(8, "little"):
                raise self._damaged(
                    "its record of 64-bit numbers is not where its end says, or there is something else before"
                )
            disks, here, count, length, at = struct.unpack("<5Q", record[16:])
            disks = disks or locator[4:8] + locator[16:] != bytes((0, 0, 0, 0, 1, 0, 0, 0))
        if disks or here != count:
            raise self._damaged("a part of a zip of several")
        if count == 0:
            return begin, b"", b"", 0
        if at + length != begin or length > _MOST_DIRECTORY:
            before = " there is something else before, or" if at + length < begin else ""
            raise self._damaged(
                f"its directory of {length} bytes at {at} does not end at {begin}:{before} it is damaged"
            )
        both = self._read(at, self._length - at)
        return at, both[:length], both[length:], count

    def _listed(self, count: int) -> dict[str, _Member]:
        """The members, from the directory's entries."""
        entries, found = self.entries, dict[str, _Member]()
        at = 0
        while at + _CENTRAL.size <= len(entries):
            fields = _CENTRAL.unpack_from(entries, at)
            flags, size, header = fields[3], fields[9], fields[16]
            at += _CENTRAL.size
            raw, extra = entries[at : at + fields[10]], entries[at + fields[10] : at + fields[10] + fields[11]]
            at += sum(fields[10:13])
            name = raw.decode("utf-8" if flags & 0x800 else "cp437", "replace")
            if fields[0] != b"PK\x01\x02":
                raise self._damaged(f"an entry of its directory begins with {fields[0]!r}")
            if fields[4] or fields[8] != size:
                raise self._damaged(f"member {name} is compressed")
            if flags & _CLOSED:
                raise self._damaged(f"member {name} is encrypted")
            if fields[13] > 1:
                raise self._damaged(f"member {name} is on disk {fields[13]}")
            if name in found:
                raise self._damaged(f"member {name} occurs twice")
            if _LONG in (size, header):
                size, header = _wide(extra, size, header)
            found[name] = _Member(name, raw, header, size, fields[7], bool(flags & 0x8))
        if at != len(entries) or len(found) != count:
            raise self._damaged(f"{len(found)} of {count} members in its directory")
        return found

    def _place(self, one: _Member) -> int:
        """The offset of a member's payload: from its local header, or, if that was not read, from torch's alignment.

        torch pads the local header such that the payload is at a multiple of 64 bytes, and starts the next member
        right after the payload and its record, which has 16 or 24 bytes. Both must give the same place.
        """
        fixed, after = one.header + _LOCAL.size, self._next[one.header]
        close = min(fixed + _NEAR, after)
        if close > len(self._head) and not self._file.at_hand(self._offset + one.header, self._offset + close):
            least = fixed + len(one.raw)
            for record in _RECORDS if one.recorded else (0,):
                at = after - record - one.size
                if at % _ALIGNMENT == 0 and least <= at < least + 2 * _ALIGNMENT:
                    return at
        begins = self._read(one.header, max(close, fixed) - one.header)
        local = _LOCAL.unpack_from(begins)
        if local[0] != b"PK\x03\x04":
            raise self._damaged(f"member {one.name} has no local header")
        length = local[9] + local[10]
        rest = begins[_LOCAL.size : _LOCAL.size + length]
        if len(rest) < length:
            rest = self._read(fixed, length)
        if local[3] or rest[: local[9]] != one.raw:
            raise self._damaged(f"member {one.name} differs between its local header and the directory")
        extra = rest[local[9] :]
        if max((end for _, _, end in _records(extra)), default=0) != len(extra):  # one wrong length moves the payload
            raise self._damaged(f"member {one.name} has a local header of unclear length")
        begin = fixed + len(rest)
        end = begin + one.size
        if end > after:
            raise self._damaged(f"member {one.name} ends at {end}, what follows it is at {after}: they overlap")
        # torch writes a record after each payload, which proves the payload's end, or its place if it is far away
        near = after - end not in _RECORDS or self._file.at_hand(self._offset + end, self._offset + end + 4)
        if one.recorded and near and self._read(end, 4) != b"PK\x07\x08":
            raise self._damaged(f"member {one.name} has no record at its end, {end}")
        return begin


def _wide(extra: bytes, size: int, header: int) -> tuple[int, int]:
    """A member's size and offset, from an extra field if they do not fit in 32 bits."""
    for kind, at, end in _records(extra):
        if kind == 1:
            fields = extra[at:end]
            wide = iter(value for (value,) in struct.iter_unpack("<Q", fields[: len(fields) // 8 * 8]))
            if size == _LONG:  # the packed size, which is equal, comes second
                size = next(wide, size)
                next(wide, None)
            header = next(wide, header) if header == _LONG else header
    return size, header


def _records(extra: bytes) -> Iterator[tuple[int, int, int]]:
    """The kind of each record of an extra field, and where its content begins and ends, by its length.

    >>> list(_records(b"FB\\x02\\x00ZZ"))
    [(16966, 4, 6)]
    """
    end = 0
    while end + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, end)
        at, end = end + 4, end + 4 + length
        yield kind, at, end
