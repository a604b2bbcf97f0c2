"""Axes: how the storage shape of a tensor is written over named axes.

`(groups (queries + k + v) head_dim) | hidden` has two storage dimensions. The first groups three
axes, outermost first; the middle one concatenates queries, key and value. The bar separates the
dimensions that a weight shares with its bias from those that only the weight has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from engine.errors import EngineError, Lines, Place


@dataclass(frozen=True, slots=True)
class Axis:
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Product:
    """Axes that share a storage dimension, outermost first."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " ".join(f"({t})" if isinstance(t, Sum) else str(t) for t in self.terms)


@dataclass(frozen=True, slots=True)
class Sum:
    """Alternatives stored one after the other."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " + ".join(str(t) for t in self.terms)


Node = Axis | Product | Sum


@dataclass(frozen=True, slots=True)
class Axes:
    """Storage dimensions, and how many of them are before the bar (None: no bar)."""

    dims: tuple[Node, ...]
    bar: int | None = None
    _names: tuple[str, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", tuple(dict.fromkeys(name for dim in self.dims for name in leaves(dim))))

    def bias(self) -> Axes:
        """The axes of the bias: everything before the bar."""
        return Axes(self.dims if self.bar is None else self.dims[: self.bar])

    def weight(self) -> Axes:
        return Axes(self.dims)

    def names(self) -> tuple[str, ...]:
        """Every axis once, in order of first appearance."""
        return self._names

    def pieces(self) -> tuple[tuple[str, ...], ...]:
        """Multiply out the sums: the axes of each piece, in storage order.

        >>> parse_axes("(heads (q + k)) | hidden").pieces()
        (('heads', 'q', 'hidden'), ('heads', 'k', 'hidden'))
        """
        return _pieces(self.dims)

    def __str__(self) -> str:
        parts = [str(d) if isinstance(d, Axis) else f"({d})" for d in self.dims]
        if self.bar is not None:
            parts.insert(self.bar, "|")
        return " ".join(parts)


def leaves(node: Node) -> Iterator[str]:
    if isinstance(node, Axis):
        yield node.name
    else:
        for term in node.terms:
            yield from leaves(term)


@lru_cache(maxsize=1024)  # asked again for every combination of variants
def _pieces(dims: tuple[Node, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(_alternatives(Product(dims)))


def _alternatives(node: Node) -> list[tuple[str, ...]]:
    if isinstance(node, Axis):
        return [(node.name,)]
    if isinstance(node, Sum):
        return [piece for term in node.terms for piece in _alternatives(term)]
    result: list[tuple[str, ...]] = [()]
    for term in node.terms:
        result = [left + right for left in result for right in _alternatives(term)]
    return result


def extent(node: Node, sizes: Mapping[str, int]) -> int:
    """The number of storage positions a node spans.

    >>> extent(parse_axes("(groups (queries + k + v) d)").dims[0], dict(groups=2, queries=4, k=1, v=1, d=8))
    96
    """
    if isinstance(node, Axis):
        return sizes[node.name]
    if isinstance(node, Sum):
        return sum(extent(term, sizes) for term in node.terms)
    return prod(extent(term, sizes) for term in node.terms)


_TOKEN = re.compile(r"([A-Za-z_][A-Za-z0-9_]*|[()+|])|(\S)")
_MAX_LENGTH = 1000
_MAX_DEPTH = 16
_MAX_PIECES = 64


Failing = Callable[[str, int], EngineError]  # what is wrong, and at which character


@lru_cache(maxsize=4096)
def parse_axes(text: str, place: Place | None = None) -> Axes:
    """Parse axes; E103 says what is wrong and where in the text.

    >>> str(parse_axes("((q + k + v) heads head_dim) | hidden"))
    '((q + k + v) heads head_dim) | hidden'
    """

    def fail(message: str, at: int) -> EngineError:
        where = place
        if place is not None and place.column is not None:
            where = Place(place.file, place.line, place.column + at)
        return EngineError(
            "E103",
            f"axes cannot be read: {message}",
            place=where,
            got=Lines.of([text, f"{' ' * at}^"]),
            fix="Write axis names separated by spaces, one storage dimension each; group with ( ), "
            "concatenate with + inside a group, end the bias with |.",
        )

    axes = _read_axes(text, fail)
    _check_pieces(axes, text, fail)
    return axes


def _read_axes(text: str, fail: Failing) -> Axes:
    if len(text) > _MAX_LENGTH:
        raise fail(f"longer than {_MAX_LENGTH} characters", 0)
    tokens: list[tuple[str, int]] = []
    for match in _TOKEN.finditer(text):
        if match[2]:
            raise fail(f"unexpected `{match[2]}`", match.start())
        tokens.append((match[1], match.start()))
    tokens.append(("", len(text)))
    left = iter(tokens)
    bar: int | None = None

    def read(depth: int, opened: int) -> list[Node]:
        """Parse storage dimensions, or, inside a group that was `opened`, the terms of its `+`."""
        nonlocal bar
        if depth > _MAX_DEPTH:
            raise fail("groups are nested too deeply", opened)
        alternatives: list[Node] = []
        terms: list[Node] = []
        for token, at in left:
            if token == "(":
                inside = read(depth + 1, at)
                terms.append(inside[0] if len(inside) == 1 else Sum(tuple(inside)))
            elif token in ("+", ")"):
                if not depth:
                    raise fail(f"`{token}` outside a group", at)
                if not terms:
                    raise fail(f"an axis is missing before `{token}`", at)
                alternatives.append(terms[0] if len(terms) == 1 else Product(tuple(terms)))
                terms = []
                if token == ")":
                    return alternatives
            elif depth and token in ("", "|"):
                raise fail("a group is not closed", opened)
            elif token == "|":
                if bar is not None:
                    raise fail("a second `|`", at)
                if not terms:
                    raise fail("nothing before `|`: a bias has at least one dimension", at)
                bar = len(terms)
            elif token:
                terms.append(Axis(token))
        return terms

    dims = read(0, 0)
    if not dims:
        raise fail("there are no axes", 0)
    return Axes(tuple(dims), bar)


def _check_pieces(axes: Axes, text: str, fail: Failing) -> None:
    """Few pieces, each with every axis once, and no two with the same axes."""
    count = 1
    for dim in axes.dims:
        count *= len(_alternatives(dim))
        if count > _MAX_PIECES:
            raise fail(f"more than {_MAX_PIECES} pieces", 0)
    seen: set[frozenset[str]] = set()
    for piece in axes.pieces():
        twice = [name for name in piece if piece.count(name) > 1]
        if twice:
            raise fail(f"axis `{twice[0]}` occurs twice in one piece", text.find(twice[0]))
        if frozenset(piece) in seen:
            raise fail(f"two pieces have the same axes: {{{', '.join(piece)}}}", 0)
        seen.add(frozenset(piece))
