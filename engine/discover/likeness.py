"""Rows or columns that are similar, not equal: in another order, or from another tensor, with other values too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.discover.alike import NARROWEST, Placed, find_alike
from engine.discover.levels import Relation
from engine.discover.rows import changes_of, own_rows, region_in_words, region_of
from engine.discover.sides import Sides
from engine.discover.values import closeness, relate_values
from engine.errors import counted
from engine.move.tensors import View

CLOSE = 0.1  # of its norm
NEAR = 0.35  # of its norm: still its own values in their own places


def relate_alike(sides: Sides, name: str, one: View, own: View | None, others: Sequence[str]) -> Relation | None:
    """Find rows or columns in another order, or from another tensor, that have other values too."""
    for other, view, _ in sides.comparable(one, ([name] if own is not None else []) + list(others)):
        for axis, there in ((0, 0), (1, 1), (0, 1)):
            turned, across = axis != there, one.shape[1 - axis]
            if across < NARROWEST or across != view.shape[1 - there]:
                continue
            mine, theirs = sides.sketch(one), sides.sketch(view)
            if mine is None or theirs is None:
                continue
            order = find_alike(mine[axis], theirs[there])
            found = None if order is None else _relate_rows(sides, name, one, other, view, order, axis, turned=turned)
            if found is not None:
                return found
    return None


def _relate_rows(
    sides: Sides, name: str, one: View, other: str, view: View, order: np.ndarray, axis: int, *, turned: bool
) -> Relation | None:
    """The relation of rows or columns whose places are known."""
    here, there = one.swap(0, 1) if axis else one, view.swap(0, 1) if axis != turned else view
    straight = len(order) == there.shape[0] and bool(((order < 0) | (order == np.arange(len(order)))).all())
    if straight and other == name and not turned:
        return None
    placed = Placed(sides.tensors, here, there, order)
    values = _difference(
        sides.sizes, placed, *placed.views, near=CLOSE if other != name else NEAR, whole=bool((order >= 0).all())
    )
    if values is None:
        return None
    noun = ("row", "column")[axis]
    if straight:
        missing = int((order < 0).sum())
        found = Relation("permuted", f"{counted(missing, noun)} from elsewhere" if missing else "")
    else:
        plain = np.zeros(there.shape[0], bool)
        found = own_rows(order, order, np.arange(there.shape[0]), plain, len(order), sides.units(name, axis))
    words = ", ".join(one for one in ("rows are columns" if turned else "", found.words, values) if one)
    if other != name:
        return replace(found, kind="other", words=words, other=other)
    return replace(found, kind="transposed" if turned else found.kind, words=words)


def _difference(
    sizes: dict[str, int], tensors: Placed, one: View, two: View, *, near: float, whole: bool
) -> str | None:
    """How two arrays with similar rows differ; None if in no known way."""
    if tensors.match(one, two):
        return ""
    found = relate_values(tensors, one, two, sizes)
    if found is not None:
        return found.words
    changes = changes_of(tensors, one, two)
    region = None if changes is None else region_of(changes, one.shape)
    if changes is not None and region is not None and whole:
        return region_in_words(region, changes)
    apart = closeness(tensors, one, two)
    return None if apart is None or apart >= near else closeness_in_words(apart)


def closeness_in_words(apart: float) -> str:
    """
    >>> closeness_in_words(0.0123)
    'close: off by 1.2% of its size'
    """
    return f"close: off by {100 * apart:.2g}% of its size"
