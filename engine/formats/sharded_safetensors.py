"""Safetensors files of tensors' boxes, as torch's Hugging Face writer saves them, one or more for each rank.

`__metadata__` holds `DCP_SHARDING_INFO`: for each tensor, where it begins in the whole. The shape of the whole
stands nowhere. It is where the last box ends; boxes that are missing in the middle leave a gap, those
at the end cannot be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader, Part
from engine.formats.safetensors import read_safetensors_metadata
from engine.formats.unpickle import damaged
from engine.storage.json_text import parse_json
from engine.storage.store import File, Store

_INFO = "DCP_SHARDING_INFO"


def read_boxes(where: File) -> FileHeader:
    """Index a file; each tensor's part has where it begins, and an end as if it were the last.

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
        starts = one.get("saved_offsets") if isinstance(one, dict) else None
        if (
            not isinstance(starts, list)
            or len(starts) != len(tensor.shape)
            or not all(type(at) is int and 0 <= at < 1 << 62 for at in starts)
        ):
            raise damaged(where.name, f"saved_offsets {starts!r}"[:200], tensor.name)
        whole = tuple(at + size for at, size in zip(starts, tensor.shape, strict=True))
        tensors.append(replace(tensor, part=Part(tuple(starts), whole)))
    return replace(header, tensors=tuple(tensors))


def read_sharded_safetensors(folder: Store, names: Sequence[str]) -> tuple[FileHeader, ...]:
    """Index the files of a checkpoint; the shape of each whole is where the last of its boxes ends."""
    headers = [read_boxes(File(folder, name)) for name in names]
    wholes: dict[str, tuple[int, ...]] = {}
    for header in headers:
        for tensor in header.tensors:
            known = wholes.get(tensor.name, tensor.whole)
            if len(known) != len(tensor.whole):
                raise damaged(header.name, f"{len(tensor.whole)} dimensions, elsewhere {len(known)}", tensor.name)
            wholes[tensor.name] = tuple(map(max, known, tensor.whole))
    return tuple(
        replace(
            header,
            tensors=tuple(
                replace(t, part=Part(t.part.starts, wholes[t.name])) for t in header.tensors if t.part is not None
            ),
        )
        for header in headers
    )
