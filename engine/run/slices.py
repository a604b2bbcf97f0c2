"""Slices that ranks hold of one tensor must differ: equal ones were copied from rank to rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import xxhash

from engine.errors import EngineError, Place
from engine.formats.headers import FLOATS, ITEM_SIZES, TensorHeader
from engine.move.blocks import BLOCK_BYTES, Block, block_of
from engine.move.moves import Gatherer
from engine.planning.boxes import Copy, in_order
from engine.planning.model import Slices, Work
from engine.run.meter import Meter
from engine.storage.store import Range

_SAMPLE = 4096  # bytes at an end of a slice: enough to differ between slices of a trained tensor
_FEW = 32  # elements that may be equal by chance


def ends_of(header: TensorHeader) -> Iterator[Range]:
    """The bytes at both ends of a slice, which are read of each."""
    low, high = header.offset, header.offset + header.nbytes
    yield low, min(low + _SAMPLE, high)
    if header.nbytes > _SAMPLE:
        yield high - _SAMPLE, high


def compare_slices(plan: Work, slices: Slices, first: Gatherer, other: Gatherer, meter: Meter, others: Others) -> None:
    """E306 for two slices that are bit-identical, or begin or end alike, except those of few values or elements.

    Args:
        others: of the tensors that were compared before; this one is added.
    """
    held = _Held(plan, slices, first, other)
    begins: dict[int, bytes] = {}
    seen: dict[bytes, int] = {}
    equal: list[tuple[int, int]] = []
    for source in slices.sources if held.size >= _FEW else ():
        if meter.stopped.is_set():
            return
        if plan.sources[source].header.dtype != held.dtype:
            continue
        begins[source] = held.sample(source, 0)
        one = seen.setdefault(begins[source], source)
        if one != source and not _few_values(begins[source], held.item) and held.alike(one, source):
            equal.append((one, source))
    if not equal:
        if slices.repeats <= 1 and held.dtype in FLOATS:  # of experts, training may have changed a part
            _check_parts(held, begins)
        _check_others(held, begins, others)
        return
    got = f"bit-identical slices of {' × '.join(map(str, plan.sources[slices.sources[0]].header.shape))}"
    if _in_rows(slices, {twin: one for one, twin in equal}):
        after = _next(plan, slices)
        if all(held.alike(*held.beside(after, pair)) for pair in equal):
            return
        got += f", while those of `{after.name}` differ"
    raise _copied(plan, slices, *equal[0], got)


def _check_parts(held: _Held, begins: Mapping[int, bytes]) -> None:
    """E306 for two slices with the same few elements in one place at either end, by samples of their begins."""
    low = max(held.size - _SAMPLE // held.item, 0)
    ends = {source: held.sample(source, low) for source in begins} if low else {}
    for start, samples in ((0, begins), (low, ends)):
        for one, source, place, some in _in_part(samples, held.item):
            if not held.regular((one, source), start + place, some):
                got = f"{_FEW} elements or more that are bit-identical, from element {start + place} on"
                raise _copied(held.plan, held.slices, one, source, got, "a part of ")


def _check_others(held: _Held, begins: Mapping[int, bytes], others: Others) -> None:
    """E306 for a slice that another tensor has too, if it has not all: after upcycling, layers are equal on all ranks.

    They then have one shape. Vectors of a few ranks may well have stayed equal since then.
    """
    header = held.plan.sources[held.slices.sources[0]].header
    if len(header.shape) < 2 or held.dtype not in FLOATS:
        return
    ours = _Begins(held.slices, header.shape, tuple(map(xxhash.xxh3_128_digest, begins.values())))
    for (source, sample), digest in zip(begins.items(), ours.digests, strict=True):
        one, theirs = others.setdefault((held.size, held.dtype, digest), (source, ours))
        if theirs[1:] != ours[1:] and not _few_values(sample, held.item) and held.alike(one, source):
            raise _copied_within(held.plan, {one: theirs.slices, source: held.slices})


class _Begins(NamedTuple):
    """A tensor, the shape of its slices, and how each of them begins."""

    slices: Slices
    shape: tuple[int, ...]
    digests: tuple[bytes, ...]


Others = dict[tuple[int, str, bytes], tuple[int, _Begins]]  # by size, type and how a slice begins


class _Held:
    """What ranks hold of one tensor: slices of one shape and, as far as they are compared, of one type."""

    def __init__(self, plan: Work, slices: Slices, first: Gatherer, other: Gatherer) -> None:
        header = plan.sources[slices.sources[0]].header
        self.plan, self.slices, self._first, self._other = plan, slices, first, other
        self.dtype, self.item = header.dtype, ITEM_SIZES[header.dtype]
        self.size, self._row = math.prod(header.shape), header.shape[-1]

    def alike(self, one: int, two: int) -> bool:
        """Whether two slices of one size hold the same elements in the same order, also if their shapes differ."""
        for low in range(0, self.size, BLOCK_BYTES // self.item):
            ours = self._first.gather(self._block(one, low, BLOCK_BYTES), self.dtype)
            theirs = self._other.gather(self._block(two, low, BLOCK_BYTES), self.dtype)
            if not same(ours, theirs):
                return False
        return True

    def sample(self, source: int, low: int) -> bytes:
        """The bytes of elements from `low` on."""
        return bytes(self._other.gather(self._block(source, low, _SAMPLE), self.dtype))

    def _block(self, source: int, low: int, nbytes: int) -> Block:
        """A slice's elements from `low` on, so many bytes of them."""
        return block_of([whole(self.plan, source)], low, min(low + nbytes // self.item, self.size))

    def beside(self, after: Slices, pair: Sequence[int]) -> Iterator[int]:
        """The slices of another tensor that are on the same ranks."""
        return (after.sources[self.slices.sources.index(source)] for source in pair)

    def regular(self, pair: tuple[int, int], low: int, some: bytes) -> bool:
        """Whether equal elements are those of added tokens, or of heads that ranks repeat in all layers."""
        rows = (low + step for step in (self._row, -self._row))
        if some in [self.sample(pair[1], row)[: len(some)] for row in rows if 0 <= row < self.size]:
            return True
        after = _next(self.plan, self.slices)
        x, y = (self.sample(source, low)[: len(some)] for source in self.beside(after, pair))
        return after is not self.slices and x == y


def _few_values(some: bytes, item: int) -> bool:
    """Whether elements may be equal by chance: constants, or norms in bfloat16 of which training changed a few.

    >>> _few_values(bytes(range(15)) * 3, 1), _few_values(bytes(range(16)) * 2, 1)
    (True, False)
    """
    return len({some[at : at + item] for at in range(0, len(some), item)}) < _FEW // 2


def _in_part(samples: Mapping[int, bytes], item: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Two slices with the same few elements in the same place, if they have many values; the place and the elements."""
    seen: dict[tuple[int, bytes], int] = {}
    for source, sample in samples.items():
        for at in range(0, len(sample) - _FEW * item + 1, _FEW * item):
            some = sample[at : at + _FEW * item]
            one = seen.setdefault((at, some), source)
            if one != source and not _few_values(some, item):
                yield one, source, at // item, some


def _copied(plan: Work, slices: Slices, one: int, source: int, got: str, what: str = "") -> EngineError:
    name, twin = (plan.files[plan.sources[s].file].name for s in (one, source))
    return EngineError(
        "E306",
        f"`{twin}` and `{name}` hold {what}the same slice of `{slices.name}`",
        place=Place(twin, tensor=plan.sources[source].header.name),
        got=got,
        expected="another slice on each rank: this tensor is cut",
        fix="The tensor, or its file, was copied from the other rank: copy the file again from the training run.",
    )


def _copied_within(plan: Work, held: Mapping[int, Slices]) -> EngineError:
    (one, first), (two, second) = sorted(held.items())
    name, twin = (plan.files[plan.sources[source].file].name for source in (one, two))
    shapes = [" × ".join(map(str, plan.sources[source].header.shape)) for source in (one, two)]
    return EngineError(
        "E306",
        f"`{twin}` holds the same slice of `{second.name}` as "
        + (f"`{name}` of `{first.name}`" if name != twin else f"of `{first.name}`"),
        place=Place(twin, tensor=plan.sources[two].header.name),
        got=f"bit-identical slices of {shapes[0]}, only on some ranks"
        if len({*shapes}) < 2
        else f"bit-identical slices of {shapes[0]} and of {shapes[1]}",
        expected="different ones, or equal ones of one shape on all ranks, as after upcycling",
        fix="One was copied from the other: copy the " + ("file" if name == twin else "files") + " again from the "
        "training run.",
    )


def _next(plan: Work, slices: Slices) -> Slices:
    """The tensor that repeats its slices if this one does: keys and values of all layers do, or none."""

    def form(one: Slices) -> tuple[object, ...]:
        header = plan.sources[one.sources[0]].header
        return one.repeats, len(one.sources), header.shape, header.dtype

    alike = [one for one in plan.slices if form(one) == form(slices)]
    return alike[(alike.index(slices) + 1) % len(alike)]


def _in_rows(slices: Slices, first: Mapping[int, int]) -> bool:
    """Whether each slice is repeated as often as it may be, and its copies follow each other.

    >>> heads, experts = (Slices((4, 5, 6, 7), "w", repeats) for repeats in (0, 4))
    >>> pairs, one, all_equal = {5: 4, 7: 6}, {5: 4}, {5: 4, 6: 4, 7: 4}
    >>> [[_in_rows(held, first) for first in (pairs, one, all_equal)] for held in (heads, experts)]
    [[True, False, False], [False, False, True]]
    """
    sources = slices.sources
    times, left = divmod(len(sources), len(sources) - len(first))
    return (
        not left
        and (times == slices.repeats if slices.repeats else times < len(sources))
        and all(first.get(source, source) == sources[at - at % times] for at, source in enumerate(sources))
    )


def same(x: memoryview, y: memoryview) -> bool:
    """Whether two buffers hold the same bytes.

    Comparing a whole bytearray with a buffer uses `memcmp`; two memoryviews are compared item by item.
    """
    if isinstance(x.obj, bytearray) and len(x.obj) == len(x):
        return x.obj == y
    return x == y if len(x) % 8 else x.cast("Q") == y.cast("Q")


def whole(plan: Work, source: int) -> Copy:
    """A stored tensor copied to itself in row-major order."""
    header = plan.sources[source].header
    return in_order(source, header.shape, header.strides)
