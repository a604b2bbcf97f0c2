"""Reads any bytes of a plan's outputs, computing them from the sources on demand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain

from engine.formats.headers import ITEM_SIZES, span
from engine.language.documents import grouped, portions
from engine.move.blocks import Block, block_of, output_blocks
from engine.move.moves import Gatherer
from engine.move.runs import MOST_SPAN, dense_parts, long_rows
from engine.move.values import Converter, check_transform
from engine.planning.boxes import Copy
from engine.planning.model import Output, Work
from engine.storage.sources import GAP, SourceFiles
from engine.storage.store import Range

_Run = tuple[int, int, int, int]  # begin and end of a byte range of an output, a file, and the offset there
_LONG = 32 << 10  # bytes: shorter runs are gathered in blocks
_WORTH = 4  # a block is computed whole if at least a quarter of it is wanted
_KEPT = 8  # outputs whose blocks are cached


class Reader:
    """Reads the bytes of a plan's outputs. Belongs to one thread, like the files it reads."""

    def __init__(self, plan: Work, files: SourceFiles) -> None:
        self._plan, self._files = plan, files
        self._gatherer, self._converter = Gatherer(files, plan.sources), Converter()
        self._last: tuple[int, Block | None, memoryview] = (-1, None, memoryview(b""))  # the last result of `convert`
        self._runs_of = lru_cache(_KEPT)(partial(_long_runs, plan))
        self._blocks_of = lru_cache(_KEPT)(partial(_listed_blocks, plan))

    def convert(self, output: Output, block: Block) -> memoryview:
        """The bytes of one block as they are written, valid until the next call."""
        self._last = (-1, None, memoryview(b""))
        return self._converter.convert(output, self._gatherer.gather(block, output.read_dtype))

    def stream(self, wanted: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, memoryview]]:
        """The bytes of outputs one after the other, each from a byte offset on; reads ahead if storage has latency.

        Args:
            wanted: outputs, and the byte offset that each is read from.

        Yields:
            The output, a byte offset in it, and bytes that are valid until the next step. An empty output yields
            nothing.
        """
        window = self._files.block
        held = chain.from_iterable(self._files.ahead(windows(self._plan, wanted, window))) if window else None
        for index, start, block in held or _wanted_blocks(self._plan, wanted):
            output = self._plan.outputs[index]
            at = block.low * ITEM_SIZES[output.dtype]
            skip = max(start - at, 0)
            yield index, at + skip, self.convert(output, block)[skip:]

    def blocks(self, index: int, start: int = 0) -> Iterator[tuple[int, memoryview]]:
        """All bytes of an output from `start` on, in order: (byte offset, bytes that are valid until the next step)."""
        return ((at, data) for _, at, data in self.stream([(index, start)]))

    def read_into(self, index: int, start: int, target: memoryview) -> None:
        """Fill a buffer with the bytes of an output from a byte offset on, which need not be an element boundary.

        Raises:
            EngineError: E209 for a transform that does not run along the last dimension, E3xx when a source
                cannot be read, E405 when one has changed.
            ValueError: for bytes beyond the end of the output.
        """
        output = self._plan.outputs[index]
        stop = start + len(target)
        if not 0 <= start <= stop <= output.nbytes:
            raise ValueError(f"bytes {start} to {stop} of the {output.nbytes} of {output.name}")
        check_transform(output)
        if self._files.block == 0 and (runs := self._runs_of(index)):
            self._read_runs(runs, start, target)
            return
        item = ITEM_SIZES[output.dtype]
        row = output.shape[-1] if output.transform is not None else 1  # a transform needs whole rows
        low, high = start // (item * row) * row, -(-stop // (item * row)) * row
        blocks: Iterable[Block] = self._covering(index, low, high)
        if self._files.block:
            blocks, needs = list(blocks), _Needs(self._plan)
            ranges = grouped(one for block in blocks for one in needs.of(index, block))
            (blocks,) = self._files.ahead([(blocks, ranges)])
        for block in blocks:
            at = block.low * item
            if self._last[:2] != (index, block):  # the next read often continues in the same block
                self._last = index, block, self.convert(output, block)
            data = self._last[2][max(start - at, 0) : stop - at]
            to = max(at - start, 0)
            target[to : to + len(data)] = data

    def _read_runs(self, runs: list[_Run], start: int, target: memoryview) -> None:
        stop = start + len(target)
        for low, high, file, offset in runs[bisect_right(runs, start, key=lambda run: run[1]) :]:
            if low >= stop:
                break
            first, last = max(low, start), min(high, stop)
            self._files.read_into(file, offset + first - low, (target[first - start : last - start],))

    def _covering(self, index: int, low: int, high: int) -> Iterator[Block]:
        """Blocks that hold elements low..high: blocks of the whole output, whose templates repeat, or part of one."""
        copies, blocks, ends = self._blocks_of(index)
        at, wanted = bisect_right(ends, low), high - low
        while low < high:
            whole = blocks[at]
            end = min(high, whole.high)
            least = wanted * _WORTH < whole.high - whole.low
            yield block_of(copies, low, end) if least else whole
            low, at = end, at + 1


def _long_runs(plan: Work, index: int) -> list[_Run]:
    """The long runs of an output, if it consists only of long runs; else empty.

    They are read directly into the caller's buffer, without a block in between.
    """
    output, sources = plan.outputs[index], plan.sources
    copies = plan.copies(index) if output.unchanged else []
    item = ITEM_SIZES[output.dtype]
    listed = [long_rows(copy, _LONG // item) for copy in copies]
    return sorted(
        (to := (copy.target_offset + inner) * item, to + length * item, sources[copy.source].file,
         sources[copy.source].header.offset + (copy.source_offset + outer) * item)
        for copy, held in zip(copies, listed, strict=True)
        for outer, inner, length in held
    ) if all(listed) else []  # fmt: skip


def _listed_blocks(plan: Work, index: int) -> tuple[Sequence[Copy], list[Block], list[int]]:
    """The copies of an output, its blocks, and where each ends."""
    copies = plan.copies(index)
    blocks = list(output_blocks(plan.outputs[index], copies))
    return copies, blocks, [block.high for block in blocks]


Wanted = tuple[int, int, Block]  # an output, the byte offset to start from, and one of its blocks


def _wanted_blocks(plan: Work, wanted: Iterable[tuple[int, int]]) -> Iterator[Wanted]:
    """The blocks of outputs, each from a byte offset on."""
    for index, start in wanted:
        item = ITEM_SIZES[plan.outputs[index].dtype]
        blocks = output_blocks(plan.outputs[index], plan.copies(index))
        yield from ((index, start, block) for block in blocks if block.high * item > start)


def windows(
    plan: Work, wanted: Iterable[tuple[int, int]], nbytes: int
) -> Iterator[tuple[list[Wanted], Mapping[int, Sequence[Range]]]]:
    """Cut outputs, each from a byte offset on, into windows that fetch about `nbytes`; small outputs share one.

    Yields:
        Blocks that are moved one after the other, and the byte ranges of each file that fill them.
    """
    needs = _Needs(plan)

    def listed() -> Iterator[tuple[tuple[Wanted, list[tuple[int, Range]]], int]]:
        for index, start, block in _wanted_blocks(plan, wanted):
            found = needs.of(index, block)
            read = sum(end - begin for _, (begin, end) in found)
            made = (block.high - block.low) * ITEM_SIZES[plan.outputs[index].dtype]
            yield ((index, start, block), found), max(read, made)

    for held in portions(listed(), nbytes):
        yield [block for block, _ in held], grouped(one for _, found in held for one in found)


class _Needs:
    """The byte ranges that blocks read, computed once per template."""

    def __init__(self, plan: Work) -> None:
        self._plan = plan
        self._template: Sequence[Copy] = ()
        self._parts: list[tuple[int, int, int, int]] = []  # file, first byte, bytes per step, bytes

    def of(self, index: int, block: Block) -> list[tuple[int, Range]]:
        """The file and the byte range of every run."""
        if block.template is not self._template:
            self._template, item = block.template, ITEM_SIZES[self._plan.outputs[index].read_dtype]
            self._parts = []
            for copy, shift in zip(block.template, block.shifts, strict=True):
                source = self._plan.sources[copy.source]
                for part in dense_parts(copy, GAP // item, MOST_SPAN // item):
                    begin = source.header.offset + part.source_offset * item
                    nbytes = span(part.shape, part.source_strides) * item
                    self._parts.append((source.file, begin, shift * item, nbytes))
        step = block.step
        return [(file, (at + step * shift, at + step * shift + size)) for file, at, shift, size in self._parts]
