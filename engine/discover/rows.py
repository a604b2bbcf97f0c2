"""Rows or columns of a tensor that lie in other places: found by their prints, and said in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.discover.geometry import Units
from engine.discover.levels import Kind, Relation
from engine.discover.orders import divisors, read_order, runs_of
from engine.discover.prints import Prints64
from engine.errors import counted
from engine.explaining.words import span
from engine.planning.boxes import Interval

MOST_NAMED = 4  # stretches that are named one by one
_FEWEST_UNITS = 4  # different units that an order must put in place


def own_rows(
    order: np.ndarray, here: Prints64, there: Prints64, plain: np.ndarray, telling: int, units: Units
) -> Relation:
    """Rows of the same tensor in other places."""
    noun = units.noun
    if len(here) != len(there):
        return _resized(order, here, there, noun, plain)
    known = order >= 0
    found = int(known.sum())
    steps = np.unique((np.arange(len(order)) - order)[known])
    if len(steps) == 1:
        by, left = int(steps[0]), len(order) - found
        also = f"; {counted(left, noun)} from elsewhere" if left else ""
        first = f"{noun} {max(by, 0)} holds {noun} {max(-by, 0)}"
        return Relation("permuted", f"{noun}s shifted by {abs(by)}: {first}{also}")
    filled = completed(order)
    if filled is not None:
        reading = read_order(filled, units)
        missing = len(order) - found
        also = f"; {counted(missing, noun)} from elsewhere" if found < telling else ""
        return Relation("permuted", reading.words + also, rotary=reading.rotary)
    repeated = len(np.unique(order[known])) < found
    what = f"{noun}s repeated" if repeated else f"{noun}s in other places"
    rest = f"; {len(order) - found:,} are from elsewhere" if found < telling else ""
    return Relation("permuted", f"{what}: {placed(order, noun)}{rest}")


def completed(order: np.ndarray) -> np.ndarray | None:
    """An order whose few gaps are filled by what is left, next to its neighbours; None where places are taken twice.

    >>> completed(np.array([2, -1, 0, 1])).tolist(), completed(np.array([1, 1, -1]))
    ([2, 3, 0, 1], None)
    """
    gaps = np.flatnonzero(order < 0)
    left = dict.fromkeys(np.setdiff1d(np.arange(len(order)), order).tolist())
    if len(left) != len(gaps) or 4 * len(gaps) > len(order):
        return None
    filled = order.copy()
    for gap in gaps.tolist():
        near = [int(filled[gap - 1]) + 1] if gap else []
        near += [int(filled[gap + 1]) - 1] if gap + 1 < len(order) else []
        filled[gap] = next((place for place in near if place in left), next(iter(left)))
        del left[int(filled[gap])]
    return None if np.array_equal(filled, np.arange(len(order))) else filled


def _repeats(order: np.ndarray, count: int) -> str | None:
    """Each of `count` rows several times: block by block, or all of them again and again."""
    if len(order) % count or (order < 0).any() or (np.bincount(order, minlength=count) != len(order) // count).any():
        return None
    times = len(order) // count
    for size in sorted(divisors(count), reverse=True):
        blocks = np.arange(count).reshape(-1, 1, size)
        if np.array_equal(order, np.repeat(blocks, times, axis=1).reshape(-1)):
            return f"each block of {size} is there {times} times" if size < count else f"all are there {times} times"
    return None


def _resized(order: np.ndarray, here: Prints64, there: Prints64, noun: str, plain: np.ndarray) -> Relation:
    """More or fewer rows than the reference, the others in order."""
    by = len(here) - len(there)
    told = f"{counted(abs(by), noun)} {'more' if by > 0 else 'fewer'} than the reference"
    common = min(len(here), len(there))
    known = order >= 0
    if by < 0 and np.array_equal(here, there[:common]):
        left = there[common:]
        padding = bool(plain[common:].all()) or len(np.unique(left)) == 1
        return Relation("padded" if padding else "truncated", told + ("" if padding else f", {noun}s with content"))
    repeats = _repeats(order, len(there)) if by > 0 else None
    if repeats is not None:
        return Relation("extended", f"{told}: {noun}s repeated, {repeats}")
    if by > 0 and np.array_equal(here[:common], there):
        padding = len(np.unique(here[common:])) == 1
        return Relation("padded" if padding else "extended", told + ("" if padding else f", {noun}s with content"))
    rising = bool((np.diff(order[known]) > 0).all())
    what = "in order" if rising else "in another order"
    kind: Kind = "padded" if by > 0 and rising else "truncated" if by < 0 and rising else "shape"
    return Relation(kind, f"{told}, the others {what}: {placed(order, noun)}")


def telling(prints: Prints64) -> bool:
    return len(prints) >= 2 and len(np.unique(prints)) >= min(_FEWEST_UNITS, len(prints))


def lookup(here: Prints64, there: Prints64, first: int | None = 0) -> np.ndarray:
    """Where each unit lies on the other side, -1 where it is nowhere.

    Args:
        first: a unit's own place is the first unit's plus its number, and is taken if the unit is there too.
    """
    by_content = np.argsort(there, kind="stable")
    at = np.searchsorted(there[by_content], here)
    places = by_content[np.minimum(at, len(there) - 1)]
    found = np.where(there[places] == here, places, -1)
    if first is None:
        return found
    own = np.arange(first, first + len(here))
    same = (own < len(there)) & (there[np.minimum(own, len(there) - 1)] == here)
    result: np.ndarray = np.where(same, own, found)
    return result


def listed(noun: str, runs: Sequence[Interval]) -> str:
    """
    >>> listed("row", [(4, 7), (0, 1)]), listed("column", [(2, 3)])
    ('rows 4…6, 0', 'column 2')
    """
    alone = len(runs) == 1 and runs[0][1] - runs[0][0] == 1
    told = ", ".join(map(span, runs[:MOST_NAMED])) + (", …" if len(runs) > MOST_NAMED else "")
    return f"{noun}{'' if alone else 's'} {told}"


def spans(order: np.ndarray, noun: str) -> str:
    """
    >>> spans(np.array([4, 5, 6, -1, 0]), "row")
    'rows 4…6, 0'
    """
    return listed(noun, [(start, start + high - low) for low, high, start in runs_of(order) if start >= 0])


def placed(order: np.ndarray, noun: str, *, every: bool = False) -> str:
    """
    >>> placed(np.array([0, 1, 0, 1]), "row")
    'rows 2…3 hold 0…1'
    """
    moved = [(low, high, start) for low, high, start in runs_of(order) if start >= 0 and (every or start != low)]
    told = [f"{span((low, high))} hold {span((start, start + high - low))}" for low, high, start in moved[:MOST_NAMED]]
    return f"{noun}s {', '.join(told)}" + (", …" if len(moved) > MOST_NAMED else "")
