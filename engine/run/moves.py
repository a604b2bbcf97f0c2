"""Moves: a block's copies as byte ranges outside it and strided assignments inside it. No torch.

The block is an interval of the driving tensor. Gathering fills it from runs outside, scattering
empties it into runs outside: the same moves, read in one direction or the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.plan.copies import Copy
from engine.run.blocks import Block

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


MOST_SPAN = 4 << 20  # bytes of a run with gaps: what the scratch buffer may grow to


@dataclass(slots=True)
class Move:
    """One run outside the block, and its elements in the block.

    Attributes:
        tensor: the tensor outside; `offset` and `shift` are its bytes, at step 0 and per step.
        data: the run's bytes: a part of the block itself, or a scratch buffer.
        inside, outside: strided views of the block and of the scratch; None when `data` is the block.
    """

    tensor: int
    offset: int
    shift: int
    data: memoryview
    inside: np.ndarray | None
    outside: np.ndarray | None


class Moves:
    """A block buffer with the moves of its current template. Belongs to one thread."""

    def __init__(self, gap: int) -> None:
        """Args: gap: bytes between runs that are moved along rather than skipped."""
        self._gap = gap
        self._block = np.empty(0, np.uint8)
        self._scratch = np.empty(0, np.uint8)
        self._template: tuple[Copy, ...] | None = None
        self._item = 0
        self._moves: list[Move] = []

    def of(self, block: Block, item: int) -> list[Move]:
        """The moves of a block of `item`-byte elements; its buffer is `bytes(block, item)`."""
        nbytes = (block.high - block.low) * item
        if self._block.nbytes < nbytes:
            self._block = np.empty(nbytes, np.uint8)
            self._template = None
        if self._template is not block.template or self._item != item:
            self._moves = self._compile(block, item)
            self._template, self._item = block.template, item
        return self._moves

    def elements(self, block: Block, item: int) -> np.ndarray:
        """The block's buffer as unsigned integers of the element size."""
        return self._block[: (block.high - block.low) * item].view(UNSIGNED[item])

    def _compile(self, block: Block, item: int) -> list[Move]:
        pieces = [
            (part, shift * item)
            for copy, shift in zip(block.template, block.shifts, strict=True)
            for part in dense_parts(copy, self._gap // item, MOST_SPAN // item)
        ]
        largest = max((span(p.shape, p.source_strides) for p, _ in pieces if not straight(p)), default=0)
        if self._scratch.nbytes < largest * item:
            self._scratch = np.empty(largest * item, np.uint8)
        moves: list[Move] = []
        kind = np.dtype(UNSIGNED[item])
        for part, shift in pieces:
            length = span(part.shape, part.source_strides) * item
            at = part.source_offset * item
            if straight(part):
                start = part.target_offset * item
                moves.append(Move(part.source, at, shift, self._block.data[start : start + length], None, None))
                continue
            inside = np.ndarray(
                part.shape, kind, self._block.data, part.target_offset * item, [s * item for s in part.target_strides]
            )
            outside = np.ndarray(part.shape, kind, self._scratch.data, 0, [s * item for s in part.source_strides])
            moves.append(Move(part.source, at, shift, self._scratch.data[:length], inside, outside))
        return moves


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to one past the last of a strided array."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def straight(copy: Copy) -> bool:
    """One contiguous run on both sides."""
    return not copy.shape or (len(copy.shape) == 1 and copy.source_strides[0] == 1 and copy.target_strides[0] == 1)


def dense_parts(copy: Copy, gap: int, most: int) -> list[Copy]:
    """Split a copy along its largest source stride until no run skips or spans too many elements.

    Args:
        gap: the most elements that a run may skip at once.
        most: the most elements from a run's first to its last, as far as it skips any.

    >>> rows = Copy(0, 0, 0, 0, (4, 8), (64, 1), (8, 1))
    >>> [part.shape for part in dense_parts(rows, 56, 1000)], [part.shape for part in dense_parts(rows, 56, 100)]
    ([(4, 8)], [(2, 8), (2, 8)])
    """
    if not copy.shape or straight(copy):
        return [copy]
    axis = max(range(len(copy.shape)), key=lambda i: copy.source_strides[i])
    rest = [i for i in range(len(copy.shape)) if i != axis]
    stride, size = copy.source_strides[axis], copy.shape[axis]
    inner = span([copy.shape[j] for j in rest], [copy.source_strides[j] for j in rest])
    whole = (size - 1) * stride + inner
    if stride - inner <= gap and whole <= most:
        return [copy]
    rows = max(1, (most - inner) // stride + 1) if stride - inner <= gap else 1
    parts: list[Copy] = []
    for start in range(0, size, rows):
        count = min(rows, size - start)
        kept = rest if count == 1 else range(len(copy.shape))
        part = Copy(
            copy.source,
            copy.target,
            copy.source_offset + start * stride,
            copy.target_offset + start * copy.target_strides[axis],
            tuple(count if j == axis else copy.shape[j] for j in kept),
            tuple(copy.source_strides[j] for j in kept),
            tuple(copy.target_strides[j] for j in kept),
        )
        parts.extend(dense_parts(part, gap, most) if count == 1 else [part])
    return parts


def runs(copy: Copy, gap: int) -> tuple[int, int]:
    """How many runs `dense_parts` gives on the source side, and elements moved in all of them.

    >>> runs(Copy(0, 0, 0, 0, (4, 8), (64, 1), (8, 1)), 0), runs(Copy(0, 0, 0, 0, (4, 8), (64, 1), (8, 1)), 56)
    ((4, 32), (1, 200))
    """
    count, reach = 1, 1
    for stride, size in sorted(zip(copy.source_strides, copy.shape, strict=True)):
        if stride - reach <= gap and count == 1:
            reach += stride * (size - 1)
        else:
            count *= size
    return count, count * reach
