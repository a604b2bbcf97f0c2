"""Parts: shards that record which rows of a larger tensor they hold, checked against the order of their ranks.

Trusting the record alone would let in a file of another run; trusting the order alone, a renamed file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.checkpoint.ranks import RankFile
from engine.errors import EngineError, Place
from engine.planning.stored import Stored

Ranks = tuple[int, ...]
Shards = Mapping[Ranks, tuple[Stored, ...]]


def fold_replicas(shards: Shards, files: Sequence[RankFile]) -> dict[Ranks, tuple[Stored, ...]]:
    """Shards that hold the same rows together, those that hold none left out.

    Ranks along the last coordinate hold rows one after the other. When all rows are there, the next
    rank starts again: groups smaller than all ranks cut the tensor each. Four ranks in two groups,
    over five rows, become two shards of two replicas:

        rank 0: 0..3   rank 1: 3..5   rank 2: 0..3   rank 3: 3..5   →   (0,): ranks 0, 2   (1,): ranks 1, 3

    Raises:
        EngineError: E208 when the recorded rows do not follow each other in the order of ranks.
    """
    lines: dict[Ranks, list[tuple[Stored, ...]]] = {}
    for ranks in sorted(shards):
        lines.setdefault(ranks[:-1], []).append(shards[ranks])
    result: dict[Ranks, tuple[Stored, ...]] = {}
    for others, line in lines.items():
        rows, end, position = line[0][0].header.whole[0], 0, 0
        for held in line:
            if end == rows and any(one.header.shape[0] for one in held):
                end = position = 0
            for one in held:
                if _start(one) != end or one.header.shape != held[0].header.shape:
                    raise _out_of_order(one, files, end)
            end += held[0].header.shape[0]
            if held[0].header.shape[0]:
                result[*others, position] = (*result.get((*others, position), ()), *held)
                position += 1
        if end != rows:
            raise _out_of_order(line[-1][0], files, end)
    return result


def _start(one: Stored) -> int:
    return 0 if one.header.part is None else one.header.part.start


def _out_of_order(one: Stored, files: Sequence[RankFile], end: int) -> EngineError:
    first, count, rows = _start(one), one.header.shape[0], one.header.whole[0]
    return EngineError(
        "E208",
        f"shards of `{one.name}` do not follow each other in the order of ranks",
        place=Place(files[one.file].name, tensor=one.header.name),
        got=f"rows {first} to {first + count} of {rows}, by the shard's own record",
        expected=f"rows from {end} on, where the rank before ends" if first != end else f"all {rows} rows on some rank",
        fix="Files were renamed, are missing at the end, or are from another run: copy them again.",
    )


def unexpected_part(one: Stored, file: RankFile) -> EngineError:
    """E303 for a shard in files whose mode cuts by rank, and for a tensor that only some files shard."""
    sharded = one.header.part is not None
    return EngineError(
        "E303",
        f"`{one.name}` is {'a shard' if sharded else 'no shard'}, unlike what its file's name or other ranks say",
        place=Place(file.name, tensor=one.header.name),
        got="a ShardedTensor, as FSDP saves it" if sharded else "a plain tensor",
        expected=f"plain tensors in `{file.pattern.name}`, or the same on every rank",
        fix="The file was renamed or is from another run: FSDP's files keep their names, `_dp` and a number.",
    )
