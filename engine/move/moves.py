"""Moves: a block's copies as byte ranges outside it and places inside it, and the classes that make them. No torch.

The block is an interval of the driving tensor. Gathering fills it from runs outside, scattering
writes it to runs outside: the same moves in opposite directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.formats.headers import ITEM_SIZES, span
from engine.move.blocks import Block
from engine.move.runs import MOST_SPAN, READ_THROUGH, dense_parts, rows, straight
from engine.planning.boxes import Copy
from engine.planning.stored import Stored
from engine.storage.sources import SourceFiles

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True)
class Move:
    """One run outside the block, and its elements in the block.

    Attributes:
        tensor: the tensor outside; `offset` and `shift` are byte offsets in it, at step 0 and per step.
        parts: buffers for the run's bytes, in order: rows of the block itself, with scratch for what is
            skipped between them, or one scratch buffer.
        inside, outside: strided views of the block and of the scratch; None when `parts` are the block's.
    """

    tensor: int
    offset: int
    shift: int
    parts: Sequence[memoryview]
    inside: np.ndarray | None = None
    outside: np.ndarray | None = None


class Moves:
    """A block buffer with the moves of its current template. Belongs to one thread."""

    def __init__(self, gap: int) -> None:
        """Args: gap: gaps between runs of at most this many bytes are moved too, not skipped."""
        self._gap = gap
        self._block = memoryview(bytearray())
        self._scratch = memoryview(bytearray())
        self._template: tuple[Copy, ...] | None = None
        self._item = 0
        self._moves: list[Move] = []

    def of(self, block: Block, item: int) -> list[Move]:
        """The moves of a block of `item`-byte elements, into `bytes(block, item)`."""
        nbytes = (block.high - block.low) * item
        grows = self._block.nbytes < nbytes
        if grows:
            self._block = memoryview(bytearray(nbytes))
        if grows or self._template is not block.template or self._item != item:
            self._moves = self._compile(block, item)
            self._template, self._item = block.template, item
        return self._moves

    def bytes(self, block: Block, item: int) -> memoryview:
        """The block's buffer."""
        return self._block[: (block.high - block.low) * item]

    def _compile(self, block: Block, item: int) -> list[Move]:
        pieces = [
            (part, shift * item, None if straight(part) else rows(part, item))
            for copy, shift in zip(block.template, block.shifts, strict=True)
            for part in dense_parts(copy, self._gap // item, MOST_SPAN // item)
        ]
        # Taken once, since moves keep what they were given.
        spans = (span(p.shape, p.source_strides) for p, _, listed in pieces if listed is None and not straight(p))
        self._scratch_of(max(spans, default=0) * item)
        return [self._move(*piece, item) for piece in pieces]

    def _move(self, part: Copy, shift: int, listed: Sequence[tuple[int, int, int]] | None, item: int) -> Move:
        block = self._block
        nbytes = span(part.shape, part.source_strides) * item
        outside, inside = part.source_offset * item, part.target_offset * item
        if straight(part):
            return Move(part.source, outside, shift, (block[inside : inside + nbytes],))
        if listed is not None:
            return Move(part.source, outside, shift, self._rows(inside, listed, item))
        import numpy as np  # imported late: most conversions only move rows

        kind, scratch = np.dtype(f"u{item}"), self._scratch_of(nbytes)
        strides = [[stride * item for stride in side] for side in (part.target_strides, part.source_strides)]
        return Move(
            part.source, outside, shift, (scratch,),
            np.ndarray(part.shape, kind, block, inside, strides[0]),
            np.ndarray(part.shape, kind, scratch, 0, strides[1]),
        )  # fmt: skip

    def _rows(self, inside: int, listed: Sequence[tuple[int, int, int]], item: int) -> list[memoryview]:
        """Rows of the block, and scratch for the gaps between them."""
        parts, end = [], 0
        for outer, inner, length in listed:
            if outer > end:
                parts.append(self._scratch_of((outer - end) * item))
            at = inside + inner * item
            parts.append(self._block[at : at + length * item])
            end = outer + length
        return parts

    def _scratch_of(self, nbytes: int) -> memoryview:
        """A buffer of this size; all moves share it, as they run one after the other."""
        if self._scratch.nbytes < nbytes:
            self._scratch = memoryview(bytearray(nbytes))
        return self._scratch[:nbytes]


class Gatherer:
    """Fills blocks of output tensors from source tensors. Belongs to one thread."""

    def __init__(self, files: SourceFiles, sources: Sequence[Stored]) -> None:
        self._files, self._sources = files, sources
        self._moves = Moves(READ_THROUGH)

    def gather(self, block: Block, dtype: str) -> memoryview:
        """The block's bytes, valid until the next call."""
        item = ITEM_SIZES[dtype]
        step = block.step
        read = self._files.read_into
        for move in self._moves.of(block, item):
            source = self._sources[move.tensor]
            read(source.file, source.header.offset + move.offset + step * move.shift, move.parts)
            if move.inside is not None:
                move.inside[...] = move.outside
        return self._moves.bytes(block, item)


# Takes an output, a byte offset in it, and buffers to write there; gaps are never written.
Write = Callable[[int, int, Sequence[memoryview]], None]


class Scatterer:
    """Reads blocks of source tensors and writes each of their runs to its output. Belongs to one thread."""

    def __init__(self, files: SourceFiles, sources: Sequence[Stored], write: Write) -> None:
        self._files, self._sources, self._write = files, sources, write
        self._moves = Moves(0)

    def scatter(self, source: int, block: Block) -> None:
        """Move one block of a contiguous source tensor."""
        tensor = self._sources[source]
        item = ITEM_SIZES[tensor.header.dtype]
        moves = self._moves.of(block, item)
        data = self._moves.bytes(block, item)
        self._files.read_into(tensor.file, tensor.header.offset + block.low * item, (data,))
        step = block.step
        for move in moves:
            if move.outside is not None:
                move.outside[...] = move.inside
            self._write(move.tensor, move.offset + step * move.shift, move.parts)
