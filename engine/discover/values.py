"""Values: how the elements of one array come from those of another in the same places.

Tried on some tiles spread over the array, then on all of it: one value throughout, the sign, a factor, a
summand, both, a factor for each row or column, and fewer bits than the reference has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from engine.discover.levels import BITS, GROUPS, Fits, Pair, groups, quantised, rounded
from engine.formats.headers import FLOATS
from engine.move.tensors import Tensors, values_of
from engine.move.values import float_type
from engine.move.views import Box, View, tiles

Kind = Literal["zeroed", "constant", "negated", "scaled", "shifted", "rounded", "clipped", "mapped", "changed"]

_TILE = 1 << 14  # elements at a time
_TRIED = 12  # tiles that are looked at before all are
_FEW = 3  # factors that are named one by one
_FEWEST = 4  # elements that one factor must explain
_TELLING = 16  # different values that a function must explain
_STRAY = 0.005  # of the elements may be otherwise
_FAR = 0.01  # of the squares
_ZEROS = 0.005  # of the elements, so that they are pruned and not chance


@dataclass(frozen=True, slots=True)
class Values:
    """A relation of values: its kind, and in words: `scaled: 2 times the reference`."""

    kind: Kind
    words: str


def relate_values(tensors: Tensors, out: View, ref: View, sizes: Mapping[str, int]) -> Values | None:
    """How an array's values come from the reference's, both rows × columns; None when in no such way.

    Args:
        sizes: sizes of the model by name, whose roots factors are compared with.
    """
    boxes = list(tiles(out.shape, (out.strides, ref.strides), _TILE))
    tried = [boxes[i * len(boxes) // _TRIED] for i in range(_TRIED)] if len(boxes) > _TRIED else boxes

    def pairs(chosen: Iterable[Box] = boxes) -> Iterator[Pair]:
        for box in chosen:
            shape = tuple(high - low for low, high in box)
            yield (
                values_of(tensors.read(out, box), out.dtype).reshape(shape),
                values_of(tensors.read(ref, box, 1), ref.dtype).reshape(shape),
            )

    some = [(x.copy(), y.copy()) for x, y in pairs(tried)]
    precision = 2.0 ** -min(BITS.get(out.dtype, 50), BITS.get(ref.dtype, 50))
    nearly: Values | None = None
    for relation, fits in _relations(some, precision, out, ref, sizes):
        misfits = _misfits(fits, some)
        if misfits > _STRAY * sum(x.size for x, _ in some):
            continue
        if len(tried) < len(boxes):
            misfits = _misfits(fits, pairs(), _STRAY * out.elements)
        if misfits == 0:
            return relation
        if nearly is None and misfits <= _STRAY * out.elements:
            words = f"{relation.words}, but for {misfits:,} element{'' if misfits == 1 else 's'}"
            nearly = Values(relation.kind, words)
    return nearly


def _misfits(fits: Fits, pairs: Iterable[Pair], most: float = np.inf) -> int:
    """How many elements a relation does not explain, counted until they are too many."""
    count = 0
    for x, y in pairs:
        fitting = np.asarray(fits(x, y))
        count += int(x.size - fitting.sum()) if fitting.size > 1 or x.size == 1 else 0 if fitting else x.size
        if count > most:
            break
    return count


def _relations(
    some: list[Pair], precision: float, out: View, ref: View, sizes: Mapping[str, int]
) -> Iterator[tuple[Values, Fits]]:
    """What may hold by the tiles tried, plainest first, and whether it holds in a tile."""
    x, y = (np.concatenate([pair[i].reshape(-1) for pair in some]) for i in (0, 1))
    first = x[0]
    if (x == first).all() or np.isnan(x).all():
        yield _constant(first, y), lambda x, _: bool((x == first).all() or (first != first and np.isnan(x).all()))
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.any():
        yield from _functions(x[finite], y[finite], precision, (out.dtype, ref.dtype))
    if out.dtype in FLOATS and ref.dtype in FLOATS:
        for words, fits in rounded(x[finite], y[finite], out.dtype, ref.dtype):
            yield Values("rounded", words), fits
    x, y = x[finite], y[finite]
    if len(x) < _FEWEST or len(np.unique(y)) < 2:
        return
    for factor, summand, words, kind, room in _lines(x, y, precision, sizes):
        yield Values(kind, words), _line(factor, summand, precision, room if summand else 0.0)
    yield from _by_groups(some, precision)
    for words, fits in quantised(some, precision):
        yield Values("rounded", words), fits
    far = np.square(x - y).sum() > _FAR * np.square(y).sum()  # what noise does not do
    if far and len(np.unique(y)) >= _TELLING and np.ptp(x) > 0:
        yield Values("mapped", "each value turned into another, their order kept"), _rising


def _functions(x: np.ndarray, y: np.ndarray, precision: float, types: tuple[str, str]) -> Iterator[tuple[Values, Fits]]:
    """Values cut off, without their sign, pruned, or another function of themselves."""
    low, high = float(x.min()), float(x.max())
    bounds = f"to {low:g} … {high:g}"
    yield Values("clipped", "without signs: absolute values"), lambda x, y: bool(np.array_equal(x, np.abs(y)))
    if low == 0:
        yield (
            Values("clipped", "without negative values: they are zero"),
            lambda x, y: np.array_equal(x, np.maximum(y, 0)),
        )
    yield Values("clipped", f"cut off {bounds}"), lambda x, y: bool(np.array_equal(x, np.clip(y, low, high)))
    lost = (x == 0) & (y != 0)
    if lost.mean() > _ZEROS:
        yield Values("changed", f"pruned: {lost.mean():.1%} of the elements are zero, the others as they were"), _pruned
    if len(np.unique(y)) < _TELLING:
        return
    for words, function in (*_POWERS.items(), *_bits_read(types)):

        def fits(x: np.ndarray, y: np.ndarray, function: Callable[[np.ndarray], np.ndarray] = function) -> bool:
            with np.errstate(all="ignore"):
                wanted = function(y)
                return bool(((np.abs(x - wanted) <= 2 * _slack(x, precision)) | (x == wanted) | np.isnan(wanted)).all())

        yield Values("mapped", words), fits


_POWERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "squared": np.square,
    "the reciprocal of the reference": np.reciprocal,
    "the root of the reference": np.sqrt,
    "the tanh of the reference": np.tanh,
    "the signs of the reference alone": np.sign,
}


def _bits_read(types: tuple[str, str]) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """The reference's bytes in another order, or its bits read as those of another type."""
    one, two = types
    if one != two or one not in FLOATS:
        return
    kind = float_type(one)
    if kind.itemsize > 1:
        yield "the bytes of each element in reverse order", lambda y: _viewed(y.astype(kind), kind, swapped=True)
    if kind.itemsize == 2:
        for held, other in (("F16", "BF16"), ("BF16", "F16")):

            def read(y: np.ndarray, held: str = held, other: str = other) -> np.ndarray:
                return (
                    _viewed(y.astype(np.float32).astype(float_type(held)), float_type(other)).astype(kind).astype(float)
                )

            yield f"the bits of {held} read as {other}", read


def _viewed(values: np.ndarray, kind: np.dtype[Any], *, swapped: bool = False) -> np.ndarray:
    bits = values.view(f"u{kind.itemsize}")
    return (bits.byteswap() if swapped else bits).view(kind).astype(float)


def _pruned(x: np.ndarray, y: np.ndarray) -> bool:
    return bool(((x == 0) | (x == y)).all())


def _rising(x: np.ndarray, y: np.ndarray) -> bool:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return False
    order = np.lexsort((x.reshape(-1), y.reshape(-1)))
    steps = np.diff(x.reshape(-1)[order])
    return bool((steps >= 0).all() or (steps <= 0).all())


def _constant(value: float, y: np.ndarray) -> Values:
    if value == 0:
        return Values("zeroed", "all zero")
    if value != value:
        return Values("constant", "all NaN")
    told = f"{value:g} throughout"
    if (y == y[0]).all():
        more = {y[0] + 1: ", plus 1", y[0] - 1: ", minus 1"}.get(value, "")
        if value == -y[0]:
            return Values("negated", f"negated: {value:g} throughout, the reference is {y[0]:g}")
        by = f", {value / y[0]:g} times" if y[0] else ""
        kind: Kind = "shifted" if more else "scaled" if by else "constant"
        return Values(kind, f"{told}, the reference is {y[0]:g}{more}{' or' if more and by else ''}{by}")
    return Values("constant", told)


def _line(factor: float, summand: float, precision: float, room: float) -> Fits:
    def fits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            wanted = factor * y + summand
            near = np.abs(x - wanted) <= _slack(x, precision) + abs(summand) * precision / 2 + room
        return np.asarray(near | (np.isnan(x) & np.isnan(y)) | (x == wanted))

    return fits


def _slack(x: np.ndarray, precision: float) -> np.ndarray:
    """What rounding explains: one unit in the last place."""
    slack: np.ndarray = np.abs(x) * precision * 1.01 + 1e-38
    return slack


def _lines(
    x: np.ndarray, y: np.ndarray, precision: float, sizes: Mapping[str, int]
) -> Iterator[tuple[float, float, str, Kind, float]]:
    """Factors and summands that may fit, those with a meaning first; and how exactly the summand is known."""
    below = float(y @ y)
    ratio = float(x @ y) / below if below else 0.0
    small = np.abs(x) <= np.quantile(np.abs(x), 0.1)  # where rounding is finest
    summand = float(np.mean((x - y)[small]))
    room = 4 * precision * float(np.abs(x[small]).max()) / float(small.sum()) ** 0.5  # how exactly it is known
    spread = np.abs(x - np.median(x)) > _slack(x, precision)
    telling = spread.mean() > 0.25  # else any line through the middle fits
    if ratio == 0 or not np.isfinite(ratio):
        return
    if abs(ratio + 1) < precision:
        yield -1.0, 0.0, "negated: every sign flipped", "negated", 0.0
    ways: list[tuple[bool, float, float, str, Kind]] = []  # first those whose numbers mean something
    known = precision / min(len(x), 1 / precision) ** 0.5  # rounding depends on few different digits
    exact, named = _named(ratio, known, sizes)
    exact = exact if named else _shortest(ratio, known)
    if named or telling:
        ways.append((not named, exact, 0.0, f"scaled: {named or f'{exact:.6g}'} times the reference", "scaled"))
    whole = round(summand * 4) / 4
    exactly = whole != 0 and abs(whole - summand) <= precision * max(float(np.abs(x).max()), 1.0)
    told = "plus" if summand > 0 else "minus"
    if exactly:
        ways.append((False, 1.0, whole, f"{told} {abs(whole):g} in every element", "shifted"))
    elif telling and summand != 0:
        summand = _shortest(summand, room / abs(summand))
        ways.append((True, 1.0, summand, f"{told} {abs(summand):.6g} in every element", "shifted"))
    if len(x) >= 2 * _FEWEST and telling:
        slope, start = np.polyfit(y, x, 1) if np.ptp(y) > 0 else (0.0, 0.0)
        if slope:
            slope, start = _shortest(float(slope), 2 * known), _shortest(float(start), 2 * known)
            words = f"scaled and shifted: {slope:.6g} times the reference plus {start:.6g}"
            ways.append((True, float(slope), float(start), words, "scaled"))
    alike = float(np.square(x - y).sum()) / 2  # what is no better than no change is noise

    def left(way: tuple[bool, float, float, str, Kind]) -> float:
        return float(np.square(x - way[1] * y - way[2]).sum())

    for way in sorted(ways, key=lambda way: (way[0], left(way) * (2 if way[1] != 1 and way[2] else 1))):
        if left(way) < alike:
            yield (*way[1:], room)


def _shortest(value: float, tolerance: float) -> float:
    """The number of fewest digits that is as good as a measured one.

    >>> _shortest(3.69996, 1e-4), _shortest(0.333333, 1e-9)
    (3.7, 0.333333)
    """
    return next(
        (
            short
            for digits in range(1, 7)
            if abs((short := float(f"{value:.{digits}g}")) - value) <= tolerance * abs(value)
        ),
        value,
    )


def _named(ratio: float, precision: float, sizes: Mapping[str, int]) -> tuple[float, str]:
    """The factor with a meaning that a measured one stands for, and its name; itself and none otherwise.

    >>> _named(2.83, 0.004, {"head_dim": 8}), _named(0.5, 0.004, {})
    ((2.8284271247461903, '√8 (√head_dim)'), (0.5, '0.5'))
    """
    meant: dict[float, str] = {}
    for number in (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 128, 256, 512, 1024):
        meant[float(number)], meant[1 / number] = str(number), f"{1 / number:g}"
    for name, number in {**sizes, "2": 2}.items():
        called = f" (√{name})" if name != str(number) else ""
        meant.setdefault(number**0.5, f"√{number}{called}")
        meant.setdefault(number**-0.5, f"1/√{number}{called.replace('√', '1/√')}")
    for value, name in meant.items():
        if abs(abs(ratio) - value) <= value * precision:
            sign = -1.0 if ratio < 0 else 1.0
            return sign * value, ("-" if ratio < 0 else "") + name
    return ratio, ""


def _by_groups(some: list[Pair], precision: float) -> Iterator[tuple[Values, Fits]]:
    """A factor, or a summand, of its own for each row, each column, or each of other groups."""
    for noun, rows, cols in GROUPS:
        kinds: tuple[tuple[Kind, str], ...] = (("scaled", "a factor"), ("shifted", "a summand"))
        for kind, told in kinds:

            def fits(
                x: np.ndarray, y: np.ndarray, rows: int = rows, cols: int = cols, scaled: bool = kind == "scaled"
            ) -> bool:
                one, two = groups(x, rows, cols), groups(y, rows, cols)
                if one is None or two is None or not (np.isfinite(one).all() and np.isfinite(two).all()):
                    return False
                wanted = _own(one, two, scaled=scaled) * two if scaled else _own(one, two, scaled=scaled) + two
                slack = _slack(one, precision)
                if not scaled:  # and how exactly the summand is known
                    size = np.sqrt(np.square(one).mean(axis=1, keepdims=True) / one.shape[1])
                    slack = slack + _slack(two, precision) / 2 + 2 * precision * size
                return bool((np.abs(one - wanted) <= 2 * slack).all())

            if not all(fits(x, y) for x, y in some):
                continue
            owns, better = [], 0.0
            for pair in some:
                one, two = (part for side in pair if (part := groups(side, rows, cols)) is not None)
                owns.append(_own(one, two, scaled=kind == "scaled"))
                left = one - (owns[-1] * two if kind == "scaled" else owns[-1] + two)
                better += float(np.square(one - two).sum()) - 2 * float(np.square(left).sum())
            if better <= 0:  # no better than no change: noise
                continue
            own = np.concatenate([one.reshape(-1) for one in owns])
            yield (
                Values(kind, f"{kind}: each {noun} by {told} of its own{_told(own, some, noun, kind, precision)}"),
                fits,
            )


def _told(own: np.ndarray, some: list[Pair], noun: str, kind: str, precision: float) -> str:
    if kind == "shifted":
        return f", {own.min():.4g} to {own.max():.4g}"
    lengths = np.concatenate([np.sqrt((x * x).sum(axis=1)) for x, _ in some])
    if noun == "row" and bool((np.abs(lengths - 1) < 8 * precision).all()):
        return ", to length 1"
    each = np.unique(np.round(own / precision) * precision)
    few = ": " + " and ".join(f"{value:.4g}" for value in each)
    return few if len(each) <= _FEW else f", {own.min():.4g} to {own.max():.4g}"


def _own(x: np.ndarray, y: np.ndarray, *, scaled: bool) -> np.ndarray:
    """The factor, or else the summand, that explains each group best."""
    if not scaled:
        return np.asarray((x - y).mean(axis=1, keepdims=True))
    below = (y * y).sum(axis=1, keepdims=True)
    return np.asarray((x * y).sum(axis=1, keepdims=True) / np.where(below == 0, 1, below))


def closeness(tensors: Tensors, out: View, ref: View) -> float | None:
    """How far apart two arrays are, relative to the reference's size, by some tiles; None for what is no number."""
    boxes = list(tiles(out.shape, (out.strides, ref.strides), _TILE))
    edges = [len(boxes) * i // _TRIED for i in range(_TRIED + 1)]
    apart = size = 0.0
    for low, high in pairwise(edges):
        for box in boxes[low : min(low + 1, high)]:
            x = values_of(tensors.read(out, box), out.dtype)
            y = values_of(tensors.read(ref, box, 1), ref.dtype)
            apart += float(np.square(x - y).sum())
            size += float(np.square(y).sum())
    found = (apart / size) ** 0.5 if size else float("nan")
    return found if np.isfinite(found) else None
