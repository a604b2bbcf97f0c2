"""Replicas, tensors that every rank holds, must be bit-identical on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from engine.errors import EngineError, Place
from engine.formats.headers import FLOATS, ITEM_SIZES
from engine.language.documents import grouped, portions
from engine.move.blocks import BLOCK_BYTES, block_of, blocks
from engine.move.moves import Gatherer
from engine.move.values import elements, float_type
from engine.planning.model import Replicas, Slices, Tied, Work
from engine.run.meter import Meter
from engine.run.slices import Others, compare_slices, ends_of, same, whole
from engine.storage.sources import SourceFiles
from engine.storage.store import Range

Check = Replicas | Tied | Slices
_TOGETHER = 32  # checks whose first bytes are fetched together from storage with latency
_FETCHED = 256 << 10  # bytes fetched of each replica


def checks(plan: Work) -> tuple[Check, ...]:
    """The tensors that must be equal, or must differ, before anything is written."""
    return (*plan.replicas, *plan.tied, *plan.slices)


def compare_replicas(
    plan: Work,
    meter: Meter | None = None,
    some: Sequence[Check] | None = None,
    users: int = 1,
    others: Others | None = None,
) -> None:
    """Compare each replica block by block with the first of its set.

    Args:
        meter: advances by `replica_bytes` in all; its flag stops the comparison early, without a result.
        some: of the plan's `checks`; default: all.
        users: how many threads compare at the same time.
        others: what they share of slices, so that those of different tensors are compared too.

    Raises:
        EngineError: E402 with the ranks that differ and the largest deviation, E306 for equal slices.
    """
    meter, others = meter or Meter(0, None), {} if others is None else others
    with SourceFiles(plan.files, users) as files:
        first, other = Gatherer(files, plan.sources), Gatherer(files, plan.sources)
        for batch in files.ahead(_batches(plan, checks(plan) if some is None else some, files.block)):
            for check in batch:
                if isinstance(check, Tied):
                    _compare_tied(plan, check, first, other, meter)
                elif isinstance(check, Slices):
                    compare_slices(plan, check, first, other, meter, others)
                else:
                    _compare(plan, check, first, other, meter)


def _batches(
    plan: Work, some: Sequence[Check], window: int
) -> Iterator[tuple[Sequence[Check], Mapping[int, list[Range]]]]:
    """Batches of checks, with the first bytes that they read of each file, to be fetched together."""

    def starts(check: Check) -> list[tuple[int, Range]]:
        read = [plan.sources[source] for source in (() if isinstance(check, Tied) else check.sources)]
        if isinstance(check, Slices):
            return [(one.file, ends) for one in read for ends in ends_of(one.header)]
        return [(one.file, (at := one.header.offset, at + min(one.header.nbytes, _FETCHED))) for one in read]

    found = ((check, starts(check)) for check in some)
    sized = ((one, sum(end - begin for _, (begin, end) in one[1])) for one in found)
    for batch in portions(sized, window, _TOGETHER):
        yield [check for check, _ in batch], grouped(one for _, ranges in batch for one in ranges)


def _compare_tied(plan: Work, tied: Tied, first: Gatherer, other: Gatherer, meter: Meter) -> None:
    """E402 unless a tied tensor equals the one that is written for both."""
    kept = plan.outputs[tied.same_as]
    copies = plan.copies(tied.same_as)
    limit = BLOCK_BYTES // ITEM_SIZES[kept.read_dtype]
    equal = kept.read_dtype == tied.output.read_dtype and all(
        meter.stopped.is_set()
        or same(
            first.gather(block_of(tied.copies, low, min(low + limit, kept.elements)), kept.read_dtype),
            other.gather(block_of(copies, low, min(low + limit, kept.elements)), kept.read_dtype),
        )
        for low in range(0, kept.elements, limit)
    )
    if not equal:
        raise EngineError(
            "E402",
            f"`{tied.output.name}` differs from `{kept.name}`, to which the config ties it",
            place=Place(tied.output.place),
            expected="the same bytes, since only one of the two is written",
            fix="Let `tie_word_embeddings` be false, so that both are written.",
        )


def replica_bytes(plan: Work) -> int:
    """Bytes that comparing replicas reads besides the first of each set."""
    sets = [check for check in checks(plan) if isinstance(check, Replicas)]
    return sum(plan.sources[source].header.nbytes for replicas in sets for source in replicas.sources[1:])


def _compare(plan: Work, replicas: Replicas, first: Gatherer, other: Gatherer, meter: Meter) -> None:
    """Read each block of the first replica once, and compare it with the same block of all others."""
    one, *others = replicas.sources
    header = plan.sources[one].header
    for source in others:
        if plan.sources[source].header.dtype != header.dtype:
            raise _differ(plan, replicas, source, f"{plan.sources[source].header.dtype} against {header.dtype}")
    size = math.prod(header.shape)
    limit = BLOCK_BYTES // ITEM_SIZES[header.dtype]
    found: dict[int, tuple[int, float]] = {}  # source → elements that differ, and by how much at most
    for block, *theirs in zip(*(blocks([whole(plan, s)], size, limit) for s in replicas.sources), strict=True):
        if meter.stopped.is_set():
            return
        x = first.gather(block, header.dtype)
        for source, their in zip(others, theirs, strict=True):
            y = other.gather(their, header.dtype)
            if not same(x, y):
                count, largest = found.get(source, (0, 0.0))
                unlike, deviation = _deviation(x, y, header.dtype)
                found[source] = count + unlike, max(largest, deviation)
            meter.advance(y.nbytes)
    for source in others:
        if source in found:
            count, largest = found[source]
            raise _differ(plan, replicas, source, f"{count} of {size} elements, by up to {largest:.6g}")


def _deviation(x: memoryview, y: memoryview, dtype: str) -> tuple[int, float]:
    """The number of elements that differ, and the largest difference."""
    import numpy as np

    one, two = elements(x, dtype), elements(y, dtype)
    unlike = int((one != two).sum())
    if dtype not in FLOATS:
        return unlike, 0.0
    with np.errstate(invalid="ignore"):
        u, v = (z.view(float_type(dtype)).astype(np.float64) for z in (one, two))
        return unlike, float(np.nanmax(np.abs(u - v), initial=0.0))


def _differ(plan: Work, replicas: Replicas, source: int, told: str) -> EngineError:
    def file(index: int) -> str:
        return plan.files[plan.sources[index].file].name

    one, two = (plan.sources[index].header.name for index in (replicas.sources[0], source))
    if file(source) == file(replicas.sources[0]):
        return EngineError(
            "E402",
            f"`{one}` and `{two}` stand for one tensor, and differ",
            place=Place(file(source), tensor=two),
            got=f"they differ in {told}",
            expected="one of them, or the same bytes",
            fix="If the configuration ties them, it is wrong. Otherwise the file holds two models, such as a model and "
            "its average: save only the one that you want.",
        )
    return EngineError(
        "E402",
        f"replicas of `{replicas.name}` differ between ranks",
        place=Place(file(source), tensor=two),
        got=f"{file(source)} differs from {file(replicas.sources[0])} in {told}",
        expected="the same bytes on every rank: this tensor is not cut",
        fix="The ranks drifted apart in training, or a file is from another step. No single Hugging Face tensor "
        "can stand for both; compare the dates and steps of the files.",
    )
