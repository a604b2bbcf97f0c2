"""Values that are the reference's times a factor or plus a summand: one for all, or one for each row or column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from engine.discover.levels import GROUPS, Fits, Kind, Pair, Relation, groups

FEWEST = 4  # elements that one factor must explain
_FEW = 3  # factors that are named one by one


def line(factor: float, summand: float, precision: float, room: float) -> Fits:
    """A test whether elements are `factor` times the reference's plus `summand`, which is off by `room`."""

    def fits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            wanted = factor * y + summand
            near = np.abs(x - wanted) <= slack(x, precision) + abs(summand) * precision / 2 + room
        return np.asarray(near | (np.isnan(x) & np.isnan(y)) | (x == wanted))

    return fits


def slack(x: np.ndarray, precision: float) -> np.ndarray:
    """The difference that rounding explains: one unit in the last place."""
    least: np.ndarray = np.abs(x) * precision * 1.01 + 1e-38
    return least


def lines(
    x: np.ndarray, y: np.ndarray, precision: float, sizes: Mapping[str, int]
) -> Iterator[tuple[float, float, str, Kind, float]]:
    """(factor, summand, words, kind, error of the summand) that may fit; numbers with a known meaning first."""
    below = float(y @ y)
    ratio = float(x @ y) / below if below else 0.0
    small = np.abs(x) <= np.quantile(np.abs(x), 0.1)  # where rounding is finest
    summand = float(np.mean((x - y)[small]))
    room = 4 * precision * float(np.abs(x[small]).max()) / float(small.sum()) ** 0.5  # the error of the summand
    spread = np.abs(x - np.median(x)) > slack(x, precision)
    telling = spread.mean() > 0.25  # else any line through the middle fits
    if ratio == 0 or not np.isfinite(ratio):
        return
    if abs(ratio + 1) < precision:
        yield -1.0, 0.0, "negated: every sign flipped", "negated", 0.0
    ways: list[tuple[bool, float, float, str, Kind]] = []  # numbers with a known meaning first
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
    if len(x) >= 2 * FEWEST and telling:
        slope, start = np.polyfit(y, x, 1) if np.ptp(y) > 0 else (0.0, 0.0)
        if slope:
            slope, start = _shortest(float(slope), 2 * known), _shortest(float(start), 2 * known)
            words = f"scaled and shifted: {slope:.6g} times the reference plus {start:.6g}"
            ways.append((True, float(slope), float(start), words, "scaled"))
    alike = float(np.square(x - y).sum()) / 2  # a way that explains less than this is noise

    def left(way: tuple[bool, float, float, str, Kind]) -> float:
        return float(np.square(x - way[1] * y - way[2]).sum())

    for way in sorted(ways, key=lambda way: (way[0], left(way) * (2 if way[1] != 1 and way[2] else 1))):
        if left(way) < alike:
            yield (*way[1:], room)


def _shortest(value: float, tolerance: float) -> float:
    """The number with the fewest digits within `tolerance` of a measured one.

    >>> _shortest(3.69996, 1e-4), _shortest(0.333333, 1e-9)
    (3.7, 0.333333)
    """
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 7))
    return next((short for short in shorter if abs(short - value) <= tolerance * abs(value)), value)


def _named(ratio: float, precision: float, sizes: Mapping[str, int]) -> tuple[float, str]:
    """The factor with a known meaning that a measured one equals, and its name; else the measured one, without a name.

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


def by_groups(some: list[Pair], precision: float) -> Iterator[tuple[Relation, Fits]]:
    """Relations with a separate factor or summand for each row, column or other group."""
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
                off = slack(one, precision)
                if not scaled:  # plus the error of the summand
                    size = np.sqrt(np.square(one).mean(axis=1, keepdims=True) / one.shape[1])
                    off = off + slack(two, precision) / 2 + 4 * precision * size
                return bool((np.abs(one - wanted) <= 2 * off).all())

            if not all(fits(x, y) for x, y in some):
                continue
            owns, better = [], 0.0
            for pair in some:
                one, two = (part for side in pair if (part := groups(side, rows, cols)) is not None)
                owns.append(_own(one, two, scaled=kind == "scaled"))
                left = one - (owns[-1] * two if kind == "scaled" else owns[-1] + two)
                better += float(np.square(one - two).sum()) - 2 * float(np.square(left).sum())
            if better <= 0:  # it explains too little: noise
                continue
            own = np.concatenate([one.reshape(-1) for one in owns])
            words = f"{kind}: each {noun} by {told} of its own{_factors(own, some, noun, kind, precision)}"
            yield Relation(kind, words), fits


def _factors(own: np.ndarray, some: list[Pair], noun: str, kind: str, precision: float) -> str:
    if kind == "shifted":
        return f", {own.min():.4g} to {own.max():.4g}"
    lengths = np.concatenate([np.sqrt((x * x).sum(axis=1)) for x, _ in some])
    if noun == "row" and bool((np.abs(lengths - 1) < 8 * precision).all()):
        return ", to length 1"
    each = np.unique(np.round(own / precision) * precision)
    few = ": " + " and ".join(f"{value:.4g}" for value in each)
    return few if len(each) <= _FEW else f", {own.min():.4g} to {own.max():.4g}"


def _own(x: np.ndarray, y: np.ndarray, *, scaled: bool) -> np.ndarray:
    """The factor or the summand that explains each group best."""
    if not scaled:
        return np.asarray((x - y).mean(axis=1, keepdims=True))
    below = (y * y).sum(axis=1, keepdims=True)
    return np.asarray((x * y).sum(axis=1, keepdims=True) / np.where(below == 0, 1, below))
