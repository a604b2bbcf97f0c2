"""Digests of tensors: xxh3-128 of their bytes in order, computed on blocks while they are in cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import xxhash

from engine.run.looks import Look
from engine.storage.sinks import Checksum

ALGORITHM = "xxh3_128"


class Total:
    """Digest and, if wanted, CRC-32 of one output tensor, over bytes that usually arrive in order.

    >>> total = Total(3, digest=True, checksum=False)
    >>> for start, data in ((0, b"0"), (2, b"2"), (1, b"1")):
    ...     total.add(start, memoryview(data))
    >>> total.mark() is None and total.digest(lambda: [memoryview(b"012")]) == digest_of([b"012"])
    True
    """

    def __init__(self, size: int, *, digest: bool, checksum: bool) -> None:
        self._size, self.look = size, Look()
        self._digest = xxhash.xxh3_128() if digest else None
        self._checksum = Checksum() if checksum else None
        self.end = 0  # bytes added in order
        self._in_order = True

    def add(self, start: int, data: memoryview) -> None:
        if self._checksum is not None:
            self._checksum.add(start, data)
        if self._digest is not None:
            self.look = self.look.and_at(data[-start % 8 :], self._size)  # whole words: parts begin at any byte
        if self._digest is not None and self._in_order:
            if start == self.end:
                self._digest.update(data)
                self.end += len(data)
            else:
                self._in_order = False

    def mark(self) -> tuple[str, int] | None:
        """The digest of the bytes so far, and their number; None when they did not arrive in order."""
        return (self._digest.hexdigest(), self.end) if self._digest is not None and self._in_order else None

    def checksum(self) -> int:
        return self._checksum.result() if self._checksum is not None else 0

    def digest(self, again: Callable[[], Iterable[memoryview]]) -> str:
        """The digest; reads the bytes `again` if they did not arrive in order."""
        if self._digest is None:
            return ""
        return self._digest.hexdigest() if self._in_order else digest_of(again())


def digest_of(blocks: Iterable[memoryview | bytes]) -> str:
    total = xxhash.xxh3_128()
    for block in blocks:
        total.update(block)
    return total.hexdigest()


def content_id(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """One id of a whole checkpoint: SHA-256 over every tensor's name, type, shape and digest, by name.

    File names and sizes do not count, so checkpoints that differ only in how they are split agree.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, digest = tensors[name]
        total.update(f"{name}\0{dtype}\0{'x'.join(map(str, shape))}\0{digest}\n".encode())
    return total.hexdigest()
