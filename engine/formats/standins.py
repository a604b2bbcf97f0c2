"""Stand-ins for torch's objects while metadata is unpickled: plain data that can do nothing.

No class or function that a pickle names is ever looked up. Known names give one of the objects
below, and only a `Function` can be called.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.formats.headers import DTYPES, STORAGES

# Known, so that a refusal can name the element type instead of suspecting an attack.
_UNSUPPORTED_DTYPES = (
    "complex32", "complex64", "complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "qint8", "quint8", "qint32",
)  # fmt: skip
_UNSUPPORTED_STORAGES = (
    "ComplexFloatStorage", "ComplexDoubleStorage", "QInt8Storage", "QUInt8Storage", "QInt32Storage",
    "QUInt4x2Storage", "QUInt2x4Storage",
)  # fmt: skip
MOST_DIMENSIONS = 64  # torch's own limit
# An Ascend NPU marks its memory format of a tensor: it is saved as on any other device.
_OF_THE_DEVICE = ("base_sizes_/", "base_strides_/", "storage_sizes_/", "origin_format_/", "npu_format_/")


class Refused(Exception):
    """What the file asked for, to be reported with the file's name."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


@dataclass(frozen=True, slots=True)
class DType:
    """`torch.bfloat16` and other dtypes."""

    name: str

    @property
    def held(self) -> str:
        """Its safetensors name, or torch's if there is none."""
        return DTYPES.get(self.name, self.name)


@dataclass(frozen=True, slots=True)
class StorageType:
    """Element type by its safetensors name; None: untyped bytes."""

    dtype: str | None


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage: its key in the file, element type (None: untyped bytes) and elements."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage, in elements; `dtype` of None is the storage's own."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Function:
    """The only kind of object that a pickle can call."""

    call: Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """An object of a class whose content is ignored: an enum, a random state. It holds nothing."""

    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class OpaqueClass(Function):
    """A class or function that makes an `Opaque`, for any arguments."""


def opaque(kind: str) -> OpaqueClass:
    return OpaqueClass(lambda *_: Opaque(kind))


@dataclass(frozen=True, slots=True, eq=False)
class PlainClass:
    """A class that a pickle can only make an `Instance` of; with arguments only if it takes any."""

    name: str
    takes: bool = False


_UNSET: Any = object()


@dataclass(slots=True, eq=False, repr=False)  # a state can be nested endlessly
class Instance:
    """An object of a known class: its arguments, and its state as in the pickle."""

    kind: PlainClass
    arguments: tuple[Any, ...] = ()
    state: Any = _UNSET

    def build(self, state: Any) -> None:
        """Set the state, only once, as in pickling; it is checked when it is read."""
        if self.state is not _UNSET:
            raise Refused("E301", f"a second state for a {self.kind.name}")
        self.state = state


def attributes(value: Any, *kinds: str) -> dict[str, Any]:
    """The attributes of an object of one of these classes; unused ones are not read.

    Raises:
        Refused: E301 for another object.
    """
    if isinstance(value, Instance) and value.kind.name in kinds:
        state = {} if value.state is _UNSET else slotted(value.state)
        if type(state) is dict:
            return state
    raise Refused("E301", f"no {' or '.join(kinds)} where one should be")


def slotted(state: Any) -> Any:
    """The attributes in a state of (others, slots); Python before 3.11 has {} for no others, and later None."""
    if type(state) is tuple and len(state) == 2 and type(state[0]) in (dict, type(None)) and type(state[1]) is dict:
        return {**(state[0] or {}), **state[1]}
    return state


@dataclass(frozen=True, slots=True)
class OtherClass:
    """A class that is only named, as the type of a tensor with attributes."""

    name: str


class OtherFunction(OtherClass):
    """A class or function that may be named, but not called: a pickle that calls it is refused, with its name."""


class Record(dict[Any, Any]):
    """Stands for `OrderedDict` and for any dict class named `Config`, such as InternEvo's."""


def ints(value: Any) -> tuple[int, ...]:
    if (
        type(value) is tuple
        and len(value) <= MOST_DIMENSIONS
        and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    ):
        return value
    raise Refused("E301", f"a shape or stride is {reprlib.repr(value)}")


def int_list(value: Any) -> tuple[int, ...]:
    """As `ints`, but also accepts a list instead of a tuple."""
    return ints(tuple(value) if type(value) is list and len(value) <= MOST_DIMENSIONS else value)


def element_type(properties: Any) -> str:
    """The element type in torch's `TensorProperties`: the first of a tuple."""
    state = getattr(properties, "state", None)
    dtype = state[0] if type(state) is tuple and state else None
    if not isinstance(dtype, DType):
        raise Refused("E301", "a tensor without an element type")
    return dtype.held


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = False, hooks: Any = None, marks: Any = None
) -> Tensor:
    """A tensor, and the `marks` that torch sets on loading: a negated tensor is computed, not stored."""
    for mark, is_set in marks.items() if isinstance(marks, dict) else ((marks, marks),):
        if is_set and not (isinstance(mark, str) and mark.startswith(_OF_THE_DEVICE)):
            raise Refused("E303", f"a tensor that is marked as {reprlib.repr(mark)} on loading, like a negated one")
    if not isinstance(storage, Storage) or type(offset) is not int or not 0 <= offset < 1 << 62:
        raise Refused("E301", f"a tensor has storage offset {reprlib.repr(offset)}")
    shape, strides = ints(shape), ints(strides)
    if len(shape) != len(strides):
        raise Refused("E301", f"a tensor has shape {shape} and strides {strides}")
    return Tensor(storage, offset, shape, strides, None)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    plain = _rebuild_tensor(storage, offset, shape, strides)
    if not isinstance(dtype, DType):
        raise Refused("E301", "a tensor has no element type")
    return Tensor(plain.storage, plain.offset, plain.shape, plain.strides, dtype.held)


def _rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("E301", "a parameter without a tensor")
    return data


_REBUILD = {
    "_rebuild_tensor": Function(_rebuild_tensor),
    "_rebuild_tensor_v2": Function(_rebuild_tensor),
    "_rebuild_tensor_v3": Function(_rebuild_tensor_v3),
    "_rebuild_parameter": Function(_rebuild_parameter),
    "_rebuild_parameter_with_state": Function(_rebuild_parameter),
}


def rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """A tensor with extra attributes, which are dropped."""
    if not any(function is known for known in _REBUILD.values()) or type(arguments) is not tuple:
        raise Refused("E301", "a tensor built by something else than torch")
    if any(isinstance(one, dict) and "data" in one for one in (state if type(state) is tuple else (state,))):
        raise Refused("E303", "a tensor that is given other data when it is loaded")
    tensor: Tensor = function.call(*arguments)
    return tensor


def _record(*arguments: Any) -> Record:
    if arguments:
        raise Refused("E301", "a mapping with arguments")
    return Record()


def scalar(value: Any) -> Any:
    """The value, if it can be a key. Hashing a nested value can take forever, or crash."""
    if type(value) not in (str, int, float, bool, type(None), Instance):  # which is hashed by identity
        raise Refused("E301", f"a key is a {type(value).__name__}, not text")
    return value


RECORD = Function(_record)

# What frameworks keep beside the weights. Nothing of it is looked at.
_OPAQUE_PACKAGES = ("megatron.", "torch.distributed.checkpoint.planner")
# Objects that record the place of a part of a tensor: `dtensor` and `dcp` read their attributes.
_PLAIN_PACKAGES = (
    "torch.distributed.checkpoint.", "torch.distributed.tensor", "torch.distributed._tensor",
    "torch.distributed.device_mesh", "torch.distributed._mesh_layout", "torch.distributed._pycute",
    "internlm.checkpoint.",
)  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): RECORD,
    # As Ascend's torch before 2.1 saves a tensor, from a copy in host memory; the last argument is for the device.
    ("torch_npu.utils.storage", "_rebuild_npu_tensor"): Function(lambda *given: _rebuild_tensor(*given[:-1])),
    ("torch", "Size"): Function(lambda value=(): int_list(value)),
    # Core 0.15's has data of its own beside torch's.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): PlainClass("Metadata"),
    ("torch.storage", "UntypedStorage"): StorageType(None),
    ("torch", "UntypedStorage"): StorageType(None),
    ("torch", "Tensor"): OtherClass("torch.Tensor"),
    ("torch.nn.parameter", "Parameter"): OtherClass("torch.nn.parameter.Parameter"),
    **{("torch._utils", name): function for name, function in _REBUILD.items()},
    **{("torch", name): DType(name) for name in (*DTYPES, *_UNSUPPORTED_DTYPES)},
    **{(module, name): StorageType(STORAGES.get(name, name))
       for module in ("torch", "torch.storage") for name in (*STORAGES, *_UNSUPPORTED_STORAGES)},
}  # fmt: skip


def known_global(module: str, name: str) -> Any:
    """The stand-in for a global; `Refused` with its name when there is none."""
    known = _KNOWN.get((module, name))
    if known is not None:
        return known
    if name == "Config":
        return RECORD
    if module.startswith(_OPAQUE_PACKAGES):
        return opaque(name)
    if module.startswith(_PLAIN_PACKAGES):
        return PlainClass(name, takes=True)
    form = name.removeprefix("_rebuild_") in ("qtensor", "sparse_tensor", "nested_tensor", "meta_tensor_no_storage")
    shards = "_shard" in module or name in ("ShardedTensor", "DTensor")
    raise Refused("E303" if form or shards else "E302", f"{module}.{name}")


def storage_of(pid: Any) -> Storage:
    """The storage that a persistent id describes: ("storage", type, key, location, elements, …)."""
    if not (type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], StorageType)):
        raise Refused("E301", f"a persistent id {reprlib.repr(pid)}")
    key, count = pid[2], pid[4]
    if type(key) is not str or type(count) is not int or not 0 <= count < 1 << 62:
        raise Refused("E301", f"a storage {reprlib.repr(key)} of {reprlib.repr(count)} elements")
    if len(pid) > 5 and pid[5] is not None:
        raise Refused("E303", "a storage that is a view of another (saved before 2017)")
    return Storage(key, pid[1].dtype, count)
