"""Rank files: torch-saved state dicts, indexed without reading payload and without torch.

A zip's directory gives the place of each storage; the pickle gives storage, offset, shape and strides
of each tensor. Files from before the zip format hold the same in a sequence of pickles.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from re import Pattern
from sys import intern
from typing import Any

from engine.errors import EngineError, Place
from engine.formats.dtensor import Distributed, read_distributed
from engine.formats.headers import ITEM_SIZES, FileHeader, TensorHeader, damaged, shared, span, unsupported
from engine.formats.legacy import load_legacy
from engine.formats.sharded import Sharded, ShardReader
from engine.formats.standins import Instance, Refused, Storage, Tensor
from engine.formats.unpickle import error_of, load_pickle
from engine.formats.zipdir import TorchZip
from engine.storage.store import File, OpenFile

_SHORT = 4096  # bytes: a shorter pickle is its own cache key, a longer one's is its digest
_DEEPEST, _MOST = 16, 1 << 21  # levels of mappings in a file, and what they hold
_HELD = (Tensor, Distributed, Mapping, list)
_SIZES = 12  # of tensors apart: all combinations of so few are tried
LoadPickle = Callable[[bytes, str], Any]


class Pickles:
    """Reads each pickle once: ranks, and boxes of one shape, mostly have equal ones."""

    def __init__(self, most: int) -> None:
        """Args: most: how many are kept."""
        self._most = most
        self._known: dict[tuple[int, bytes], Any] = {}

    def __call__(self, data: bytes, name: str) -> Any:
        key = len(data), data if len(data) < _SHORT else hashlib.sha256(data).digest()
        found = self._known.get(key)
        if found is None:
            found = load_pickle(data, name)
            if len(self._known) < self._most:
                self._known[key] = found  # nothing changes it
        return found


@dataclass(frozen=True, slots=True)
class Saved:
    """A file that torch saved.

    Attributes:
        value: what was saved, with inert tensors.
        payload: storage key → (offset, bytes) in the file.
        summed: whether the identity covers checksums of all bytes; if not, it covers the pickle.
        root: the folder inside a zip.
    """

    value: Any
    payload: Mapping[str, tuple[int, int]]
    identity: str
    summed: bool = False
    root: str | None = None


def read_rank_file(
    where: File, load: LoadPickle = load_pickle, nested: Sequence[Pattern[str]] | None = (), says: Sequence[str] = ()
) -> FileHeader:
    """Index one rank file.

    Args:
        load: reads a pickle, given its bytes and the file's name.
        nested: the file's keys that hold mappings of tensors; names then begin with that key and a dot. Of other
            mappings with tensors only the names are reported. Without any, the file itself is the mapping. None:
            mappings and lists at any depth hold tensors, by dotted names as in a distributed checkpoint.
        says: dotted keys of numbers and texts to keep, if they exist.

    Raises:
        EngineError: E301 when damaged or truncated, E302 when it asks to run code, E303 for another kind of
            file, E305 when unreadable.
    """
    with where.open() as file:
        state = file.state
        size = state.size
        saved = read_torch_file(file, where.name, load)
    value = saved.value
    if not isinstance(value, Mapping):
        raise _not_a_state_dict(where.name, type(value).__name__)
    if nested is None:
        value = _flattened(value, where.name)
    elif nested:
        value = dict(_flat(value, nested, where.name))
    for name in value:
        if not isinstance(name, str) or not _is_text(name):
            raise damaged(where.name, f"a key is not text: {name!r}"[:100])
    tensors = tuple(_headers(value, saved.payload, where.name))
    if not tensors:
        first = ", ".join(list(value)[:5])[:200]
        raise _not_a_state_dict(where.name, f"a mapping without tensors: {first}" if first else "an empty mapping")
    said = {path: one for path in says if isinstance(one := _value_at(saved.value, path), int | float | str)}
    beside = {**value, **{str(key): one for key, one in saved.value.items() if nested and not _named(key, nested)}}
    known: dict[tuple[int, int], bool] = {}
    left = tuple(name for name, one in beside.items() if isinstance(one, Mapping) and _holds_tensors(one, known))
    replaced = tuple(_replaced(tensors, saved.payload.values()))
    found = FileHeader(where, size, tensors, saved.identity, saved.summed, state, saved.root, left, replaced, said)
    return found.apart()


def _replaced(tensors: Sequence[TensorHeader], storages: Iterable[tuple[int, int]]) -> list[str]:
    """Tensors outside of the buffers that others share, if unused parts of these are as large as they are.

    A program that loads a file, assigns other tensors to names and saves it again leaves such parts. Tensors that it
    took from another file come with the buffer that they share there, most of which is then unused.
    """
    placed = sorted((one for one in tensors if one.nbytes), key=lambda one: one.offset)
    begins = [one.offset for one in placed]
    buffers: list[tuple[float, list[TensorHeader], list[int]]] = []  # with the unused share
    alone: list[TensorHeader] = []
    for start, nbytes in storages:
        held = placed[bisect_left(begins, start) : bisect_left(begins, start + nbytes)]
        if len(held) == 1:
            alone += held
        elif held:
            ends = [start, *(one.offset + one.nbytes for one in held)]
            until = [*(one.offset for one in held), start + nbytes]
            gaps = [begin - end for end, begin in zip(ends, until, strict=True)]
            buffers.append((sum(gaps) / nbytes, held, gaps))
    for most in (0.5, 1):  # first, buffers of which little is used count as another file's
        apart = alone + [one for share, held, _ in buffers if share > most for one in held]
        sizes = Counter(one.nbytes for one in apart)
        least = min(sizes, default=0)
        room = sum(gap for share, _, gaps in buffers if share <= most for gap in gaps if gap >= least)
        counts = range(len(sizes) if room else 0, 0 if len(sizes) <= _SIZES else len(sizes) - 1, -1)
        # as many sizes as possible whose tensors fill the unused parts exactly
        for some in (set(some) for count in counts for some in combinations(sizes, count)):
            if sum(size * sizes[size] for size in some) == room:
                return [one.name for one in apart if one.nbytes in some]
    return []


def _value_at(value: Any, path: str) -> Any:
    for name in path.split("."):
        if isinstance(value, Instance) and value.kind.name == "Namespace":
            value = value.state
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _holds_tensors(value: Any, known: dict[tuple[int, int], bool], depth: int = 3) -> bool:
    """Whether a mapping, or one nested in it, holds tensors; `known` caches the answer for repeated mappings."""
    if not isinstance(value, Mapping) or not depth:
        return isinstance(value, Tensor | Distributed)
    at = (id(value), depth)
    if at not in known:
        known[at] = any(_holds_tensors(one, known, depth - 1) for one in value.values())
    return known[at]


def _named(key: Any, nested: Sequence[Pattern[str]]) -> bool:
    return isinstance(key, str) and any(one.fullmatch(key) for one in nested)


def _flat(value: Mapping[Any, Any], nested: Sequence[Pattern[str]], file: str) -> Iterator[tuple[str, Any]]:
    """The items of the mappings that a file holds under some keys, by dotted names."""
    found = False
    for key, below in value.items():
        if _named(key, nested):
            if not isinstance(below, Mapping):
                raise _not_a_state_dict(file, f"{type(below).__name__} under the key {key}"[:100])
            found = True
            for name, one in below.items():
                if not isinstance(name, str):
                    raise damaged(file, f"a key is not text: {name!r}"[:100])
                yield f"{key}.{name}", one
    if not found:
        keys = ", ".join(str(key) for key in list(value)[:8])
        raise _not_a_state_dict(file, f"keys {keys}"[:200])


def _flattened(value: Mapping[Any, Any], file: str) -> dict[str, Any]:
    """The tensors of a mapping and of all mappings and lists in it, by the names that torch's distributed checkpoints
    give them."""
    found: dict[str, Any] = {}
    rest: list[tuple[tuple[str, ...], Any]] = [((), value)]
    for path, one in rest:  # grows while iterating
        if isinstance(one, Mapping | list):
            items = one.items() if isinstance(one, Mapping) else enumerate(one)
            rest += [((*path, str(key)), below) for key, below in items if isinstance(below, _HELD)]
        elif found.setdefault(".".join(path), one) is not one:
            raise damaged(file, f"two tensors are called {'.'.join(path)}"[:200])
        if len(path) > _DEEPEST or len(rest) > _MOST:
            raise damaged(file, "its mappings are nested without end")
    return found


def _headers(value: Mapping[str, Any], payload: Mapping[str, tuple[int, int]], file: str) -> Iterator[TensorHeader]:
    shards = ShardReader()
    for name, one in value.items():
        try:
            if isinstance(one, Tensor):
                yield tensor_header(name, one, payload, file)
            elif isinstance(one, Distributed):
                tensor, box = shards.read(one) if isinstance(one, Sharded) else read_distributed(one)
                if tensor is not None:
                    yield replace(tensor_header(name, tensor, payload, file), recorded=box)
                elif one.dtype in ITEM_SIZES:
                    yield TensorHeader(name, one.dtype, (0, *box.whole[1:]), (0,) * len(box.whole), 0, box)
        except Refused as refused:
            raise error_of(refused, file, name) from None


def _is_text(name: str) -> bool:
    """Whether a name can be encoded as UTF-8: pickles can hold half characters."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def read_torch_file(file: OpenFile, name: str, load: LoadPickle = load_pickle) -> Saved:
    """The content of a file that torch saved, without its payload."""
    size = file.state.size
    start = file.read(4)
    if start == b"PK\x03\x04":
        archive = TorchZip(file, name, 0, size)
        pickle = archive.pickle()
        described = struct.pack("<Q", size) + archive.entries + archive.ends + (b"" if archive.summed else pickle)
        identity = hashlib.sha256(described).hexdigest()
        return Saved(load(pickle, name), archive.payload(), identity, archive.summed, archive.root)
    file.seek(0)
    return Saved(*load_legacy(file, name, size))


def tensor_header(name: str, tensor: Tensor, payload: Mapping[str, tuple[int, int]], file: str) -> TensorHeader:
    """A tensor's header, given the places of its file's storages."""
    storage: Storage = tensor.storage
    place = payload.get(storage.key)
    if place is None:
        raise damaged(file, f"storage {storage.key} is not in the file", name)
    dtype = tensor.dtype or storage.dtype
    if dtype is None or dtype not in ITEM_SIZES or (storage.dtype or dtype) not in ITEM_SIZES:
        raise unsupported("tensor", dtype, Place(file, tensor=name))
    item = ITEM_SIZES[dtype]
    nbytes = storage.count * (1 if storage.dtype is None else ITEM_SIZES[storage.dtype])
    if nbytes > place[1]:
        raise damaged(file, f"storage {storage.key} of {place[1]} bytes, its tensors need {nbytes}", name)
    needed = (tensor.offset + _span(tensor.shape, tensor.strides)) * item
    if 0 not in tensor.shape and needed > nbytes:
        raise damaged(file, f"it needs {needed} bytes of a storage of {nbytes}", name)
    if _repeats(tensor.shape, tensor.strides):
        raise EngineError(
            "E303",
            f"`{name}` repeats its elements",
            place=Place(file, tensor=name),
            got=f"shape {tensor.shape} with strides {tensor.strides}",
            expected="each element stored once",
            fix="Save it again after calling `contiguous()`.",
        )
    shape, strides = shared(tensor.shape), shared(tensor.strides)
    return TensorHeader(intern(name), dtype, shape, strides, place[0] + tensor.offset * item)


_span = lru_cache(maxsize=4096)(span)  # layers are alike


@lru_cache(maxsize=4096)
def _repeats(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether several indices may share an element, which no trained tensor has.

    >>> _repeats((2, 3), (3, 1)), _repeats((2, 3), (1, 2)), _repeats((2, 3), (2, 1)), _repeats((1, 3), (0, 1))
    (False, False, True, False)
    """
    end = 0  # end of what the smaller strides reach
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= end:
            return 0 not in shape
        end += (size - 1) * stride
    return False


def _not_a_state_dict(file: str, got: str) -> EngineError:
    return EngineError(
        "E303",
        "the file is not a state dict",
        place=Place(file),
        got=got,
        expected="a mapping of names to tensors",
        fix="Is it a rank file of the model? Optimizer and scheduler files are not converted.",
    )
