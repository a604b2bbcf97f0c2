"""Values: how the elements of one array are derived from those of another in the same places.

Relations are tried on some tiles spread over the array, then on all of it: one value throughout, the sign, a
factor, a summand, both, a factor for each row or column, less precision than the reference, and others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from engine.discover.levels import BITS, Fits, Kind, Pair, Relation, quantised, rounded
from engine.discover.lines import FEWEST, by_groups, line, lines, slack
from engine.errors import counted
from engine.formats.headers import FLOATS
from engine.move.tensors import Box, Tensors, View, tiles
from engine.move.values import float_type

_TILE = 1 << 14  # elements at a time
_TRIED = 12  # tiles that are tried first
_TELLING = 16  # different values that a function must explain
_STRAY = 0.005  # share of the elements that may be exceptions
_FAR = 0.01  # share of the sum of squares
_ZEROS = 0.005  # share of elements that are zero if they were pruned


def relate_values(tensors: Tensors, out: View, ref: View, sizes: Mapping[str, int]) -> Relation | None:
    """How an array's values are derived from the reference's, both rows × columns; None if in no known way.

    A factor that is the square root of one of the model's `sizes` is named so.
    """
    boxes, tried = _boxes(out, ref)
    some = [(x.copy(), y.copy()) for x, y in _pairs(tensors, out, ref, tried)]
    precision = 2.0 ** -min(BITS.get(out.dtype, 50), BITS.get(ref.dtype, 50))
    nearly: Relation | None = None
    for relation, fits in _relations(some, precision, out, ref, sizes):
        misfits = _misfits(fits, some)
        if misfits > _STRAY * sum(x.size for x, _ in some):
            continue
        if len(tried) < len(boxes):
            misfits = _misfits(fits, _pairs(tensors, out, ref, boxes), _STRAY * out.elements)
        if misfits == 0:
            return relation
        if nearly is None and misfits <= _STRAY * out.elements:
            words = f"{relation.words}, but for {counted(misfits, 'element')}"
            nearly = Relation(relation.kind, words)
    return nearly


def relate_rounding(tensors: Tensors, out: View, ref: View) -> Relation | None:
    """Whether an array is the reference through a type that holds less, which changes few elements of some."""
    if out.dtype not in FLOATS or ref.dtype not in FLOATS:
        return None
    boxes, none = _boxes(out, ref)[0], np.empty(0)
    for words, fits in rounded(none, none, out.dtype, ref.dtype):
        if not _misfits(fits, _pairs(tensors, out, ref, boxes), 0):
            return Relation("rounded", words)
    return None


def _boxes(out: View, ref: View) -> tuple[list[Box], list[Box]]:
    """The tiles of two arrays of one shape, and a few of them, evenly spread."""
    boxes = list(tiles(out.shape, (out.strides, ref.strides), _TILE))
    return boxes, [boxes[i * len(boxes) // _TRIED] for i in range(_TRIED)] if len(boxes) > _TRIED else boxes


def _pairs(tensors: Tensors, out: View, ref: View, boxes: Iterable[Box]) -> Iterator[Pair]:
    return ((tensors.values(out, box), tensors.values(ref, box, 1)) for box in boxes)


def _misfits(fits: Fits, pairs: Iterable[Pair], most: float = np.inf) -> int:
    """The number of elements that a relation does not explain; counting stops above `most`."""
    count = 0
    for x, y in pairs:
        fitting = np.asarray(fits(x, y))
        count += int(x.size - fitting.sum()) if fitting.size > 1 or x.size == 1 else 0 if fitting else x.size
        if count > most:
            break
    return count


def _relations(
    some: list[Pair], precision: float, out: View, ref: View, sizes: Mapping[str, int]
) -> Iterator[tuple[Relation, Fits]]:
    """Relations that may hold by the tried tiles, the simplest first, each with a test for tiles."""
    x, y = (np.concatenate([pair[i].reshape(-1) for pair in some]) for i in (0, 1))
    first = x[0]
    if not x.any() and not y.any():
        yield Relation("negated", "zeros of the other sign"), lambda x, y: not x.any() and not y.any()
    if (x == first).all() or np.isnan(x).all():
        yield _constant(first, y), lambda x, _: bool((x == first).all() or (first != first and np.isnan(x).all()))
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.any():
        yield from _functions(x[finite], y[finite], precision, (out.dtype, ref.dtype))
    if out.dtype in FLOATS and ref.dtype in FLOATS:
        for words, fits in rounded(x[finite], y[finite], out.dtype, ref.dtype):
            yield Relation("rounded", words), fits
    x, y = x[finite], y[finite]
    if len(x) < FEWEST or len(np.unique(y)) < 2:
        return
    for factor, summand, words, kind, room in lines(x, y, precision, sizes):
        yield Relation(kind, words), line(factor, summand, precision, room if summand else 0.0)
    yield from by_groups(some, precision)
    for words, fits in quantised(some, precision):
        yield Relation("rounded", words), fits
    far = np.square(x - y).sum() > _FAR * np.square(y).sum()  # more than noise
    if far and len(np.unique(y)) >= _TELLING and np.ptp(x) > 0:
        yield Relation("mapped", "each value turned into another, their order kept"), _rising


def _functions(
    x: np.ndarray, y: np.ndarray, precision: float, types: tuple[str, str]
) -> Iterator[tuple[Relation, Fits]]:
    """Values that were cut off, pruned, without their sign, or another function of themselves."""
    low, high = float(x.min()), float(x.max())
    bounds = f"to {low:g} … {high:g}"
    yield Relation("clipped", "without signs: absolute values"), lambda x, y: bool(np.array_equal(x, np.abs(y)))
    if low == 0:
        words = "without negative values: they are zero"
        yield Relation("clipped", words), lambda x, y: np.array_equal(x, np.maximum(y, 0))
    yield Relation("clipped", f"cut off {bounds}"), lambda x, y: bool(np.array_equal(x, np.clip(y, low, high)))
    lost = (x == 0) & (y != 0)
    if lost.mean() > _ZEROS:
        words = f"pruned: {lost.mean():.1%} of the elements are zero, the others as they were"
        yield Relation("changed", words), lambda x, y: bool(((x == 0) | (x == y)).all())
    if len(np.unique(y)) < _TELLING:
        return
    for words, function in (*_POWERS.items(), *_bits_read(types)):

        def fits(x: np.ndarray, y: np.ndarray, function: Callable[[np.ndarray], np.ndarray] = function) -> bool:
            with np.errstate(all="ignore"):
                wanted = function(y)
                return bool(((np.abs(x - wanted) <= 2 * slack(x, precision)) | (x == wanted) | np.isnan(wanted)).all())

        yield Relation("mapped", words), fits


_POWERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "squared": np.square,
    "the reciprocal of the reference": np.reciprocal,
    "the root of the reference": np.sqrt,
    "the tanh of the reference": np.tanh,
    "the signs of the reference alone": np.sign,
}


def _bits_read(types: tuple[str, str]) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """The reference's bytes in another order, or its bits read as another type."""
    one, two = types
    if one != two or one not in FLOATS:
        return
    kind = float_type(one)
    if kind.itemsize > 1:
        yield "the bytes of each element in reverse order", lambda y: _viewed(y.astype(kind), kind, swapped=True)
    if kind.itemsize == 2:
        for held, other in (("F16", "BF16"), ("BF16", "F16")):

            def read(y: np.ndarray, held: str = held, other: str = other) -> np.ndarray:
                bits = _viewed(y.astype(np.float32).astype(float_type(held)), float_type(other))
                return bits.astype(kind).astype(float)

            yield f"the bits of {held} read as {other}", read


def _viewed(values: np.ndarray, kind: np.dtype[Any], *, swapped: bool = False) -> np.ndarray:
    bits = values.view(f"u{kind.itemsize}")
    return (bits.byteswap() if swapped else bits).view(kind).astype(float)


def _rising(x: np.ndarray, y: np.ndarray) -> bool:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return False
    order = np.lexsort((x.reshape(-1), y.reshape(-1)))
    steps = np.diff(x.reshape(-1)[order])
    return bool((steps >= 0).all() or (steps <= 0).all())


def _constant(value: float, y: np.ndarray) -> Relation:
    if value == 0:
        return Relation("zeroed", "all zero")
    if value != value:
        return Relation("constant", "all NaN")
    told = f"{value:g} throughout"
    if (y == y[0]).all():
        more = {y[0] + 1: ", plus 1", y[0] - 1: ", minus 1"}.get(value, "")
        if value == -y[0]:
            return Relation("negated", f"negated: {value:g} throughout, the reference is {y[0]:g}")
        by = f", {value / y[0]:g} times" if y[0] else ""
        kind: Kind = "shifted" if more else "scaled" if by else "constant"
        return Relation(kind, f"{told}, the reference is {y[0]:g}{more}{' or' if more and by else ''}{by}")
    return Relation("constant", told)


def closeness(tensors: Tensors, out: View, ref: View) -> float | None:
    """The relative distance (RMS) of two arrays on some tiles; None if it is not a finite number."""
    apart = size = 0.0
    for x, y in _pairs(tensors, out, ref, _boxes(out, ref)[1]):
        apart += float(np.square(x - y).sum())
        size += float(np.square(y).sum())
    found = (apart / size) ** 0.5 if size else float("nan")
    return found if np.isfinite(found) else None
