"""Linears that were one while training ran, seen by where their tensors are stored.

InternEvo cuts a fused linear by lengths when it saves it. Its pieces are views of one storage, so that they lie end to
end. So may linears of their own, as the optimizer keeps the parameters of a rank in buffers: sorted by size, and those
of one size in the order of layers (`_partition_param_list` of its `hybrid_zero_optim.py`). What is sorted in a buffer,
the pieces or their linear, tells which of them is the parameter. Nothing is told by copies, which have storages of
their own, nor by buffers that are in another order, as programs leave them that flatten a state or a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, product

from engine.checkpoint.order import FEW, buffers, layer_of
from engine.formats.headers import FileHeader, TensorHeader

_Set = tuple[str, ...]  # names of one linear's pieces, or of linears


@dataclass(frozen=True, slots=True)
class Joined:
    """Whether tensors are pieces of `one` linear, and where that is seen."""

    one: bool
    file: str
    names: _Set


def joined_in(headers: Sequence[FileHeader], words: Mapping[str, Sequence[str]]) -> dict[str, Joined]:
    """What the places of tensors in the first file that tells say about each key.

    Args:
        words: key → the last words of names before the parameter, in the order of one linear's rows.
    """
    found: dict[str, Joined] = {}
    for header in headers if words else ():
        shared = [*buffers(header.tensors)]
        sets = {key: [*_sets(header.tensors, each)] for key, each in words.items()} if shared else {}
        if any(each and key not in found for key, each in sets.items()):
            for key, one, names in _votes(header.tensors, shared, sets):
                found.setdefault(key, Joined(one, header.name, names))
    return found


def _sets(tensors: Sequence[TensorHeader], words: Sequence[str]) -> Iterator[_Set]:
    held = dict.fromkeys(one.name for one in tensors)
    for name in held:
        begin, of, param = name.rpartition(f".{words[0]}.")
        names = tuple(f"{begin}.{word}.{param}" for word in words)
        if of and "." not in param and held.keys() >= {*names}:
            yield names


def _votes(
    tensors: Sequence[TensorHeader], shared: Sequence[Sequence[TensorHeader]], sets: Mapping[str, Sequence[_Set]]
) -> Iterator[tuple[str, bool, _Set]]:
    """A key, whether its linears are one, and some of these: what each buffer tells, and all those that hold one set.

    A buffer tells it if it is sorted in one way only, with these linears as one or apart.
    """
    layers = {layer: at for at, layer in enumerate(dict.fromkeys(layer_of(one.name) for one in tensors))}
    of = {name: (key, names) for key, each in sets.items() for names in each for name in names}
    alone: dict[str, list[_Set]] = {}
    for buffer in shared:
        runs = [[*run] for _, run in groupby(buffer, lambda one: of.get(one.name, (one.name, ())))]
        held = [(*of[run[0].name], len(run)) for run in runs if run[0].name in of]
        first = {key: names for key, names, _ in reversed(held)}
        apart = {key for key, names, count in held if count < len(names)}
        if len(runs) == 1 and first and not apart:
            alone.setdefault(held[0][0], []).append(held[0][1])
        elif len(buffer) >= FEW:
            ways = [dict(zip(first, one, strict=True)) for one in product((True, False), repeat=len(first))]
            fit = [way for way in ways if not any(way[key] for key in apart) and _sorted(runs, of, way, layers)]
            told = {key: {way[key] for way in fit} for key in first}
            yield from ((key, each.pop(), first[key]) for key, each in told.items() if len(each) == 1)
    yield from ((key, True, each[0]) for key, each in alone.items() if len(each) == len(sets[key]) > 1)


def _sorted(
    runs: Sequence[Sequence[TensorHeader]],
    of: Mapping[str, tuple[str, _Set]],
    one: Mapping[str, bool],
    layers: Mapping[str, int],
) -> bool:
    """Whether parameters are in the order of their sizes, then of layers, if those of some keys are `one` linear."""
    parameters = chain.from_iterable(
        [run] if run[0].name in of and one[of[run[0].name][0]] else [[each] for each in run] for run in runs
    )
    order = [(-sum(piece.nbytes for piece in each), layers[layer_of(each[0].name)]) for each in parameters]
    return order == sorted(order)
