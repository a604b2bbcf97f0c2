"""Tensors of any size compared and digested in small buffers, element types cast on the way. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from engine.formats.headers import FileHeader
from engine.move.blocks import Block
from engine.move.gather import Gatherer
from engine.move.values import elements, float_type
from engine.move.views import Box, View, dense_strides, tiles
from engine.planning.copies import Copy
from engine.planning.stored import SourceTensor
from engine.storage.sources import SourceFiles

_LIMIT = 1 << 18  # elements of a tile: half a MiB of bfloat16
_SPAN = 1 << 20  # elements that one read may reach across
_SMALL = 1 << 16  # elements of a tile where differences are measured in float64
_FLOATS = ("BF16", "F16", "F32", "F64")  # what is left of precision by casting, least first
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Pair = tuple[View, View]


@dataclass(frozen=True, slots=True)
class Difference:
    """How two arrays of one shape differ.

    Attributes:
        count: elements that are not the same, after casting if their types differ.
        largest: the largest absolute deviation; infinite where only one side is a number.
        first: index of the first such element in row-major order.
    """

    count: int
    largest: float
    first: tuple[int, ...]


def common_types(one: str, two: str) -> tuple[str, ...]:
    """The element types in which two arrays can be compared; none for an integer and a float.

    >>> common_types("F32", "BF16"), common_types("F16", "BF16"), common_types("I64", "F32")
    (('BF16',), ('BF16', 'F16'), ())
    """
    if one == two:
        return (one,)
    if one not in _FLOATS or two not in _FLOATS:
        return ()
    if {one, two} == {"BF16", "F16"}:  # neither holds the other's values
        return ("BF16", "F16")
    return (min(one, two, key=_FLOATS.index),)


def narrowest(types: Sequence[str]) -> str | None:
    """The type in which all of these can be digested alike, if there is one.

    >>> narrowest(["F32", "BF16", "F32"]), narrowest(["I64", "I64"]), narrowest(["I64", "F32"])
    ('BF16', 'I64', None)
    """
    kinds = set(types)
    if len(kinds) == 1:
        return types[0]
    return min(kinds, key=_FLOATS.index) if kinds <= set(_FLOATS) else None


class Tensors:
    """Every tensor of some files, read in tiles. Not shared between threads.

    Used as a context: leaving it closes the files.
    """

    def __init__(self, files: Sequence[FileHeader]) -> None:
        sources = [SourceTensor(i, header) for i, file in enumerate(files) for header in file.tensors]
        self.views = tuple(
            View(i, source.header.dtype, source.header.shape, source.header.strides) for i, source in enumerate(sources)
        )
        self._files = SourceFiles(files)
        self._readers = (Gatherer(self._files, sources), Gatherer(self._files, sources))
        self._last: list[tuple[object, tuple[Copy, ...]] | None] = [None, None]

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *details: object) -> None:
        self._files.__exit__(*details)

    def _read(self, reader: int, view: View, box: Box) -> np.ndarray:
        """A box's elements in row-major order, as unsigned integers; valid until the next call."""
        shape = tuple(high - low for low, high in box)
        key = (view.source, view.strides, shape)
        last = self._last[reader]
        if last is None or last[0] != key:  # boxes of a tensor differ by their start only
            last = self._last[reader] = (key, tuple(_pieces(view.source, shape, view.strides)))
        start = view.start + sum(low * stride for (low, _), stride in zip(box, view.strides, strict=True))
        block = Block(0, prod(shape), last[1], (1,) * len(last[1]), start)
        return elements(self._readers[reader].gather(block, view.dtype), view.dtype)

    def _both(self, one: View, two: View, limit: int) -> Iterator[tuple[Box, np.ndarray, np.ndarray]]:
        for box in tiles(one.shape, (one.strides, two.strides), limit):
            yield box, self._read(0, one, box), self._read(1, two, box)

    def match(self, pairs: Sequence[Pair], advance: Callable[[int], None] | None = None) -> bool:
        """Whether the arrays of each pair are the same, cast if their types differ.

        Stops at the first tile that differs, so that a wrong guess costs one tile.

        Args:
            advance: called with the elements of each tile that is the same.
        """
        kinds = common_types(pairs[0][0].dtype, pairs[0][1].dtype)
        return any(
            all(self._match(one, two, kind, advance if kind == kinds[0] else None) for one, two in pairs)
            for kind in kinds
        )

    def _match(self, one: View, two: View, kind: str, advance: Callable[[int], None] | None) -> bool:
        for _, x, y in self._both(one, two, _LIMIT):
            if one.dtype == two.dtype:
                if not np.array_equal(x, y):
                    return False
            elif _unlike(x, one.dtype, y, two.dtype, kind).any():
                return False
            if advance is not None:
                advance(x.size)
        return True

    def difference(self, one: View, two: View, advance: Callable[[int], None] | None = None) -> Difference | None:
        """How two arrays of one shape differ; None when their types cannot be compared."""
        kinds = common_types(one.dtype, two.dtype)
        found: Difference | None = None
        for kind in kinds:
            told = self._difference(one, two, kind, advance if kind == kinds[0] else None)
            if found is None or told.count < found.count:
                found = told
        return found

    def _difference(self, one: View, two: View, kind: str, advance: Callable[[int], None] | None) -> Difference:
        count, largest, first = 0, 0.0, (0,) * len(one.shape)
        for box, x, y in self._both(one, two, _SMALL):
            unlike = _unlike(x, one.dtype, y, two.dtype, kind)
            if unlike.any():
                at = np.unravel_index(int(unlike.argmax()), [high - low for low, high in box])
                index = tuple(int(i) + low for i, (low, _) in zip(at, box, strict=True))
                first = index if not count else min(first, index)
                count += int(unlike.sum())
                largest = max(largest, _deviation(x[unlike], one.dtype, y[unlike], two.dtype))
            if advance is not None:
                advance(x.size)
        return Difference(count, largest, first)

    def digest(self, view: View, kind: str, elements: int | None = None) -> bytes:
        """A digest of an array's elements in row-major order, cast to `kind`; of the first few only if asked."""
        state, left = hashlib.blake2b(digest_size=16), view.elements if elements is None else elements
        for box in tiles(view.shape, (dense_strides(view.shape),), min(left, _LIMIT) or 1):
            values = _cast(self._read(0, view, box), view.dtype, kind)
            state.update(values.data)
            left -= values.size
            if left <= 0:
                break
        return state.digest()

    def row_digests(self, view: View, kind: str) -> Iterator[bytes]:
        """A short digest per index of the first axis."""
        rows = max(1, _LIMIT * view.shape[0] // max(view.elements, 1))
        inner = tuple((0, size) for size in view.shape[1:])
        for low in range(0, view.shape[0], rows):
            box = ((low, min(low + rows, view.shape[0])), *inner)
            values = _cast(self._read(0, view, box), view.dtype, kind).reshape(box[0][1] - low, -1)
            for row in values:
                yield hashlib.blake2b(row.data, digest_size=8).digest()


def _pieces(source: int, shape: Sequence[int], strides: Sequence[int]) -> Iterator[Copy]:
    """Copies that fetch a box in row-major order; none reads across much more than a tile."""
    axes = [axis for axis in zip(shape, strides, dense_strides(shape), strict=True) if axis[0] > 1]
    if all(stride == target for _, stride, target in axes):
        axes = [(prod(shape), 1, 1)] if axes else []
    if not axes:
        yield Copy(source, 0, 0, 0, (), (), ())
        return
    sizes, sources, targets = (tuple(values) for values in zip(*axes, strict=True))
    axis = max(range(len(axes)), key=lambda i: sources[i])
    per = max(1, _SPAN // max(sources[axis], 1))
    for low in range(0, sizes[axis], per):
        part = (*sizes[:axis], min(per, sizes[axis] - low), *sizes[axis + 1 :])
        yield Copy(source, 0, low * sources[axis], low * targets[axis], part, sources, targets)


def _unlike(x: np.ndarray, one: str, y: np.ndarray, two: str, kind: str) -> Any:
    """Which elements differ in their bits, after casting both to `kind`. Cast NaNs are alike."""
    a, b = _cast(x, one, kind), _cast(y, two, kind)
    unlike = a != b
    if one != two and unlike.any():
        unlike &= _numbers(a, kind) | _numbers(b, kind)
    return unlike


def _cast(bits: np.ndarray, dtype: str, kind: str) -> np.ndarray:
    if dtype == kind:
        return bits
    target = float_type(kind)
    with np.errstate(over="ignore", invalid="ignore"):
        cast: np.ndarray = bits.view(float_type(dtype)).astype(target).view(_BITS[target.itemsize])
    return cast


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    numbers: np.ndarray = ~np.isnan(bits.view(float_type(kind)))
    return numbers


def _deviation(x: np.ndarray, one: str, y: np.ndarray, two: str) -> float:
    u, v = _values(x, one), _values(y, two)
    with np.errstate(invalid="ignore", over="ignore"):
        deviation = np.abs(u - v)
    both = np.isnan(u) & np.isnan(v)
    return float(np.where(np.isnan(deviation), np.where(both, 0.0, np.inf), deviation).max())


def _values(bits: np.ndarray, dtype: str) -> np.ndarray:
    import ml_dtypes

    if dtype in _FLOATS:
        kind = float_type(dtype)
    elif dtype.startswith("F8"):
        kind = np.dtype(ml_dtypes.float8_e4m3fn if dtype == "F8_E4M3" else ml_dtypes.float8_e5m2)
    else:
        kind = np.dtype(bool if dtype == "BOOL" else dtype.replace("I", "int").replace("U", "uint"))
    return bits.view(kind).astype(np.float64)
