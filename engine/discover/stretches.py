"""Stretches: elements that lie in a row in another place, whatever rows and columns they are cut into there.

Flat pieces of a tensor, as sharded training keeps them, begin and end anywhere. Some short windows of one side are
looked for at every place of the other.
"""

from __future__ import annotations

import numpy as np

from engine.discover.prints import Prints64, mix, weights
from engine.move.tensors import Tensors
from engine.move.views import View

_WINDOW = 8  # elements
_TRIED = 256  # windows
_TILE = 1 << 15  # elements at a time
_MOST_NAMED = 4


def find_stretches(tensors: Tensors, one: View, own: View) -> str | None:
    """Where the elements of a flat array lie in another, in words; None where less than half do, or all in place.

    Args:
        one, own: of one type, each a column of elements.
    """
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
    return _told(places[known], offsets)


def _windows(tensors: Tensors, view: View, low: int, high: int, reader: int) -> Prints64:
    """The prints of the windows that begin at low..high."""
    mixed = mix(tensors.read(view, ((low, high - 1 + _WINDOW), (0, 1)), reader))
    found: Prints64 = np.zeros(high - low, np.uint64)
    for place, weight in enumerate(weights(_WINDOW)):
        found += mixed[place : place + high - low] * weight
    return found


def _told(places: np.ndarray, offsets: np.ndarray) -> str | None:
    edges = [0, *(np.flatnonzero(np.diff(offsets)) + 1).tolist()]
    pieces = [(int(places[edge]), int(offsets[edge])) for edge in edges]
    if 4 * len(pieces) > len(places):
        return None
    if len(pieces) == 1:
        by = -pieces[0][1]
        return f"elements in a row shifted by {abs(by):,}: {max(by, 0):,} holds {max(-by, 0):,}"
    told = ", ".join(f"from {at:,} on hold {at + by:,} on" for at, by in pieces[:_MOST_NAMED])
    return f"pieces of elements in a row in other places: those about {told}" + (", …" if len(pieces) > 4 else "")
