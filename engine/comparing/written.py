"""An output against its own manifest: every tensor, every file, and nothing else that a program would read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError, Place, printable
from engine.formats.headers import FileHeader, TensorHeader
from engine.formats.rank_files import read_rank_file
from engine.formats.safetensors import INDEX, read_safetensors
from engine.language.layout_file import load_layout
from engine.run.digests import ALGORITHM, content_id, digest_of
from engine.run.execute import read_checkpoint
from engine.run.manifest import NAME
from engine.storage.json_text import parse_json
from engine.storage.sources import SourceFiles
from engine.storage.store import File, Store

_BLOCK = 1 << 20
_LISTED = 20  # files that are told one by one

# Files that transformers, trainers and other programs read or run, by what they are.
_READ = {
    "weights": r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|npz|onnx|distcp)|.*\.index\.json|\.metadata",
    "an adapter": r"adapter_.*",
    "a pickle": r".*\.(pkl|pickle|joblib|dill)",
    "code": r".*\.(py|pyc|so|sh)",
    "what makes a model": r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|additional_chat|config|"
    r"generation_config|processor|preprocessor|quant).*",
}


@dataclass(frozen=True, slots=True)
class Written:
    """What the manifest told of an output.

    Attributes:
        tensors, files, nbytes: what was found as it was written, or was told to be wrong.
        read: tensors whose contents were compared.
        unchecked: what the manifest does not tell, and so was not checked.
    """

    tensors: int
    files: int
    nbytes: int
    content_id: str
    read: int
    problems: tuple[str, ...]
    unchecked: tuple[str, ...]


def check_written(folder: Store, data: Mapping[str, Any], advance: Callable[[int], None] = lambda _: None) -> Written:
    """Read every byte of an output and compare it with the manifest."""
    tensors: Mapping[str, Any] = data["tensors"]
    problems: list[str] = []
    for name, wanted in data["files"].items():
        problems += _check_small(folder, str(name), str(wanted))
    headers, unreadable = _headers(folder, data)
    problems += unreadable
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    nbytes = read = 0
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
                read += bool(digest)
                nbytes += one.nbytes
                found[key] = (one.dtype, one.shape, digest)
                if [one.dtype, list(one.shape)] != [entry.get("dtype"), entry.get("shape")]:
                    problems.append(f"{file}:{one.name} is {one.dtype} {list(one.shape)}, not what was written")
                elif digest != entry.get("digest", ""):
                    problems.append(f"{file}:{one.name} has other bytes than were written")
            problems += [f"{file}:{name} is missing" for name in here]
    problems += _index(folder, tensors)
    known = {*data["files"], *(str(entry.get("file")) for entry in tensors.values())}
    strangers, beside = extra_files(folder, known)
    total = content_id(found) if found and read == len(found) else ""
    complete = data.get("digest") == ALGORITHM or "content_id" in data
    if (total != data.get("content_id", "") or complete != bool(total)) and not problems:
        problems.append("the content id is not that of the tensors: the manifest was changed")
    problems += strangers
    unchecked = [*_without_digests(len(found), read), *beside]
    files = len(data["files"]) + len(headers)
    return Written(len(found), files, nbytes, total, read, tuple(problems), tuple(unchecked))


def _headers(folder: Store, data: Mapping[str, Any]) -> tuple[dict[str, FileHeader], list[str]]:
    """The weight files that the manifest names, read by their ending or as their layout has them."""
    headers: dict[str, FileHeader] = {}
    problems: dict[str, str] = {}
    for file in dict.fromkeys(str(entry.get("file")) for entry in data["tensors"].values()):
        try:
            headers[file] = _read(folder, file)
        except EngineError as error:
            problems[file] = f"{file}: {error.message}"
    if (
        problems
        and all(_inside(file) for file in problems)
        and str(next(iter(data["tensors"]))).split(":")[0] in problems
    ):
        try:
            layout = load_layout(str(data["layout"]["name"]))
            written = {header.name: header for header in read_checkpoint(folder, layout, needed=False).files}
        except EngineError as error:
            return headers, [*problems.values(), f"as files of layout {data['layout']['name']}: {error.message}"]
        for file in [file for file in problems if file in written]:
            headers[file] = written[file]
            del problems[file]
    return headers, list(problems.values())


def _without_digests(tensors: int, read: int) -> Iterator[str]:
    if read < tensors:
        which = "contents of the tensors" if not read else f"contents of {tensors - read} tensors"
        yield f"{which}: the manifest has no digests of them, so only names, types and shapes were compared"


def extra_files(folder: Store, known: Collection[str]) -> tuple[list[str], list[str]]:
    """What lies in a folder that is not known to belong there.

    Returns:
        Problems, for files that programs read or run; and notes, for others.
    """
    folders = {name.split("/")[0] for name in known if "/" in name}
    others = [name for name in folder.names() if name not in {NAME, INDEX, *known, *folders} and name[:1] != "."]
    others += [name for name in folder.names() if name == ".metadata" and name not in known]
    problems, beside = [], []
    for name in others:
        what = next((what for what, names in _READ.items() if re.fullmatch(names, name.lower())), None)
        if what is None:
            beside.append(printable(name))
        else:
            problems.append(f"{printable(name)} was not written by the engine: {what} that programs may read")
    if len(problems) > _LISTED:
        problems = [*problems[:_LISTED], f"{len(problems) - _LISTED} more files were not written by the engine"]
    more = f" and {len(beside) - 4} more" if len(beside) > 4 else ""
    return problems, [f"{', '.join(beside[:4])}{more}: not the engine's"] if beside else []


def _index(folder: Store, tensors: Mapping[str, Any]) -> list[str]:
    """An index of weight files that says otherwise than the manifest."""
    files = {str(name): str(entry.get("file")) for name, entry in tensors.items()}
    several = len(set(files.values())) > 1 and all(name.endswith(".safetensors") for name in files.values())
    if not folder.has(INDEX):
        return [f"{INDEX} is missing"] if several else []
    try:
        with folder.open(INDEX) as file:
            data = parse_json(file.read())
        listed = data["weight_map"] if isinstance(data, dict) else None
    except (EngineError, KeyError, ValueError):
        listed = None
    return [] if several and listed == files else [f"{INDEX} was changed"]


def _inside(name: str) -> bool:
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _check_small(folder: Store, name: str, wanted: str) -> list[str]:
    if not _inside(name):
        return [f"{name!r} is not the name of an output file"]
    try:
        with folder.open(name) as file:
            total = hashlib.sha256()
            while block := file.read(_BLOCK):
                total.update(block)
    except EngineError as error:
        return [f"{name}: {error.message}"]
    return [] if total.hexdigest() == wanted else [f"{name} was changed"]


def _read(folder: Store, name: str) -> FileHeader:
    if not _inside(name):
        raise EngineError("E301", "this is not the name of an output file", place=Place(name))
    file = File(folder, name)
    return read_safetensors(file) if name.endswith(".safetensors") else read_rank_file(file)


def _blocks(sources: SourceFiles, one: TensorHeader, advance: Callable[[int], None]) -> Any:
    """The bytes of a contiguous tensor."""
    buffer = memoryview(bytearray(min(_BLOCK, max(one.nbytes, 1))))
    for start in range(0, one.nbytes, _BLOCK):
        block = buffer[: min(_BLOCK, one.nbytes - start)]
        sources.read_into(0, one.offset + start, (block,))
        advance(len(block))
        yield block


def nothing_read(checked: Sequence[bool]) -> str | None:
    """A problem, where no tensor's content was checked in any way."""
    if any(checked):
        return None
    return (
        "no tensor's content was checked: there are no digests to compare with. Give --src and --mapping to compare "
        "with the source, or --logits"
    )
