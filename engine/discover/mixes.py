"""Mixtures: an array that is a sum of others, that gained or lost a low-rank part, or was rotated.

All of this is found on a sample: elements in the same places of each, and a square of rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.discover.levels import BITS
from engine.move.tensors import Tensors, View, tiles

_SAMPLE = 1 << 14  # elements
_SQUARE = 256  # rows and columns
_MOST_TERMS = 16
_SIDE = 24  # rows and columns that a square needs
_FEW = 48  # rows or columns whose lengths and angles are compared
_LEAST = 0.02  # the smallest factor of a term
_FAR = 0.05  # share of the sum of squares: a smaller difference may be noise, not a rotation
_BLOCKS = (2, 4, 8)
_RELATED = 0.15  # the smallest correlation that is reported

Sampled = Callable[[View], np.ndarray]


def mixed(
    tensors: Tensors, one: View, own: View, others: Sequence[tuple[str, View]], blocks: Sequence[int]
) -> str | None:
    """How an array is composed of others, in words; None if in no known way.

    Args:
        one, own: rows × columns; if their shapes differ, only blocks are looked for.
        others: other arrays of that shape, by name.
        blocks: numbers of equal blocks of rows or columns that may have been summed.
    """
    precision = 2.0 ** -min(BITS.get(view.dtype, 50) for view in (one, own))
    if one.shape != own.shape:
        return _blocks(tensors, one, own, blocks, precision)
    sample = _sampler(tensors, one)
    x, y = sample(one), sample(own)
    terms = [("the reference's own", y)] + [(name, sample(view)) for name, view in others]
    told = _sum(x, terms, precision) or _blocks(tensors, one, own, blocks, precision)
    if told is not None:
        return told
    here, there = _square(tensors, one), _square(tensors, own)
    if here is not None and there is not None:
        told = _rank(here, there, precision)
    far = np.square(x - y).sum() > _FAR * np.square(y).sum()
    return told or (_turned(tensors, one, own, precision) if far else None) or _related(x, y)


def _sampler(tensors: Tensors, shape: View) -> Sampled:
    boxes = list(tiles(shape.shape, (shape.strides,), 1 << 10))
    chosen = [boxes[i] for i in np.unique(np.linspace(0, len(boxes) - 1, _SAMPLE >> 10).astype(int))]

    def sample(view: View) -> np.ndarray:
        found = np.concatenate([tensors.values(view, box).reshape(-1) for box in chosen])
        return np.where(np.isfinite(found), found, 0)

    return sample


def _sum(x: np.ndarray, terms: Sequence[tuple[str, np.ndarray]], precision: float) -> str | None:
    """The few terms whose weighted sum is x, up to rounding; in words."""
    chosen: list[int] = []
    left, factors = x, np.zeros(0)
    size = float(np.abs(x).max(initial=0))
    lengths = [float(np.sqrt(np.square(values).sum())) for _, values in terms]
    while len(chosen) < _MOST_TERMS:
        scores = [
            abs(float(left @ values)) / length if length and i not in chosen else 0.0
            for i, ((_, values), length) in enumerate(zip(terms, lengths, strict=True))
        ]
        best = int(np.argmax(scores))
        if scores[best] < 5 * float(np.sqrt(np.square(left).mean())):  # as by chance
            return None
        chosen.append(best)
        matrix = np.stack([terms[i][1] for i in chosen], axis=1)
        factors = np.linalg.lstsq(matrix, x, rcond=None)[0]
        left = x - matrix @ factors
        if (np.abs(left) <= np.abs(x) * precision + size * precision / 8).mean() > 0.999:
            break
    else:
        return None
    if len(chosen) < 2 or len(chosen) * 8 > len(x) or np.abs(factors).min() < _LEAST:
        return None
    return _summed([(float(factors[i]), terms[chosen[i]][0]) for i in range(len(chosen))])


def _summed(terms: Sequence[tuple[float, str]]) -> str:
    """
    >>> _summed([(0.5, "a"), (0.5001, "b")]), _summed([(1.0, "a"), (-0.3, "b")])
    ('the mean of a and b', '1 × a - 0.3 × b')
    """
    names = [name for _, name in terms]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    for factor, word in ((1 / len(terms), "mean"), (1.0, "sum")):
        if all(abs(one - factor) < 0.01 * factor for one, _ in terms):
            return f"the {word} of {listed}"
    told = " ".join(f"{'-' if one < 0 else '+'} {abs(one):.3g} × {name}" for one, name in terms)
    return told.removeprefix("+ ")


def _blocks(tensors: Tensors, one: View, own: View, counts: Sequence[int], precision: float) -> str | None:
    """Blocks of rows or columns that were summed, such as slices of ranks that should have been joined."""
    for axis, noun in ((0, "row"), (1, "column")):
        for count in dict.fromkeys((*_BLOCKS, *counts)):
            size, rest = divmod(own.shape[axis], count)
            if rest or count < 2 or size >= one.shape[axis] or one.shape[1 - axis] != own.shape[1 - axis]:
                continue
            first = one.part(axis, 0, size)
            sample = _sampler(tensors, first)
            terms = [
                (f"{noun}s {i * size}…{i * size + size - 1}", sample(own.part(axis, i * size, (i + 1) * size)))
                for i in range(min(count, _MOST_TERMS))
            ]
            told = _sum(sample(first), terms, precision)
            if told is not None:
                return f"{noun}s 0…{size - 1} are {told} of the reference"
    return None


def _square(tensors: Tensors, view: View) -> np.ndarray | None:
    """Some of the rows and columns of an array, as a matrix."""
    if min(view.shape) < _SIDE:
        return None
    rows, cols = (_stretches(size) for size in view.shape)
    found = np.block([[tensors.values(view, (down, across)) for across in cols] for down in rows])
    return found if np.isfinite(found).all() else None


def _stretches(size: int) -> list[tuple[int, int]]:
    """Stretches of an axis, spread over it.

    >>> _stretches(100), len(_stretches(1000))
    ([(0, 100)], 4)
    """
    if size <= _SQUARE:
        return [(0, size)]
    return [(start, start + _SQUARE // 4) for start in np.linspace(0, size - _SQUARE // 4, 4).astype(int).tolist()]


def _rank(x: np.ndarray, y: np.ndarray, precision: float) -> str | None:
    """Whether the difference, or the array itself, has low rank; in words."""
    side = min(x.shape)
    for apart, whole in ((True, x - y), (False, x)):
        values = np.linalg.svd(whole, compute_uv=False)
        noise = precision * float(np.sqrt(np.square(x).mean())) * 0.6 * (x.shape[0] ** 0.5 + x.shape[1] ** 0.5)
        rank = int((values > noise).sum())
        if not 0 < rank <= side // 3 or values[rank - 1] < 2 * values[rank]:
            continue
        if apart:
            share = float(np.sqrt(np.square(whole).sum() / np.square(y).sum()))
            return f"a product of rank {rank} was added, {share:.1%} of its size, as an adapter that was merged"
        return f"of rank {rank} only: all else of the reference is cut off"
    return None


def _turned(tensors: Tensors, one: View, own: View, precision: float) -> str | None:
    """Rows or columns that kept their lengths and angles: the other axis was rotated."""
    if min(one.shape) < _SIDE:
        return None
    for axis, noun in ((0, "columns"), (1, "rows")):
        angles = [_angles(tensors, view if axis == 0 else view.swap(0, 1)) for view in (one, own)]
        apart, size = (float(np.sqrt(np.square(part).mean())) for part in (angles[0] - angles[1], angles[1]))
        if np.isfinite(apart) and apart <= size * max(precision, 1e-4):
            return f"{noun} turned: mixed by a rotation, lengths and angles are the reference's"
    return None


def _angles(tensors: Tensors, view: View) -> np.ndarray:
    """The products of some rows with each other, over all columns."""
    some = min(_FEW, view.shape[0])
    found = np.zeros((some, some))
    for left in range(0, view.shape[1], _SQUARE):
        part = tensors.values(view, ((0, some), (left, min(left + _SQUARE, view.shape[1]))))
        found += part @ part.T
    return found


def _related(x: np.ndarray, y: np.ndarray) -> str | None:
    """How large the reference's part is, if it is more than by chance."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    related = float(x @ y) / size if size else 0.0
    if len(x) < _SAMPLE // 4 or abs(related) < _RELATED:
        return None
    factor = float(x @ y) / float(y @ y)
    rest = float(np.sqrt(np.square(x - factor * y).sum() / (y @ y)))
    times = "" if abs(factor - 1) < 0.05 else f"{factor:.2g} times "
    return f"{times}the reference and something else, {100 * rest:.2g}% of its size: their correlation is {related:.2f}"
