"""From SentencePiece's scores to the ranked merges that `tokenizers` wants.

SentencePiece joins the neighbours whose *joined piece* scores highest, and of equal scores the
leftmost. `tokenizers` joins the pair of the lowest *rank*, and ranks are never equal. So among
pairs of equal score the order must be chosen such that rank decides as position would: of two pairs
that can compete for a symbol, `(a, b)` and `(b, c)`, the first always stands further left.

    aba, bab of equal score, text a ba b:   (a, ba) competes with (ba, b) and must come first
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from itertools import groupby

Pair = tuple[str, str]


def ranked_merges(scores: Mapping[str, float]) -> list[Pair]:
    """Every way to join two pieces into a third, in the order `tokenizers` must try them.

    >>> ranked_merges({"a": 0.0, "b": 0.0, "ab": -1.0, "abb": -2.0})
    [('a', 'b'), ('ab', 'b')]
    >>> ranked_merges({"a": 0.0, "aa": -1.0, "aaa": -2.0})    # of a run, the left end is joined first
    [('a', 'a'), ('aa', 'a'), ('a', 'aa')]
    """
    pairs = [
        (score, (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pairs.sort(key=lambda item: (-item[0], -len(item[1][0]), item[1]))
    merges: list[Pair] = []
    for _, group in groupby(pairs, key=lambda item: item[0]):
        merges.extend(_leftmost_first([pair for _, pair in group]))
    return merges


def _leftmost_first(pairs: list[Pair]) -> Iterator[Pair]:
    """Order pairs of one score so that `(a, b)` precedes `(b, c)`; where that runs in circles, the
    given order holds, longest left part first: in a run of one character the left end is longer.
    """
    by_left: dict[str, list[int]] = {}
    for index, (left, _) in enumerate(pairs):
        by_left.setdefault(left, []).append(index)
    after = [[other for other in by_left.get(right, ()) if other != index] for index, (_, right) in enumerate(pairs)]
    waiting = [0] * len(pairs)
    for followers in after:
        for follower in followers:
            waiting[follower] += 1
    ready = [index for index, count in enumerate(waiting) if count == 0]
    done = [False] * len(pairs)
    stuck = 0
    for _ in pairs:
        while ready and done[ready[0]]:
            heapq.heappop(ready)
        if ready:
            index = heapq.heappop(ready)
        else:
            while done[stuck]:
                stuck += 1
            index = stuck
        done[index] = True
        yield pairs[index]
        for follower in after[index]:
            waiting[follower] -= 1
            if waiting[follower] == 0 and not done[follower]:
                heapq.heappush(ready, follower)
