"""How deep the tests look: `make test` at a sample of each kind, `make soak` at all of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

SOAK = "SOAK" in os.environ
deep = pytest.mark.skipif(not SOAK, reason="takes long; `make soak` runs it")


# Rows that alone reach a branch of the engine, as a run under coverage with a context for each test says.
ALONE = frozenset(Path(__file__).with_name("alone.txt").read_text(encoding="utf-8").splitlines())
Kind = str | Callable[[Mapping[str, Any]], object]


def sampled(every: int, *kinds: Kind) -> pytest.MarkDecorator:
    """Of the rows of a parametrised test, one of so many, and those in `alone.txt`; `in_sample` chooses them.

    Args:
        every: of each kind the first row is tried and then one of so many, and all in the soak. Where several columns
            are multiplied, not a multiple of the length of the first, else it would always have the same value.
        kinds: what says of which kind a row is: an argument, an attribute of one, as `attack.codes`, or a function.
    """
    return pytest.mark.sampled.with_args(every, *kinds)


def in_sample(items: Iterable[pytest.Item], whole: bool = SOAK) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests to run, and the rows that are left to the soak."""
    rows: Counter[object] = Counter()
    chosen: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        mark = item.get_closest_marker("sampled")
        row = getattr(item, "callspec", None)
        if whole or mark is None or row is None:
            chosen.append(item)
            continue
        every, *kinds = mark.args
        of = item.nodeid.partition("[")[0], *(repr(_kind(row.params, kind)) for kind in kinds)
        (left if rows[of] % every and item.nodeid not in ALONE else chosen).append(item)
        rows[of] += 1
    return chosen, left


def _kind(row: Mapping[str, Any], kind: Kind) -> object:
    if callable(kind):
        return kind(row)
    name, *attributes = kind.split(".")
    value: object = row[name]
    for attribute in attributes:
        value = getattr(value, attribute)
    return value


def examples(most: int) -> int:
    """How many examples a property is tried with, of so many in the soak; they are others each time."""
    return most if SOAK else max(2, most // 8)


def crossed(*columns: Sequence[Any], every: bool = SOAK) -> list[tuple[Any, ...]]:
    """Cases for `parametrize`: all combinations in the soak, else enough that each value of each column occurs.

    For columns that act apart from each other. Rows are shifted, so that columns of one length do not march in step.

    >>> crossed("abc", "xy", every=False)
    [('a', 'x'), ('b', 'y'), ('c', 'y')]
    """
    if every:
        return list(product(*columns))
    return [
        tuple(column[(row + row // len(column) * number) % len(column)] for number, column in enumerate(columns))
        for row in range(max(map(len, columns)))
    ]
