"""Checks an output against its own manifest: every tensor, every file, and no other file that a program would read."""

from __future__ import annotations

import hashlib
import math
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from engine.checkpoint.folder import read_headers
from engine.checkpoint.manifests import NAME, read_manifest
from engine.errors import EngineError, Place, first_of, printable
from engine.formats.headers import ITEM_SIZES, FileHeader, TensorHeader
from engine.formats.rank_files import read_rank_file
from engine.formats.safetensors import INDEX, METADATA, index_json, read_safetensors_metadata
from engine.language.layout_file import load_layout
from engine.language.model import FilePattern
from engine.language.names import pattern
from engine.run.digests import digest_of
from engine.storage.folders import listing
from engine.storage.json_text import parse_json
from engine.storage.sources import SourceFiles
from engine.storage.store import File, Store

_BLOCK = 1 << 20
_DEEPEST = 4  # levels of nested folders that are searched
_LISTED = 20  # files that are reported one by one

# Files that transformers, trainers and other programs read or run, by purpose.
_READ = {
    "weights": r".*\.(safetensors|bin|pt2?|pth|ckpt|gguf|ggml|h5|msgpack|npz|onnx|ot|distcp)"
    r"|.*\.index\.json|\.metadata",
    "an adapter": r"adapter_.*",
    "a pickle": r".*\.(pkl|pickle|joblib|dill)",
    "code": r".*\.(py|pyc|so|sh)",
    "what makes a model": r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|additional_chat|config|"
    r"processor|preprocessor|quant|params\.json|modules\.json|tekken|openvino).*|.*config\.json|.*\.(model|tiktoken)",
}


class Ours:
    """Finds what in a folder is not the engine's output as written. Reads contents only where they may have changed."""

    def __init__(self, marked: Callable[[str], bool] = lambda name: False) -> None:
        """
        Args:
            marked: whether the store itself records that the engine wrote a file, so that it need not be read. In a
                bucket, reading takes as long as converting.
        """
        self._marked = marked
        self._seen: object = None

    def __call__(self, store: Store) -> str | None:
        """What is foreign, in words; None for the engine's output or an empty folder. Missing files do not count."""
        try:
            names = store.names()
            return self._foreign(store, names, read_manifest(store)) if names else None
        except FileNotFoundError:
            return None
        except OSError as error:
            return error.strerror or "a folder that cannot be read"
        except EngineError as error:
            return f"a folder without a manifest of the engine: {error.message}"

    def _foreign(self, store: Store, names: Sequence[str], data: Mapping[str, Any]) -> str | None:
        mine = {NAME, INDEX, *data["files"], *(entry["file"] for entry in data["tensors"].values())}
        names = list(_below(store, names, {above for name in mine for above in _folders(name)}))
        others = [name for name in names if name not in mine or not _is_plain(store, name)]
        if others:
            return f"files that the engine did not write: {first_of(others, 4)}"
        seen = [(name, state.told()) for name, state in store.states(names).items()]
        if seen == self._seen:
            return None
        here = {name: wanted for name, wanted in data["files"].items() if name in names}
        read = {file for file in names if not self._marked(file)}
        tensors = {name: entry for name, entry in data["tensors"].items() if entry["file"] in read}
        *_, changed = read_contents(store, {**data, "files": here, "tensors": tensors})
        changed += check_index(store, data["tensors"]) if INDEX in names else []
        undigested = {entry["file"] for entry in tensors.values() if "digest" not in entry}
        changed += _written_later(dict(seen), undigested)
        self._seen = None if changed else seen
        return f"not what the engine wrote there: {changed[0]}" if changed else None


def _written_later(told: Mapping[str, Mapping[str, Any]], undigested: Collection[str]) -> list[str]:
    """Files that may have changed: without digests, and with no time or one after the manifest's, written last."""
    return [
        f"{name} has no digests in {NAME}, and was written later or at an unknown time"
        for name in sorted(undigested)
        if not ("modified" in told[name] and told[name]["modified"] <= told[NAME].get("modified", 0))
    ]


def _below(store: Store, names: Sequence[str], folders: Collection[str]) -> Iterator[str]:
    """The names, with each of `folders` replaced by the names in it."""
    for name in names:
        if name in folders and (store.folder is None or not (store.folder / name).is_symlink()):
            yield from _below(store, [f"{name}/{one}" for one in store.names(name)], folders)
        else:
            yield name


def _folders(name: str) -> Iterator[str]:
    """The folders above a file that have a name."""
    *above, _ = name.split("/")
    return ("/".join(above[:n]) for n in range(1, len(above) + 1)) if _inside(name) else iter(())


def _is_plain(store: Store, name: str) -> bool:
    """Whether it is a file itself, not a link to one."""
    return store.folder is None or stat.S_ISREG((store.folder / name).lstat().st_mode)


Found = dict[str, tuple[str, tuple[int, ...], str]]  # type, shape and digest of tensors


def read_contents(
    folder: Store,
    data: Mapping[str, Any],
    advance: Callable[[int], None] = lambda _: None,
    look: Callable[[str, TensorHeader, memoryview], None] = lambda name, tensor, block: None,
    headers: Mapping[str, FileHeader] | None = None,
) -> tuple[Found, int, int, list[str]]:
    """Read every file that the manifest names; returns tensors, their bytes, how many have digests, and problems.

    Args:
        look: called with the manifest's name of every tensor that has a digest, the tensor and each of its blocks.
        headers: those of all weights files, by name, if they are known.
    """
    tensors: Mapping[str, Any] = data["tensors"]
    problems: list[str] = []
    for name, wanted in data["files"].items():
        problems += _check_small(folder, str(name), str(wanted))
    if headers is None:
        headers, unreadable = _headers(folder, data)
        problems += unreadable
    found: Found = {}
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
                blocks = _blocks(sources, one, advance, partial(look, key))
                digest = digest_of(blocks) if "digest" in entry else ""
                read += bool(digest)
                nbytes += one.nbytes
                found[key] = (one.dtype, one.shape, digest)
                if [one.dtype, list(one.shape)] != [entry.get("dtype"), entry.get("shape")]:
                    problems.append(f"{file}:{one.name} is {one.dtype} {list(one.shape)}, not what was written")
                elif digest != entry.get("digest", ""):
                    problems.append(f"{file}:{one.name} has other bytes than were written")
            problems += [f"{file}:{name} is missing" for name in here]
    return found, nbytes, read, problems


def _headers(folder: Store, data: Mapping[str, Any]) -> tuple[dict[str, FileHeader], list[str]]:
    """The weights files that the manifest names, read by their suffix or as their layout says."""
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
        here = [file for file in problems if folder.has(file)]
        try:
            layout = load_layout(str(data["layout"]["name"]))
            mode = next(m for m in layout.modes if all(any(map(partial(_named, file), m.files)) for file in problems))
            read = read_headers(folder, here, mode, layout.skip_tensors, wrappers=layout.wrappers, some=True)
        except (EngineError, StopIteration) as error:
            told = error.message if isinstance(error, EngineError) else "it has no files of these names"
            return headers, [f"as files of layout {data['layout']['name']}: {told}", *problems.values()]
        headers |= zip(here, read, strict=True)
        problems = {file: told for file, told in problems.items() if file not in here}
    return headers, list(problems.values())


def _named(name: str, file: FilePattern) -> bool:
    return pattern(file.name).match(name) is not None


def extra_files(folder: Store, known: Collection[str]) -> tuple[list[str], list[str]]:
    """Files of a folder that are not known to belong there.

    Returns:
        Problems, for files that programs read or run; and notes, for all others.
    """
    with listing(folder):
        others = [name for name in _files_of(folder) if name not in {NAME, INDEX, *known}]
    problems, beside = [], []
    for name in others:
        parts = [part for part in name.lower().split("/") if part]
        what = next((what for what, names in _READ.items() if any(re.fullmatch(names, part) for part in parts)), None)
        if what is None:
            beside.append(printable(name))
        else:
            problems.append(f"{printable(name)} was not written by the engine: {what} that programs may read")
    if len(problems) > _LISTED:
        problems = [*problems[:_LISTED], f"{len(problems) - _LISTED} more files were not written by the engine"]
    more = f" and {len(beside) - 4} more" if len(beside) > 4 else ""
    return problems, [f"{', '.join(beside[:4])}{more}: not the engine's"] if beside else []


def _files_of(folder: Store, inside: str = "", depth: int = 0) -> Iterator[str]:
    """Every file of a folder and its subfolders; of hidden ones, only those that programs read."""
    for name in folder.names(inside):
        path = f"{inside}/{name}" if inside else name
        if name.startswith("."):
            if re.fullmatch(_READ["weights"], name.lower()):
                yield path
            continue
        try:
            held = depth < _DEEPEST and bool(folder.names(path))
        except OSError:
            held = False
        if held:
            yield from _files_of(folder, path, depth + 1)
        else:
            yield path


def check_index(folder: Store, tensors: Mapping[str, Any]) -> list[str]:
    """Problems of an index of weights files that contradicts the manifest."""
    files = {str(name): str(entry.get("file")) for name, entry in tensors.items()}
    several = len(set(files.values())) > 1 and all(name.endswith(".safetensors") for name in files.values())
    if not folder.has(INDEX):
        return [f"{INDEX} is missing"] if several else []
    try:
        with folder.open(INDEX) as file:
            found = parse_json(file.read())
    except (EngineError, ValueError):
        found = None
    size = sum(ITEM_SIZES.get(entry["dtype"], 0) * math.prod(entry["shape"]) for entry in tensors.values())
    return [] if several and found == parse_json(index_json(files, size)) else [f"{INDEX} was changed"]


def _inside(name: str) -> bool:
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _check_small(folder: Store, name: str, wanted: str) -> list[str]:
    if not _inside(name):
        return [f"{name!r} is not the name of an output file"]
    try:
        with folder.open(name) as file:
            total = hashlib.file_digest(file, "sha256")
    except EngineError as error:
        return [f"{name}: {error.message}"]
    return [] if total.hexdigest() == wanted else [f"{name} was changed"]


def _read(folder: Store, name: str) -> FileHeader:
    if not _inside(name):
        raise EngineError("E301", "this is not the name of an output file", place=Place(name))
    file = File(folder, name)
    if not name.endswith(".safetensors"):
        return read_rank_file(file)
    header, metadata = read_safetensors_metadata(file)
    if metadata != METADATA:  # transformers 4 refuses a file without it, and takes `tf` for TensorFlow
        raise EngineError("E301", f"its metadata was changed, from {METADATA}", place=Place(name))
    return header


def _blocks(
    sources: SourceFiles,
    one: TensorHeader,
    advance: Callable[[int], None],
    look: Callable[[TensorHeader, memoryview], None],
) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor."""
    buffer = memoryview(bytearray(min(_BLOCK, max(one.nbytes, 1))))
    for start in range(0, one.nbytes, _BLOCK):
        block = buffer[: min(_BLOCK, one.nbytes - start)]
        sources.read_into(0, one.offset + start, (block,))
        advance(len(block))
        look(one, block)
        yield block
