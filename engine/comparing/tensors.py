"""Compares two checkpoints tensor by tensor: a verdict for each, and what the verdicts mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

from engine.discover.geometry import geometry_of
from engine.discover.levels import Kind as RelationKind
from engine.discover.levels import Relation
from engine.discover.relate import Search
from engine.discover.rows import changes_of
from engine.discover.sides import Sides, as_matrix
from engine.formats.headers import ITEM_SIZES, FileHeader
from engine.language.names import is_number
from engine.move.tensors import Tensors, View
from engine.planning.model import Plan

_MEASURED = ("different", "changed")
Kind = Literal[RelationKind, "equal", "cast", "swapped", "copied", "missing", "extra"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one tensor.

    Attributes:
        name: in the output, or in the reference when it is `missing`.
        out_dtype, out_shape, ref_dtype, ref_shape: None on the side that lacks it.
        other: the tensor of another name that it equals instead, if any.
        note: details, for people.
        rotary: for a permuted tensor, the choice of `rotary` that would have been right; `other`
            if head_dim is 4, for which both choices look alike.
        count, largest, first: number of differing elements, largest absolute deviation, index of the first.
    """

    name: str
    kind: Kind
    out_dtype: str | None = None
    out_shape: tuple[int, ...] | None = None
    ref_dtype: str | None = None
    ref_shape: tuple[int, ...] | None = None
    other: str | None = None
    note: str = ""
    rotary: str | None = None
    count: int | None = None
    largest: float | None = None
    first: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        largest = self.largest
        return {
            "name": self.name,
            "verdict": self.kind,
            "out": _side(self.out_dtype, self.out_shape),
            "ref": _side(self.ref_dtype, self.ref_shape),
            "other": self.other,
            "note": self.note,
            "rotary": self.rotary,
            "differing": self.count,
            "largest_deviation": largest if largest is None or isfinite(largest) else "infinite",
            "first_difference": None if self.first is None else list(self.first),
        }


def _side(dtype: str | None, shape: tuple[int, ...] | None) -> dict[str, Any] | None:
    return None if dtype is None or shape is None else {"dtype": dtype, "shape": list(shape)}


def compare_tensors(
    out: Sequence[FileHeader] | Plan,
    ref: Sequence[FileHeader] | Plan,
    configs: Sequence[Mapping[str, Any]],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Verdict, ...]:
    """Verdicts on every tensor of either side, by name.

    Args:
        out, ref: files, or a plan for what it would write.
        configs: those of out and ref, possibly empty; they give the head counts.
        advance: called with the number of bytes of the output that are done.

    Raises:
        EngineError: E301, E305 or E405 when reading a file fails.
    """
    with Tensors(out, ref) as tensors:
        return _Comparer(tensors, configs, advance).run()


class _Comparer:
    """One comparison. `found` holds the verdicts so far."""

    def __init__(self, tensors: Tensors, configs: Sequence[Mapping[str, Any]], advance: Callable[[int], None]) -> None:
        self.tensors, self.configs, self.advance = tensors, configs, advance
        self.out, self.ref = tensors.sides
        self.found: dict[str, Verdict] = {}

    def run(self) -> tuple[Verdict, ...]:
        for name, view in self.out.items():
            self._pair(name, view)
        for name in sorted(self.out.keys() ^ self.ref.keys()):
            self._tied(name)
        self._relate()
        for name in self.ref:
            if name not in self.found:
                self._verdict(name, "missing")
        return tuple(self.found[name] for name in sorted(self.found, key=_natural))

    def _verdict(self, name: str, kind: Kind, **more: Any) -> None:
        views = self.out.get(name), self.ref.get(name)
        sides: list[Any] = [getattr(view, what, None) for view in views for what in ("dtype", "shape")]
        self.found[name] = Verdict(name, kind, *sides, **more)

    def _pair(self, name: str, one: View) -> None:
        """Add the verdict of a tensor that is equal on both sides; one that differs is related later."""
        two, item, done = self.ref.get(name), ITEM_SIZES[one.dtype], 0

        def advance(elements: int) -> None:
            nonlocal done
            done += elements
            self.advance(elements * item)

        if two is not None and one.shape == two.shape and self.tensors.match(one, two, advance):
            self._verdict(name, "equal" if one.dtype == two.dtype else "cast")
        self.advance((one.elements - done) * item)

    def _tied(self, name: str) -> None:
        """A head that only one side stores is equal if the other side's configuration ties it."""
        side, config = (self.out, self.configs[1]) if name in self.out else (self.ref, self.configs[0])
        if name.split(".")[-2:-1] not in (["lm_head"], ["output"]) or config.get("tie_word_embeddings") is not True:
            return
        head = side[name]
        for other, view in side.items():
            if other.split(".")[-2:-1] in (["embed_tokens"], ["tok_embeddings"]) and view.shape == head.shape:
                if self.tensors.match(head, view):
                    self._verdict(name, "equal", other=other, note="tied, stored on one side only")
                return

    def _relate(self) -> None:
        """Find out how each tensor that differs from its counterpart was derived."""
        left = [name for name in self.out if name not in self.found]
        first = [name for name in self.ref if name not in self.found]
        search = Search(Sides(self.tensors, self.out, self.ref, geometry_of(self.configs)))
        relations = {name: search.relate(name, first) for name in left}
        for name, relation in relations.items():
            self._relate_one(name, relation, relations, search)
        for name, relation in relations.items():
            other = None if relation is None or relation.kind != "other" else relation.other
            if other is not None and name not in self.ref and other not in self.found:
                self._verdict(other, "missing", other=name, note=f"equals {name} of the output")

    def _relate_one(
        self, name: str, relation: Relation | None, all_of: Mapping[str, Relation | None], search: Search
    ) -> None:
        one, two = self.out[name], self.ref.get(name)
        if relation is not None and relation.kind == "other" and relation.other is not None:
            back = all_of.get(relation.other)
            gone = back is not None and back.kind == "other"  # its place also holds another tensor's content
            kind: Kind = "extra" if two is None else "swapped" if gone else "copied"
            words = f", {relation.words}" if relation.words else ""
            note = f"equals {relation.other} of the reference{words}"
            self._verdict(name, kind, other=relation.other, note=note, rotary=relation.rotary)
        elif two is None:
            self._verdict(name, "extra", note="" if relation is None else f"holds {relation.words} of the reference")
        else:
            held = relation or Relation("shape" if one.shape != two.shape else "different")
            self._verdict(name, held.kind, note=held.words, rotary=held.rotary)
            if held.kind in _MEASURED:
                self._measure(name, one, two, search)

    def _measure(self, name: str, one: View, two: View, search: Search) -> None:
        """Add the number of differing elements, the largest deviation and the first index to a verdict."""
        import numpy as np

        here, there, told = as_matrix(one), as_matrix(two), search.changes.get(name)
        if told is None and here is not None and there is not None:
            told = changes_of(self.tensors, here, there)
        found = self.found[name]
        if told is None:
            self.found[name] = replace(found, note=found.note or "types that cannot be compared")
            return
        flat = told.first[0] * (here.shape[1] if here is not None else 1) + told.first[1]
        first = tuple(int(i) for i in np.unravel_index(flat, one.shape)) if one.shape else ()
        self.found[name] = replace(found, count=told.count, largest=told.largest, first=first)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key that puts layer 10 after layer 9.

    >>> sorted(["h.10.w", "h.9.w", "a"], key=_natural)
    ['a', 'h.9.w', 'h.10.w']
    """
    return [(0, int(part)) if is_number(part) else (1, part) for part in name.split(".")]
