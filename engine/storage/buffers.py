"""Buffers that one call of the system reads into, or writes from, one after the other."""

from __future__ import annotations

from collections.abc import Sequence


def after(parts: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of buffers without their first bytes.

    >>> [part.tolist() for part in after([memoryview(b"ab"), memoryview(b"cd")], 3)]
    [[100]]
    """
    left = []
    for part in parts:
        if nbytes < part.nbytes:
            left.append(part[nbytes:])
        nbytes = max(nbytes - part.nbytes, 0)
    return left
