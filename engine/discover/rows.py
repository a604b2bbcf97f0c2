"""Finds rows or columns of a tensor that are in other places or changed, and describes them in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from engine.discover.geometry import Units
from engine.discover.levels import Kind, Relation
from engine.discover.orders import divisors, read_order, runs_of
from engine.discover.prints import Prints64
from engine.errors import counted, first_of, span
from engine.move.tensors import Tensors, View, common_types, deviation, tiles, unlike
from engine.planning.boxes import Interval

MOST_NAMED = 4  # stretches that are named one by one
_FEWEST_UNITS = 4  # different units that are needed to prove an order
_TILE = 1 << 16  # elements at a time
_DENSE = 0.5  # share of a block's elements that differ if the block changed
_NEARLY = 0.9  # share of the rows or columns that counts as all
_FEW = 0.02  # share of all elements that may differ in scattered places


def own_rows(
    order: np.ndarray, here: Prints64, there: Prints64, plain: np.ndarray, telling: int, units: Units
) -> Relation:
    """Describe rows of the same tensor in other places."""
    noun = units.noun
    if len(here) != len(there):
        return _resized(order, here, there, noun, plain)
    known = order >= 0
    found, missing = int(known.sum()), int((~known).sum())
    also = f"; {counted(missing, noun)} from elsewhere"
    steps = np.unique((np.arange(len(order)) - order)[known])
    if len(steps) == 1:
        by = int(steps[0])
        first = f"{noun} {max(by, 0)} holds {noun} {max(-by, 0)}"
        return Relation("permuted", f"{noun}s shifted by {abs(by)}: {first}{also if missing else ''}")
    if missing and len([start for _, _, start in runs_of(order) if start >= 0]) <= MOST_NAMED:
        return Relation("permuted", f"{noun}s in other places: {moves(order, noun)}{also}")
    filled = completed(order)
    if filled is not None:
        reading = read_order(filled, units)
        return replace(reading, words=reading.words + (also if found < telling else ""))
    repeated = len(np.unique(order[known])) < found
    what = f"{noun}s repeated" if repeated else f"{noun}s in other places"
    rest = f"; {missing:,} are from elsewhere" if found < telling else ""
    return Relation("permuted", f"{what}: {moves(order, noun)}{rest}")


def completed(order: np.ndarray) -> np.ndarray | None:
    """An order whose few gaps are filled with the unused places, near neighbours first; None if places occur twice.

    >>> completed(np.array([2, -1, 0, 1])).tolist(), completed(np.array([1, 1, -1]))
    ([2, 3, 0, 1], None)
    """
    gaps = np.flatnonzero(order < 0)
    left = dict.fromkeys(np.setdiff1d(np.arange(len(order)), order).tolist())
    if len(left) != len(gaps) or 4 * len(gaps) > len(order):
        return None
    filled = order.copy()
    for gap in gaps.tolist():
        near = [int(filled[gap - 1]) + 1] if gap else []
        near += [int(filled[gap + 1]) - 1] if gap + 1 < len(order) else []
        filled[gap] = next((place for place in near if place in left), next(iter(left)))
        del left[int(filled[gap])]
    return None if np.array_equal(filled, np.arange(len(order))) else filled


def _repeats(order: np.ndarray, count: int) -> str | None:
    """Describe `count` rows that each occur several times: block by block, or all of them again and again."""
    if len(order) % count or (order < 0).any() or (np.bincount(order, minlength=count) != len(order) // count).any():
        return None
    times = len(order) // count
    for size in sorted(divisors(count), reverse=True):
        blocks = np.arange(count).reshape(-1, 1, size)
        if np.array_equal(order, np.repeat(blocks, times, axis=1).reshape(-1)):
            return f"each block of {size} is there {times} times" if size < count else f"all are there {times} times"
    return None


def _resized(order: np.ndarray, here: Prints64, there: Prints64, noun: str, plain: np.ndarray) -> Relation:
    """Describe more or fewer rows than the reference has, and the order of the common ones."""
    by = len(here) - len(there)
    told = f"{counted(abs(by), noun)} {'more' if by > 0 else 'fewer'} than the reference"
    common = min(len(here), len(there))
    known = order >= 0
    if by < 0 and np.array_equal(here, there[:common]):
        left = there[common:]
        padding = bool(plain[common:].all()) or len(np.unique(left)) == 1
        return Relation("padded" if padding else "truncated", told + ("" if padding else f", {noun}s with content"))
    repeats = _repeats(order, len(there)) if by > 0 else None
    if repeats is not None:
        return Relation("extended", f"{told}: {noun}s repeated, {repeats}")
    if by > 0 and np.array_equal(here[:common], there):
        padding = len(np.unique(here[common:])) == 1
        return Relation("padded" if padding else "extended", told + ("" if padding else f", {noun}s with content"))
    rising = bool((np.diff(order[known]) > 0).all())
    what = "in order" if rising else "in another order"
    kind: Kind = "padded" if by > 0 and rising else "truncated" if by < 0 and rising else "shape"
    return Relation(kind, f"{told}, the others {what}: {moves(order, noun)}")


def stretch(other: str, here: Prints64, there: Prints64) -> Relation | None:
    """Find a vector's elements as consecutive elements of another vector."""
    if not are_different(here):
        return None
    if len(here) > len(there):
        if np.array_equal(here[: len(there)], there):
            return Relation("padded", f"{len(here) - len(there):,} elements more than the reference")
        return None
    for start in np.flatnonzero(there == here[0])[:1000].tolist():
        if np.array_equal(there[start : start + len(here)], here):
            return Relation("part", f"elements {start}…{start + len(here) - 1} of {other}", other=other)
    return None


def are_different(prints: Prints64) -> bool:
    return len(prints) >= 2 and len(np.unique(prints)) >= min(_FEWEST_UNITS, len(prints))


def lookup(here: Prints64, there: Prints64, first: int | None = 0) -> np.ndarray:
    """The place of each unit on the other side, -1 if it is not there.

    A unit that is also at its own place is found there; `first` is that of the first unit, None if they have none.
    """
    by_content = np.argsort(there, kind="stable")
    at = np.searchsorted(there[by_content], here)
    places = by_content[np.minimum(at, len(there) - 1)]
    found = np.where(there[places] == here, places, -1)
    if first is None:
        return found
    own = np.arange(first, first + len(here))
    same = (own < len(there)) & (there[np.minimum(own, len(there) - 1)] == here)
    result: np.ndarray = np.where(same, own, found)
    return result


def listed(noun: str, runs: Sequence[Interval]) -> str:
    """
    >>> listed("row", [(4, 7), (0, 1)]), listed("column", [(2, 3)])
    ('rows 4…6, 0', 'column 2')
    """
    alone = len(runs) == 1 and runs[0][1] - runs[0][0] == 1
    return f"{noun}{'' if alone else 's'} {first_of([span(run) for run in runs[: MOST_NAMED + 1]], MOST_NAMED)}"


def ranges(order: np.ndarray, noun: str) -> str:
    """
    >>> ranges(np.array([4, 5, 6, -1, 0]), "row")
    'rows 4…6, 0'
    """
    return listed(noun, [(start, start + high - low) for low, high, start in runs_of(order) if start >= 0])


def moves(order: np.ndarray, noun: str, *, every: bool = False) -> str:
    """
    >>> moves(np.array([0, 1, 0, 1]), "row")
    'rows 2…3 hold 0…1'
    """
    moved = [(low, high, start) for low, high, start in runs_of(order) if start >= 0 and (every or start != low)]
    few = moved[: MOST_NAMED + 1]
    told = [f"{span((low, high))} hold {span((start, start + high - low))}" for low, high, start in few]
    return f"{noun}s {first_of(told, MOST_NAMED)}"


@dataclass(frozen=True, slots=True)
class Changes:
    """How two arrays, rows × columns, differ.

    Attributes:
        count: number of elements that differ, after casting if their types differ.
        largest: the largest absolute deviation; infinite if only one side is a number.
        first: row and column of the first differing element.
        nans: number of elements that are NaN only in the output.
        rows, cols: number of differing elements in each row and column.
    """

    count: int
    largest: float
    first: tuple[int, int]
    nans: int
    rows: np.ndarray
    cols: np.ndarray


def changes_of(tensors: Tensors, out: View, ref: View) -> Changes | None:
    """How two arrays differ; None if their types cannot be compared."""
    every = (_changes(tensors, out, ref, kind) for kind in common_types(out.dtype, ref.dtype))
    return min(every, key=lambda changes: changes.count, default=None)


def _changes(tensors: Tensors, out: View, ref: View, kind: str) -> Changes:
    rows, cols = np.zeros(out.shape[0], np.int64), np.zeros(out.shape[1], np.int64)
    largest, nans, first = 0.0, 0, (out.shape[0], 0)
    for (low, high), (left, right) in tiles(out.shape, (out.strides, ref.strides), _TILE):
        box = ((low, high), (left, right))
        x, y = tensors.read(out, box), tensors.read(ref, box, 1)
        differ = unlike(x, out.dtype, y, ref.dtype, kind)
        if not differ.any():
            continue
        far, lost = deviation(x[differ], out.dtype, y[differ], ref.dtype)
        largest, nans = max(largest, far), nans + lost
        differ = differ.reshape(high - low, right - left)
        rows[low:high] += differ.sum(axis=1)
        cols[left:right] += differ.sum(axis=0)
        row, col = divmod(int(differ.argmax()), right - left)
        first = min(first, (low + row, left + col))
    return Changes(int(rows.sum()), largest, first, nans, rows, cols)


@dataclass(frozen=True, slots=True)
class Region:
    """Rows and columns that changed, as stretches low..high, and in words."""

    rows: tuple[tuple[int, int], ...]
    cols: tuple[tuple[int, int], ...]
    words: str


def region_of(changes: Changes, shape: Sequence[int]) -> Region | None:
    """The part of an array, stored in this shape, that changed; None if it is more than half, and may be all of it."""
    rows, cols = _stretches(changes.rows), _stretches(changes.cols)
    diagonal = (changes.rows == 1).all() and (changes.cols == 1).all() and changes.first == (0, 0)
    if diagonal and changes.count > 1:
        told = f"{changes.count:,} scattered elements differ, one of each row and column: the diagonal"
        return Region(rows, cols, told)
    height, width = (sum(high - low for low, high in part) for part in (rows, cols))
    total = prod(shape)
    if changes.count == 1:
        at = [int(i) for i in np.unravel_index(changes.first[0] * len(changes.cols) + changes.first[1], shape)]
        return Region(rows, cols, f"one element differs, at {at}")
    small = _DENSE * height * width <= changes.count and 2 * height * width <= total
    if small and len(rows) <= MOST_NAMED and len(cols) <= MOST_NAMED:
        noun = "row" if len(shape) > 1 else "element"
        parts = [listed(noun, rows)] if height < len(changes.rows) else []
        parts += [listed("column", cols)] if width < len(changes.cols) else []
        what = "a block of it differs" if len(parts) == 2 else "a part of it differs"
        if len(parts) == 1 and (height if height < len(changes.rows) else width) == 1:
            what = f"one {parts[0].split(' ')[0]} differs"
        return Region(rows, cols, f"{what}: {', '.join(parts)}")
    if changes.count <= _FEW * total:
        return Region(rows, cols, f"{changes.count:,} scattered elements differ")
    return None


def region_in_words(region: Region, changes: Changes) -> str:
    """A region in words, and whether all of it is NaN."""
    return region.words + (", all of them NaN" if changes.nans == changes.count else "")


def _stretches(counts: np.ndarray) -> tuple[tuple[int, int], ...]:
    if (counts > 0).mean() > _NEARLY:  # some elements are equal by chance
        return ((0, len(counts)),)
    places = np.where(counts > 0, np.arange(len(counts)), -1)
    return tuple((low, high) for low, high, start in runs_of(places) if start >= 0)
