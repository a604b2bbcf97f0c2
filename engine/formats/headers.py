"""The content of a checkpoint file without its payload; and the errors for unsound files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

from engine.errors import EngineError, Place
from engine.storage.store import File, State

FLOATS = ("BF16", "F16", "F32", "F64")  # of weights, by their safetensors names; least precise first

# Element types by their safetensors names, and bytes per element.
ITEM_SIZES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
# The same by torch's names.
DTYPES = {
    "bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32",
    "float64": "F64", "double": "F64", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32",
    "int16": "I16", "short": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
TORCH_NAMES = {held: name for name, held in reversed(DTYPES.items())}  # torch's spelling of each
STORAGES = {
    "BFloat16Storage": "BF16", "HalfStorage": "F16", "FloatStorage": "F32", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in row-major order.

    >>> dense_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of elements from the first to the last of a strided array, including those in between.

    >>> span((2, 3), (10, 1)), span((), ())
    (13, 1)
    """
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@lru_cache(maxsize=4096)
def shared(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all equal ones: most ranks hold tensors of the same shapes, and there can be thousands of ranks."""
    return sizes


@dataclass(frozen=True, slots=True)
class Recorded:
    """A box of a larger tensor, as the file records it.

    Attributes:
        starts: its start along each dimension of the larger tensor.
        whole: the larger tensor's shape.
    """

    starts: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of one file.

    Attributes:
        name: the key in the file, prefix included.
        dtype: safetensors spelling (`BF16`, `F32`, ...).
        shape: sizes in elements.
        strides: in elements, as stored; shared storages make offsets and strides arbitrary.
        offset: absolute byte position in the file of element [0, 0, ...].
        recorded: its place in a larger tensor, for a shard that records it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    recorded: Recorded | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the whole tensor: of this one, or of the one that it records to be a part of."""
        return self.shape if self.recorded is None else self.recorded.whole

    @property
    def starts(self) -> tuple[int, ...]:
        """Its start in `whole`, along each dimension."""
        return (0,) * len(self.shape) if self.recorded is None else self.recorded.starts

    @property
    def nbytes(self) -> int:
        """The size in bytes, counting each index once."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileHeader:
    """One checkpoint file: its tensors in file order, its size in bytes and an identity.

    Attributes:
        identity: hex digest over size and the part of the file that describes it (zip directory, or
            header); computed without reading payload.
        summed: whether that part holds a checksum of every tensor's bytes, so that equal identities mean
            equal content. Safetensors have none, nor have files from before the zip format; torch may omit them.
        left: names of its tensors that are not part of the model, and were not read.
        replaced: names of tensors that are stored apart, while room for them among the others is still there, unused.
        state: the state of the file when it was indexed; None if it is not a file.
    """

    file: File
    size: int
    tensors: tuple[TensorHeader, ...]
    identity: str
    summed: bool = False
    state: State | None = None
    root: str | None = None  # the folder inside a torch zip: the name under which it was saved
    left: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    says: Mapping[str, Any] = field(default_factory=dict)  # the requested values that are saved beside the tensors

    def only(self, wanted: Callable[[str], bool]) -> FileHeader:
        """The header with only the wanted tensors, by name; the others are `left`."""
        left = tuple(t.name for t in self.tensors if not wanted(t.name))
        return replace(self, tensors=tuple(t for t in self.tensors if wanted(t.name)), left=(*self.left, *left))

    def apart(self) -> FileHeader:
        """This header; E301 if two tensors in row-major order share a part of each: a wrong offset reads into the next.

        Both may be one, or one a part of the other, as a fused tensor and its pieces.
        """
        dense = (one for one in self.tensors if one.nbytes and one.strides == dense_strides(one.shape))
        end, last = 0, ""
        for one in sorted(dense, key=lambda one: (one.offset, -one.nbytes)):
            until = one.offset + one.nbytes
            if one.offset < end < until:
                got = f"its first {end - one.offset} bytes are also the last of `{last}`"
                raise damaged(self.name, got, one.name)
            end, last = max((end, last), (until, one.name))
        return self

    @property
    def name(self) -> str:
        return self.file.name


Named = tuple[str, str, tuple[int, ...]]  # a tensor to write: its name, element type and shape


def damaged(
    name: str, what: str, tensor: str | None = None, *, expected: str | None = None, how: str = " or truncated"
) -> EngineError:
    """E301 with what was found."""
    return EngineError(
        "E301",
        f"a checkpoint file is damaged{how}",
        place=Place(name, tensor=tensor),
        got=what,
        expected=expected,
        fix="Copy the file again from the training run.",
    )


def unsupported(whose: str, dtype: str | None, place: Place) -> EngineError:
    """E303 for the element type of a tensor or a storage."""
    return EngineError(
        "E303",
        f"a {whose}'s element type is not supported",
        place=place,
        got=str(dtype),
        expected=", ".join(ITEM_SIZES),
        fix="Quantised and complex tensors are not converted.",
    )


def big_endian(name: str, order: bytes = b"big") -> EngineError:
    """E303 for a file with the other byte order."""
    return EngineError(
        "E303",
        "the file was saved on a big-endian machine",
        place=Place(name),
        got=repr(order),
        expected="little",
        fix="Load and save it once with torch on a little-endian machine.",
    )
