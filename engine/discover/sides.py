"""The tensors of two checkpoints, with their prints and sketches, each computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from engine.discover.alike import Sketch, take_sketch
from engine.discover.geometry import Geometry, Units, neighbours, units_of
from engine.discover.levels import Relation
from engine.discover.orders import read_order
from engine.discover.prints import Prints, take_prints
from engine.move.tensors import Tensors, View, common_types

MOST_UNITS = 1 << 22  # rows, columns or runs that are matched; more would take too much memory
_ROOM = 256 << 20  # bytes of sketches that are kept


class Sides:
    """An output's tensors, and the reference's.

    Attributes:
        tensors: reads both.
        out, ref: the tensors by name.
        geometry: heads and sizes of the model, if they are known.
    """

    def __init__(
        self, tensors: Tensors, out: Mapping[str, View], ref: Mapping[str, View], geometry: Geometry | None
    ) -> None:
        self.tensors, self.out, self.ref, self.geometry = tensors, out, ref, geometry
        self._prints: dict[tuple[View, str], Prints] = {}
        self._sketches: dict[View, Sketch] = {}
        self._room = _ROOM

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the model by name."""
        return {} if self.geometry is None else self.geometry.sizes

    def others(self, name: str, first: Sequence[str]) -> list[str]:
        """The reference's tensors in the order of search: those of `first`, then others, from near to far."""
        rest = [other for other in self.ref if other not in set(first)]
        return neighbours(name, first) + neighbours(name, rest)

    def comparable(self, one: View, names: Sequence[str]) -> Iterator[tuple[str, View, str]]:
        """The reference's tensors that an array can be compared with: name, matrix, and the type to compare in."""
        for name in names:
            view = as_matrix(self.ref[name])
            if view is not None and (kinds := common_types(one.dtype, view.dtype)):
                yield name, view, kinds[0]

    def take(self, view: View, kind: str) -> Prints:
        """The prints of an array's rows and columns, cast to a type."""
        key = (view, kind)
        if key not in self._prints:
            self._prints[key] = take_prints(self.tensors, view, kind)
        return self._prints[key]

    def sketch(self, view: View) -> Sketch | None:
        """The sketches of an array; None once the memory for sketches is used up."""
        if view not in self._sketches and (max(view.shape) > MOST_UNITS or self._room <= 0):
            return None
        if view not in self._sketches:
            self._sketches[view] = take_sketch(self.tensors, view)
            self._room -= sum(part.nbytes for part in self._sketches[view])
        return self._sketches[view]

    def units(self, name: str, axis: int) -> Units:
        """What the rows (axis 0) or columns of an output's tensor are, such as heads."""
        return units_of(name, axis, self.out[name].shape, self.geometry)

    def reading(self, name: str, axis: int, order: np.ndarray) -> Relation:
        """An order of rows or columns, in words."""
        return read_order(order, self.units(name, axis))


def flat(view: View) -> View:
    """A matrix as one column of its elements, if they are stored densely; else unchanged."""
    dense = view.strides == (view.shape[1], 1) or 1 in view.shape
    step = view.strides[0] if view.shape[1] == 1 else 1
    return replace(view, shape=(view.elements, 1), strides=(step, 1)) if dense else view


def reshaped(view: View) -> View | None:
    """A matrix's elements one after the other, cut into as many rows as it has columns; None where it is not dense.

    >>> reshaped(View(0, "F32", (2, 6), (6, 1)))
    View(source=0, dtype='F32', shape=(6, 2), strides=(2, 1), start=0)
    """
    rows, cols = view.shape
    return replace(view, shape=(cols, rows), strides=(rows, 1)) if view.strides == (cols, 1) else None


def as_matrix(view: View) -> View | None:
    """A tensor with all axes but the last joined, a vector as a column; None if the strides do not allow it."""
    if len(view.shape) < 2:
        return View(view.source, view.dtype, (view.elements, 1), (*(view.strides or (1,)), 1), view.start)
    for outer, inner, size in zip(view.strides[:-2], view.strides[1:-1], view.shape[1:-1], strict=True):
        if outer != inner * size:
            return None
    return replace(view, shape=(prod(view.shape[:-1]), view.shape[-1]), strides=(view.strides[-2], view.strides[-1]))
