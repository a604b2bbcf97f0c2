"""Gathering and scattering: blocks filled from source tensors, or emptied into output tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.formats.headers import ITEM_SIZES
from engine.move.blocks import Block
from engine.move.moves import Moves
from engine.move.runs import READ_THROUGH
from engine.planning.stored import SourceTensor
from engine.storage.sources import SourceFiles


class Gatherer:
    """Fills blocks of output tensors from source tensors. Belongs to one thread."""

    def __init__(self, files: SourceFiles, sources: Sequence[SourceTensor]) -> None:
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


class Scatterer:
    """Reads blocks of source tensors and writes each run of them where it belongs. Belongs to one thread."""

    def __init__(
        self,
        files: SourceFiles,
        sources: Sequence[SourceTensor],
        write: Callable[[int, int, Sequence[memoryview]], None],
    ) -> None:
        """Args: write: takes an output, a byte offset in it, and the bytes in parts; gaps are never written."""
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
