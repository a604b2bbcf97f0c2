"""Sums: an array that is made of several others, or of its own parts, added up.

They are seen on a sample: elements in the same places of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.discover.levels import BITS
from engine.move.tensors import Tensors, View, tiles

_SAMPLE = 1 << 14  # elements
_MOST_TERMS = 16
_LEAST = 0.02  # of a term's share
_BLOCKS = (2, 4, 8)

Sampled = Callable[[View], np.ndarray]


def summed(
    tensors: Tensors, one: View, own: View, others: Sequence[tuple[str, View]], blocks: Sequence[int]
) -> str | None:
    """How an array is several added up, in words; None where in no way that is known.

    Args:
        one, own: rows × columns, of one shape.
        others: other arrays of that shape, by name.
        blocks: numbers of equal blocks of rows or columns that may have been added up.
    """
    precision = 2.0 ** -min(BITS.get(view.dtype, 50) for view in (one, own))
    sample = _sampler(tensors, one)
    x, y = sample(one), sample(own)
    terms = [("the reference's own", y)] + [(name, sample(view)) for name, view in others]
    return _sum(x, terms, precision) or _blocks(tensors, one, own, blocks, precision)


def _sampler(tensors: Tensors, shape: View) -> Sampled:
    boxes = list(tiles(shape.shape, (shape.strides,), 1 << 10))
    chosen = [boxes[i] for i in np.unique(np.linspace(0, len(boxes) - 1, _SAMPLE >> 10).astype(int))]

    def sample(view: View) -> np.ndarray:
        found = np.concatenate([tensors.values(view, box).reshape(-1) for box in chosen])
        return np.where(np.isfinite(found), found, 0)

    return sample


def _sum(x: np.ndarray, terms: Sequence[tuple[str, np.ndarray]], precision: float) -> str | None:
    """The few terms whose sum with factors is x, but for rounding."""
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
        if scores[best] < 5 * float(np.sqrt(np.square(left).mean())):  # what chance gives
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
    return _in_words([(float(factors[i]), terms[chosen[i]][0]) for i in range(len(chosen))])


def _in_words(terms: Sequence[tuple[float, str]]) -> str:
    """
    >>> _in_words([(0.5, "a"), (0.5001, "b")]), _in_words([(1.0, "a"), (-0.3, "b")])
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
    """Blocks of rows or columns that were added up, as of ranks that were to be joined."""
    for axis, noun in ((0, "row"), (1, "column")):
        for count in dict.fromkeys((*_BLOCKS, *counts)):
            size, rest = divmod(own.shape[axis], count)
            if rest or count < 2 or size >= one.shape[axis]:
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
