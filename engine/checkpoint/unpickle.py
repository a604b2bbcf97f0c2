"""Unpickling metadata only: an allow-list of globals, each an inert stand-in. Nothing is executed."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, BinaryIO

from engine.checkpoint.headers import ITEM_SIZES
from engine.checkpoint.opcodes import memo_is_bounded
from engine.errors import EngineError, Place

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32",
    "float64": "F64", "double": "F64", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32",
    "int16": "I16", "short": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_STORAGES = {
    "BFloat16Storage": "BF16", "HalfStorage": "F16", "FloatStorage": "F32", "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage: its key in the file, element type (None: untyped bytes) and size in bytes."""

    key: str
    dtype: str | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None


@dataclass(frozen=True, slots=True)
class DType:
    """`torch.bfloat16` and its kind."""

    name: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str | None


class Config(dict[Any, Any]):
    """Stands for any class named `Config` that is a dict: InternEvo's and mmengine's."""

    def __setstate__(self, state: Any) -> None:
        """Attributes are not kept; the items are the configuration."""


class _Refused(Exception):
    """What the file asked for, to be told with its name."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


def _ints(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise _Refused("E301", f"a shape or stride is {value!r}"[:80])
    return value


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise _Refused("E301", f"a tensor has storage offset {offset!r}"[:80])
    shape, strides = _ints(shape), _ints(strides)
    if len(shape) != len(strides):
        raise _Refused("E301", f"a tensor has shape {shape} and strides {strides}")
    return Tensor(storage, offset, shape, strides, None)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    plain = _rebuild_tensor(storage, offset, shape, strides)
    if not isinstance(dtype, DType) or dtype.name not in _DTYPES:
        raise _Refused("E301", "a tensor has no element type")
    return Tensor(plain.storage, plain.offset, plain.shape, plain.strides, _DTYPES[dtype.name])


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _size(value: Any = ()) -> tuple[int, ...]:
    return _ints(tuple(value))


def _ordered(items: Any = ()) -> Any:
    return OrderedDict(items)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): _size,
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    ("torch", "UntypedStorage"): _StorageType(None),
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
_KNOWN.update({("torch", name): DType(name) for name in _DTYPES})
_KNOWN.update({("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()})
_KNOWN.update({("torch.storage", name): _StorageType(dtype) for name, dtype in _STORAGES.items()})


# What the unpickler raises on bytes that are not a pickle of the kinds above.
_MALFORMED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, OverflowError, LookupError,
    struct.error, ImportError, AssertionError,
)  # fmt: skip


class _OnlyKnown:
    """Knows the globals above and no others; a persistent id gives a storage."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if name == "Config":
            return Config
        if "_shard" in module or name in ("ShardedTensor", "DTensor"):
            raise _Refused("E303", f"{module}.{name}")
        raise _Refused("E302", f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise _Refused("E301", f"a persistent id {pid!r}"[:80])
        count = pid[4]
        if type(count) is not int or not 0 <= count < 1 << 62:
            raise _Refused("E301", f"a storage of {count!r} elements"[:80])
        if len(pid) > 5 and pid[5] is not None:
            raise _Refused("E303", "a storage that is a view of another (saved before 2017)")
        dtype = pid[1].dtype
        return Storage(str(pid[2]), dtype, count * (1 if dtype is None else ITEM_SIZES[dtype]))


class _Unpickler(_OnlyKnown, pickle.Unpickler):
    """For pickles whose memo was looked at before."""


class _StreamUnpickler(_OnlyKnown, pickle._Unpickler):
    """For pickles inside a longer file; the Python one keeps its memo in a dict, whatever the numbers."""


def _load(unpickler: Any, name: str) -> Any:
    try:
        return unpickler.load()
    except _Refused as refused:
        raise _error(refused, name) from None
    except RecursionError:
        raise _damaged(name, "a pickle nested too deeply") from None
    except MemoryError:
        raise _damaged(name, "a pickle that claims more memory than there is") from None
    except _MALFORMED as error:
        raise _damaged(name, f"its pickle cannot be read: {type(error).__name__}: {error}"[:200]) from None


def _error(refused: _Refused, name: str) -> EngineError:
    if refused.code == "E302":
        return EngineError(
            "E302",
            f"a checkpoint file asks to run code: `{refused}`",
            place=Place(name),
            expected="tensors, numbers and text",
            fix="Nothing of it was executed. If you trust the file, load it in the "
            "training environment and save a plain state dict.",
        )
    if refused.code == "E303":
        return EngineError(
            "E303",
            f"a checkpoint file holds what only code can rebuild: `{refused}`",
            place=Place(name),
            fix="Saved by FSDP or another sharding library: load it once in the training environment and save "
            "with sharding off.",
        )
    return _damaged(name, str(refused))


def _damaged(name: str, what: str) -> EngineError:
    return EngineError(
        "E301",
        "a checkpoint file is damaged or truncated",
        place=Place(name),
        got=what,
        fix="Copy the file again from the training run.",
    )


def load_pickle(data: bytes, name: str) -> Any:
    """One pickle from memory."""
    if not memo_is_bounded(data):
        raise _damaged(name, "a pickle that claims more memory than there is")
    return _load(_Unpickler(io.BytesIO(data), encoding="utf-8"), name)


class _WholeLines:
    """A file whose lines all end: one cut off by the end of the file is not taken for a shorter name."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self._file = file

    def readline(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("a line is cut off")
        return line


def _load_next(file: BinaryIO, name: str) -> Any:
    """The pickle at the file's position, which moves behind it."""
    return _load(_StreamUnpickler(_WholeLines(file), encoding="utf-8"), name)


def load_legacy(file: BinaryIO, name: str, size: int) -> tuple[Any, dict[str, tuple[int, int]], str]:
    """A file from before the zip format: pickles one after the other, then each storage's bytes."""
    first = file.read(2)
    file.seek(0)
    if first[:1] != b"\x80":
        raise EngineError(
            "E301",
            "a checkpoint file is damaged or truncated",
            place=Place(name),
            got=f"{size} bytes starting with {first.hex() or 'nothing'}",
            expected="a file that torch.save wrote",
            fix="Copy the file again from the training run.",
        )
    magic = _load_next(file, name)
    if magic != _LEGACY_MAGIC:
        if isinstance(magic, (dict, str)):
            return magic, {}, hashlib.sha256(struct.pack("<Q", size)).hexdigest()
        raise EngineError("E303", "a pickle, but not one that torch saved", place=Place(name), fix="Is it a rank file?")
    _load_next(file, name)  # protocol version
    _load(
        _StreamUnpickler(file, encoding="utf-8"), name
    )  # byte order and sizes of the machine, always little-endian here
    value = _load_next(file, name)
    keys = _load_next(file, name)
    headers = file.tell()
    storages: dict[str, Storage] = {}
    _collect(value, storages)
    payload: dict[str, tuple[int, int]] = {}
    position = headers
    for key in keys if isinstance(keys, list) else []:
        file.seek(position)
        raw = file.read(8)
        if len(raw) < 8 or str(key) not in storages:
            raise _damaged(name, f"storage {key} is not in the file")
        (count,) = struct.unpack("<q", raw)
        storage = storages[str(key)]
        item = ITEM_SIZES[storage.dtype] if storage.dtype else 1
        if count < 0 or position + 8 + count * item > size:
            raise _damaged(name, f"storage {key} ends outside the file of {size} bytes")
        payload[str(key)] = (position + 8, count * item)
        position += 8 + count * item
    file.seek(0)
    digest = hashlib.sha256(struct.pack("<Q", size) + file.read(headers)).hexdigest()
    return value, payload, digest


def _collect(value: Any, storages: dict[str, Storage]) -> None:
    if isinstance(value, dict):
        for item in value.values():
            if isinstance(item, Tensor):
                storages[item.storage.key] = item.storage
