"""How deep the tests look: `make test` at a sample of each kind, `make soak` at all of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

SOAK = "SOAK" in os.environ
deep = pytest.mark.skipif(not SOAK, reason="takes long; `make soak` runs it")


def examples(most: int) -> int:
    """How many examples a property is tried with, of so many in the soak; they are others each time."""
    return most if SOAK else most // 4


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
