"""Orders: where each unit of one list lies in another, found by content and described in words.

An order is an array p: place i of the output holds the unit at place p[i] of the reference. It is found for
the largest blocks that are equal on both sides, and described by blocks, periods and axes: the block size, the
permutation, and the larger block within which it happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from engine.discover.geometry import Units
from engine.discover.levels import Relation
from engine.discover.prints import Prints64, joined
from engine.errors import span

_OTHER = "in another order"
_MOST_NAMED = 6  # blocks that are named one by one
_FEW = 4  # stretches of blocks that are
_RANKS = 64  # up to so many slices may be those of tensor ranks


def find_order(ours: Prints64, theirs: Prints64) -> np.ndarray | None:
    """The order that makes the units of one side those of the other; None if they are not the same units.

    >>> find_order(np.array([3, 4, 1, 2], np.uint64), np.array([1, 2, 3, 4], np.uint64)).tolist()
    [2, 3, 0, 1]
    """
    count = len(ours)
    if count < 2 or not _same_bag(ours, theirs):
        return None
    for size in sorted(divisors(count), reverse=True):
        if size == count:
            continue
        one, two = (ours, theirs) if size == 1 else (joined(ours, size), joined(theirs, size))
        if _same_bag(one, two):
            order = _order_of(one, two)
            return (order[:, None] * size + np.arange(size)).reshape(-1)
    return None


def _same_bag(one: Prints64, two: Prints64) -> bool:
    return one.sum(dtype=np.uint64) == two.sum(dtype=np.uint64) and np.array_equal(np.sort(one), np.sort(two))


def _order_of(one: Prints64, two: Prints64) -> np.ndarray:
    """An order of the same units; if some are equal to each other, the simplest that fits, else equal ones in turn."""
    for order in _plain_orders(len(one)) if len(np.unique(two)) < len(two) else ():
        if np.array_equal(one, two[order]):
            return order
    found = np.empty(len(one), np.int64)
    found[np.argsort(one, kind="stable")] = np.argsort(two, kind="stable")
    return found


def _plain_orders(count: int) -> Iterator[np.ndarray]:
    """The reverse, and orders that swap two axes somewhere: (a, b, c, d) read as (a, c, b, d)."""
    places = np.arange(count)
    yield places[::-1]
    sizes = divisors(count)
    for block in sorted(sizes, reverse=True):
        for inner in divisors(count // block):
            for a in divisors(inner):
                b = inner // a
                if a > 1 and b > 1:
                    yield places.reshape(-1, a, b, block).swapaxes(1, 2).reshape(-1)


def divisors(number: int) -> list[int]:
    """
    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def block_size(order: np.ndarray) -> int:
    """The size of the largest blocks that stay whole.

    >>> block_size(np.array([4, 5, 6, 7, 0, 1, 2, 3]))
    4
    """
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    edges = [len(order), int(order[0]), *breaks.tolist(), *order[breaks].tolist()]
    return int(np.gcd.reduce(edges))


def read_order(order: np.ndarray, units: Units) -> Relation:
    """Describe an order other than the identity, in words without a verb: `heads 0 and 2 exchanged`."""
    size = block_size(order)
    blocks = order[::size] // size
    period = _period(blocks, size, units)
    if period is None:
        plain = _words(blocks, size, units)
        return (_twofold(blocks, size, units) if f"s {_OTHER}" in plain else None) or Relation("permuted", plain)
    local = blocks.reshape(-1, period) - np.arange(0, len(blocks), period)[:, None]
    moved = np.flatnonzero((local != np.arange(period)).any(axis=1))
    patterns = np.unique(local[moved], axis=0)
    span = period * size
    if len(moved) < len(local) and span not in (units.head, *units.sizes.values()):
        return Relation("permuted", _words(blocks, size, units))  # the unmoved rest does not make it a period
    noun = units.block_noun(span) if span != units.head else "head"
    which = f"in every {noun}" if len(moved) == len(local) else f"in {noun} {', '.join(map(str, moved.tolist()))}"
    if _MOST_NAMED < len(moved) < len(local):
        which = f"in {len(moved)} of {len(local)} {noun}s"
    if len(local) == 1:
        which = f"within the {noun}"
    if len(patterns) == 1:
        turned = _rotary(patterns[0], size, span, units)
        if turned is not None:
            return Relation("permuted", f"rotary pairs {which}", rotary=turned)
        return Relation("permuted", f"{_words(patterns[0], size, units, joined=False)}, {which}")
    return Relation("permuted", f"{units.noun}s in another order {which}, not the same in each")


def _twofold(blocks: np.ndarray, size: int, units: Units) -> Relation | None:
    """Describe heads or groups in another order that are also reordered within, each in the same way."""
    for extent in sorted({*units.sizes.values(), units.head or 0}):
        count = extent // size
        if count < 2 or extent % size or len(blocks) % count or len(blocks) == count:
            continue
        held = blocks.reshape(-1, count)
        outer, inner = held // count, held % count
        if (outer != outer[:, :1]).any() or (inner != inner[0]).any() or (inner[0] == np.arange(count)).all():
            continue
        within = read_order((inner + np.arange(len(held))[:, None] * count).repeat(size) * size
                            + np.tile(np.arange(size), len(blocks)), units)  # fmt: skip
        return replace(within, words=f"{within.words}; {_words(outer[:, 0], extent, units)}")
    return None


def _period(blocks: np.ndarray, size: int, units: Units) -> int | None:
    """The smallest period, in blocks, whose multiples nothing leaves: one with a name if possible."""
    places = np.arange(len(blocks))
    sizes = divisors(len(blocks))
    named = [one // size for one in sorted({*units.sizes.values(), units.head or 0}) if one and one % size == 0]
    for count in [*(one for one in named if one in sizes), *(one for one in sizes if one < len(blocks))]:
        if count > 1 and np.array_equal(blocks // count, places // count):
            return count
    return None


def _rotary(pattern: np.ndarray, size: int, span: int, units: Units) -> str | None:
    """The choice of `rotary` that would have been right, if halves and pairs of a head changed places.

    Rows of a head are (half, pair) or (pair, half).
    """
    if size != 1 or span % 2 or span < 4 or units.heads is False or span != (units.head or span):
        return None
    places = np.arange(span)
    pairs = places.reshape(2, -1).T.reshape(-1)
    if not np.array_equal(pattern, pairs) and not np.array_equal(pattern, np.argsort(pairs)):
        return None
    if span == 4:
        return "other"
    return "pairs" if np.array_equal(pattern, pairs) else "halves"


def _words(blocks: np.ndarray, size: int, units: Units, *, joined: bool = True) -> str:
    """Describe a permutation of blocks of one size, which may be slices of tensor ranks if `joined`."""
    count = len(blocks)
    places = np.arange(count)
    moved = np.flatnonzero(blocks != places)
    noun = units.block_noun(size)
    named = noun.split(" ")[0] if noun.startswith("block") else noun
    extent = f" ({units.block(size)} each)" if size > 1 else ""
    slices = joined and size > 1 and count <= _RANKS
    ranks = f", as slices of {count} tensor ranks joined in another order" if slices else ""
    shift = int(blocks[0])
    axes = _axes(blocks)
    if count == 2:
        return f"halves of the {units.noun}s exchanged{extent}{ranks}"
    if len(moved) == 2:
        return f"{named}s {moved[0]} and {moved[1]} exchanged{extent}{ranks if count <= 8 else ''}"
    if np.array_equal(blocks, places[::-1]):
        return f"{named}s in reverse order{extent}{ranks}"
    if np.array_equal(blocks, np.roll(places, -shift)):
        by = -shift if shift <= count // 2 else count - shift
        return f"{named}s shifted by {abs(by)}, the last ones wrapped around to the other end{extent}{ranks}"
    if axes is not None:
        a, b = axes
        told = f" × {size}" if size > 1 else ""
        return (
            f"{units.noun}s interleaved: ({a} × {b}{told}) lie as ({b} × {a}{told}), as slices of {min(a, b)} or "
            f"{max(a, b)} joined along the wrong axis"
        )
    shown = ", ".join(f"{at} holds {blocks[at]}" for at in moved[:_MOST_NAMED].tolist())
    more = ", …" if len(moved) > _MOST_NAMED else ""
    runs = [(low, high, start) for low, high, start in runs_of(blocks) if low != start]
    if more and len(runs) <= _FEW:
        return f"{named}s {_in_stretches(runs)}{extent}{ranks if count <= 8 else ''}"
    return f"{named}s {_OTHER}{extent}: {shown}{more}{ranks if count <= 8 else ''}"


def _in_stretches(runs: Sequence[tuple[int, int, int]]) -> str:
    """
    >>> _in_stretches([(100, 255, 101), (255, 256, 100)])
    '100…254 hold 101…255, 255 holds 100'
    """
    return ", ".join(
        f"{span((low, high))} hold{'s' if high - low == 1 else ''} {span((start, start + high - low))}"
        for low, high, start in runs
    )


def _axes(blocks: np.ndarray) -> tuple[int, int] | None:
    """Two axes that changed places: reference (a, b), output (b, a)."""
    count = len(blocks)
    if count < 4:
        return None
    b = int(blocks[1])
    if b < 2 or count % b:
        return None
    a = count // b
    return (a, b) if np.array_equal(blocks, np.arange(count).reshape(a, b).T.reshape(-1)) else None


def read_loops(order: np.ndarray) -> list[tuple[int, int]] | None:
    """An order that starts at 0 as nested loops (count, step), outermost first; None if it is not such.

    >>> read_loops(np.arange(12).reshape(2, 3, 2).swapaxes(0, 1).reshape(-1))
    [(3, 2), (2, 6), (2, 1)]
    """
    loops: list[tuple[int, int]] = []
    while len(order) > 1:
        step = int(order[1] - order[0])
        ends = np.flatnonzero(np.diff(order) != step)
        count = int(ends[0]) + 1 if len(ends) else len(order)
        if count == 1 or len(order) % count:
            return None
        starts = order[::count]
        if not np.array_equal(order.reshape(-1, count), starts[:, None] + step * np.arange(count)):
            return None
        loops.append((count, step))
        order = starts
    return loops[::-1] if order[0] == 0 else None


def runs_of(order: np.ndarray) -> list[tuple[int, int, int]]:
    """Stretches of an order as (low, high, start): places low..high hold start, start + 1, …; unknown ones start at -1.

    >>> runs_of(np.array([5, 6, -1, -1, 0]))
    [(0, 2, 5), (2, 4, -1), (4, 5, 0)]
    """
    known = order >= 0
    joins = np.where(known[1:] & known[:-1], np.diff(order) == 1, known[1:] == known[:-1])
    edges = [0, *(np.flatnonzero(~joins) + 1).tolist(), len(order)]
    return [(low, high, int(order[low])) for low, high in pairwise(edges)]
