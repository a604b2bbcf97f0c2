"""What is odd in the values of tensors although nothing is wrong with the files: zeros, no numbers, equal tensors.

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
_ZEROS = bytes(8)
_WORDS = 1 << 17  # of which digests are computed at a time
_STEP = 8 * 61  # bytes of which one word is looked at in a large tensor
# At least so many bytes are seen of a page, the least that a file system leaves out, also where ranks cut columns.
_HOLE = 4096 // _STEP // 2 * _STEP
_FEW = 32  # elements that may be equal by chance
_SPLIT = re.compile(r"([0-9]+)").split


@cache
def _of_one(word: bytes, nbytes: int) -> str:
    """The digest of one word of eight bytes, again and again."""
    total, block = xxhash.xxh3_128(), memoryview(word * _WORDS)
    for at in range(0, nbytes, len(block)):
        total.update(block[: nbytes - at])
    return total.hexdigest()


class Look(NamedTuple):
    """What a sample of a tensor's bytes shows: about how many are zero, and whether a number is none, or far too large.

    Of a float type: other numbers may well have such bytes.

    Attributes:
        word: its first eight bytes, and about how many bytes are in `others`.
    """

    zeros: int = 0
    wild: bool = False
    word: bytes = b""
    others: int = 0

    def and_at(self, data: memoryview, size: int) -> Look:
        """With more bytes of a tensor of `size` bytes: of each word of eight, or of one in 61 of a large tensor.

        61 is odd, so that rows of equal lengths hide nothing. Trained weights have no zeros in a row.

        >>> seen = [Look().and_at(memoryview(one), size) for one, size in ((bytes(4880), 1 << 20), (b"1" * 8, 16))]
        >>> seen += [seen[1].and_at(memoryview(b"1234567" + bytes([0x7F])), 16)]
        >>> [(look.zeros, look.wild, look.word[:1], look.others) for look in seen]
        [(4880, False, b'\\x00', 0), (0, False, b'1', 0), (0, True, b'1', 8)]
        """
        step = 8 if size < _SMALL else _STEP
        tops = bytes(data[7::step])
        kinds = tops.translate(_KINDS)
        zeros, wild = self.zeros, self.wild or _WILD in kinds
        word = self.word or bytes(data[: 8 * bool(tops)])
        alike = tops.count(word[7:8]) if tops else 0
        if _ZERO in kinds or 2 * alike > len(tops):  # very rare, except in float16, and of norms
            import numpy as np

            words = np.frombuffer(data, "u8", len(data) // 8)[:: step // 8]
            zeros += int(len(words) - np.count_nonzero(words)) * step
            alike = int(np.count_nonzero(words == np.frombuffer(word, "u8")))
        return Look(zeros, wild, word, self.others + (len(tops) - alike) * step)


def suspicious(tensors: Iterable[tuple[str, str, tuple[int, ...], str, Look]], *, whole: bool = True) -> list[str]:
    """What is odd in tensors, in words: no numbers, nothing but zeros or many of them, equal layers or experts.

    Biases may well be zeros, and norms ones, or nearly all of them.
    A model may have been built by copying layers, so nothing is refused.

    Args:
        tensors: the name, type, shape, digest and look of each.
        whole: whether they are a whole model's; several ranks may hold the same matrix.

    >>> zeros, other = xxhash.xxh3_128(bytes(16)).hexdigest(), xxhash.xxh3_128(b"some").hexdigest()
    >>> some, half = (((2, 4), zeros, Look(16)), ((2, 4), other, Look(8)))
    >>> suspicious([("w", "F16", *some), ("b", "F16", (8,), *some[1:]), ("x", "F16", *half)])
    ['nothing but zeros: w', 'zeros in a part, as of padding tokens, or if a file was not copied completely: x (50%)']
    >>> suspicious([(f"l.{n}.w", "F16", (2, 4), other, Look()) for n in range(3)])
    ['equal to the last bit, as after upcycling, or if a file was copied: l.{0…2}.w']
    >>> suspicious([(f"l.{n}.bias", "F32", (32,), other, Look(others=120)) for n in range(2)])
    ['equal to the last bit, as after upcycling, or if a file was copied: l.{0…1}.bias']
    >>> norm, tiny = ("F32", (4,), other, Look(9)), ("F16", (1, 2), other, Look())
    >>> suspicious([("n.0.weight", *norm), ("n.1.weight", *norm), ("i", "I32", (4,), "", Look(0, True)), ("t", *tiny)])
    []
    """
    zeros: list[str] = []
    constant: list[str] = []
    partly: list[str] = []
    wild: list[str] = []
    alike: dict[str, list[str]] = {}
    for name, dtype, shape, digest, look in tensors:
        nbytes = prod(shape) * ITEM_SIZES[dtype]
        if look.wild and dtype in FLOATS:
            wild.append(name)
        vector = len(shape) < 2
        if not digest or (vector and not name.endswith((".weight", ".bias"))):
            continue
        if digest == _of_one(_ZEROS, nbytes):
            zeros += [name] if not vector or name.endswith(".weight") else []
            continue
        if vector:
            if whole and 2 * look.others > nbytes >= _FEW * ITEM_SIZES[dtype]:
                alike.setdefault(digest, []).append(name)
            continue
        one = look.word[: ITEM_SIZES[dtype]]
        if one and not look.others and look.word == one * (8 // len(one)) and digest == _of_one(look.word, nbytes):
            constant.append(name)
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
        *listed("nothing but one number", constant),
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
