"""What is odd in the values of tensors although nothing is wrong with the files: zeros, no numbers, equal matrices.

A run looks at a sample while bytes are in cache, since looking at all of them would take longer than copying them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import xxhash

from engine.errors import first_of
from engine.formats.headers import FLOATS, ITEM_SIZES
from engine.language.documents import grouped
from engine.language.names import form

_SMALL = 1 << 16  # bytes of a tensor of which every word is looked at
_ZERO, _WILD = b"01"  # kinds of a number's last byte, its sign and the top of its exponent
_KINDS = bytes(_ZERO if not one else _WILD if one & 0x7F >= 0x7C else 0 for one in range(256))
_ZEROS = bytes(1 << 20)
_STEP = 8 * 61  # bytes of which one word is looked at in a large tensor
_HOLE = 4096 // _STEP * _STEP  # bytes: as many are seen of the least that a file system leaves out
_SPLIT = re.compile(r"([0-9]+)").split


@cache
def _of_zeros(nbytes: int) -> str:
    total = xxhash.xxh3_128()
    for at in range(0, nbytes, len(_ZEROS)):
        total.update(memoryview(_ZEROS)[: nbytes - at])
    return total.hexdigest()


class Look(NamedTuple):
    """What a sample of a tensor's bytes shows: about how many are zero, and whether a number is none, or far too large.

    Of a float type: other numbers may well have such bytes.
    """

    zeros: int = 0
    wild: bool = False

    def and_at(self, data: memoryview, size: int) -> Look:
        """With more bytes of a tensor of `size` bytes: of each word of eight, or of one in 61 of a large tensor.

        61 is odd, so that rows of equal lengths hide nothing. Trained weights have no zeros in a row.

        >>> Look().and_at(memoryview(bytes(4880)), 1 << 20), Look().and_at(memoryview(bytes([0, 1] * 2440)), 4880)
        (Look(zeros=4880, wild=False), Look(zeros=0, wild=False))
        >>> Look(zeros=8).and_at(memoryview(b"1234567\x7f"), 16).and_at(memoryview(bytes(8)), 16)
        Look(zeros=16, wild=True)
        """
        step = 8 if size < _SMALL else _STEP
        kinds = bytes(data[7::step]).translate(_KINDS)
        zeros, wild = self.zeros, self.wild or _WILD in kinds
        if _ZERO in kinds:  # very rare, except in float16
            import numpy as np

            words = np.frombuffer(data, "u8", len(data) // 8)[:: step // 8]
            zeros += int(len(words) - np.count_nonzero(words)) * step
        return Look(zeros, wild)


def suspicious(tensors: Iterable[tuple[str, str, tuple[int, ...], str, Look]], *, whole: bool = True) -> list[str]:
    """What is odd in tensors, in words: no numbers, nothing but zeros or many of them, equal layers or experts.

    Biases may well be zeros, and norms ones. A model may have been built by copying layers, so nothing is refused.

    Args:
        tensors: the name, type, shape, digest and look of each.
        whole: whether they are a whole model's; several ranks may hold the same matrix.

    >>> zeros, other = xxhash.xxh3_128(bytes(16)).hexdigest(), xxhash.xxh3_128(b"some").hexdigest()
    >>> some, half = (((2, 4), zeros, Look(16)), ((2, 4), other, Look(8)))
    >>> suspicious([("w", "F16", *some), ("b", "F16", (8,), *some[1:]), ("x", "F16", *half)])
    ['nothing but zeros: w', 'zeros in a part, as of padding tokens, or if a file was not copied completely: x (50%)']
    >>> suspicious([(f"l.{n}.w", "F16", (2, 4), other, Look()) for n in range(3)])
    ['equal to the last bit, as after upcycling, or if a file was copied: l.{0…2}.w']
    >>> norm, tiny = ("F32", (4,), other, Look(9)), ("F16", (1, 2), other, Look())
    >>> suspicious([("n.0.weight", *norm), ("n.1.weight", *norm), ("i", "I32", (4,), "", Look(0, True)), ("t", *tiny)])
    []
    """
    zeros: list[str] = []
    partly: list[str] = []
    wild: list[str] = []
    alike: dict[str, list[str]] = {}
    for name, dtype, shape, digest, look in tensors:
        nbytes = prod(shape) * ITEM_SIZES[dtype]
        if look.wild and dtype in FLOATS:
            wild.append(name)
        if not digest or (len(shape) < 2 and not name.endswith(".weight")):
            continue
        if digest == _of_zeros(nbytes):
            zeros.append(name)
            continue
        if len(shape) < 2:
            continue
        if look.zeros >= min(_HOLE, nbytes // 16) > 0:
            partly.append(f"{name} ({max(min(look.zeros * 100 // nbytes, 99), 1)}%)")
        if whole and _SPLIT(name)[1:]:  # has a number: an embedding may be the head too
            alike.setdefault(digest, []).append(name)
    copies = [_together(names) for names in alike.values() if len(names) > 1]
    told = "equal to the last bit, as after upcycling, or if a file was copied"
    holes = listed("zeros in a part, as of padding tokens, or if a file was not copied completely", partly)
    return [
        *listed("NaN, infinity or far too large numbers", wild),
        *listed("nothing but zeros", zeros),
        *holes,
        *listed(told, copies),
    ]


def _together(names: Sequence[str]) -> str:
    """Names that differ in their numbers as one name.

    >>> _together(["l.0.w", "l.1.w"]), _together(["l.0.w", "l.5.w"]), _together(["l.0.e.1.w", "l.1.e.0.w"])
    ('l.{0…1}.w', 'l.{0, 5}.w', 'l.0.e.1.w and l.1.e.0.w')
    >>> _together(["l.0.w", "l.0.v", "l.1.w"])
    'l.{0…1}.w and l.0.v'
    """
    kinds = grouped((form(name), name) for name in names)
    if len(kinds) > 1:
        return " and ".join(map(_together, kinds.values()))
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
