"""Changes: where two arrays of one shape differ, as rows, columns or a block of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from engine.discover.orders import runs_of
from engine.discover.rows import MOST_NAMED, listed
from engine.move.tensors import Tensors, common_types, deviation, unlike
from engine.move.views import View, tiles

_TILE = 1 << 16  # elements at a time
_DENSE = 0.5  # of a block must differ, so that the block is what changed
_NEARLY = 0.9  # of the rows or columns: all of them
_FEW = 0.02  # of all elements may differ without a place in common


@dataclass(frozen=True, slots=True)
class Changes:
    """How two arrays, rows × columns, differ.

    Attributes:
        count: elements that are not the same, after casting if their types differ.
        largest: the largest absolute deviation; infinite where only one side is a number.
        first: index of the first such element.
        nans: elements that are no number in the output alone.
        rows, cols: how many differ in each.
    """

    count: int
    largest: float
    first: tuple[int, int]
    nans: int
    rows: np.ndarray
    cols: np.ndarray


def changes_of(tensors: Tensors, out: View, ref: View) -> Changes | None:
    """How two arrays differ; None when their types cannot be compared."""
    found: Changes | None = None
    for kind in common_types(out.dtype, ref.dtype):
        told = _changes(tensors, out, ref, kind)
        if found is None or told.count < found.count:
            found = told
    return found


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
    """Rows and columns that changed, each as stretches low..high, and in words."""

    rows: tuple[tuple[int, int], ...]
    cols: tuple[tuple[int, int], ...]
    words: str


def region_of(changes: Changes, shape: Sequence[int]) -> Region | None:
    """What part of an array changed, when it is no more than half; None when all of it may have.

    Args:
        shape: as stored, for naming an element.
    """
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
        if len(parts) == 1 and min(height, width) == 1:
            what = f"one {parts[0].split(' ')[0]} differs"
        return Region(rows, cols, f"{what}: {', '.join(parts)}")
    if changes.count <= _FEW * total:
        return Region(rows, cols, f"{changes.count:,} scattered elements differ")
    return None


def said(region: Region, changes: Changes) -> str:
    """A region in words, and whether it holds no number."""
    return region.words + (", all of them NaN" if changes.nans == changes.count else "")


def _stretches(counts: np.ndarray) -> tuple[tuple[int, int], ...]:
    if (counts > 0).mean() > _NEARLY:  # some elements are equal by chance
        return ((0, len(counts)),)
    places = np.where(counts > 0, np.arange(len(counts)), -1)
    return tuple((low, high) for low, high, start in runs_of(places) if start >= 0)
