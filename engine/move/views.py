"""Views: the elements of a stored tensor in another order, as offset and strides; no data moves.

Transposing, regrouping and taking rows of a stored tensor are all changes of its strides, so one
reader serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt, prod

Box = tuple[tuple[int, int], ...]  # low and high of each axis


@dataclass(frozen=True, slots=True)
class View:
    """A strided array over one stored tensor.

    Attributes:
        source: index of the tensor among those that are read together.
        dtype: safetensors spelling.
        shape, strides, start: in elements; `start` counts from the tensor's first element.
    """

    source: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def swap(self, one: int, two: int) -> View:
        """Two axes exchanged.

        >>> View(0, "F32", (6, 4), (4, 1)).swap(0, 1)
        View(source=0, dtype='F32', shape=(4, 6), strides=(1, 4), start=0)
        """
        axes = list(range(len(self.shape)))
        axes[one], axes[two] = two, one
        return replace(self, shape=tuple(self.shape[a] for a in axes), strides=tuple(self.strides[a] for a in axes))

    def part(self, axis: int, low: int, high: int) -> View:
        """Indices low..high of an axis.

        >>> View(0, "F32", (6, 4), (4, 1)).part(0, 2, 5)
        View(source=0, dtype='F32', shape=(3, 4), strides=(4, 1), start=8)
        """
        return replace(
            self,
            shape=(*self.shape[:axis], high - low, *self.shape[axis + 1 :]),
            start=self.start + low * self.strides[axis],
        )


def tiles(shape: Sequence[int], strides: Sequence[Sequence[int]], limit: int) -> Iterator[Box]:
    """Cut an array into boxes of at most `limit` elements, in row-major order of boxes.

    Args:
        strides: those of every array read in step. A box is long along the axis on which each of
            them is dense, so that transposed arrays are read in runs on both sides.

    >>> list(tiles((4, 6), [(6, 1)], 12))
    [((0, 2), (0, 6)), ((2, 4), (0, 6))]
    >>> list(tiles((4, 4), [(4, 1), (1, 4)], 4))[:2]
    [((0, 2), (0, 2)), ((0, 2), (2, 4))]
    """
    if 0 in shape:
        return
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    dense = list(dict.fromkeys(min(wide, key=lambda axis: one[axis]) for one in strides)) if wide else []
    order = dense + sorted((axis for axis in wide if axis not in dense), key=lambda axis: strides[0][axis])
    extents, room = [1] * len(shape), limit
    for axis in order:
        most = isqrt(room) if len(dense) > 1 and axis == dense[0] else room
        extents[axis] = max(1, min(shape[axis], most))
        room //= extents[axis]
    yield from product(
        *(
            [(low, min(low + extent, size)) for low in range(0, size, extent)]
            for size, extent in zip(shape, extents, strict=True)
        )
    )
