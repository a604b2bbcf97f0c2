"""Digests of tensors: xxh3-128 of their bytes in order, computed on blocks while they are in cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from math import prod

import xxhash

from engine.errors import first_of
from engine.language.names import form
from engine.storage.sinks import Checksum

ALGORITHM = "xxh3_128"


class Total:
    """Digest and, if wanted, CRC-32 of one output tensor, over bytes that usually arrive in order.

    >>> total = Total(digest=True, checksum=False)
    >>> for start, data in ((0, b"0"), (2, b"2"), (1, b"1")):
    ...     total.add(start, memoryview(data))
    >>> total.mark() is None and total.digest(lambda: [memoryview(b"012")]) == digest_of([b"012"])
    True
    """

    def __init__(self, *, digest: bool, checksum: bool) -> None:
        self._digest = xxhash.xxh3_128() if digest else None
        self._checksum = Checksum() if checksum else None
        self.end = 0  # bytes added in order
        self._in_order = True

    def add(self, start: int, data: memoryview) -> None:
        if self._checksum is not None:
            self._checksum.add(start, data)
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


_ZEROS = bytes(1 << 20)
_SPLIT = re.compile(r"([0-9]+)").split


@cache
def _of_zeros(nbytes: int) -> str:
    return digest_of(_ZEROS[: nbytes - at] for at in range(0, nbytes, len(_ZEROS)))


def suspicious(tensors: Iterable[tuple[str, tuple[int, ...], int, str]], *, whole: bool = True) -> list[str]:
    """Matrices that hold nothing but zeros, and those of layers or experts that are equal, in words.

    Biases may well be zeros, and norms ones. A model may have been built by copying layers, so nothing is refused.

    Args:
        tensors: the name, shape, bytes and digest of each.
        whole: whether they are a whole model's; several ranks may hold the same matrix.

    >>> zeros, other = digest_of([bytes(16)]), digest_of([b"some"])
    >>> suspicious([("w", (2, 4), 16, zeros), ("b", (8,), 16, zeros), ("l.0.w", (2, 4), 16, other)])
    ['nothing but zeros: w']
    >>> suspicious([(f"l.{n}.w", (2, 4), 16, other) for n in range(3)])
    ['equal to the last bit, as after upcycling, or if a file was copied: l.{0…2}.w']
    """
    zeros: list[str] = []
    alike: dict[tuple[str, str], list[str]] = {}
    for name, shape, nbytes, digest in tensors:
        if len(shape) < 2 or not digest:
            continue
        if digest == _of_zeros(nbytes):
            zeros.append(name)
        elif whole:
            alike.setdefault((form(name), digest), []).append(name)
    copies = [_together(names) for names in alike.values() if len(names) > 1]
    told = "equal to the last bit, as after upcycling, or if a file was copied"
    return [*listed("nothing but zeros", zeros), *listed(told, copies)]


def _together(names: Sequence[str]) -> str:
    """Names that differ in their numbers as one name.

    >>> _together(["l.0.w", "l.1.w"]), _together(["l.0.w", "l.5.w"]), _together(["l.0.e.1.w", "l.1.e.0.w"])
    ('l.{0…1}.w', 'l.{0, 5}.w', 'l.0.e.1.w and l.1.e.0.w')
    """
    parts = [
        sorted(set(column), key=lambda part: (len(part), part)) for column in zip(*map(_SPLIT, names), strict=True)
    ]
    if prod(map(len, parts)) != len(names):  # not every number of one with every number of another
        return " and ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return "".join(part[0] if len(part) == 1 else f"{{{_numbers(part)}}}" for part in parts)


def _numbers(texts: Sequence[str]) -> str:
    first, last = int(texts[0]), int(texts[-1])
    return f"{first}…{last}" if last - first == len(texts) - 1 else first_of(texts, 8)


def listed(what: str, names: Collection[str]) -> list[str]:
    """A message that names some of the tensors, if there are any."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [f"{what}: {', '.join(list(names)[:4])}{more}"] if names else []


def content_id(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """One id of a whole checkpoint: SHA-256 over every tensor's name, type, shape and digest, by name.

    File names and sizes do not count, so checkpoints that differ only in how they are split agree.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, digest = tensors[name]
        total.update(f"{name}\0{dtype}\0{'x'.join(map(str, shape))}\0{digest}\n".encode())
    return total.hexdigest()
