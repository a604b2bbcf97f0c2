"""Verifying an output against its own manifest: every tensor and every file, streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.headers import FileHeader, TensorHeader
from engine.checkpoint.rank_files import open_regular, read_rank_file
from engine.checkpoint.safetensors_files import read_safetensors
from engine.checkpoint.sources import SourceFiles
from engine.errors import EngineError, Place
from engine.run.digests import ALGORITHM, content_id, digest_of
from engine.run.manifest import NAME, VERSION

_BLOCK = 1 << 20
_MOST = 1 << 30  # bytes of a manifest


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked of an output, and what is wrong with it."""

    tensors: int
    files: int
    nbytes: int
    content_id: str
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "files": self.files,
            "bytes": self.nbytes,
            "content_id": self.content_id,
            "problems": list(self.problems),
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output; E304 when it has none, E301 when it cannot be read."""
    path = folder / NAME
    if not path.is_file():
        raise EngineError(
            "E304",
            f"there is no `{NAME}`",
            place=Place(str(folder)),
            expected="an output of this engine",
            fix="Only what `engine run`, `reverse` or `reshard` wrote can be verified.",
        )
    with open_regular(path) as file:
        raw = file.read(_MOST)
    try:
        data = json.loads(raw)
        known = data["manifest"] == VERSION
        shaped = all(isinstance(data[key], dict) for key in ("tensors", "files"))
    except (ValueError, KeyError, TypeError, RecursionError):
        known = shaped = False
        data = {}
    if not known or not shaped:
        raise EngineError(
            "E301",
            f"`{NAME}` cannot be read",
            place=Place(str(path)),
            expected=f"a manifest of version {VERSION}",
            fix="Convert again.",
        )
    result: dict[str, Any] = data
    return result


def verify(folder: Path, advance: Callable[[int], None] = lambda _: None) -> Verified:
    """Read every byte of an output and compare it with the manifest.

    Raises:
        EngineError: E304 or E301 when there is no manifest to verify with.
    """
    data = read_manifest(folder)
    tensors: Mapping[str, Any] = data["tensors"]
    problems: list[str] = []
    for name, wanted in data["files"].items():
        problems += _check_small(folder, str(name), str(wanted))
    headers: dict[str, FileHeader] = {}
    for file in dict.fromkeys(str(entry.get("file")) for entry in tensors.values()):
        try:
            headers[file] = _read(folder, file)
        except EngineError as error:
            problems.append(f"{file}: {error.message}")
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    nbytes = 0
    for file, header in headers.items():
        with SourceFiles((header,)) as sources:
            here = {str(k)[len(file) + 1 :] if str(k).startswith(f"{file}:") else str(k): (k, v)
                    for k, v in tensors.items() if v.get("file") == file}  # fmt: skip
            for one in header.tensors:
                key, entry = here.pop(one.name, (None, None))
                if key is None or entry is None:
                    problems.append(f"{file}:{one.name} is not in the manifest")
                    continue
                digest = digest_of(_blocks(sources, one, advance)) if "digest" in entry else ""
                nbytes += one.nbytes
                found[key] = (one.dtype, one.shape, digest)
                if [one.dtype, list(one.shape)] != [entry.get("dtype"), entry.get("shape")]:
                    problems.append(f"{file}:{one.name} is {one.dtype} {list(one.shape)}, not what was written")
                elif digest != entry.get("digest", ""):
                    problems.append(f"{file}:{one.name} has other bytes than were written")
            problems += [f"{file}:{name} is missing" for name in here]
    total = content_id(found) if data.get("digest") == ALGORITHM else ""
    if total != data.get("content_id", "") and not problems:
        problems.append("the content id is not that of the tensors")
    return Verified(len(found), len(data["files"]) + len(headers), nbytes, total, tuple(problems))


def _check_small(folder: Path, name: str, wanted: str) -> list[str]:
    if "/" in name or name in ("", ".", ".."):
        return [f"{name!r} is not the name of a file of the output"]
    try:
        with open_regular(folder / name) as file:
            total = hashlib.sha256()
            while block := file.read(_BLOCK):
                total.update(block)
    except EngineError as error:
        return [f"{name}: {error.message}"]
    return [] if total.hexdigest() == wanted else [f"{name} was changed"]


def _read(folder: Path, name: str) -> FileHeader:
    if "/" in name or name in ("", ".", ".."):
        raise EngineError("E301", "not the name of a file of the output", place=Place(name))
    path = folder / name
    return read_safetensors(path) if name.endswith(".safetensors") else read_rank_file(path)


def _blocks(sources: SourceFiles, one: TensorHeader, advance: Callable[[int], None]) -> Any:
    """The bytes of a contiguous tensor."""
    buffer = memoryview(bytearray(min(_BLOCK, max(one.nbytes, 1))))
    for start in range(0, one.nbytes, _BLOCK):
        block = buffer[: min(_BLOCK, one.nbytes - start)]
        sources.read_into(0, one.offset + start, block)
        advance(len(block))
        yield block
