"""Tensors that exchanged names inside a file, seen by where they are stored.

Training keeps the parameters of a rank in a few buffers, and torch saves tensors of one buffer end to end, as they
were. In all genuine files that share buffers, tensors of equal sizes follow each other there as their names do in the
file: InternEvo's optimizer sorts parameters by size and keeps their order (`_partition_param_list` of its
`hybrid_zero_optim.py`), Megatron's buffers have the reverse order. A program that exchanges two values under their
names leaves the buffer as it was. One that exchanges two names writes them in another order than in other layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise

from engine.errors import EngineError, Place, counted, first_of
from engine.formats.headers import FileHeader, TensorHeader
from engine.language.documents import grouped

_NUMBER = re.compile(r"(?<=[.])\d+(?=[.])")
_DIGITS, _WIDTH = re.compile(r"\d+"), 8  # so that layer 10 follows layer 9
FEW, _NAMES = 12, 6  # tensors of a buffer, and names of a layer: fewer may be in order by chance
_LAST = re.compile(r"((?:.*[.]\d+[.])?)(.*)", re.DOTALL)  # up to the last number, and the rest


def check_order(headers: Sequence[FileHeader], *, buffers: bool = True) -> tuple[str, ...]:
    """Which names were exchanged in all layers of a file, by one layer: it may be a renaming on purpose.

    Or which layers have each other's places: a program may store its layers in another order.

    It is only known if a buffer is in the order of sizes or names, except for tensors that exchanged places in pairs,
    or for layers that did.

    Args:
        buffers: whether tensors that lie end to end are views of one buffer.

    Raises:
        EngineError: E306 for the first file in which other tensors of equal shapes exchanged names.
    """
    _check_names(headers)
    told: list[str] = []
    for header in headers if buffers else ():
        pairs, found = _pairs(header), list[tuple[str, str]]()
        layers = _moved_layers(pairs)
        if layers and _perhaps_ordered(layers, len(pairs), header.tensors):
            told.append(f"all of {first_of([*layers], 4)} in {header.name}")
            continue
        every = {*pairs}
        pairs = [(one, other) for one, other in pairs if one < other or (other, one) not in every]
        for each in grouped(((_form(one), _form(other)), (one, other)) for one, other in pairs).values():
            if _everywhere(header.tensors, each):
                told.append(f"{each[0][0]} and {each[0][1]} in {header.name}")
            else:
                found += each
        if found:
            more = f"; {counted(len(found) - 1, 'more pair')}" if len(found) > 1 else ""
            raise _refused(
                header,
                *found[0],
                f"each stored where the other belongs{more}",
                "tensors of one buffer in the order of their names, as training saved them",
                "If they were exchanged on purpose, save it again with a copy of each tensor: "
                "`torch.save({name: tensor.clone() for name, tensor in state.items()}, file)`.",
            )
    return tuple(told)


def _refused(header: FileHeader, one: str, other: str, got: str, expected: str, fix: str) -> EngineError:
    return EngineError(
        "E306",
        f"tensors of `{header.name}` have exchanged names",
        place=Place(header.name, tensor=one),
        got=f"`{one}` and `{other}`, {got}",
        expected=expected,
        fix=f"Copy the file again. {fix}",
    )


def _check_names(headers: Sequence[FileHeader]) -> None:
    """E306 for two tensors of equal shapes that are in each other's place among the names of their layer or expert.

    At least half of the layers with these names must have them in one order; of few names, at least three quarters.
    """
    names = [tuple([one.name for one in header.tensors]) for header in headers]
    names = [() if _apart(each) else each for each in names]
    known = {each: _listed(each) for each in {*names}}
    orders = Counter(order for each in names for _, order in known[each])
    usual = {_same(order): order for order, _ in reversed(orders.most_common())}
    every = Counter[tuple[str, ...]]()
    for order, count in orders.items():
        every[_same(order)] += count
    for header, each in zip(headers, names, strict=True):
        for begin, order in known[each]:
            wanted = usual[_same(order)]
            if order == wanted or orders[wanted] < _share(len(order), every[_same(order)]):
                continue
            moved = {one: other for one, other in zip(order, wanted, strict=True) if one != other}
            held = {one.name[len(begin) :]: one for one in header.tensors if one.name.startswith(begin)}
            if all(moved.get(other) == one and _like(held[one], held[other]) for one, other in moved.items()):
                one, other = sorted(begin + name for name in next(iter(moved.items())))
                raise _refused(
                    header,
                    one,
                    other,
                    "each where others of its kind have the other",
                    f"names in one order, as in {counted(orders[wanted] - 1, 'other place')}",
                    "If they were exchanged on purpose, save it again with its names in the order that others have.",
                )


def _same(order: Sequence[str]) -> tuple[str, ...]:
    """What orders of the same names have in common: a name is there as often as the file holds boxes of its tensor."""
    return tuple(sorted(order))


def _share(names: int, places: int) -> float:
    """In how many places names must have one order, so that they do not have it by chance."""
    return max(places / 2, 2) if names >= _NAMES else max(places * 3 / 4, 3)


def _listed(names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """For each part of names up to the last number, the rest of these names, in order."""
    parts = (_LAST.match(name) for name in names)
    found = grouped((part[1], part[2]) for part in parts if part is not None)
    return [(begin, tuple(rest)) for begin, rest in found.items()]


def _pairs(header: FileHeader) -> list[tuple[str, str]]:
    """Names of pairs of tensors that exchanged them; none if names are in no training's order.

    Programs sort names, or put some of them back at the end.
    """
    if _moved([one.name for one in header.tensors]):
        return []
    numbers = {one.name: at for at, one in enumerate(header.tensors)}
    pairs = _exchanged([*buffers(header.tensors)], header.tensors, numbers)
    return [(one.name, other.name) for one, other in pairs]


def _moved(names: Sequence[str]) -> bool:
    """Whether names are sorted, or not layer by layer, or the layers' are in several orders."""
    orders = {order for _, order in _listed(names)}
    return _apart(names) or len(orders) > len({*map(_same, orders)}) or _is_sorted(names)


def _apart(names: Sequence[str]) -> bool:
    """Whether the names of some layer are not one after the other, as a program leaves those that it puts back."""
    layers = [*map(layer_of, names)]
    return len([*groupby(layers)]) > len({*layers})


def layer_of(name: str) -> str:
    """The beginning of a name up to its layer's number, or a whole name that has none."""
    return name[: number.end()] if (number := _NUMBER.search(name)) else name


def _is_sorted(names: Sequence[str]) -> bool:
    """Whether names are in the order of the alphabet, with numbers as text or by their values."""
    padded = [_DIGITS.sub(lambda digits: digits[0].zfill(_WIDTH), name) for name in names]
    return [*names] == sorted(names) or padded == sorted(padded)


def _form(name: str) -> str:
    return _NUMBER.sub("", name)


def _everywhere(tensors: Sequence[TensorHeader], pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether all tensors of two forms, and no others, exchanged names, each with the one of its own layer."""
    forms = {(_form(one), _form(other)) for one, other in pairs}
    within = all(_NUMBER.findall(one) == _NUMBER.findall(other) != [] for one, other in pairs)
    return len(forms) == 1 and within and len(pairs) == sum(_form(one.name) == min(forms)[0] for one in tensors) > 1


def _moved_layers(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Layer → the one that its tensors are stored as, each as the same tensor; nothing if that is not so of all."""
    layers = {layer_of(one): layer_of(other) for one, other in pairs}
    same = all(layers[layer_of(one)] + one.removeprefix(layer_of(one)) == other for one, other in pairs)
    return layers if same and {*layers} == {*layers.values()} else {}


def _perhaps_ordered(layers: Mapping[str, str], moved: int, tensors: Sequence[TensorHeader]) -> bool:
    """Whether a program may have stored layers in another order: most of them moved, and not just two of several.

    Args:
        moved: how many tensors are stored as those of another layer.
    """
    every = [*dict.fromkeys(layer for one in tensors if (layer := layer_of(one.name)) != one.name)]
    ends = len(every) <= 3 and {*layers} == {*every[:1], *every[-1:]}
    most = 2 * moved > sum(layer_of(one.name) in layers for one in tensors)
    return most and moved >= 2 * _NAMES and (ends or len(layers) > 2)


def buffers(tensors: Sequence[TensorHeader]) -> Iterator[Sequence[TensorHeader]]:
    """The tensors of each buffer of several, as they are stored.

    They lie end to end: between others there is at least the header of a zip's entry.
    """
    placed = sorted((one for one in tensors if one.nbytes), key=lambda one: one.offset)
    breaks = [at for at, (one, other) in enumerate(pairwise(placed), 1) if one.offset + one.nbytes != other.offset]
    yield from (placed[begin:end] for begin, end in pairwise([0, *breaks, len(placed)]) if end - begin > 1)


def _exchanged(
    stored: Sequence[Sequence[TensorHeader]], tensors: Sequence[TensorHeader], numbers: Mapping[str, int]
) -> list[tuple[TensorHeader, TensorHeader]]:
    """Pairs of tensors in buffers that are stored where the other one belongs; none if the order says nothing.

    Where layers have each other's places, all of their tensors, each with the one in whose place it is.

    Args:
        stored: the tensors of each buffer. All buffers of a file have one direction, so a small one, such as that of
            two routers, needs no proof of its own if it is the only one of its element type. Several small ones of a
            type may be linears that a program cut into pieces.
        tensors: those of the file, in the order of names.
        numbers: the place of each name in that order.
    """
    types = Counter(buffer[0].dtype for buffer in stored)
    stored = [buffer for buffer in stored if len(buffer) >= FEW or types[buffer[0].dtype] == 1]
    count = sum(map(len, stored))
    if count < FEW:
        return []
    groups = [group for buffer in stored for group in _alike(buffer, numbers)]
    if all(_is_sorted([tensors[one].name for one in each]) for each in groups):
        return []  # as a program leaves them that sorts by names, or by sizes and names

    def misplaced(*, backwards: bool) -> set[tuple[int, int]]:
        ordered = (zip(each, sorted(each, reverse=backwards), strict=True) for each in groups)
        return {(one, wanted) for each in ordered for one, wanted in each if one != wanted}

    both = sorted((misplaced(backwards=False), misplaced(backwards=True)), key=len)
    wrong = both[0]
    found = [(tensors[one], tensors[wanted]) for one, wanted in sorted(wrong) if one < wanted]
    in_pairs = all((wanted, one) in wrong for one, wanted in wrong)
    most = count // (2 if count >= 2 * FEW else 4)
    alone = len(found) == 1  # programs that order parameters otherwise exchange more than one pair
    alike = all(_like(*pair, anywhere=alone) for pair in found)
    few = len(wrong) <= most or _everywhere(tensors, [(one.name, other.name) for one, other in found])
    if in_pairs and few and alike:
        return found
    each = ([(tensors[one], tensors[wanted]) for one, wanted in sorted(wrong)] for wrong in both if both[0])
    return next((moved for moved in each if _moved_layers([(one.name, other.name) for one, other in moved])), [])


def _alike(buffer: Sequence[TensorHeader], numbers: Mapping[str, int]) -> list[list[int]]:
    """The numbers of a buffer's tensors, those of each size by themselves if they are in the order of sizes."""
    sizes = [one.nbytes for one in buffer]
    placed = [numbers[one.name] for one in buffer]
    in_order = sizes == sorted(sizes, reverse=True)
    return [*grouped(zip(sizes, placed, strict=True)).values()] if in_order else [placed]


def _like(one: TensorHeader, other: TensorHeader, *, anywhere: bool = False) -> bool:
    """Whether two tensors of one shape are in the same layer, or are the same parameter of two, or are `anywhere`."""
    near = (
        anywhere
        or _NUMBER.findall(one.name) == _NUMBER.findall(other.name) != []
        or _form(one.name) == _form(other.name)
    )
    return near and (one.shape, one.dtype) == (other.shape, other.dtype)
