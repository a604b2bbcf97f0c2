"""Reads and compares tensors of any size in small buffers, casting element types as needed. No torch.

Transposing, regrouping and taking rows of a stored tensor only change its strides, so one reader
serves them all: a view is the same elements in another order, given by offset and strides; no data moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt, prod

import numpy as np

from engine.formats.headers import FLOATS, ITEM_SIZES, FileHeader, dense_strides, span
from engine.move.blocks import Block
from engine.move.moves import Gatherer
from engine.move.reader import Reader
from engine.move.values import elements, float_type
from engine.planning.boxes import Copy, in_order
from engine.planning.model import Work
from engine.planning.stored import Stored
from engine.storage.sources import SourceFiles

Box = tuple[tuple[int, int], ...]  # low and high of each axis


@dataclass(frozen=True, slots=True)
class View:
    """A strided array over one stored tensor.

    Attributes:
        source: index of the tensor among those that are read together.
        dtype: as safetensors spells it.
        shape, strides, start: in elements; `start` counts from the tensor's first element.
    """

    source: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def swap(self, one: int, two: int) -> View:
        """Two axes exchanged.

        >>> View(0, "F32", (6, 4), (4, 1)).swap(0, 1)
        View(source=0, dtype='F32', shape=(4, 6), strides=(1, 4), start=0)
        """
        axes = list(range(len(self.shape)))
        axes[one], axes[two] = two, one
        return replace(self, shape=tuple(self.shape[a] for a in axes), strides=tuple(self.strides[a] for a in axes))

    def part(self, axis: int, low: int, high: int) -> View:
        """Indices low..high of an axis.

        >>> View(0, "F32", (6, 4), (4, 1)).part(0, 2, 5)
        View(source=0, dtype='F32', shape=(3, 4), strides=(4, 1), start=8)
        """
        return replace(
            self,
            shape=(*self.shape[:axis], high - low, *self.shape[axis + 1 :]),
            start=self.start + low * self.strides[axis],
        )


def tiles(shape: Sequence[int], strides: Sequence[Sequence[int]], limit: int) -> Iterator[Box]:
    """Cut an array into boxes of at most `limit` elements, in row-major order of boxes.

    Args:
        strides: those of every array that is read with the same boxes. A box is long along each axis on which
            one of them is dense, so that transposed arrays are read in runs on both sides.

    >>> list(tiles((4, 6), [(6, 1)], 12))
    [((0, 2), (0, 6)), ((2, 4), (0, 6))]
    >>> list(tiles((4, 4), [(4, 1), (1, 4)], 4))[:2]
    [((0, 2), (0, 2)), ((0, 2), (2, 4))]
    """
    if 0 in shape:
        return
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    dense = list(dict.fromkeys(min(wide, key=lambda axis: one[axis]) for one in strides)) if wide else []
    order = dense + sorted((axis for axis in wide if axis not in dense), key=lambda axis: strides[0][axis])
    extents, room = [1] * len(shape), limit
    for axis in order:
        most = isqrt(room) if len(dense) > 1 and axis == dense[0] else room
        extents[axis] = max(1, min(shape[axis], most))
        room //= extents[axis]
    both = zip(shape, extents, strict=True)
    yield from product(*([(low, min(low + most, size)) for low in range(0, size, most)] for size, most in both))


_LIMIT = 1 << 18  # elements of a tile: half a MiB of bfloat16
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def common_types(one: str, two: str) -> tuple[str, ...]:
    """The element types in which two arrays can be compared; empty for an integer and a float.

    >>> common_types("F32", "BF16"), common_types("F16", "BF16"), common_types("I64", "F32")
    (('BF16',), ('BF16', 'F16'), ())
    """
    if one == two:
        return (one,)
    if one not in FLOATS or two not in FLOATS:
        return ()
    if {one, two} == {"BF16", "F16"}:  # neither can hold all values of the other
        return ("BF16", "F16")
    return (min(one, two, key=FLOATS.index),)


class Tensors(AbstractContextManager["Tensors"]):
    """Reads the tensors of several checkpoints in tiles; a checkpoint is its files, or a plan that converts others.

    Not shared between threads. A context manager that closes the files.

    Attributes:
        sides: each checkpoint's tensors by name, in order.
    """

    def __init__(self, *sides: Sequence[FileHeader] | Work) -> None:
        self._files = [SourceFiles(side.files if isinstance(side, Work) else side) for side in sides]
        self._readers: list[tuple[_Stored | _Planned, int]] = []  # for each tensor, its reader and its number there
        self.sides: list[dict[str, View]] = []
        for side, files in zip(sides, self._files, strict=True):
            views: dict[str, View] = {}
            readers = _Planned(side, files) if isinstance(side, Work) else _Stored(side, files)
            for number, (name, dtype, shape, strides) in enumerate(readers.tensors):
                views[name] = View(len(self._readers), dtype, shape, strides)
                self._readers.append((readers, number))
            self.sides.append(views)

    def __exit__(self, *details: object) -> None:
        for files in self._files:
            files.__exit__(*details)

    def read(self, view: View, box: Box, reader: int = 0) -> np.ndarray:
        """A box's elements in row-major order, as unsigned integers; valid until the next call."""
        readers, number = self._readers[view.source]
        return readers.read(number, view, box, reader)

    def values(self, view: View, box: Box, reader: int = 0) -> np.ndarray:
        """The elements of a box as float64, in its shape."""
        found = values_of(self.read(view, box, reader), view.dtype)
        return found.reshape([high - low for low, high in box])

    def match(self, one: View, two: View, advance: Callable[[int], None] | None = None) -> bool:
        """Whether two arrays of one shape are equal, after a cast if their types differ; stops at the first difference.

        Args:
            advance: called with the number of elements of each equal tile.
        """
        kinds = common_types(one.dtype, two.dtype)
        return any(self._match(one, two, kind, advance if kind == kinds[0] else None) for kind in kinds)

    def _match(self, one: View, two: View, kind: str, advance: Callable[[int], None] | None) -> bool:
        for box in tiles(one.shape, (one.strides, two.strides), _LIMIT):
            x, y = self.read(one, box), self.read(two, box, 1)
            if not np.array_equal(x, y) if one.dtype == two.dtype else unlike(x, one.dtype, y, two.dtype, kind).any():
                return False
            if advance is not None:
                advance(x.size)
        return True


_Tensor = tuple[str, str, tuple[int, ...], tuple[int, ...]]  # name, type, shape, strides


class _Stored:
    """Tensors as they are stored in files."""

    def __init__(self, files: Sequence[FileHeader], opened: SourceFiles) -> None:
        sources = [Stored(i, header, header.name) for i, file in enumerate(files) for header in file.tensors]
        self.tensors: list[_Tensor] = [
            (s.header.name, s.header.dtype, s.header.shape, s.header.strides) for s in sources
        ]
        self._gatherers = (Gatherer(opened, sources), Gatherer(opened, sources))
        self._last: list[tuple[object, tuple[Copy, ...]] | None] = [None, None]

    def read(self, number: int, view: View, box: Box, reader: int) -> np.ndarray:
        shape = tuple(high - low for low, high in box)
        key = (number, view.strides, shape)
        last = self._last[reader]
        if last is None or last[0] != key:  # boxes of a tensor differ only in their start
            copy = in_order(number, shape, view.strides)
            if copy.source_strides == copy.target_strides:  # one run
                copy = in_order(number, (prod(shape),), (1,))
            last = self._last[reader] = (key, (copy,))
        block = Block(0, prod(shape), last[1], (1,), _start(view, box))
        return elements(self._gatherers[reader].gather(block, view.dtype), view.dtype)


class _Planned:
    """Tensors as a plan would write them."""

    def __init__(self, plan: Work, opened: SourceFiles) -> None:
        self.tensors: list[_Tensor] = [(o.name, o.dtype, o.shape, dense_strides(o.shape)) for o in plan.outputs]
        self._readers = (Reader(plan, opened), Reader(plan, opened))

    def read(self, number: int, view: View, box: Box, reader: int) -> np.ndarray:
        shape, item = tuple(high - low for low, high in box), ITEM_SIZES[view.dtype]
        start = _start(view, box)
        count = span(shape, view.strides)
        data = bytearray(count * item)
        self._readers[reader].read_into(number, start * item, memoryview(data))
        found = elements(memoryview(data), view.dtype)
        if view.strides == dense_strides(view.shape) and count == prod(shape):
            return found
        strides = [stride * item for stride in view.strides]
        return np.lib.stride_tricks.as_strided(found, shape, strides).reshape(-1)


def _start(view: View, box: Box) -> int:
    return view.start + sum(low * stride for (low, _), stride in zip(box, view.strides, strict=True))


def unlike(x: np.ndarray, one: str, y: np.ndarray, two: str, kind: str) -> np.ndarray:
    """Which elements differ in their bits, after casting both to `kind`. After a cast, all NaNs are equal."""
    a, b = cast_bits(x, one, kind), cast_bits(y, two, kind)
    differ: np.ndarray = a != b
    if one != two and differ.any():
        differ &= _numbers(a, kind) | _numbers(b, kind)
    return differ


def cast_bits(bits: np.ndarray, dtype: str, kind: str) -> np.ndarray:
    """The bits that elements have after a cast to another float type."""
    if dtype == kind:
        return bits
    target = float_type(kind)
    with np.errstate(over="ignore", invalid="ignore"):
        cast: np.ndarray = bits.view(float_type(dtype)).astype(target).view(_BITS[target.itemsize])
    return cast


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    numbers: np.ndarray = ~np.isnan(bits.view(float_type(kind)))
    return numbers


def deviation(x: np.ndarray, one: str, y: np.ndarray, two: str) -> tuple[float, int]:
    """The largest absolute deviation, and how many elements are NaN on the first side only."""
    u, v = values_of(x, one), values_of(y, two)
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(u - v)
    both = np.isnan(u) & np.isnan(v)
    largest = float(np.where(np.isnan(far), np.where(both, 0.0, np.inf), far).max())
    return largest, int((np.isnan(u) & ~np.isnan(v)).sum())


def values_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Elements as float64, from their bits."""
    import ml_dtypes

    if dtype in FLOATS:
        kind = float_type(dtype)
    elif dtype.startswith("F8"):
        kind = np.dtype(ml_dtypes.float8_e4m3fn if dtype == "F8_E4M3" else ml_dtypes.float8_e5m2)
    else:
        kind = np.dtype(bool if dtype == "BOOL" else dtype.replace("I", "int").replace("U", "uint"))
    with np.errstate(invalid="ignore"):  # NaNs of every kind
        return bits.view(kind).astype(np.float64)
