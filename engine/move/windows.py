"""Windows: blocks of outputs whose sources are fetched together, ahead of being moved. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.formats.headers import ITEM_SIZES
from engine.move.blocks import Block, output_blocks
from engine.move.runs import MOST_SPAN, READ_THROUGH, dense_parts, span
from engine.planning.copies import Copy
from engine.planning.model import Plan
from engine.storage.coalesce import GAP, Range

Wanted = tuple[int, int, Block]  # an output, the byte offset that it is wanted from, and a block of it


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks that are moved one after the other, and for each file the byte ranges that fill them."""

    blocks: tuple[Wanted, ...]
    ranges: Mapping[int, Sequence[Range]]


def windows(plan: Plan, wanted: Iterable[tuple[int, int]], nbytes: int) -> Iterator[Window]:
    """Cut outputs, each from a byte offset on, into windows of about so many bytes; small outputs share one."""
    held: list[Wanted] = []
    total = 0
    for index, start in wanted:
        output = plan.outputs[index]
        item = ITEM_SIZES[output.dtype]
        for block in output_blocks(output, plan.copies(index)):
            if block.high * item <= start:
                continue
            size = (block.high - block.low) * max(item, ITEM_SIZES[output.read_dtype])
            if held and total + size > nbytes:
                yield Window(tuple(held), needed(plan, held))
                held, total = [], 0
            held.append((index, start, block))
            total += size
    if held:
        yield Window(tuple(held), needed(plan, held))


def needed(plan: Plan, blocks: Iterable[Wanted]) -> dict[int, list[Range]]:
    """For each file, the byte ranges that blocks are gathered from."""
    found: dict[int, list[Range]] = {}
    template: Sequence[Copy] = ()
    parts: list[tuple[Copy, int]] = []
    for index, _, block in blocks:
        item = ITEM_SIZES[plan.outputs[index].read_dtype]
        if block.template is not template:
            template = block.template
            parts = [
                (part, shift)
                for copy, shift in zip(template, block.shifts, strict=True)
                for part in dense_parts(copy, max(GAP, READ_THROUGH) // item, MOST_SPAN // item)
            ]
        for part, shift in parts:
            source = plan.sources[part.source]
            start = source.header.offset + (part.source_offset + block.step * shift) * item
            end = start + span(part.shape, part.source_strides) * item
            found.setdefault(source.file, []).append((start, end))
    return found
