"""Windows: blocks of outputs whose sources are fetched together, ahead of being moved. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.formats.headers import ITEM_SIZES
from engine.language.documents import grouped
from engine.move.blocks import Block, output_blocks
from engine.move.runs import MOST_SPAN, dense_parts, span
from engine.planning.boxes import Copy
from engine.planning.model import Work
from engine.storage.coalesce import GAP, Range

Wanted = tuple[int, int, Block]  # an output, the byte offset that it is wanted from, and a block of it


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks that are moved one after the other, and for each file the byte ranges that fill them."""

    blocks: tuple[Wanted, ...]
    ranges: Mapping[int, Sequence[Range]]


def windows(plan: Work, wanted: Iterable[tuple[int, int]], nbytes: int) -> Iterator[Window]:
    """Cut outputs, each from a byte offset on, into windows that fetch about so many bytes; small outputs share one."""
    held: list[Wanted] = []
    ranges: dict[int, list[Range]] = {}
    total = 0
    needs = _Needs(plan)
    for index, start in wanted:
        output = plan.outputs[index]
        item = ITEM_SIZES[output.dtype]
        for block in output_blocks(output, plan.copies(index)):
            if block.high * item <= start:
                continue
            found = needs.of(index, block)
            size = max(sum(end - begin for _, begin, end in found), (block.high - block.low) * item)
            if held and total + size > nbytes:
                yield Window(tuple(held), ranges)
                held, ranges, total = [], {}, 0
            held.append((index, start, block))
            total += size
            for file, begin, end in found:
                ranges.setdefault(file, []).append((begin, end))
    if held:
        yield Window(tuple(held), ranges)


def needed(plan: Work, index: int, blocks: Iterable[Block]) -> dict[int, list[Range]]:
    """For each file, the byte ranges that blocks of an output are gathered from."""
    needs = _Needs(plan)
    return grouped((file, (begin, end)) for block in blocks for file, begin, end in needs.of(index, block))


class _Needs:
    """What blocks read; that of a template is computed once."""

    def __init__(self, plan: Work) -> None:
        self._plan = plan
        self._template: Sequence[Copy] = ()
        self._parts: list[tuple[int, int, int, int]] = []  # file, first byte, bytes per step, bytes

    def of(self, index: int, block: Block) -> list[tuple[int, int, int]]:
        """(file, begin, end) of every run."""
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
        return [(file, at + step * shift, at + step * shift + size) for file, at, shift, size in self._parts]
