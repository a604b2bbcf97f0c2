"""Reads source files again to check them: the CRC-32 of zip members, `.md5` sidecars, and Meta's `checklist.chk`."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable

from isal import isal_zlib

from engine.errors import EngineError
from engine.formats.headers import damaged
from engine.storage.store import File, OpenFile, Positioned

_BLOCK = 1 << 20
_MD5 = re.compile(rb"\b[0-9a-f]{32}\b")


def check_files(files: Iterable[File], advance: Callable[[int], None]) -> list[str]:
    """Check files against their recorded checksums; returns the names of files and sidecars without any.

    Torch can omit all checksums of a zip: if all are zero, there are none, and nothing is damaged.

    Raises:
        EngineError: E301 for the first file that has changed since it was saved, E305 when unreadable.
    """
    unchecked: list[str] = []
    for file in files:
        try:
            checked = _check_members(file, advance)
            for sidecar, alone in ((file.beside(file.name + ".md5"), True), (file.beside("checklist.chk"), False)):
                compared = sidecar.exists and _check_md5(file, sidecar, alone)
                checked = checked or compared
                unchecked += [sidecar.name] if alone and sidecar.exists and not compared else []
        except (zipfile.BadZipFile, ValueError, OverflowError, struct.error, RuntimeError, OSError) as error:
            raise _damaged(file, None, str(error)[:200], "a zip as torch.save writes it") from None
        if not checked:
            unchecked.append(file.name)
    return unchecked


def _check_members(file: File, advance: Callable[[int], None]) -> bool:
    """Whether every zip of a file has checksums; torch's distributed checkpoints have several in a row."""
    checked = True
    with file.open() as opened:
        if opened.read(4) != b"PK\x03\x04":
            return False
        end = opened.state.size
        while end:
            try:
                infos = zipfile.ZipFile(_front(opened, end)).infolist()
            except zipfile.BadZipFile:
                if end == opened.state.size:
                    raise
                return False  # something else is before it
            some = any(info.CRC for info in infos)
            for info in infos if some else ():
                _check_member(file, opened, info, advance)
            checked = checked and some
            end = min((info.header_offset for info in infos), default=0)
    return checked


def _front(file: OpenFile, end: int) -> OpenFile:
    """The first `end` bytes of a file, as a file."""

    def read(at: int, target: memoryview) -> int:
        file.seek(at)
        return file.readinto(target)

    return OpenFile(Positioned(end, read), file.state)


def _check_member(file: File, opened: OpenFile, info: zipfile.ZipInfo, advance: Callable[[int], None]) -> None:
    buffer = memoryview(bytearray(_BLOCK))
    opened.seek(info.header_offset + 26)
    opened.seek(sum(struct.unpack("<2H", opened.read(4))), 1)
    left, found = info.file_size, 0
    while left:
        count = opened.readinto(buffer[: min(left, _BLOCK)])
        if not count:
            break
        found = isal_zlib.crc32(buffer[:count], found)
        left -= count
        advance(count)
    if left or found != info.CRC:
        raise _damaged(file, info.filename, f"CRC-32 {found:08x}", f"{info.CRC:08x}, as recorded at saving")


def _check_md5(file: File, sidecar: File, alone: bool) -> bool:
    """Whether the sidecar holds an MD5 of the file, with which it agrees: its only one, or the one before its name."""
    named = re.escape(os.fsencode(file.name.lower()))
    text = _MD5 if alone else re.compile(rb"^[0-9a-f]{32}(?= [ *]" + named + rb"\s*$)", re.MULTILINE)
    with sidecar.open() as opened:
        recorded = text.search(opened.read(_BLOCK).lower())
    if recorded is None:
        return False
    with file.open() as opened:
        total = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False))
    wanted = recorded[0].decode()
    if total.hexdigest() != wanted:
        raise _damaged(file, None, f"MD5 {total.hexdigest()}", f"{wanted}, as in {sidecar.name}")
    return True


def _damaged(file: File, member: str | None, got: str, expected: str) -> EngineError:
    return damaged(file.name, got, member, expected=expected, how=": its bytes are not those that were saved")
