"""Zips that say one thing to one reader and another to the next, and those that swell."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.attacks import attack
from tests.attacks.pickles import RANK, with_members

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def members(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def patch(path: Path, change: Callable[[bytearray], object]) -> None:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def entry_of(raw: bytes, ending: str) -> int:
    """Where the directory's entry of a member starts."""
    at = raw.index(_CENTRAL)
    while raw[at : at + 4] == _CENTRAL:
        name, extra, comment = struct.unpack_from("<3H", raw, at + 28)
        if raw[at + 46 : at + 46 + name].decode().endswith(ending):
            return at
        at += 46 + name + extra + comment
    raise LookupError(ending)


@attack("training", "E301", "twice")
def a_second_data_pkl_of_the_same_name(folder: Path) -> None:
    listed = members(folder / RANK)
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        for name, data in [*listed, listed[0]]:
            archive.writestr(name, data)


@attack("training", "E303", "not one that torch saved")
def a_second_data_pkl_in_another_folder(folder: Path) -> None:
    listed = members(folder / RANK)
    with zipfile.ZipFile(folder / RANK, "a") as archive:
        archive.writestr("other/data.pkl", listed[0][1])


@attack("training", "E301", "where all others are")
def a_second_data_pkl_in_capitals(folder: Path) -> None:
    with zipfile.ZipFile(folder / RANK, "a") as archive:
        archive.writestr("MODEL_TP1_PP0/DATA.PKL", b"\x80\x02cos\nsystem\n)R.")


@attack("training", "E301", "where all others are")
def members_that_climb_out_of_the_folder(folder: Path) -> None:
    with zipfile.ZipFile(folder / RANK, "a") as archive:
        archive.writestr("../../../../../../evil/ran", b"x")
        archive.writestr("/etc/ran", b"x")
        archive.writestr("C:\\ran", b"x")


@attack("training", "E303", "")
def a_data_pkl_without_folder(folder: Path) -> None:
    listed = members(folder / RANK)
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        for name, data in listed:
            archive.writestr(name.partition("/")[2], data)


@attack("training", "E301", "compressed")
def a_compressed_data_pkl(folder: Path) -> None:
    listed = members(folder / RANK)
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        for name, data in listed:
            kind = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
            archive.writestr(name, data, kind)


@attack("training", "E301", "compressed")
def a_zip_bomb_for_a_storage(folder: Path) -> None:
    listed = members(folder / RANK)
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        for name, data in listed:
            bomb = "/data/" in name
            archive.writestr(name, b"\0" * (64 << 20) if bomb else data, zipfile.ZIP_DEFLATED if bomb else None)


@attack("training", "E301", "")
def a_storage_of_4_gigabytes_in_the_directory(folder: Path) -> None:
    def change(raw: bytearray) -> None:
        struct.pack_into("<II", raw, entry_of(raw, "/data/0") + 20, 0xFFFFFFF0, 0xFFFFFFF0)

    patch(folder / RANK, change)


@attack("training", "E301", "")
def sizes_of_64_bits_that_are_absurd(folder: Path) -> None:
    listed = members(folder / RANK)
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        for name, data in listed:
            info = zipfile.ZipInfo(name)
            if "/data/" in name:
                info.extra = struct.pack("<2H3Q", 1, 24, (1 << 63) - 1, (1 << 63) - 1, (1 << 63) - 1)
            archive.writestr(info, data)
    patch(folder / RANK, lambda raw: struct.pack_into("<II", raw, entry_of(raw, "/data/0") + 20, *[0xFFFFFFFF] * 2))


@attack("training", "E301", "")
def sizes_of_64_bits_that_are_cut_short(folder: Path) -> None:
    listed = members(folder / RANK)
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        for name, data in listed:
            info = zipfile.ZipInfo(name)
            if "/data/" in name:
                info.extra = struct.pack("<2HQI", 1, 24, len(data), 0)
            archive.writestr(info, data)
    patch(folder / RANK, lambda raw: struct.pack_into("<II", raw, entry_of(raw, "/data/0") + 20, *[0xFFFFFFFF] * 2))


@attack("training", "E301", "")
def a_header_offset_beyond_the_file(folder: Path) -> None:
    patch(folder / RANK, lambda raw: struct.pack_into("<I", raw, entry_of(raw, "/data/0") + 42, 0xFFFFFF00))


@attack("training", "E301", "")
def two_members_at_one_place(folder: Path) -> None:
    def change(raw: bytearray) -> None:
        (at,) = struct.unpack_from("<I", raw, entry_of(raw, "/data.pkl") + 42)
        struct.pack_into("<I", raw, entry_of(raw, "/version") + 42, at)

    patch(folder / RANK, change)


@attack("training", "E301", "encrypted")
def a_member_that_claims_to_be_encrypted(folder: Path) -> None:
    def change(raw: bytearray) -> None:
        raw[entry_of(raw, "/data.pkl") + 8] |= 1

    patch(folder / RANK, change)


@attack("training", "E301", "encrypted")
def a_member_that_claims_to_be_a_patch(folder: Path) -> None:
    def change(raw: bytearray) -> None:
        raw[entry_of(raw, "/data/0") + 8] |= 0x20

    patch(folder / RANK, change)


@attack("training", "E301", "on disk 256")
def a_member_on_another_disk(folder: Path) -> None:
    patch(folder / RANK, lambda raw: raw.__setitem__(entry_of(raw, "/data/0") + 35, 1))


@attack("training", "E301", "where all others are")
def a_member_beside_the_folder_of_all_others(folder: Path) -> None:
    """torch does not load such a file."""
    patch(folder / RANK, lambda raw: raw.__setitem__(entry_of(raw, "/byteorder") + 46, ord("X")))


@attack("training", "E301", "a part of a zip")
def a_directory_that_is_a_part_of_one(folder: Path) -> None:
    with_members(folder / RANK, lambda _, data: data)
    patch(folder / RANK, lambda raw: raw.__setitem__(raw.rindex(_END) + 4, 1))


@attack("training", "E301", "local header")
def a_member_of_another_name_in_its_local_header(folder: Path) -> None:
    patch(folder / RANK, lambda raw: raw.__setitem__(raw.index(b"data.pkl"), ord("X")))


@attack("training", "E301", "")
def a_directory_of_more_entries_than_there_are(folder: Path) -> None:
    with_members(folder / RANK, lambda _, data: data)  # without the 64-bit record, which would count

    def change(raw: bytearray) -> None:
        end = raw.rindex(_END)
        (size,) = struct.unpack_from("<I", raw, end + 12)
        struct.pack_into("<I", raw, end + 12, size + 46)

    patch(folder / RANK, change)


@attack("training", "E301", "")
def a_directory_at_the_end_of_the_address_space(folder: Path) -> None:
    with_members(folder / RANK, lambda _, data: data)
    patch(folder / RANK, lambda raw: struct.pack_into("<I", raw, raw.rindex(_END) + 16, 0xFFFFFFFE))


@attack("training", "E301", "")
def a_directory_of_64_bits_that_is_absurd(folder: Path) -> None:
    raw = (folder / RANK).read_bytes()
    end = raw.rindex(_END)
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 62, 1 << 62)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    (folder / RANK).write_bytes(raw[:end] + record + locator + raw[end:])


@attack("training", "E301", "")
def a_zip_of_several_disks(folder: Path) -> None:
    raw = (folder / RANK).read_bytes()
    end = raw.rindex(_END)
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 7, 7, 1, 1, 1, 1)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 7, end, 9)
    (folder / RANK).write_bytes(raw[:end] + record + locator + raw[end:])


@attack("training", "E301", "something else before")
def a_zip_behind_another(folder: Path) -> None:
    """The last directory is that of the second zip: readers disagree about which one counts."""
    raw = (folder / RANK).read_bytes()
    (folder / RANK).write_bytes(raw + raw)


@attack("training", "E301", "")
def a_zip_in_the_comment_of_another(folder: Path) -> None:
    raw = (folder / RANK).read_bytes()
    patch(folder / RANK, lambda old: struct.pack_into("<H", old, old.rindex(_END) + 20, min(len(raw), 0xFFFF)))
    (folder / RANK).write_bytes((folder / RANK).read_bytes() + raw[-0xFFFF:])


@attack("training", "E301", "")
def text_before_a_zip(folder: Path) -> None:
    (folder / RANK).write_bytes(b"#!/bin/sh\n" + (folder / RANK).read_bytes())


@attack("training", "E301", "something else before")
def a_zip_that_knows_of_what_is_before_it(folder: Path) -> None:
    """Its offsets are right, and a reader that begins at the first byte finds something else."""
    listed = members(folder / RANK)
    (folder / RANK).write_bytes(_LOCAL + b"of a member that no directory has")
    with zipfile.ZipFile(folder / RANK, "a") as archive:
        for name, data in listed:
            archive.writestr(name, data)


@attack("training", None)
def a_zip_behind_an_old_rank_file(folder: Path) -> None:
    """The first bytes decide what a file is, as for torch.load: the rest is never looked at."""
    state, zipped = torch.load(folder / RANK, weights_only=True), (folder / RANK).read_bytes()
    torch.save(state, folder / RANK, _use_new_zipfile_serialization=False)
    (folder / RANK).write_bytes((folder / RANK).read_bytes() + zipped)


@attack("training", None)
def twenty_thousand_more_members(folder: Path) -> None:
    with zipfile.ZipFile(folder / RANK, "a") as archive:
        for n in range(20_000):
            archive.writestr(f"model_tp1_pp0/more/{n}", b"")


@attack("training", "E301", "is not in the file")
def a_storage_left_out(folder: Path) -> None:
    with_members(folder / RANK, lambda name, data: None if name.endswith("/data/0") else data)


@attack("training", "E301", "")
def a_storage_cut_short(folder: Path) -> None:
    with_members(folder / RANK, lambda name, data: data[:-2] if name.endswith("/data/0") else data)


@attack("training", "E303", "big-endian")
def a_byte_order_that_is_not_ours(folder: Path) -> None:
    with_members(folder / RANK, lambda name, data: b"big" if name.endswith("/byteorder") else data)


@attack("training", "E303", "big-endian")
def a_byte_order_that_is_none(folder: Path) -> None:
    with_members(folder / RANK, lambda name, data: b"" if name.endswith("/byteorder") else data)


@attack("training", "E303", "not one that torch saved")
def a_zip_without_members(folder: Path) -> None:
    with zipfile.ZipFile(folder / RANK, "w"):
        pass
    (folder / RANK).write_bytes(b"PK\x03\x04" + (folder / RANK).read_bytes())


@attack("training", "E301", "other bytes than were saved")
def one_bit_of_the_pickle_flipped(folder: Path) -> None:
    """A storage's offset, say: the tensor would be read from elsewhere, and nothing would look wrong."""

    def change(raw: bytearray) -> None:
        raw[raw.index(b"Wqkv.weight")] ^= 0x20

    patch(folder / RANK, change)


@attack("training", "E301", "")
def zeros_where_the_file_ended(folder: Path) -> None:
    size = (folder / RANK).stat().st_size
    with (folder / RANK).open("r+b") as file:
        file.truncate(size // 2)
        file.truncate(size)


@attack("training", "E301", "")
def nothing_but_zeros(folder: Path) -> None:
    (folder / RANK).write_bytes(b"\0" * (folder / RANK).stat().st_size)


@attack("training", "E301", "")
def an_empty_file(folder: Path) -> None:
    (folder / RANK).write_bytes(b"")


@attack("training", "E301", "")
def bytes_behind_the_end(folder: Path) -> None:
    with (folder / RANK).open("ab") as file:
        file.write(b"\0" * 100_000)
