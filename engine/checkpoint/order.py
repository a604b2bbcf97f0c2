"""Tensors that exchanged names inside a file, seen by where they are stored.

Training keeps the parameters of a rank in a few buffers, and torch saves tensors of one buffer end to end, as they
were. In all genuine files that share buffers, tensors of equal sizes follow each other there as their names do in the
file: InternEvo's optimizer sorts parameters by size and keeps their order (`_partition_param_list` of its
`hybrid_zero_optim.py`), Megatron's buffers have the reverse order. A program that exchanges two values under their
names leaves the buffer as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from engine.errors import EngineError, Place, counted
from engine.formats.headers import FileHeader, TensorHeader
from engine.language.documents import grouped

_NUMBER = re.compile(r"(?<=[.])\d+(?=[.])")


def check_order(headers: Sequence[FileHeader]) -> tuple[str, ...]:
    """Which names were exchanged in all layers of a file, by one layer: it may be a renaming on purpose.

    It is only known if most tensors of a buffer are in order, and the others exchanged places in pairs.

    Raises:
        EngineError: E306 for the first file in which other tensors of equal shapes exchanged names.
    """
    told: list[str] = []
    for header in headers:
        found: list[tuple[str, str]] = []
        for forms, pairs in _by_form(header).items():
            if _everywhere(header, forms, pairs):
                told.append(f"{pairs[0][0]} and {pairs[0][1]} in {header.name}")
            else:
                found += pairs
        if found:
            one, other = found[0]
            more = f"; {counted(len(found) - 1, 'more pair')}" if len(found) > 1 else ""
            raise EngineError(
                "E306",
                f"tensors of `{header.name}` have exchanged names",
                place=Place(header.name, tensor=one),
                got=f"`{one}` and `{other}`, each stored where the other belongs{more}",
                expected="tensors of one buffer in the order of their names, as training saved them",
                fix="Copy the file again. If they were exchanged on purpose, save it again with a copy of each tensor: "
                "`torch.save({name: tensor.clone() for name, tensor in state.items()}, file)`.",
            )
    return tuple(told)


def _by_form(header: FileHeader) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Pairs of tensors that exchanged names, by these names without numbers."""
    numbers = {one.name: at for at, one in enumerate(header.tensors)}
    pairs = (pair for buffer in _buffers(header.tensors) for pair in _exchanged(buffer, header.tensors, numbers))
    return grouped(((_form(one.name), _form(other.name)), (one.name, other.name)) for one, other in pairs)


def _form(name: str) -> str:
    return _NUMBER.sub("", name)


def _everywhere(header: FileHeader, forms: tuple[str, str], pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether all tensors of two forms exchanged names, each with the one of its own layer."""
    within = all(_NUMBER.findall(one) == _NUMBER.findall(other) != [] for one, other in pairs)
    return within and len(pairs) == sum(_form(one.name) == forms[0] for one in header.tensors) > 1


def _buffers(tensors: Sequence[TensorHeader]) -> Iterator[Sequence[TensorHeader]]:
    """The tensors of each buffer of several, as they are stored.

    They lie end to end: between others there is at least the header of a zip's entry.
    """
    placed = sorted((one for one in tensors if one.nbytes), key=lambda one: one.offset)
    breaks = [at for at, (one, other) in enumerate(pairwise(placed), 1) if one.offset + one.nbytes != other.offset]
    yield from (placed[begin:end] for begin, end in pairwise([0, *breaks, len(placed)]) if end - begin > 1)


def _exchanged(
    buffer: Sequence[TensorHeader], tensors: Sequence[TensorHeader], numbers: Mapping[str, int]
) -> list[tuple[TensorHeader, TensorHeader]]:
    """Pairs of a buffer's tensors that are stored where the other one belongs; none if its order says nothing.

    Args:
        tensors: those of the file, in the order of names.
        numbers: the place of each name in that order.
    """
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
