"""Tensors that exchanged names inside a file, seen by where they are stored.

Training keeps the parameters of a rank in a few buffers, and torch saves tensors of one buffer end to end, as they
were. In all genuine files that share buffers, tensors of equal sizes follow each other there as their names do in the
file: InternEvo's optimizer sorts parameters by size and keeps their order (`_partition_param_list` of its
`hybrid_zero_optim.py`), Megatron's buffers have the reverse order. A program that exchanges two values under their
names leaves the buffer as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from engine.errors import EngineError, Place
from engine.formats.headers import FileHeader, TensorHeader
from engine.language.documents import grouped


def check_order(headers: Sequence[FileHeader]) -> None:
    """E306 for the first file in which two tensors of equal shapes exchanged names.

    It is only known if most tensors of a buffer are in order, and the others exchanged places in pairs.
    """
    for header in headers:
        found = [pair for buffer in _buffers(header.tensors) for pair in _exchanged(buffer, header.tensors)]
        if found:
            one, other = (each.name for each in found[0])
            more = f"; {len(found) - 1} more pairs" if len(found) > 1 else ""
            raise EngineError(
                "E306",
                f"tensors of `{header.name}` have exchanged names",
                place=Place(header.name, tensor=one),
                got=f"`{one}` and `{other}`, each stored where the other belongs{more}",
                expected="tensors of one buffer in the order of their names, as training saved them",
                fix="Copy the file again. If they were exchanged on purpose, save it again with a copy of each tensor: "
                "`torch.save({name: tensor.clone() for name, tensor in state.items()}, file)`.",
            )


def _buffers(tensors: Sequence[TensorHeader]) -> Iterator[Sequence[TensorHeader]]:
    """The tensors of each buffer, as they are stored.

    They lie end to end: between others there is at least the header of a zip's entry.
    """
    placed = sorted((one for one in tensors if one.nbytes), key=lambda one: one.offset)
    breaks = [at for at, (one, other) in enumerate(pairwise(placed), 1) if one.offset + one.nbytes != other.offset]
    yield from (placed[begin:end] for begin, end in pairwise([0, *breaks, len(placed)]))


def _exchanged(
    buffer: Sequence[TensorHeader], tensors: Sequence[TensorHeader]
) -> list[tuple[TensorHeader, TensorHeader]]:
    """Pairs of a buffer's tensors that are stored where the other one belongs; none if its order says nothing.

    Args:
        tensors: those of the file, in the order of names.
    """
    numbers = {one.name: at for at, one in enumerate(tensors)}
    alike = [each for each in grouped((one.nbytes, numbers[one.name]) for one in buffer).values() if len(each) > 1]

    def misplaced(*, backwards: bool) -> set[tuple[int, int]]:
        ordered = (zip(each, sorted(each, reverse=backwards), strict=True) for each in alike)
        return {(one, wanted) for each in ordered for one, wanted in each if one != wanted}

    wrong = min(misplaced(backwards=False), misplaced(backwards=True), key=len)
    found = [(tensors[one], tensors[wanted]) for one, wanted in sorted(wrong) if one < wanted]
    in_pairs = all((wanted, one) in wrong for one, wanted in wrong)
    if not in_pairs or 2 * len(wrong) > sum(map(len, alike)):
        return []
    return found if all((one.shape, one.dtype) == (other.shape, other.dtype) for one, other in found) else []
