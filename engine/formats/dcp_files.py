"""Torch's distributed checkpoints, written: files of small torch files, and the directory that says where they lie.

What is put into `.metadata` is what torch 2.3 wrote, which every later release reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.formats.headers import Part
from engine.formats.pickling import Call, Global, Made, Pairs, dumps, tensor
from engine.formats.standins import DTYPES
from engine.formats.torch_files import TorchFile, laid_out
from engine.language.documents import grouped

Shape = tuple[int, ...]
_ROOT = "archive"


@dataclass(frozen=True, slots=True)
class Saved:
    """A box of a tensor that is written: its file, and where it lies in the whole."""

    file: str
    name: str
    dtype: str
    shape: Shape
    part: Part


@dataclass(frozen=True, slots=True)
class DcpFile:
    """Where everything of a `.distcp` file goes: small torch files one after the other, at `starts`."""

    entries: tuple[TorchFile, ...]
    starts: tuple[int, ...]
    size: int

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(at + entry.offsets[0] for at, entry in zip(self.starts, self.entries, strict=True))

    def start(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of what comes before the payload of each entry."""
        both = zip(self.starts, self.entries, strict=True)
        return [(base + at, data) for base, entry in both for at, data in entry.start()]

    def after(self, tensor: int, checksum: int) -> list[tuple[int, bytes]]:
        """(offset, bytes) of the rest of an entry, given the CRC-32 of its tensor."""
        base, entry = self.starts[tensor], self.entries[tensor]
        return [(base + at, data) for at, data in (*entry.after(0, checksum), *entry.finish((checksum,)))]

    def finish(self, checksums: Sequence[int]) -> list[tuple[int, bytes]]:
        return []


def dcp_file(tensors: Sequence[tuple[str, str, Shape]], root: str, around: object = None) -> DcpFile:
    """Lay out a file of boxes, given name, element type and shape of each; names do not stand in it."""
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


_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = {name: torch for torch, name in reversed(DTYPES.items())}


def encode_directory(saved: Iterable[Saved]) -> bytes:
    """`.metadata` of boxes, which lie in their files in the order given."""
    kinds = {
        name: Global(_METADATA, name)
        for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex")
    }
    info = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    size, layout = Global("torch", "Size"), Global("torch.serialization", "_get_layout")
    memory = Global(_METADATA, "_MEM_FORMAT_ENCODING")

    def sized(shape: Shape) -> Call:
        return Call(size, (shape,))

    tensors: dict[str, tuple[Saved, list[Made]]] = {}
    stored: list[tuple[Made, Made]] = []
    for file, boxes in grouped((one.file, one) for one in saved).items():
        laid = dcp_file([(one.name, one.dtype, one.shape) for one in boxes], file)
        ends = (*laid.starts[1:], laid.size)
        for one, start, end in zip(boxes, laid.starts, ends, strict=True):
            chunks = tensors.setdefault(one.name, (one, []))[1]
            key = {"fqn": one.name, "offset": sized(one.part.starts), "index": len(chunks)}
            place = {"relative_path": file, "offset": start, "length": end - start}
            stored.append((Made(kinds["MetadataIndex"], key), Made(info, place)))
            box = {"offsets": sized(one.part.starts), "sizes": sized(one.shape)}
            chunks.append(Made(kinds["ChunkStorageMetadata"], box))
    listed = []
    for name, (one, chunks) in tensors.items():
        dtype = Global("torch", _NAMES[one.dtype])
        properties = (dtype, Call(layout, ("torch.strided",)), False, Call(memory, (0,)), False)
        state = {
            "properties": Made(kinds["TensorProperties"], properties),
            "size": sized(one.part.whole),
            "chunks": chunks,
        }
        listed.append((name, Made(kinds["TensorStorageMetadata"], state)))
    whole = {"state_dict_metadata": Pairs(tuple(listed)), "planner_data": None, "storage_data": Pairs(tuple(stored))}
    return dumps(Made(kinds["Metadata"], whole))
