"""Relations: what a tensor that is not the reference's own holds instead.

One search for whatever became of a tensor: its content in another order, its values changed, a part of it
changed, the content of other tensors. Content is found by its prints, so that no kind of mistake needs a guess of
its own, and orders are read back in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd, prod

import numpy as np

from engine.discover.changes import Changes, Region, changes_of, region_of
from engine.discover.geometry import Geometry, neighbours, units_of
from engine.discover.orders import divisors, find_order, read_loops, read_order
from engine.discover.prints import Prints, Prints64, take_prints, take_runs
from engine.discover.rows import MOST_NAMED, Relation, lookup, own_rows, placed, spans, telling
from engine.discover.values import closeness, relate_values
from engine.move.tensors import Tensors, common_types
from engine.move.views import View

_MOST_UNITS = 1 << 22  # rows, columns or runs that are matched: more are too many to keep
_SHORTEST = 4  # elements of a run
_TELLING = 64  # elements that a relation of values to another tensor must hold for
_TRIED = 32  # tensors, the likeliest first, whose values are tried
_CLOSE = 0.1  # of its size


class Search:
    """The tensors of two checkpoints, and what is known of them so far.

    Attributes:
        changes: how tensors differ from the reference's of the same name, where that was looked at.
    """

    def __init__(
        self, tensors: Tensors, out: Mapping[str, View], ref: Mapping[str, View], geometry: Geometry | None
    ) -> None:
        self.geometry = geometry
        self.changes: dict[str, Changes | None] = {}
        self._tensors = tensors
        self._out, self._ref = out, ref
        self._prints: dict[tuple[View, str], Prints] = {}

    def relate(self, name: str, first: Sequence[str]) -> Relation | None:
        """What an output's tensor holds, which is not what the reference's of this name does.

        Args:
            first: the reference's tensors to look at before others.
        """
        out, ref = self._out[name], self._ref.get(name)
        one, own = as_matrix(out), None if ref is None else as_matrix(ref)
        if one is None or not one.elements:
            return None
        kind = None if own is None else next(iter(common_types(one.dtype, own.dtype)), None)
        if own is not None and kind is not None and ref is not None:
            found = self._own(name, one, own, out, ref, kind)
            if found is not None:
                return found
        others = [other for other in self._others(name, first) if self._ref[other].elements]
        return self._whole(name, one, others) or self._parts(name, one, own, others)

    def _own(self, name: str, one: View, own: View, out: View, ref: View, kind: str) -> Relation | None:
        turned = ref.swap(-2, -1) if len(ref.shape) > 2 else ref
        if turned is not ref and turned.shape == out.shape and self._tensors.match(out, turned):
            return Relation("transposed", "rows are columns in each of its matrices")
        arranged = self._arranged(name, one, own, kind)
        if arranged is not None or out.shape != ref.shape or one.shape != own.shape:
            return arranged
        changes = self.changes[name] = changes_of(self._tensors, one, own)
        region = None if changes is None else region_of(changes, out.shape)
        if changes is not None and region is not None and "scattered" not in region.words:
            return self._local(name, one, own, changes, region, kind)
        values = relate_values(self._tensors, one, own, self._sizes())
        if values is not None:
            return Relation(values.kind, values.words)
        if changes is not None and region is not None:
            nan = ", all of them NaN" if changes.nans == changes.count else ""
            return Relation("changed", f"{region.words}{nan}")
        return None

    def _sizes(self) -> dict[str, int]:
        return {} if self.geometry is None else self.geometry.sizes

    def _local(self, name: str, one: View, own: View, changes: Changes, region: Region, kind: str) -> Relation:
        """A part that changed: what became of it."""
        if changes.nans == changes.count:
            return Relation("changed", f"{region.words}: NaN")
        told = set()
        for low, high in region.rows:
            for left, right in region.cols:
                here, there = (view.part(0, low, high).part(1, left, right) for view in (one, own))
                found = relate_values(self._tensors, here, there, self._sizes()) if here.elements > 1 else None
                told.add(
                    found.words if found is not None else self._from(name, one, kind, ((low, high), (left, right)))
                )
        words = told.pop() if len(told) == 1 else ""
        return Relation("changed", f"{region.words}: {words}" if words else region.words)

    def _from(self, name: str, one: View, kind: str, box: Sequence[tuple[int, int]]) -> str:
        """Where changed rows or columns come from, if they come whole from elsewhere."""
        for axis, noun in enumerate(("row", "column")):
            across = one.shape[1 - axis]
            if across < _SHORTEST or box[1 - axis] != (0, across):
                continue
            ours = self._take(one, kind)
            low, high = box[axis]
            part = (ours.cols if axis else ours.rows)[low:high]
            for other in [name, *self._others(name, ())]:
                view = as_matrix(self._ref[other])
                if view is not None and view.dtype == one.dtype and view.shape[1 - axis] == across:
                    theirs = self._take(view, kind)
                    order = lookup(part, theirs.cols if axis else theirs.rows, low if other == name else None)
                    if (order >= 0).all():
                        return f"holds {spans(order, noun)} of {'the reference' if other == name else other}"
        return ""

    def _others(self, name: str, first: Sequence[str]) -> list[str]:
        rest = [other for other in self._ref if other not in set(first)]
        return neighbours(name, first) + neighbours(name, rest)

    def _take(self, view: View, kind: str) -> Prints:
        key = (view, kind)
        if key not in self._prints:
            self._prints[key] = take_prints(self._tensors, view, kind)
        return self._prints[key]

    # -- the same elements

    def _arranged(self, name: str, one: View, two: View, kind: str) -> Relation | None:
        """The elements of another array in another order."""
        if one.elements != two.elements or (one.elements > _MOST_UNITS and 1 in one.shape):
            return None
        ours, theirs = self._take(one, kind), self._take(two, kind)
        if ours.plain or ours.bag != theirs.bag:
            return None
        if one.shape != two.shape and self._tensors.match(_flat(one), _flat(two)):
            return Relation("recut", f"the same elements in a row, as {' × '.join(map(str, self._out[name].shape))}")
        if one.shape == two.shape:
            for axis, (here, there) in enumerate(((ours.rows, theirs.rows), (ours.cols, theirs.cols))):
                order = find_order(here, there) if telling(here) else None
                if order is not None:
                    return self._read(name, axis, order)
        if one.shape == two.shape[::-1] and 1 not in one.shape:
            order = np.arange(len(ours.rows)) if np.array_equal(ours.rows, theirs.cols) else None
            if order is not None:
                return Relation("transposed", "rows are columns")
            order = find_order(ours.rows, theirs.cols)
            if order is not None:
                return Relation("transposed", f"rows are columns, and {self._read(name, 0, order).words}")
        if one.shape == two.shape and telling(ours.row_bags) and telling(ours.col_bags):
            rows, cols = find_order(ours.row_bags, theirs.row_bags), find_order(ours.col_bags, theirs.col_bags)
            if rows is not None and cols is not None:
                again = take_prints(self._tensors, one, kind, cols)
                if np.array_equal(again.rows, theirs.rows[rows]):
                    told = [self._read(name, axis, order).words for axis, order in enumerate((rows, cols))]
                    return Relation("permuted", "; ".join(told))
        return self._recut(one, two, kind)

    def _read(self, name: str, axis: int, order: np.ndarray) -> Relation:
        reading = read_order(order, units_of(name, axis, self._out[name].shape, self.geometry))
        return Relation("permuted", reading.words, rotary=reading.rotary)

    def _recut(self, one: View, two: View, kind: str) -> Relation | None:
        """Runs of elements in another order: slices that were joined along another axis than they were cut."""
        for length in reversed(divisors(gcd(one.shape[-1], two.shape[-1]))):
            if length < _SHORTEST or one.elements // length > _MOST_UNITS:
                break
            runs = [take_runs(self._tensors, view, kind, length) for view in (one, two)]
            order = find_order(*runs) if telling(runs[0]) else None
            if order is None:
                continue
            loops = read_loops((order[:, None] * length + np.arange(length)).reshape(-1))
            if loops is None:
                return Relation("permuted", f"runs of {length} elements in another order")
            sizes = " × ".join(str(count) for count, _ in loops)
            held = " × ".join(str(count) for count, _ in sorted(loops, key=lambda loop: -loop[1]))
            parts = sorted({count for count, _ in loops[:2]})
            return Relation(
                "recut",
                f"interleaved: ({held}) lies as ({sizes}), as slices of {parts[0]} tensor ranks joined along the "
                "wrong axis",
            )
        known = telling(self._take(one, kind).rows)
        return Relation("permuted", "the same elements in another order") if known else None

    def _whole(self, name: str, one: View, others: Sequence[str]) -> Relation | None:
        """All of another tensor of the reference."""
        for other in others:
            view = as_matrix(self._ref[other])
            kind = None if view is None else next(iter(common_types(one.dtype, view.dtype)), None)
            if view is None or kind is None or view.elements != one.elements:
                continue
            ours, theirs = self._take(one, kind), self._take(view, kind)
            if ours.plain or ours.bag != theirs.bag:
                continue
            if one.shape == view.shape and np.array_equal(ours.rows, theirs.rows):
                return Relation("other", other=other)
            arranged = self._arranged(name, one, view, kind)
            if arranged is not None:
                told = "cut the other way" if arranged.kind == "recut" else arranged.kind
                return replace(arranged, kind="other", other=other, words=f"{told}: {arranged.words}")
        return None

    # -- some of the elements

    def _parts(self, name: str, one: View, own: View | None, others: Sequence[str]) -> Relation | None:
        """Rows or columns of the reference's own or other tensors, in other places; else how close it comes."""
        sources = ([name] if own is not None else []) + list(others)
        if max(one.shape) <= _MOST_UNITS:
            for axis in (0, 1):
                found = self._gathered(name, one, own, axis, sources)
                if found is not None:
                    return found
        turned = self._turned(name, one, own, others)
        if turned is not None:
            return turned
        if own is None or own.shape != one.shape or not common_types(one.dtype, own.dtype):
            return None
        apart = closeness(self._tensors, one, own)
        close = apart is not None and apart < _CLOSE
        return Relation("different", f"close: off by {apart:.2%} of its size") if close else None

    def _turned(self, name: str, one: View, own: View | None, others: Sequence[str]) -> Relation | None:
        """Another order, or another tensor, and other values too; tried on a few tiles first."""

        def values(two: View) -> str | None:
            if not common_types(one.dtype, two.dtype):
                return None
            here = one.split(0, *two.shape[:-1]) if len(two.shape) > 2 else one
            found = relate_values(self._tensors, here, two, self._sizes())
            return None if found is None or found.kind in ("zeroed", "constant", "clipped") else found.words

        if own is not None and own.shape == one.shape[::-1] and 1 not in one.shape:
            words = values(own.swap(0, 1))
            if words is not None:
                return Relation("transposed", f"rows are columns, {words}")
        head = None if self.geometry is None else self.geometry.head_dim
        if own is not None and own.shape == one.shape and head and head % 2 == 0 and one.shape[0] % head == 0:
            for rotary, halves in (("pairs", (2, head // 2)), ("halves", (head // 2, 2))):
                words = values(own.split(0, one.shape[0] // head, *halves).swap(1, 2))
                if words is not None:
                    return Relation("permuted", f"rotary pairs in every head, {words}", rotary=rotary)
        for other in others[:_TRIED]:
            view = as_matrix(self._ref[other])
            if view is not None and view.shape == one.shape and one.elements >= _TELLING:
                words = values(view)
                if words is not None:
                    return Relation("other", words, other=other)
        return None

    def _gathered(self, name: str, one: View, own: View | None, axis: int, sources: Sequence[str]) -> Relation | None:
        """Rows (axis 0) or columns that lie elsewhere, from as many tensors as it takes."""
        noun, across = ("row", "column")[axis], one.shape[1 - axis]
        left: np.ndarray | None = None  # places that are not found yet
        told: list[tuple[str, np.ndarray]] = []
        for other in sources:
            view = as_matrix(self._ref[other])
            kind = None if view is None else next(iter(common_types(one.dtype, view.dtype)), None)
            if view is None or kind is None or max(view.shape) > _MOST_UNITS or view.shape[1 - axis] != across:
                continue
            ours, theirs = self._take(one, kind), self._take(view, kind)
            here, there = (ours.rows, theirs.rows) if axis == 0 else (ours.cols, theirs.cols)
            if across == 1:
                found = self._stretch(other, here, there) if name != other or len(here) != len(there) else None
                if found is not None:
                    return found
                continue
            plain = ours.plain_rows if axis == 0 else ours.plain_cols
            left = ~plain if left is None else left
            order = np.where(left, lookup(here, there), -1)
            count = int((order >= 0).sum())
            if across < _SHORTEST or count < 2:
                continue
            if other == name and count >= max(2, int(left.sum()) / 2):
                plain = theirs.plain_rows if axis == 0 else theirs.plain_cols
                return own_rows(order, here, there, noun, plain, int(left.sum()))
            told.append((other, order))
            left = left & (order < 0)
            if not left.any():
                break
        if left is None or not told or 2 * int(left.sum()) > len(left):
            return None
        rest = f"; {int(left.sum()):,} {noun}s are from elsewhere" if left.any() else ""
        if len(told) == 1:
            return Relation("part", f"{spans(told[0][1], noun)} of {told[0][0]}{rest}", other=told[0][0])
        words = ", ".join(f"{placed(order, noun, every=True)} of {other}" for other, order in told[:MOST_NAMED])
        return Relation("part", words + (", …" if len(told) > MOST_NAMED else "") + rest)

    @staticmethod
    def _stretch(other: str, here: Prints64, there: Prints64) -> Relation | None:
        """Elements that lie in a row in another vector."""
        if not telling(here):
            return None
        if len(here) > len(there):
            if np.array_equal(here[: len(there)], there):
                return Relation("padded", f"{len(here) - len(there):,} elements more than the reference")
            return None
        for start in np.flatnonzero(there == here[0])[:1000].tolist():
            if np.array_equal(there[start : start + len(here)], here):
                return Relation("part", f"elements {start}…{start + len(here) - 1} of {other}", other=other)
        return None


def _flat(view: View) -> View:
    """A matrix's elements one after the other, where they are stored so; else as they are."""
    dense = view.strides == (view.shape[1], 1) or 1 in view.shape
    step = view.strides[0] if view.shape[1] == 1 else 1
    return replace(view, shape=(view.elements, 1), strides=(step, 1)) if dense else view


def as_matrix(view: View) -> View | None:
    """All axes but the last as one, a vector as a column; None where the strides do not allow it."""
    if len(view.shape) < 2:
        return View(view.source, view.dtype, (view.elements, 1), (*(view.strides or (1,)), 1), view.start)
    for outer, inner, size in zip(view.strides[:-2], view.strides[1:-1], view.shape[1:-1], strict=True):
        if outer != inner * size:
            return None
    return replace(view, shape=(prod(view.shape[:-1]), view.shape[-1]), strides=(view.strides[-2], view.strides[-1]))
