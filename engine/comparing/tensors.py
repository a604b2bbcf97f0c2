"""Comparing two checkpoints tensor by tensor: a verdict for each, and what the verdicts mean.

Guesses are tried from the cheapest on: the same bytes, the same after casting, other orders of
the same tensor, another tensor of the reference. A wrong guess costs one tile of each tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.comparing.diagnoses import fold_verdicts
from engine.comparing.verdict import Kind, Verdict
from engine.discover.guesses import Geometry, geometries, is_number, neighbours, recut, reordered_rows, rotary_orders
from engine.formats.headers import ITEM_SIZES, FileHeader
from engine.move.tensors import Tensors, narrowest
from engine.move.views import View

_HEAD = 4096  # elements: enough to tell most tensors apart before digesting them whole


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints compared: verdicts in order of name, and what they mean together."""

    out: str
    ref: str
    verdicts: tuple[Verdict, ...]
    diagnoses: tuple[str, ...]

    def same(self, *, allow_cast: bool = False) -> bool:
        """Whether every tensor is equal, or with `allow_cast` equal after casting."""
        fine = ("equal", "cast") if allow_cast else ("equal",)
        return all(verdict.kind in fine for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "ref": self.ref,
            "equal": self.same(),
            "equal_after_casting": self.same(allow_cast=True),
            "counts": dict(Counter(verdict.kind for verdict in self.verdicts)),
            "diagnoses": list(self.diagnoses),
            "rows": fold_verdicts(self.verdicts),
            "tensors": [verdict.as_dict() for verdict in self.verdicts],
        }


def compare_files(
    out: Sequence[FileHeader],
    ref: Sequence[FileHeader],
    configs: Sequence[Mapping[str, Any]],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Verdict, ...]:
    """Verdicts on every tensor of either side, by name.

    Args:
        configs: of out and ref, possibly empty; head counts are taken from them.
        advance: called with bytes of the output that are done.

    Raises:
        EngineError: E301, E305 or E405 when a file fails while it is read.
    """
    with Tensors([*out, *ref]) as tensors:
        names = [header.name for file in (*out, *ref) for header in file.tensors]
        first = sum(len(file.tensors) for file in out)
        sides = [dict(zip(names[:first], tensors.views[:first], strict=True)),
                 dict(zip(names[first:], tensors.views[first:], strict=True))]  # fmt: skip
        return _Comparer(tensors, sides[0], sides[1], configs, advance).run()


class _Comparer:
    """One comparison. `found` holds the verdicts there are so far."""

    def __init__(
        self,
        tensors: Tensors,
        out: dict[str, View],
        ref: dict[str, View],
        configs: Sequence[Mapping[str, Any]],
        advance: Callable[[int], None],
    ) -> None:
        self.tensors, self.out, self.ref, self.configs, self.advance = tensors, out, ref, configs, advance
        self.heads: tuple[Geometry, ...] = geometries(configs)
        self.found: dict[str, Verdict] = {}
        self.digests: dict[tuple[int, str, int | None], bytes] = {}

    def run(self) -> tuple[Verdict, ...]:
        for name, view in self.out.items():
            if name in self.ref:
                self._pair(name, view, self.ref[name])
            else:
                self.advance(view.elements * ITEM_SIZES[view.dtype])
        for name in sorted(self.out.keys() ^ self.ref.keys()):
            self._tied(name)
        self._search()
        for name in [*self.out, *self.ref]:
            if name not in self.found:
                self._rest(name)
        return tuple(self.found[name] for name in sorted(self.found, key=_natural))

    def _verdict(self, name: str, kind: Kind, **more: Any) -> None:
        one, two = self.out.get(name), self.ref.get(name)
        self.found[name] = Verdict(
            name,
            kind,
            None if one is None else one.dtype,
            None if one is None else one.shape,
            None if two is None else two.dtype,
            None if two is None else two.shape,
            **more,
        )

    def _pair(self, name: str, one: View, two: View) -> None:
        """A tensor of both sides; no verdict yet when only the other tensors can tell."""
        match, item, done = self.tensors.match, ITEM_SIZES[one.dtype], 0

        def advance(elements: int) -> None:
            nonlocal done
            done += elements
            self.advance(elements * item)

        if one.shape == two.shape:
            if match([(one, two)], advance):
                self._verdict(name, "equal" if one.dtype == two.dtype else "cast")
            else:
                self._other_order(name, one, two)
        elif len(one.shape) == 2 and one.shape == two.shape[::-1] and match([(one, two.swap(0, 1))]):
            self._verdict(name, "transposed")
        elif one.shape and two.shape and one.shape[1:] == two.shape[1:] and min(one.shape[0], two.shape[0]):
            rows = min(one.shape[0], two.shape[0])
            if match([(one.part(0, 0, rows), two.part(0, 0, rows))]):
                more = one.shape[0] - two.shape[0]
                note = f"{abs(more)} rows {'more' if more > 0 else 'fewer'} than the reference"
                self._verdict(name, "padded", note=note)
        self.advance((one.elements - done) * item)

    def _other_order(self, name: str, one: View, two: View) -> None:
        match = self.tensors.match
        right = []
        for heads in self.heads:
            right = [rotary for rotary, pairs in rotary_orders(one, two, heads) if match(pairs)]
            if right:
                break
        if right:
            self._verdict(name, "permuted", note="rotary pairs", rotary=right[0] if len(right) == 1 else "other")
        elif len(one.shape) == 2 and one.shape == two.shape[::-1] and match([(one, two.swap(0, 1))]):
            self._verdict(name, "transposed")

    def _tied(self, name: str) -> None:
        """A head stored on one side only is no difference where the other side's config ties it."""
        side, config = (self.out, self.configs[1]) if name in self.out else (self.ref, self.configs[0])
        if name.split(".")[-2:-1] not in (["lm_head"], ["output"]) or config.get("tie_word_embeddings") is not True:
            return
        head = side[name]
        for other, view in side.items():
            if other.split(".")[-2:-1] in (["embed_tokens"], ["tok_embeddings"]) and view.shape == head.shape:
                if self.tensors.match([(head, view)]):
                    self._verdict(name, "equal", other=other, note="tied, stored on one side only")
                return

    def _search(self) -> None:
        """Tensors that equal another one of the reference, among those that do not equal their own."""
        left_out = [name for name in self.out if name not in self.found]
        left_ref = [name for name in self.ref if name not in self.found]
        shapes: dict[tuple[int, ...], tuple[list[str], list[str]]] = {}
        for side, names, views in ((0, left_out, self.out), (1, left_ref, self.ref)):
            for name in names:
                if views[name].elements:
                    shapes.setdefault(views[name].shape, ([], []))[side].append(name)
        for ours, theirs in shapes.values():
            self._search_shape(ours, theirs)
        for name in left_out:
            if name in self.ref and name not in self.found:
                self._search_recut(name, left_ref)

    def _search_shape(self, ours: Sequence[str], theirs: Sequence[str]) -> None:
        kind = narrowest([self.out[n].dtype for n in ours] + [self.ref[n].dtype for n in theirs])
        if kind is None or not ours or not theirs:
            return
        starts: dict[bytes, list[str]] = {}
        for name in theirs:
            starts.setdefault(self._digest(self.ref[name], kind, _HEAD), []).append(name)
        taken: set[str] = set()
        for name in ours:
            likely = [o for o in starts.get(self._digest(self.out[name], kind, _HEAD), ()) if o != name]
            same = [o for o in neighbours(name, likely) if self._same_digest(name, o, kind)]
            if not same:
                continue
            other = next((o for o in same if o not in taken), same[0])
            taken.add(other)
            note = f"equals {other} of the reference"
            self._verdict(name, "swapped" if name in self.ref else "extra", other=other, note=note)
            if other not in self.out:
                self._verdict(other, "missing", other=name, note=f"equals {name} of the output")

    def _same_digest(self, name: str, other: str, kind: str) -> bool:
        return self._digest(self.out[name], kind) == self._digest(self.ref[other], kind)

    def _digest(self, view: View, kind: str, elements: int | None = None) -> bytes:
        key = (view.source, kind, elements)
        if key not in self.digests:
            self.digests[key] = self.tensors.digest(view, kind, elements)
        return self.digests[key]

    def _search_recut(self, name: str, candidates: Sequence[str]) -> None:
        for other in neighbours(name, candidates, only=True):
            pair = recut(self.out[name], self.ref[other])
            if pair is not None and self.tensors.match([pair]):
                self._verdict(name, "swapped", other=other, note=f"equals {other} of the reference, cut the other way")
                return

    def _rest(self, name: str) -> None:
        one, two = self.out.get(name), self.ref.get(name)
        if one is None or two is None:
            self._verdict(name, "extra" if two is None else "missing")
        elif one.shape != two.shape:
            self._verdict(name, "shape")
        else:
            told = self.tensors.difference(one, two)
            if told is None:
                self._verdict(name, "different", note="types that cannot be compared")
                return
            moved = reordered_rows(self.tensors, name, one, two, self.configs)
            if moved:
                self._verdict(name, "permuted", note=f"{moved} rows in another order")
            else:
                self._verdict(name, "different", count=told.count, largest=told.largest, first=told.first)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Layer 10 after layer 9.

    >>> sorted(["h.10.w", "h.9.w", "a"], key=_natural)
    ['a', 'h.9.w', 'h.10.w']
    """
    return [(0, int(part)) if is_number(part) else (1, part) for part in name.split(".")]
