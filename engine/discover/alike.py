"""Finds similar rows: which row of one array is which of another, even if their values changed.

A row's sketch is some sums of its elements with signs by place. Sketches of two rows point the same way, or the
opposite way, where the rows do, so rows are found that were scaled, shifted, rounded or disturbed. Callers check
whether the values really come from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.discover.orders import runs_of
from engine.discover.prints import weights
from engine.formats.headers import dense_strides
from engine.move.tensors import Box, Tensors, View, tiles

_TILE = 1 << 15  # elements at a time
_SUMS = 32  # numbers in a sketch
_ALIKE = 0.9  # the cosine of two sketches of one row
_TRIED = 64  # rows that are searched first
_MOST_PAIRS = 1 << 32  # of rows that are compared
NARROWEST = 16  # elements of a row: fewer are alike by chance

# Sketches of an array's rows and of its columns: float16, each of length 1, or zeros where all is one value.
Sketch = tuple[np.ndarray, np.ndarray]


def take_sketch(tensors: Tensors, view: View) -> Sketch:
    """The sketches of an array of rows × columns."""
    rows, cols = view.shape
    across, down = _signs(cols), _signs(rows)
    of_rows, of_cols = np.zeros((rows, _SUMS), np.float32), np.zeros((cols, _SUMS), np.float32)
    for box in tiles(view.shape, (dense_strides(view.shape),), _TILE):
        (low, high), (left, right) = box
        found = tensors.values(view, box)
        found = np.where(np.isfinite(found), found, 0).astype(np.float32)
        of_rows[low:high] += found @ across[left:right]
        of_cols[left:right] += found.T @ down[low:high]
    return _unit(of_rows), _unit(of_cols)


def _signs(count: int) -> np.ndarray:
    """Signs for `count` places; each column sums to 0, so that a constant added to all elements has no effect."""
    bits = np.unpackbits(weights(count)[:, None].view(np.uint8), axis=1)[:, 8 : 8 + _SUMS]
    signs: np.ndarray = bits.astype(np.float32) * 2 - 1
    signs -= signs.mean(axis=0)
    return signs


def _unit(sums: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(sums, dtype=np.float64).sum(axis=1, keepdims=True))
    small = length <= 1e-6 * max(float(length.max(initial=0)), 1e-30)
    unit: np.ndarray = np.where(small, 0, sums / np.where(small, 1, length)).astype(np.float16)
    return unit


def find_alike(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray | None:
    """The place of each row of a sketch in another sketch, -1 if it is not found; None if most are not."""
    if not len(ours) or not len(theirs) or len(ours) * len(theirs) > _MOST_PAIRS:
        return None
    known = np.flatnonzero(ours.any(axis=1))
    tried = known[np.linspace(0, len(known) - 1, min(_TRIED, len(known))).astype(int)] if len(known) else known
    if not len(tried) or 2 * int((_nearest(ours, theirs, tried) >= 0).sum()) <= len(tried):
        return None
    order = np.full(len(ours), -1, np.int64)
    order[known] = _nearest(ours, theirs, known)
    return order if 2 * int((order >= 0).sum()) > len(known) else None


def _nearest(ours: np.ndarray, theirs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    found = np.full(len(rows), -1, np.int64)
    wanted = theirs.astype(np.float32).T
    step = max(1, (1 << 18) // max(len(theirs), 1))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        near = np.abs(ours[some].astype(np.float32) @ wanted)
        best = near.argmax(axis=1)
        most = near[np.arange(len(some)), best]
        here = np.minimum(some, len(theirs) - 1)  # its own place, unless another is nearer
        best = np.where((some < len(theirs)) & (near[np.arange(len(some)), here] >= most - 1e-3), some, best)
        found[start : start + step] = np.where(most >= _ALIKE, best, -1)
    return found


class Placed(Tensors):
    """Two arrays of rows × columns, of which only chosen rows are read, in the given order."""

    def __init__(self, tensors: Tensors, one: View, two: View, order: np.ndarray) -> None:
        """
        Args:
            order: for each row of `one` its place in `two`, -1 for a row that is left out.
        """
        known = np.flatnonzero(order >= 0)
        self._tensors, self._views, self._rows = tensors, (one, two), (known, order[known])
        shape = (len(known), one.shape[1])
        self.views = tuple(replace(view, shape=shape) for view in (one, two))

    def read(self, view: View, box: Box, reader: int = 0) -> np.ndarray:
        """As `Tensors.read`, of `views` or parts of them: reader 0 is the first array's, reader 1 the second's."""
        whole = self._views[reader]
        down, across = _offset(view.start - whole.start, view.strides)
        (low, high), (left, right) = box
        parts = [
            self._tensors.read(whole, ((start, start + end - begin), (left + across, right + across)), reader).copy()
            for begin, end, start in runs_of(self._rows[reader][low + down : high + down])
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _offset(start: int, strides: Sequence[int]) -> tuple[int, int]:
    """Row and column of a part's first element.

    >>> _offset(13, (10, 1)), _offset(13, (1, 10))
    ((1, 3), (3, 1))
    """
    long, short = (0, 1) if strides[0] >= strides[1] else (1, 0)
    at = [0, 0]
    at[long], rest = divmod(start, strides[long])
    at[short] = rest // strides[short]
    return at[0], at[1]
