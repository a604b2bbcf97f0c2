"""Gathering: read the source runs of a block and rearrange them in a buffer. No torch.

One gatherer belongs to one thread. Its buffers are reused, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.checkpoint.headers import ITEM_SIZES
from engine.checkpoint.sources import SourceFiles
from engine.plan.copies import Copy
from engine.plan.model import SourceTensor
from engine.run.blocks import Block

_READ_THROUGH = 8 * 1024  # bytes: gaps smaller than this are read, not skipped
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(slots=True)
class _Move:
    """One read, and where its elements go: directly into the block, or by a strided copy."""

    file: int
    offset: int  # bytes, at step 0
    shift: int  # bytes per step
    into: memoryview
    assign: tuple[np.ndarray, np.ndarray] | None


class Gatherer:
    """Fills blocks of output tensors from source tensors."""

    def __init__(self, files: SourceFiles, sources: Sequence[SourceTensor]) -> None:
        self._files = files
        self._sources = sources
        self._block = np.empty(0, np.uint8)
        self._scratch = np.empty(0, np.uint8)
        self._template: tuple[Copy, ...] | None = None
        self._moves: list[_Move] = []

    def gather(self, block: Block, dtype: str) -> np.ndarray:
        """The block's elements as unsigned integers of the element size, valid until the next call."""
        item = ITEM_SIZES[dtype]
        count = block.high - block.low
        if self._block.nbytes < count * item:
            self._block = np.empty(count * item, np.uint8)
            self._template = None
        if self._template is not block.template:
            self._moves = self._compile(block, item)
            self._template = block.template
        step = block.step
        read = self._files.read_into
        for move in self._moves:
            read(move.file, move.offset + step * move.shift, move.into)
            if move.assign is not None:
                move.assign[0][...] = move.assign[1]
        return self._block[: count * item].view(_UNSIGNED[item])

    def _compile(self, block: Block, item: int) -> list[_Move]:
        pieces = [
            (part, shift * item)
            for copy, shift in zip(block.template, block.shifts, strict=True)
            for part in dense_parts(copy, _READ_THROUGH // item)
        ]
        largest = max((span(p.shape, p.source_strides) for p, _ in pieces if not _straight(p)), default=0)
        if self._scratch.nbytes < largest * item:
            self._scratch = np.empty(largest * item, np.uint8)
        moves: list[_Move] = []
        kind = np.dtype(_UNSIGNED[item])
        for part, shift in pieces:
            source = self._sources[part.source]
            length = span(part.shape, part.source_strides) * item
            at = source.header.offset + part.source_offset * item
            if _straight(part):
                start = part.target_offset * item
                moves.append(_Move(source.file, at, shift, self._block.data[start : start + length], None))
                continue
            to = np.ndarray(
                part.shape,
                kind,
                self._block.data,
                part.target_offset * item,
                [s * item for s in part.target_strides],
            )
            frm = np.ndarray(part.shape, kind, self._scratch.data, 0, [s * item for s in part.source_strides])
            moves.append(_Move(source.file, at, shift, self._scratch.data[:length], (to, frm)))
        return moves


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to one past the last of a strided array."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _straight(copy: Copy) -> bool:
    """One contiguous run on both sides."""
    return not copy.shape or (len(copy.shape) == 1 and copy.source_strides[0] == 1 and copy.target_strides[0] == 1)


def dense_parts(copy: Copy, gap: int) -> list[Copy]:
    """Split a copy along its largest source stride until no read skips more than `gap` elements."""
    if not copy.shape:
        return [copy]
    axis = max(range(len(copy.shape)), key=lambda i: copy.source_strides[i])
    rest = [i for i in range(len(copy.shape)) if i != axis]
    inner = span([copy.shape[i] for i in rest], [copy.source_strides[i] for i in rest])
    if copy.source_strides[axis] - inner <= gap:
        return [copy]
    parts: list[Copy] = []
    for i in range(copy.shape[axis]):
        row = replace(
            copy,
            source_offset=copy.source_offset + i * copy.source_strides[axis],
            target_offset=copy.target_offset + i * copy.target_strides[axis],
            shape=tuple(copy.shape[j] for j in rest),
            source_strides=tuple(copy.source_strides[j] for j in rest),
            target_strides=tuple(copy.target_strides[j] for j in rest),
        )
        parts.extend(dense_parts(row, gap))
    return parts
