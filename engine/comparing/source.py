"""Verifies an output against the source it was made from: plans and gathers each tensor again.

What a run would write now is compared, block by block, with the output, so memory stays at a few
blocks for any model size. Tensors are found by name, so the output may be split into other files
than the plan's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from math import ceil

import numpy as np

from engine.checkpoint.hf_folder import read_hf_folder
from engine.errors import EngineError
from engine.formats.headers import ITEM_SIZES, dense_strides
from engine.move.tensors import Box, Tensors, View, tiles
from engine.planning.boxes import Copy
from engine.planning.model import Output, Plan
from engine.run.meter import Meter
from engine.run.replicas import compare_replicas, replica_bytes
from engine.storage.store import Store

LISTED = 50  # differing tensors that are listed one by one
_BLOCK = 1 << 18  # elements


def parse_sample(text: str) -> float:
    """The value of `--sample` as a share of a tensor's blocks; E001 when it is invalid.

    >>> parse_sample("5%")
    0.05
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*%", text.strip())
    if found and 0 < float(found[1]) <= 100:
        return float(found[1]) / 100
    raise EngineError(
        "E001", f"`{text}` is not a sample", expected="a share of the blocks up to 100%", fix="Write it like 5%."
    )


@dataclass(frozen=True, slots=True)
class Differing:
    """A tensor of the output that differs from what the source gives.

    Attributes:
        what: in words: missing, of another type or shape, or how many elements differ.
        index: that of the first differing element, if elements were compared.
        source: the source tensors that fill it, first the one of that element.
    """

    name: str
    file: str
    what: str
    rule: str | None
    place: str | None
    index: tuple[int, ...] | None = None
    source: tuple[str, ...] = ()

    def __str__(self) -> str:
        at = f", first at {list(self.index)}" if self.index is not None else ""
        from_ = f" from {self.source[0]}" if self.source else ""
        rule = f" (rule `{self.rule}`, {self.place}{from_})" if self.rule else ""
        return f"{self.name} {self.what}{at}{rule}"


@dataclass(frozen=True, slots=True)
class AgainstSource:
    """The result of comparing with the source: which tensors differ, in the plan's order."""

    tensors: int
    bytes: int
    sample: str | None
    differing: tuple[Differing, ...]
    more: int = 0  # number of differing tensors that are not listed
    extra: tuple[str, ...] = field(default=())

    @property
    def problems(self) -> tuple[str, ...]:
        told = [str(one) for one in self.differing]
        told += [f"{self.more} more tensors differ from the source"] if self.more else []
        return (*told, *(f"{name} is not made from the source by any rule" for name in self.extra))

    def summary(self) -> str:
        """One line about what was compared."""
        wrong = len(self.differing) + self.more + len(self.extra)
        told = f"{wrong} tensors are not what the source gives" if wrong else "all as the source gives them"
        return f"{self.tensors} tensors against the source ({self.sample or 'every element'}): {told}"


def source_bytes(plan: Plan, sample: float) -> int:
    """The number of bytes by which `verify_source` advances its meter."""
    return plan.nbytes + (replica_bytes(plan) if sample == 1 else 0)


def verify_source(plan: Plan, folder: Store, sample: float, meter: Meter) -> AgainstSource:
    """Compare every tensor of an output with what the plan makes of the source now.

    Args:
        sample: the share of each tensor's blocks to compare. If all are, replicas are compared too.
        meter: advances by `source_bytes` in total.

    Raises:
        EngineError: E2xx and E3xx when either side cannot be read, E402 when replicas differ.
    """
    files = read_hf_folder(folder)
    held = {tensor.name: file.name for file in files for tensor in file.tensors}
    differing: list[Differing] = []
    more = nbytes = 0
    if sample == 1:
        compare_replicas(plan, meter)
    with Tensors(files, plan) as tensors:
        written, made = tensors.sides
        for index, output in enumerate(plan.outputs):
            got, wanted, file = written.get(output.name), made[output.name], held.pop(output.name, "")
            told: Differing | None = None
            if got is None:
                told = _differing(plan, index, "is missing", file)
            elif (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
                kinds = [f"{one.dtype} {list(one.shape)}" for one in (got, wanted)]
                told = _differing(plan, index, f"is {kinds[0]}, the source gives {kinds[1]}", file)
            else:
                count, first, elements = _unlike(tensors, got, wanted, _chosen(output, sample))
                nbytes += elements * ITEM_SIZES[output.dtype]
                if first is not None:
                    what = f"differs from the source in {count} of {elements} elements"
                    told = _differing(plan, index, what, file, first)
            if told is not None:
                differing, more = ([*differing, told], more) if len(differing) < LISTED else (differing, more + 1)
            meter.advance(output.nbytes)
    compared = None if sample == 1 else f"{sample * 100:g}% of the blocks"
    return AgainstSource(len(plan.outputs), nbytes, compared, tuple(differing), more, tuple(held))


def _differing(plan: Plan, index: int, what: str, file: str, at: tuple[int, ...] | None = None) -> Differing:
    """A differing output, with its source tensors as `file:tensor`: first the one that fills the element."""
    output = plan.outputs[index]
    element = None if at is None else int(np.ravel_multi_index(at, output.shape)) if at else 0
    ordered = sorted(plan.copies(index), key=lambda copy: element is None or not _fills(copy, element))
    names = (f"{plan.files[s.file].name}:{s.header.name}" for s in (plan.sources[c.source] for c in ordered))
    sources = tuple(islice(dict.fromkeys(names), 8))
    return Differing(output.name, file, what, output.rule or None, output.place or None, at, sources)


def _fills(copy: Copy, at: int) -> bool:
    """Whether a copy fills element `at` of its target.

    >>> [_fills(Copy(0, 0, 0, 4, (2, 2), (2, 1), (8, 1)), at) for at in (4, 5, 6, 12, 20)]
    [True, True, False, True, False]
    """
    rest = at - copy.target_offset
    for size, stride in sorted(zip(copy.shape, copy.target_strides, strict=True), key=lambda axis: -axis[1]):
        if rest < 0:
            return False
        rest -= min(rest // stride, size - 1) * stride
    return rest == 0


def _chosen(output: Output, sample: float) -> list[Box]:
    """The blocks to compare: all, or one from each of equally long stretches.

    The choice in a stretch depends only on the tensor's name, so a sample is the same each time, but
    differs between layers.
    """
    blocks = list(tiles(output.shape, [dense_strides(output.shape)], _BLOCK))
    if sample == 1 or not blocks:
        return blocks
    parts = ceil(len(blocks) * sample)
    chosen: list[Box] = []
    for low, high in pairwise(len(blocks) * i // parts for i in range(parts + 1)):
        digest = hashlib.sha256(f"{output.name}\0{low}".encode()).digest()
        chosen.append(blocks[low + int.from_bytes(digest[:8], "big") % (high - low)])
    return chosen


def _unlike(tensors: Tensors, got: View, wanted: View, boxes: Iterable[Box]) -> tuple[int, tuple[int, ...] | None, int]:
    """The number of wrong elements of a written tensor, the first of them, and how many were compared."""
    count = compared = 0
    found: list[tuple[int, ...]] = []
    for box in boxes:
        unlike = tensors.read(got, box) != tensors.read(wanted, box, 1)
        compared += unlike.size
        if unlike.any():
            count += int(unlike.sum())
            at = np.unravel_index(int(unlike.argmax()), [high - low for low, high in box]) if box else ()
            found.append(tuple(low + int(i) for (low, _), i in zip(box, at, strict=True)))
    return count, min(found, default=None), compared
