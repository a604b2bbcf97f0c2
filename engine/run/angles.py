"""Tensors that are not converted, but whose values follow from the configuration: rotary angles in old files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EngineError, Place, shape_text
from engine.language.documents import grouped, portions
from engine.language.expressions import evaluate
from engine.language.model import Exclusion
from engine.language.names import pattern
from engine.move.blocks import block_of
from engine.move.moves import Gatherer
from engine.move.values import elements, float_type
from engine.planning.boxes import in_order
from engine.planning.matching import SIDES
from engine.planning.model import Plan
from engine.planning.stored import Stored, strip
from engine.storage.sources import SourceFiles
from engine.storage.store import Range

_MOST = 1 << 16  # elements of such a tensor
_TOGETHER = 256  # such tensors that are fetched together
_NEAR = {"F64": (1e-4, 0.0), "F32": (1e-4, 0.0), "F16": (0.02, 6e-8), "BF16": (0.02, 0.0)}  # relative, and absolute


def check_values(plan: Plan) -> None:
    """Compare the tensors that the mapping ignores with the `values` of their entries.

    Trainers compute angles in 16 bits too, so that values of these types may be off by 2 %.

    Raises:
        EngineError: E218 for the first tensor that holds other values, E3xx for one that cannot be read.
    """
    entries = [(pattern(entry.pattern), entry) for entry in _entries(plan)]
    ignored = {name: e for name in plan.ignored for known, e in entries if known.match(name) is not None}
    stored = strip(plan.files, plan.layout if plan.reads == "training" else None) if ignored else ()
    found = [one for one in stored if one.name in ignored]
    for one in found:
        shape, dtype = one.header.shape, one.header.dtype
        if dtype not in _NEAR or len(shape) != 1 or not 0 < shape[0] <= _MOST:
            raise _other(plan, one, ignored[one.name], f"{shape_text(shape)} {dtype}", "a list of numbers")
    expected: dict[tuple[str, int], list[float]] = {}
    with SourceFiles(plan.files) as files:
        gatherer = Gatherer(files, found)
        for batch in files.ahead(map(_ranges, portions(((item, 1) for item in enumerate(found)), None, _TOGETHER))):
            for number, one in batch:
                entry, header = ignored[one.name], one.header
                size = header.shape[0]
                values = expected.get((entry.pattern, size)) or _computed(entry, plan.names, size)
                expected[entry.pattern, size] = values
                block = block_of([in_order(number, header.shape, header.strides)], 0, size)
                read = elements(gatherer.gather(block, header.dtype), header.dtype).view(float_type(header.dtype))
                near, least = _NEAR[header.dtype]
                for index, (got, value) in enumerate(zip(map(float, read), values, strict=True)):
                    if not abs(got - value) <= near * abs(value) + least:
                        raise _other(plan, one, entry, f"{got:.6g} at index {index} of {size}", f"{value:.6g}")


def _ranges(batch: Sequence[tuple[int, Stored]]) -> tuple[Sequence[tuple[int, Stored]], Mapping[int, list[Range]]]:
    """Tensors, with the bytes that they fill in each file, to be fetched together from storage with latency."""
    told = ((one.file, (one.header.offset, one.header.offset + one.header.nbytes)) for _, one in batch)
    return batch, grouped(told)


def first_values(plan: Plan) -> list[list[float]]:
    """The first three `values` of each entry of the side that a plan reads, whether there are such tensors or not."""
    return [_computed(entry, plan.names, 3) for entry in _entries(plan)]


def _entries(plan: Plan) -> list[Exclusion]:
    return [one for one in plan.mapping.ignore if one.values is not None and one.side == SIDES[plan.reads]]


def _computed(entry: Exclusion, names: Mapping[str, Any], size: int) -> list[float]:
    assert entry.values is not None
    found = [evaluate(entry.values, {**names, "index": index}) for index in range(size)]
    if all(isinstance(value, int | float) for value in found):
        return [float(value) for value in found]
    raise EngineError("E105", "`values` is not a number", place=entry.values.place, got=repr(found[0])[:80])


def _other(plan: Plan, one: Stored, entry: Exclusion, got: str, expected: str) -> EngineError:
    assert entry.values is not None
    return EngineError(
        "E218",
        f"`{one.name}` does not hold what follows from the configuration",
        place=Place(plan.files[one.file].name, tensor=one.header.name),
        got=got,
        expected=f"{expected}, by `{entry.values.text}` ({entry.values.place})",
        fix="Training computed with the values in the file: correct the configuration, such as the rotary base. If the "
        "tensor is left over from another model, use a mapping that ignores it without `values`.",
    )
