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

from engine.formats.headers import FLOATS
from engine.move.tensors import Tensors, values_of
from engine.move.values import float_type
from engine.move.views import Box, View, tiles

Kind = Literal["zeroed", "constant", "negated", "scaled", "shifted", "rounded", "clipped"]

_TILE = 1 << 14  # elements at a time
_TRIED = 16  # tiles that are looked at before all are
_BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52, "F8_E4M3": 3, "F8_E5M2": 2}  # of precision
_FEW = 3  # factors that are named one by one
_FEWEST = 4  # elements that one factor must explain
_NAMES = {7: "BF16", 10: "F16", 3: "F8_E4M3", 2: "F8_E5M2"}

Fits = Callable[[np.ndarray, np.ndarray], bool]
Pair = tuple[np.ndarray, np.ndarray]  # float64 of both sides, rows × columns


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
    precision = 2.0 ** -min(_BITS.get(out.dtype, 50), _BITS.get(ref.dtype, 50))
    for relation, fits in _relations(some, precision, out, ref, sizes):
        if all(fits(x, y) for x, y in some) and (len(tried) == len(boxes) or all(fits(x, y) for x, y in pairs())):
            return relation
    return None


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
        yield from _functions(float(x[finite].min()), float(x[finite].max()))
    if out.dtype in FLOATS and ref.dtype in FLOATS:
        yield from _rounded(x[finite], y[finite], out.dtype, ref.dtype)
    x, y = x[finite], y[finite]
    if len(x) < _FEWEST or len(np.unique(y)) < 2:
        return
    for factor, summand, words, kind in _lines(x, y, precision, sizes):
        yield Values(kind, words), _line(factor, summand, precision)
    yield from _by_rows(some, precision)


def _functions(low: float, high: float) -> Iterator[tuple[Values, Fits]]:
    """Values that are cut off, or lost their sign."""
    bounds = f"to {low:g} … {high:g}"
    yield Values("clipped", "without signs: absolute values"), lambda x, y: bool(np.array_equal(x, np.abs(y)))
    yield Values("clipped", f"cut off {bounds}"), lambda x, y: bool(np.array_equal(x, np.clip(y, low, high)))


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


def _line(factor: float, summand: float, precision: float) -> Fits:
    def fits(x: np.ndarray, y: np.ndarray) -> bool:
        with np.errstate(invalid="ignore", over="ignore"):
            wanted = factor * y + summand
            near = np.abs(x - wanted) <= _slack(x, precision) + abs(summand) * precision / 2
        return bool((near | (np.isnan(x) & np.isnan(y)) | (x == wanted)).all())

    return fits


def _slack(x: np.ndarray, precision: float) -> np.ndarray:
    """What rounding explains: one unit in the last place."""
    slack: np.ndarray = np.abs(x) * precision * 1.01 + 1e-38
    return slack


def _lines(
    x: np.ndarray, y: np.ndarray, precision: float, sizes: Mapping[str, int]
) -> Iterator[tuple[float, float, str, Kind]]:
    """Factors and summands that fit, those with a meaning first."""
    large = np.abs(y) >= np.median(np.abs(y))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.median(x[large] / y[large]))
    small = np.abs(x) <= np.quantile(np.abs(x), 0.1)  # where rounding is finest
    summand = float(np.mean((x - y)[small]))
    spread = np.abs(x - np.median(x)) > _slack(x, precision)
    telling = spread.mean() > 0.25  # else any line through the middle fits
    if ratio == 0 or not np.isfinite(ratio):
        return
    if abs(ratio + 1) < precision:
        yield -1.0, 0.0, "negated: every sign flipped", "negated"
    ways: list[tuple[bool, float, float, str, Kind]] = []  # first those whose numbers mean something
    exact, named = _named(ratio, precision, sizes)
    if named or telling:
        ways.append((not named, exact, 0.0, f"scaled: {named or f'{exact:.6g}'} times the reference", "scaled"))
    whole = round(summand * 4) / 4
    exactly = whole != 0 and abs(whole - summand) <= precision * max(float(np.abs(x).max()), 1.0)
    told = "plus" if summand > 0 else "minus"
    if exactly:
        ways.append((False, 1.0, whole, f"{told} {abs(whole):g} in every element", "shifted"))
    elif telling and summand != 0:
        ways.append((True, 1.0, summand, f"{told} {abs(summand):.6g} in every element", "shifted"))
    if len(x) >= 2 * _FEWEST and telling:
        slope, start = np.polyfit(y, x, 1) if np.ptp(y) > 0 else (0.0, 0.0)
        if slope:
            words = f"scaled and shifted: {slope:.6g} times the reference plus {start:.6g}"
            ways.append((True, float(slope), float(start), words, "scaled"))
    fitting = [way for way in ways if _line(way[1], way[2], precision)(x, y)]
    for way in sorted(fitting, key=lambda way: (way[0], float(np.square(x - way[1] * y - way[2]).sum()))):
        yield way[1:]


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


def _rounded(x: np.ndarray, y: np.ndarray, one: str, two: str) -> Iterator[tuple[Values, Fits]]:
    """One side is the other, written in a type that holds less, and back."""
    import ml_dtypes

    kinds = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
             "F8_E5M2": ml_dtypes.float8_e5m2}  # fmt: skip

    for kind, held in kinds.items():
        if kind not in (one, two):
            words = f"{kind} and back: it lost precision"
            yield Values("rounded", f"rounded to {words}"), _through(held, one, turned=False)
            yield (
                Values("rounded", f"in full precision: the reference was rounded to {words}"),
                _through(held, two, turned=True),
            )
    if one != two or not len(x):
        return
    for coarse, fine, words in ((x, y, "rounded:"), (y, x, "in full precision: the reference has")):
        kept, full = _kept(coarse, one), _kept(fine, one)
        if 0 < kept < full:
            name = f", as {_NAMES[kept]} has" if kept in _NAMES else ""
            yield Values("rounded", f"{words} only {kept} of {full} bits of precision{name}"), _within(2.0**-kept)


def _through(held: Any, dtype: str, *, turned: bool) -> Fits:
    """Whether one side is the other, written as `held` and then as `dtype`."""

    def fits(x: np.ndarray, y: np.ndarray) -> bool:
        fine, coarse = (x, y) if turned else (y, x)
        with np.errstate(over="ignore", invalid="ignore"):
            back = fine.astype(np.float32).astype(held).astype(float_type(dtype)).astype(float)
        return bool(((coarse == back) | (np.isnan(coarse) & np.isnan(back))).all())

    return fits


def _within(close: float) -> Fits:
    return lambda x, y: bool((np.abs(x - y) <= close * np.maximum(np.abs(x), np.abs(y))).all())


def _kept(values: np.ndarray, dtype: str) -> int:
    """Bits of precision that some element uses.

    >>> _kept(np.array([1.0, 1.5, 1.25]), "F32")
    2
    """
    kind = float_type(dtype)
    bits = values.astype(kind).view(f"u{kind.itemsize}")
    used = int(np.bitwise_or.reduce(bits)) & ((1 << _BITS[dtype]) - 1)
    return 0 if not used else _BITS[dtype] - ((used & -used).bit_length() - 1)


def _by_rows(some: list[Pair], precision: float) -> Iterator[tuple[Values, Fits]]:
    """A factor of its own for each row, or for each column."""
    for axis, noun in ((1, "row"), (0, "column")):
        if any(x.ndim != 2 or x.shape[axis] < _FEWEST for x, _ in some):
            continue

        def fits(x: np.ndarray, y: np.ndarray, axis: int = axis) -> bool:
            if not (np.isfinite(x).all() and np.isfinite(y).all()):
                return False
            factors = _factors(x, y, axis)
            return bool((np.abs(x - factors * y) <= 2 * _slack(x, precision)).all())

        if not all(fits(x, y) for x, y in some):
            continue
        factors = np.concatenate([_factors(x, y, axis).reshape(-1) for x, y in some])
        lengths = np.concatenate([np.sqrt((x * x).sum(axis=axis)) for x, _ in some])
        unit = axis == 1 and bool((np.abs(lengths - 1) < 8 * precision).all())
        each = np.unique(np.round(factors / precision) * precision)
        few = ": " + " and ".join(f"{value:.4g}" for value in each)
        told = (
            ", to length 1" if unit else few if len(each) <= _FEW else f", {factors.min():.4g} to {factors.max():.4g}"
        )
        yield Values("scaled", f"scaled: each {noun} by a factor of its own{told}"), fits


def _factors(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    below = (y * y).sum(axis=axis, keepdims=True)
    factors: np.ndarray = (x * y).sum(axis=axis, keepdims=True) / np.where(below == 0, 1, below)
    return factors


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
