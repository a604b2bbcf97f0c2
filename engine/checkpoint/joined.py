"""Linears that were one while training ran, seen by where their tensors are stored.

InternEvo cuts a fused linear by lengths when it saves it. Its pieces are views of one storage, so that they lie end to
end. So may linears of their own, as the optimizer keeps the parameters of a rank in buffers: sorted by size, and those
of one size in the order of layers (`_partition_param_list` of its `hybrid_zero_optim.py`). What is sorted in a buffer,
the pieces or their linear, tells which of them is the parameter. Copies of tensors have storages of their own, and tell
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, product

from engine.checkpoint.order import buffers, layer_of
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
    for header in headers:
        sets = {key: [*_sets(header.tensors, each)] for key, each in words.items()}
        if any(each and key not in found for key, each in sets.items()):
            for key, one, names in _votes(header.tensors, sets):
                found.setdefault(key, Joined(one, header.name, names))
    return found


def _sets(tensors: Sequence[TensorHeader], words: Sequence[str]) -> Iterator[_Set]:
    held = dict.fromkeys(one.name for one in tensors)
    for name in held:
        begin, of, param = name.rpartition(f".{words[0]}.")
        names = tuple(f"{begin}.{word}.{param}" for word in words)
        if of and "." not in param and held.keys() >= {*names}:
            yield names


def _votes(tensors: Sequence[TensorHeader], sets: Mapping[str, Sequence[_Set]]) -> Iterator[tuple[str, bool, _Set]]:
    layers = {layer: at for at, layer in enumerate(dict.fromkeys(layer_of(one.name) for one in tensors))}
    of = {name: (key, names) for key, each in sets.items() for names in each for name in names}
    alone: dict[str, list[_Set]] = {}
    for buffer in buffers(tensors):
        runs = [[*run] for _, run in groupby(buffer, lambda one: of.get(one.name, (one.name, ())))]
        first = {of[run[0].name][0]: of[run[0].name][1] for run in reversed(runs) if run[0].name in of}
        split = {of[run[0].name] for run in runs if run[0].name in of and len(run) < len(of[run[0].name][1])}
        apart = {key: names for key, names in split}
        tried = [dict(zip(first, one, strict=True)) for one in product((True, False), repeat=len(first))]
        fit = [one for one in tried if not any(map(one.get, apart)) and _sorted(runs, of, one, layers)]
        for key, names in first.items():
            if len(runs) == 1 and not apart:
                alone.setdefault(key, []).append(names)
                continue
            told = {False} if key in apart else {one[key] for one in fit}
            yield from ((key, one, apart.get(key, names)) for one in told if len(told) == 1)
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
