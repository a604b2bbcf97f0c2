"""Relations: how a tensor that differs from its counterpart was derived from the reference.

One search finds all of these: its content in another order, changed values, a changed part, the content of other
tensors. Content is found by its prints, so no kind of error needs its own guess; orders are described in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np

from engine.discover.levels import Relation
from engine.discover.likeness import CLOSE, NEAR, closeness_in_words, relate_alike
from engine.discover.mixes import mixed
from engine.discover.orders import divisors, find_order, read_loops
from engine.discover.prints import find_stretches, take_prints, take_runs
from engine.discover.rows import (
    MOST_NAMED,
    Changes,
    Region,
    are_different,
    changes_of,
    lookup,
    moves,
    own_rows,
    ranges,
    region_in_words,
    region_of,
    stretch,
)
from engine.discover.sides import MOST_UNITS, Sides, as_matrix, flat, reshaped
from engine.discover.values import closeness, relate_rounding, relate_values
from engine.errors import first_of
from engine.language.names import numbers_in
from engine.move.tensors import View, common_types

_SHORTEST = 4  # elements of a run
_SHUFFLED = "the same elements in another order"
_BLOCKS = (2, 4, 8)  # numbers of parts that may have changed in different ways
_STRAY = 0.1  # share of the rows that may be from elsewhere


class Search:
    """Relates the tensors of two checkpoints one by one, and keeps the differences that it found.

    Attributes:
        changes: how tensors differ from the reference's of the same name, if that was checked.
    """

    def __init__(self, sides: Sides) -> None:
        self.changes: dict[str, Changes | None] = {}
        self._sides, self._tensors, self._out, self._ref = sides, sides.tensors, sides.out, sides.ref

    def relate(self, name: str, first: Sequence[str]) -> Relation | None:
        """How an output's tensor, if it differs, was derived from the reference, of which some are tried `first`."""
        out, ref = self._out[name], self._ref.get(name)
        one, own = as_matrix(out), None if ref is None else as_matrix(ref)
        if one is None or not one.elements:
            return None
        kinds = () if own is None else common_types(one.dtype, own.dtype)
        if own is not None and kinds and ref is not None:
            found = self._own(name, one, own, out, ref, kinds[0])
            if found is not None:
                return found
        others = [other for other in self._sides.others(name, first) if self._ref[other].elements]
        return self._whole(name, one, others) or self._parts(name, one, own, others)

    def _own(self, name: str, one: View, own: View, out: View, ref: View, kind: str) -> Relation | None:
        turned = ref.swap(-2, -1) if len(ref.shape) > 2 else ref
        if turned is not ref and turned.shape == out.shape and self._tensors.match(out, turned):
            return Relation("transposed", "rows are columns in each of its matrices")
        arranged = self._arranged(name, one, own, kind)
        shuffled = arranged is not None and arranged.words == _SHUFFLED
        if (arranged is not None and not shuffled) or out.shape != ref.shape or one.shape != own.shape:
            return arranged
        changes = self.changes[name] = changes_of(self._tensors, one, own)
        region = None if changes is None else region_of(changes, out.shape)
        rounds = changes is not None and region is not None and changes.largest  # not only the sign of zeros
        if rounds and (through := relate_rounding(self._tensors, one, own)) is not None:
            return through
        if changes is not None and region is not None and "scattered" not in region.words:
            found = self._local(name, one, own, changes, region, kind)
            return replace(found, words=f"{found.words}, the elements exchanged with each other") if shuffled else found
        if shuffled:
            return arranged
        values = relate_values(self._tensors, one, own, self._sides.sizes)
        if values is not None:
            return values
        if changes is not None and region is not None:
            return Relation("changed", region_in_words(region, changes))
        return self._blocks(one, own)

    def _blocks(self, one: View, own: View) -> Relation | None:
        """Equal parts of the rows or columns that changed in different ways."""
        for axis, noun in ((0, "row"), (1, "column")):
            for count in _BLOCKS:
                size, rest = divmod(one.shape[axis], count)
                if rest or size * one.shape[1 - axis] < _SHORTEST:
                    continue
                told: list[str] = []
                for low in range(0, count * size, size):
                    here, there = (view.part(axis, low, low + size) for view in (one, own))
                    found = relate_values(self._tensors, here, there, self._sides.sizes)
                    if found is None and not self._tensors.match(here, there):
                        break
                    told.append("" if found is None else found.words)
                if len(told) == count:
                    words = [f"{noun}s {i * size}…{(i + 1) * size - 1}: {what}" for i, what in enumerate(told) if what]
                    return Relation("changed", "; ".join(words))
        return None

    def _local(self, name: str, one: View, own: View, changes: Changes, region: Region, kind: str) -> Relation:
        """How a part changed."""
        if changes.nans == changes.count:
            return Relation("changed", f"{region.words}: NaN")
        told = set()
        for low, high in region.rows:
            for left, right in region.cols:
                here, there = (view.part(0, low, high).part(1, left, right) for view in (one, own))
                found = relate_values(self._tensors, here, there, self._sides.sizes) if here.elements > 1 else None
                told.add(
                    found.words if found is not None else self._from(name, one, kind, ((low, high), (left, right)))
                )
        words = told.pop() if len(told) == 1 else ""
        return Relation("changed", f"{region.words}: {words}" if words else region.words)

    def _from(self, name: str, one: View, kind: str, box: Sequence[tuple[int, int]]) -> str:
        """Where changed rows or columns come from, if all of each come from elsewhere."""
        for axis, noun in enumerate(("row", "column")):
            across = one.shape[1 - axis]
            if across < _SHORTEST or box[1 - axis] != (0, across):
                continue
            low, high = box[axis]
            part = self._sides.take(one, kind).units[axis][low:high]
            for other in [name, *self._sides.others(name, ())]:
                view = as_matrix(self._ref[other])
                if view is not None and view.dtype == one.dtype and view.shape[1 - axis] == across:
                    order = lookup(part, self._sides.take(view, kind).units[axis], low if other == name else None)
                    if (order >= 0).all():
                        return f"holds {ranges(order, noun)} of {'the reference' if other == name else other}"
        return ""

    # -- the same elements

    def _arranged(self, name: str, one: View, two: View, kind: str) -> Relation | None:
        """Whether the elements are those of another array in another order."""
        if one.elements != two.elements or (one.elements > MOST_UNITS and 1 in one.shape):
            return None
        ours, theirs = self._sides.take(one, kind), self._sides.take(two, kind)
        if ours.constant or ours.bag != theirs.bag:
            return None
        if one.shape != two.shape and self._tensors.match(flat(one), flat(two)):
            return Relation("recut", f"the same elements in a row, as {' × '.join(map(str, self._out[name].shape))}")
        if one.shape == two.shape:
            for axis, (here, there) in enumerate(zip(ours.units, theirs.units, strict=True)):
                order = find_order(here, there) if are_different(here) else None
                if order is not None:
                    return self._sides.reading(name, axis, order)
        if one.shape == two.shape[::-1] and 1 not in one.shape:
            if np.array_equal(ours.units[0], theirs.units[1]):
                return Relation("transposed", "rows are columns")
            order = find_order(ours.units[0], theirs.units[1])
            if order is not None:
                return Relation("transposed", f"rows are columns, and {self._sides.reading(name, 0, order).words}")
        if one.shape == two.shape and all(map(are_different, ours.bags)):
            rows, cols = map(find_order, ours.bags, theirs.bags)
            if rows is not None and cols is not None:
                again = take_prints(self._tensors, one, kind, cols)
                if np.array_equal(again.units[0], theirs.units[0][rows]):
                    told = [self._sides.reading(name, axis, order).words for axis, order in enumerate((rows, cols))]
                    return Relation("permuted", "; ".join(told))
        return self._recut(one, two, kind)

    def _recut(self, one: View, two: View, kind: str) -> Relation | None:
        """Runs of elements in another order: slices that were cut along one axis and joined along another."""
        if one.shape == two.shape and (turned := reshaped(one)) and self._tensors.match(turned, two.swap(0, 1)):
            return Relation("recut", f"its transpose, {turned.shape[0]} × {turned.shape[1]}, only reshaped")
        for length in reversed(divisors(gcd(one.shape[-1], two.shape[-1]))):
            if length < _SHORTEST or one.elements // length > MOST_UNITS:
                break
            runs = [take_runs(self._tensors, view, kind, length) for view in (one, two)]
            order = find_order(*runs) if are_different(runs[0]) else None
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
        if not are_different(self._sides.take(one, kind).units[0]):
            return None
        return Relation("permuted", self._stretches(one, two) or _SHUFFLED)

    def _stretches(self, one: View, two: View) -> str | None:
        """Consecutive elements in other places, if both arrays are stored densely."""
        here, there = flat(one), flat(two)
        if one.dtype != two.dtype or 1 in one.shape or here.shape[1] > 1 or there.shape[1] > 1:
            return None
        return find_stretches(self._tensors, here, there)

    def _whole(self, name: str, one: View, others: Sequence[str]) -> Relation | None:
        """Whether it is all of another tensor of the reference."""
        for other, view, kind in self._sides.comparable(one, others):
            if view.elements != one.elements:
                continue
            ours, theirs = self._sides.take(one, kind), self._sides.take(view, kind)
            if ours.constant or ours.bag != theirs.bag:
                continue
            if one.shape == view.shape and np.array_equal(ours.units[0], theirs.units[0]):
                return Relation("other", other=other)
            arranged = self._arranged(name, one, view, kind)
            if arranged is not None:
                told = "cut the other way" if arranged.kind == "recut" else arranged.kind
                return replace(arranged, kind="other", other=other, words=f"{told}: {arranged.words}")
        return None

    # -- some of the elements

    def _parts(self, name: str, one: View, own: View | None, others: Sequence[str]) -> Relation | None:
        """Rows or columns of the reference's own or other tensors, in other places; else how close the values are."""
        sources = ([name] if own is not None else []) + list(others)
        partly: Relation | None = None
        for axis in (0, 1) if max(one.shape) <= MOST_UNITS else ():
            found, missing = self._gathered(name, one, axis, sources)
            if found is not None and missing <= _STRAY * one.shape[axis]:
                return found
            partly = partly or found
        level = own is not None and own.shape == one.shape and bool(common_types(one.dtype, own.dtype))
        apart = closeness(self._tensors, one, own) if level and own is not None else None
        if apart is None or apart >= NEAR:
            found = relate_alike(self._sides, name, one, own, others)
            if found is not None or partly is not None:
                return found or partly
        if own is None or not common_types(one.dtype, own.dtype):
            return None
        words = None if apart is not None and apart < NEAR else self._stretches(one, own)
        if words is not None:
            return Relation("permuted", words)
        alike = [(other, view) for other in others if (view := as_matrix(self._ref[other])) and view.shape == one.shape]
        counts = () if self._sides.geometry is None else (self._sides.geometry.heads, self._sides.geometry.groups)
        words = mixed(self._tensors, one, own, alike, counts)
        if apart is not None and apart < CLOSE:
            words = ", ".join([closeness_in_words(apart), *([words] if words and "correlation" not in words else [])])
        return None if words is None else Relation("different" if level else "shape", words)

    def _gathered(self, name: str, one: View, axis: int, sources: Sequence[str]) -> tuple[Relation | None, int]:
        """Rows (axis 0) or columns from other places, of as many tensors as needed; and how many are not found."""
        noun, across = ("row", "column")[axis], one.shape[1 - axis]
        left: np.ndarray | None = None  # rows or columns that are not found yet
        told: list[tuple[str, np.ndarray]] = []
        mine: Relation | None = None
        unknown = 0
        for other, view, kind in self._sides.comparable(one, sources):
            if max(view.shape) > MOST_UNITS or view.shape[1 - axis] != across:
                continue
            ours, theirs = self._sides.take(one, kind), self._sides.take(view, kind)
            here, there = ours.units[axis], theirs.units[axis]
            if across == 1:
                found = stretch(other, here, there) if name != other or len(here) != len(there) else None
                if found is not None:
                    return found, 0
                continue
            if mine is not None and numbers_in(other) != numbers_in(name):
                break
            left = ~ours.plain[axis] if left is None else left
            order = np.where(left, lookup(here, there), -1)
            if across < _SHORTEST or (count := int((order >= 0).sum())) < 2:
                continue
            own = len(here) == len(there) and bool((order[order >= 0] == np.flatnonzero(order >= 0)).all())
            if other == name and not own and count >= max(2, int(left.sum()) / 2):
                units = self._sides.units(name, axis)
                mine = own_rows(order, here, there, theirs.plain[axis], int(left.sum()), units)
                unknown = int(left.sum()) - count
            told.append((other, order))
            left = left & (order < 0)
            if not left.any():
                break
        if mine is not None and (left is None or 2 * int(left.sum()) > unknown or unknown == 0):
            return mine, unknown
        if left is None or not told or 2 * int(left.sum()) > len(left):
            return None, 0
        missing = int(left.sum())
        rest = f"; {missing:,} {noun}s are from elsewhere" if missing else ""
        if len(told) == 1:
            return Relation("part", f"{ranges(told[0][1], noun)} of {told[0][0]}{rest}", other=told[0][0]), missing
        words = first_of([f"{moves(order, noun, every=True)} of {other}" for other, order in told], MOST_NAMED)
        return Relation("part", words + rest), missing
