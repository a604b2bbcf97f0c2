"""Fingerprints of a tensor's rows and columns, which find equal content in any place.

A tensor is read once, in small tiles. Every element's bits are mixed to 64 bits. A row's print is their sum with
weights by place, so it depends on content and order; its bag is the sum without weights, so it depends only on
content. Two different rows have equal prints with a probability of one in 2 ** 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import first_of
from engine.formats.headers import dense_strides
from engine.move.tensors import Tensors, View, cast_bits, tiles

_TILE = 1 << 15  # elements at a time: eight bytes each
_ODD, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)

Prints64 = np.ndarray  # of uint64


@dataclass(frozen=True, slots=True)
class Prints:
    """What identifies the rows (first of each pair) and the columns of an array.

    Attributes:
        units: prints, which depend on content and order.
        bags: sums that depend only on content.
        plain: whether all elements of a row or column are equal, so that it proves nothing.
    """

    units: tuple[Prints64, Prints64]
    bags: tuple[Prints64, Prints64]
    plain: tuple[np.ndarray, np.ndarray]

    @property
    def bag(self) -> int:
        """A number that is equal for tensors of the same elements in any order and shape."""
        return int(self.bags[0].sum(dtype=np.uint64))

    @property
    def constant(self) -> bool:
        """Whether all elements are equal."""
        return all(plain.all() for plain in self.plain)


def take_prints(tensors: Tensors, view: View, kind: str, order: np.ndarray | None = None) -> Prints:
    """The prints of an array of rows × columns, cast to `kind`.

    With an `order`, column i weighs as if it were at `order[i]`, to find rows whose columns moved too.
    """
    rows, cols = view.shape
    places = weights(max(rows, cols))
    across = places[:cols] if order is None else places[order]
    units, bags, first = ((np.zeros(rows, np.uint64), np.zeros(cols, np.uint64)) for _ in range(3))
    for box in tiles(view.shape, (dense_strides(view.shape),), _TILE):
        mixed = mix(cast_bits(tensors.read(view, box), view.dtype, kind))
        (low, high), (left, right) = box
        mixed = mixed.reshape(high - low, right - left)
        units[0][low:high] += mixed @ across[left:right]
        units[1][left:right] += np.einsum("i,ij->j", places[low:high], mixed)
        bags[0][low:high] += mixed.sum(axis=1, dtype=np.uint64)
        bags[1][left:right] += mixed.sum(axis=0, dtype=np.uint64)
        if left == 0:
            first[0][low:high] = mixed[:, 0]
        if low == 0:
            first[1][left:right] = mixed[0]
    return Prints(units, bags, (bags[0] == first[0] * np.uint64(cols), bags[1] == first[1] * np.uint64(rows)))


def take_runs(tensors: Tensors, view: View, kind: str, length: int) -> Prints64:
    """The print of each run of `length` elements of an array of rows × columns, whose rows are whole runs."""
    found = np.empty((view.shape[0], view.shape[1] // length), np.uint64)
    places = weights(length)
    for (low, high), (left, right) in tiles(found.shape, (dense_strides(found.shape),), max(_TILE // length, 1)):
        bits = tensors.read(view, ((low, high), (left * length, right * length)))
        mixed = mix(cast_bits(bits, view.dtype, kind)).reshape(-1, length)
        found[low:high, left:right] = (mixed @ places).reshape(high - low, right - left)
    return found.reshape(-1)


def mix(bits: np.ndarray) -> Prints64:
    """64 well-mixed bits for each element, from its own bits.

    >>> len(set(mix(np.arange(1000, dtype=np.uint16)).tolist()))
    1000
    """
    z = bits.astype(np.uint64)
    z += np.uint64(1)
    z *= _ODD
    high = z >> np.uint64(32)
    z ^= high
    z *= _OTHER
    np.right_shift(z, np.uint64(29), out=high)
    z ^= high
    return z


def weights(count: int) -> Prints64:
    """Odd weights of the first `count` places; they do not depend on `count`."""
    return mix(np.arange(count, dtype=np.uint64) + np.uint64(1 << 40)) | np.uint64(1)


def joined(prints: Prints64, size: int) -> Prints64:
    """The prints of blocks of `size` consecutive units.

    >>> joined(np.arange(6, dtype=np.uint64), 3).shape
    (2,)
    """
    found: Prints64 = mix(prints).reshape(-1, size) @ weights(size)
    return found


# Consecutive elements in another place, regardless of rows and columns. Flat pieces of a tensor, as sharded training
# keeps them, begin and end anywhere, so some short windows of one side are searched at every place of the other.
_WINDOW = 8  # elements
_TRIED = 256  # windows
_MOST_NAMED = 4


def find_stretches(tensors: Tensors, one: View, own: View) -> str | None:
    """Where the elements of a column lie in another, in words; None if less than half are found or none moved."""
    count = one.shape[0]
    if min(count, own.shape[0]) < 4 * _WINDOW:
        return None
    places = np.unique(np.linspace(0, count - _WINDOW, _TRIED).astype(np.int64))
    ours = np.concatenate([_windows(tensors, one, at, at + 1, 0) for at in places.tolist()])
    found = np.full(len(places), -1, np.int64)
    by_print = np.argsort(ours)
    for start in range(0, own.shape[0] - _WINDOW + 1, _TILE):
        theirs = _windows(tensors, own, start, min(start + _TILE, own.shape[0] - _WINDOW + 1), 1)
        for at in np.flatnonzero(np.isin(theirs, ours)).tolist():
            low, high = np.searchsorted(ours[by_print], [theirs[at], theirs[at] + np.uint64(1)])
            for window in by_print[low:high].tolist():
                found[window] = start + at if found[window] in (-1, places[window]) else found[window]
    known = found >= 0
    offsets = (found - places)[known]
    if 2 * int(known.sum()) < len(places) or not offsets.any() or len(np.unique(ours)) * 2 < len(ours):
        return None
    return _pieces_in_words(places[known], offsets)


def _windows(tensors: Tensors, view: View, low: int, high: int, reader: int) -> Prints64:
    """The prints of the windows that begin at places low..high."""
    mixed = mix(tensors.read(view, ((low, high - 1 + _WINDOW), (0, 1)), reader))
    found: Prints64 = np.zeros(high - low, np.uint64)
    for place, weight in enumerate(weights(_WINDOW)):
        found += mixed[place : place + high - low] * weight
    return found


def _pieces_in_words(places: np.ndarray, offsets: np.ndarray) -> str | None:
    edges = [0, *(np.flatnonzero(np.diff(offsets)) + 1).tolist()]
    pieces = [(int(places[edge]), int(offsets[edge])) for edge in edges]
    if 4 * len(pieces) > len(places):
        return None
    if len(pieces) == 1:
        by = -pieces[0][1]
        return f"elements in a row shifted by {abs(by):,}: {max(by, 0):,} holds {max(-by, 0):,}"
    told = first_of([f"from {at:,} on hold {at + by:,} on" for at, by in pieces[: _MOST_NAMED + 1]], _MOST_NAMED)
    return f"pieces of elements in a row in other places: those about {told}"
