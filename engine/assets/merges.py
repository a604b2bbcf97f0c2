"""From SentencePiece's scores to the ranked merges that `tokenizers` needs.

SentencePiece joins the neighbours whose *joined piece* scores highest; among equal scores, the
leftmost. `tokenizers` joins the pair of lowest *rank*, and ranks are never equal. So pairs of equal
score must be ordered such that the rank decides as the position would: of two pairs that can
compete for a symbol, `(a, b)` and `(b, c)`, the first is always further left.

    aba, bab of equal score, text a ba b:   (a, ba) competes with (ba, b) and must come first
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby

from engine.language.documents import grouped

Pair = tuple[str, str]


def ranked_merges(scores: Mapping[str, float]) -> list[Pair]:
    """Every way to join two pieces into a third, in the order in which `tokenizers` must try them.

    >>> ranked_merges({"a": 0.0, "b": 0.0, "ab": -1.0, "abb": -2.0})
    [('a', 'b'), ('ab', 'b')]
    >>> ranked_merges({"a": 0.0, "aa": -1.0, "aaa": -2.0})    # in a run, the left end is joined first
    [('a', 'a'), ('aa', 'a'), ('a', 'aa')]
    """
    merges: list[Pair] = []
    for _, group in groupby(sorted(scores, key=scores.__getitem__, reverse=True), key=scores.__getitem__):
        start, alike = len(merges), list(group)
        for piece in alike:
            for cut in range(len(piece) - 1, 0, -1):
                if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores:
                    merges.append((left, right))
        # Most scores belong to one piece. Its pairs `(a, b)` and `(b, c)` can only compete if the piece's first
        # character occurs in it twice; otherwise they already are in order, longest left part first.
        if len(alike) > 1 or alike[0][:1] in alike[0][1:]:
            merges[start:] = _leftmost_first(merges[start:])
    return merges


def _leftmost_first(pairs: list[Pair]) -> Iterator[Pair]:
    """Order pairs of equal score so that `(a, b)` precedes `(b, c)`; where that is circular, the
    longest left part comes first: in a run of one character the left end is longer.
    """
    pairs = sorted(pairs, key=lambda pair: (-len(pair[0]), pair))
    by_left = grouped((left, index) for index, (left, _) in enumerate(pairs))
    after = [[other for other in by_left.get(right, ()) if other != index] for index, (_, right) in enumerate(pairs)]
    waiting = Counter(follower for followers in after for follower in followers)
    ready = [index for index in range(len(pairs)) if not waiting[index]]
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
