"""Values that lost precision: cast to another type and back, cut-off bits, a grid of levels as quantising leaves.

Parts that all relations share are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.move.values import float_type

BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52, "F8_E4M3": 3, "F8_E5M2": 2}  # of precision
_NAMES = {7: "BF16", 10: "F16", 3: "F8_E4M3", 2: "F8_E5M2"}
_FEWEST = 8  # elements that a grid must explain
_MOST_LEVELS = 1 << 10
_NEAR = 0.1  # share of the sum of squares that quantising may change
_SCALED = {3: ("F8_E4M3", 1e-5), 2: ("F8_E5M2", 1e-9), 1: ("F4_E2M1", 0.05)}  # bits → name, half its least value

Fits = Callable[[np.ndarray, np.ndarray], bool | np.ndarray]  # whether a tile, or each of its elements, fits
Pair = tuple[np.ndarray, np.ndarray]  # float64 of both sides, rows × columns

# Groups that may each have their own factor: name, rows and columns; 0 means all of a tile.
GROUPS = (
    ("row", 1, 0), ("column", 0, 1), *((f"block of {n} columns", 0, n) for n in (128, 64, 32)),
    *((f"{n} elements in a row", 1, n) for n in (256, 128, 64, 32, 16)),
)  # fmt: skip

Kind = Literal[
    "zeroed", "constant", "negated", "scaled", "shifted", "rounded", "clipped", "mapped", "changed", "permuted",
    "transposed", "recut", "part", "padded", "truncated", "extended", "shape", "different", "other",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Relation:
    """What a tensor holds.

    Attributes:
        kind: one word, such as `permuted`; `other` for the whole content of another tensor.
        words: details, such as `scaled: 2 times the reference`; empty if the kind says it all.
        other: the reference's tensor that has this content, if it has another name.
        rotary: the choice of `rotary` that would have been right.
    """

    kind: Kind
    words: str = ""
    other: str | None = None
    rotary: str | None = None


def groups(x: np.ndarray, rows: int, cols: int) -> np.ndarray | None:
    """A tile as groups × elements; None if it does not divide into them, or a group is too small to prove anything.

    >>> groups(np.arange(32).reshape(2, 16), 1, 8).shape
    (4, 8)
    """
    height, width = x.shape
    rows, cols = rows or height, cols or width
    if height % rows or width % cols or rows * cols < _FEWEST:
        return None
    return x.reshape(height // rows, rows, width // cols, cols).swapaxes(1, 2).reshape(-1, rows * cols)


def rounded(x: np.ndarray, y: np.ndarray, one: str, two: str) -> Iterator[tuple[str, Fits]]:
    """Ways in which one side may be the other, cast to a less precise type and back: words, and a test for tiles.

    Args:
        x, y: elements of both sides.
        one, two: their types.
    """
    import ml_dtypes

    kinds = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
             "F8_E5M2": ml_dtypes.float8_e5m2}  # fmt: skip

    if one in kinds and two in BITS and BITS[one] < BITS[two]:
        yield f"cut off to {one}, where rounding gives the nearest", _to_neighbours(kinds[one], lower=True)
        yield f"rounded up or down to {one}, not to the nearest", _to_neighbours(kinds[one], lower=False)
    for kind, held in kinds.items():
        if kind not in (one, two):
            words = f"{kind} and back: it lost precision"
            yield f"rounded to {words}", _through(held, one, turned=False)
            yield f"in full precision: the reference was rounded to {words}", _through(held, two, turned=True)
    if one != two or not len(x):
        return
    for coarse, fine, words in ((x, y, "rounded:"), (y, x, "in full precision: the reference has")):
        kept, full = _kept(coarse, one), _kept(fine, one)
        if 0 < kept < full:
            name = f", as {_NAMES[kept]} has" if kept in _NAMES else ""
            yield f"{words} only {kept} of {full} bits of precision{name}", _within(2.0**-kept)


def _through(held: Any, dtype: str, *, turned: bool) -> Fits:
    """A test whether one side is the other, cast to `held` and then to `dtype`."""

    def fits(x: np.ndarray, y: np.ndarray) -> bool:
        fine, coarse = (x, y) if turned else (y, x)
        with np.errstate(over="ignore", invalid="ignore"):
            back = fine.astype(np.float32).astype(held).astype(float_type(dtype)).astype(float)
        return bool(((coarse == back) | (np.isnan(coarse) & np.isnan(back))).all())

    return fits


def _to_neighbours(held: Any, *, lower: bool) -> Fits:
    """Whether each element is one of the two numbers of `held` around the reference's; or the one nearer to zero."""

    def fits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            nearest = y.astype(np.float32).astype(held)
            exact = nearest.astype(float)
            inner = np.where(np.abs(exact) > np.abs(y), np.nextafter(nearest, held(0)).astype(float), exact)
            outer = np.nextafter(inner.astype(held), np.copysign(np.inf, y).astype(held)).astype(float)
        return np.asarray((x == inner) | ((x == outer) & (inner != y) & (not lower)))

    return fits


def _within(close: float) -> Fits:
    return lambda x, y: bool((np.abs(x - y) <= close * np.maximum(np.abs(x), np.abs(y))).all())


def _kept(values: np.ndarray, dtype: str) -> int:
    """The number of bits of precision that the elements use.

    >>> _kept(np.array([1.0, 1.5, 1.25]), "F32")
    2
    """
    kind = float_type(dtype)
    bits = values.astype(kind).view(f"u{kind.itemsize}")
    used = int(np.bitwise_or.reduce(bits)) & ((1 << BITS[dtype]) - 1)
    return 0 if not used else BITS[dtype] - ((used & -used).bit_length() - 1)


def quantised(some: list[Pair], precision: float) -> Iterator[tuple[str, Fits]]:
    """Ways in which one side may be the other, rounded to a grid of levels: one step for all, or one for each group."""
    if not all(np.isfinite(x).all() and np.isfinite(y).all() for x, y in some):
        return
    if any(np.square(x - y).sum() > _NEAR * np.square(y).sum() for x, y in some):
        return
    for turned in (False, True):
        for name, rows, cols in (("", 0, 0), *GROUPS):
            steps = [_steps(x, y, rows, cols, precision, turned=turned) for x, y in some]
            told = {words for words in steps if words}
            if None in steps or not told:
                continue
            words = f"quantised to {' and '.join(sorted(told))}" + (f", with a step for each {name}" if name else "")

            def fits(x: np.ndarray, y: np.ndarray, at: tuple[int, int] = (rows, cols), back: bool = turned) -> bool:
                return _steps(x, y, *at, precision, turned=back) is not None

            yield f"in full precision: the reference was {words}" if turned else words, fits


def _steps(x: np.ndarray, y: np.ndarray, rows: int, cols: int, precision: float, *, turned: bool) -> str | None:
    """The grid that the groups of a tile lie on, in words; empty if all are zero, None if they lie on no grid."""
    coarse, fine = (groups(one, rows, cols) for one in ((y, x) if turned else (x, y)))
    if coarse is None or fine is None:
        return None
    live = coarse.any(axis=1)
    coarse, fine = coarse[live], fine[live]
    if not len(coarse):
        return ""
    size = np.abs(coarse)
    most = size.max(axis=1, keepdims=True)
    smallest = np.where(size > 0, size, np.inf).min(axis=1, keepdims=True)
    apart = np.abs(coarse - fine)
    for step, bits in ((most / 127, 8), (most / 7, 4), (most / 128, 8), (most / 8, 4), (smallest, 0)):
        levels = size / step
        told = (levels > 0.5) & (levels * precision < 0.1)
        near = np.abs(levels - np.round(levels)) <= 0.02 + levels * precision
        rounding = 0.51 * step + size * precision
        enough = told.sum(axis=1) >= min(_FEWEST, coarse.shape[1] // 2)
        if (
            2 * int(enough.sum()) >= len(enough)
            and (near | ~told).all()
            and (apart <= rounding).all()
            and levels.max() <= _MOST_LEVELS
        ):
            return f"{bits or max(2, 1 + int(np.ceil(np.log2(levels.max() + 1))))} bits"
    for kept, (name, least) in _SCALED.items():
        rounding = size * (2.0 ** -(kept + 1) + precision) + most * least
        if not (apart <= rounding).all():
            continue
        for first in range(2**kept, 2 ** (kept + 1)):  # the level that the largest value may be
            for some in (slice(1), slice(None)):  # the first group alone rules out most
                part, _ = np.frexp(size[some] * first / most[some])
                grid = part * 2 ** (kept + 1)
                if not (np.abs(grid - np.round(grid)) <= grid * precision * 1.01).all():
                    break
            else:
                return f"{name} with a scale"
    if coarse.shape[1] >= 64:
        count = max(len(np.unique(row)) for row in coarse)
        full = min(len(np.unique(row)) for row in fine)
        gaps = most * 2 / max(count - 1, 1)
        if count <= (16 if coarse.shape[1] < 1024 else 256) and full > 1.5 * count and (apart <= 2 * gaps).all():
            return f"{count} different values"
    return None
