"""Reading a plan's outputs: any bytes of any of them, computed from the sources when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engine.formats.headers import ITEM_SIZES
from engine.move.blocks import Block, block_of, output_blocks
from engine.move.gather import Gatherer
from engine.move.values import Converter, check_transform
from engine.move.windows import needed, windows
from engine.planning.model import Output, Plan
from engine.storage.sources import SourceFiles


class Reader:
    """The bytes of a plan's outputs. Belongs to one thread, as the files it reads do."""

    def __init__(self, plan: Plan, files: SourceFiles) -> None:
        self._plan, self._files = plan, files
        self._gatherer, self._converter = Gatherer(files, plan.sources), Converter()

    def convert(self, output: Output, block: Block) -> memoryview:
        """The bytes of one block as they are written, valid until the next call."""
        return self._converter.convert(output, self._gatherer.gather(block, output.read_dtype))

    def stream(self, wanted: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, memoryview]]:
        """The bytes of outputs one after the other, each from a byte offset on; read ahead where reading has latency.

        Args:
            wanted: outputs, and the byte offset that each is read from.

        Yields:
            The output, a byte offset in it, and bytes that are valid until the next. Nothing of an output that is
            empty.
        """
        if not self._files.block:
            for index, start in wanted:
                output = self._plan.outputs[index]
                item = ITEM_SIZES[output.dtype]
                for block in output_blocks(output, self._plan.copies(index)):
                    if block.high * item > start:
                        skip = max(start - block.low * item, 0)
                        yield index, block.low * item + skip, self.convert(output, block)[skip:]
            return
        found = windows(self._plan, wanted, self._files.block)
        for window in self._files.ahead((window, window.ranges) for window in found):
            for index, start, block in window.blocks:
                output = self._plan.outputs[index]
                at = block.low * ITEM_SIZES[output.dtype]
                skip = max(start - at, 0)
                yield index, at + skip, self.convert(output, block)[skip:]

    def blocks(self, index: int, start: int = 0) -> Iterator[tuple[int, memoryview]]:
        """All bytes of an output from `start` on: (byte offset, bytes valid until the next), in order."""
        return ((at, data) for _, at, data in self.stream([(index, start)]))

    def read_into(self, index: int, start: int, target: memoryview) -> None:
        """Fill a buffer with the bytes of an output at a byte offset, wherever elements begin or end.

        Raises:
            EngineError: E209 for a transform that does not run along the last dimension, E3xx and E405 when
                a source cannot be read or changed.
            ValueError: for bytes beyond the output's.
        """
        output = self._plan.outputs[index]
        stop = start + len(target)
        if not 0 <= start <= stop <= output.nbytes:
            raise ValueError(f"bytes {start} to {stop} of the {output.nbytes} of {output.name}")
        check_transform(output)
        item = ITEM_SIZES[output.dtype]
        row = output.shape[-1] if output.transform is not None else 1  # a transform needs whole rows
        low, high = start // (item * row) * row, -(-stop // (item * row)) * row
        copies = self._plan.copies(index)
        step = max(_STEP // row, 1) * row
        whole = needed(self._plan, index, block_of(copies, low, high)) if self._files.block else {}
        parts = (block_of(copies, first, min(first + step, high)) for first in range(low, high, step))
        for block in parts if not whole else next(self._files.ahead([(parts, whole)])):
            at = block.low * item
            data = self.convert(output, block)[max(start - at, 0) : stop - at]
            to = max(at - start, 0)
            target[to : to + len(data)] = data


_STEP = 1 << 18  # elements at a time
