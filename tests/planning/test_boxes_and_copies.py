"""Boxes, copies and blocks against brute force over every element."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.formats.headers import dense_strides, span
from engine.language.axes import extent, parse_axes
from engine.move.blocks import blocks
from engine.move.runs import dense_parts, straight
from engine.planning.boxes import Copy, Holding, Region, clip, cut, intersect, regions, swap
from tests.support.depth import examples

SIZES = {
    "groups": 3,
    "queries": 2,
    "k": 1,
    "v": 1,
    "pair": 2,
    "half": 2,
    "head_dim": 4,
    "hidden": 5,
    "q": 1,
    "heads": 3,
}
AXES = [
    "(groups (queries + k + v) head_dim) hidden",
    "((q + k + v) heads head_dim) hidden",
    "(groups ((queries + k) half pair + v pair half)) hidden",
    "hidden (groups queries head_dim)",
    "groups hidden",
]


def elements(copy: Copy) -> set[tuple[int, int]]:
    """Every (source element, target element) of a copy."""
    return {
        (
            copy.source_offset + sum(i * s for i, s in zip(index, copy.source_strides, strict=True)),
            copy.target_offset + sum(i * s for i, s in zip(index, copy.target_strides, strict=True)),
        )
        for index in product(*map(range, copy.shape))
    }


def addresses(region: Region) -> dict[tuple[tuple[str, int], ...], int]:
    """Index over named axes → address, for every element of a region."""
    names = sorted(region.box)
    return {
        tuple(zip(names, index, strict=True)): region.base
        + sum(region.strides[n] * i for n, i in zip(names, index, strict=True))
        for index in product(*(range(*region.box[n]) for n in names))
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (" ".join(f"(a{at} + b{at})" for at in range(6)), None),
        (" ".join(f"(a{at} + b{at})" for at in range(5)) + " (a + b + c)", "more than 64 pieces"),
        ("a" * 1000, None),
        ("a" * 1001, "longer than 1000 characters"),
    ],
)
def test_axes_have_64_pieces_and_1000_characters_at_most(text: str, why: str | None) -> None:
    with pytest.raises(EngineError, match=why) if why else nullcontext():
        parse_axes(text)


@given(st.sampled_from(AXES), st.data())
def test_any_cut_of_rows_partitions_the_whole_and_keeps_addresses(text: str, data: st.DataObject) -> None:
    axes = parse_axes(text)
    rows = extent(axes.dims[0], SIZES)
    inner = prod(extent(d, SIZES) for d in axes.dims[1:])
    whole: dict[tuple[tuple[str, int], ...], int] = {}
    for region in regions(axes, SIZES, (inner, 1)):
        whole.update(addresses(region))
    assert sorted(whole.values()) == list(range(rows * inner))
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, rows), max_size=4))), rows]
    seen: set[tuple[tuple[str, int], ...]] = set()
    for low, high in pairwise(bounds):
        for region in regions(axes, SIZES, (inner, 1), window=((low, high), (0, inner))):
            for index, address in addresses(region).items():
                assert index not in seen
                seen.add(index)
                assert address == whole[index] - low * inner
    assert seen == set(whole)


def test_a_row_cut_inside_a_head_gives_a_head_a_middle_and_a_tail() -> None:
    node = parse_axes("(heads head_dim)").dims[0]
    boxes = [dict(r.box) for r in cut(node, 2, 11, {"heads": 3, "head_dim": 4})]
    assert boxes == [
        {"heads": (0, 1), "head_dim": (2, 4)},
        {"heads": (1, 2), "head_dim": (0, 4)},
        {"heads": (2, 3), "head_dim": (0, 3)},
    ]


@given(
    st.permutations(["groups", "queries", "head_dim", "hidden"]),
    st.permutations(["groups", "queries", "head_dim", "hidden"]),
)
def test_a_copy_between_two_orders_of_axes_is_numpys_transpose(one: list[str], two: list[str]) -> None:
    def part(order: list[str]) -> Holding:
        strides = [prod(SIZES[n] for n in order[i + 1 :]) for i in range(len(order))]
        (region,) = regions(parse_axes(" ".join(order)), SIZES, strides)
        return Holding(0, region)

    copy = intersect(part(one), part(two))
    assert copy is not None
    source = np.arange(prod(SIZES[n] for n in one))
    expected = source.reshape([SIZES[n] for n in one]).transpose([one.index(n) for n in two]).reshape(-1)
    target = np.full_like(source, -1)
    for a, b in elements(copy):
        target[b] = source[a]
    assert (target == expected).all()
    assert {(b, a) for a, b in elements(swap(copy))} == elements(copy)


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    shape = draw(st.lists(st.integers(2, 4), max_size=4))
    target: list[int] = []
    step = draw(st.integers(1, 3))
    for n in reversed(shape):
        target.insert(0, step)
        step = step * n + draw(st.integers(0, 3))
    source = draw(st.lists(st.integers(0, 40), min_size=len(shape), max_size=len(shape)))
    return Copy(0, 0, draw(st.integers(0, 9)), draw(st.integers(0, 9)), tuple(shape), tuple(source), tuple(target))


@given(copies(), st.integers(0, 80), st.integers(0, 80))
def test_clipping_gives_exactly_the_elements_of_the_interval_in_few_copies(copy: Copy, low: int, length: int) -> None:
    parts = list(clip(copy, low, low + length))
    wanted = sorted(e for e in elements(copy) if low <= e[1] < low + length)
    assert sorted(e for part in parts for e in elements(part)) == wanted
    assert len(parts) <= max(1, 2 * len(copy.shape))


@given(copies(), st.integers(0, 20), st.integers(1, 200))
def test_dense_parts_copy_the_same_elements_in_runs_of_bounded_reach(copy: Copy, gap: int, most: int) -> None:
    parts = dense_parts(copy, gap, most)
    assert sorted(e for part in parts for e in elements(part)) == sorted(elements(copy))
    assert all(straight(part) or span(part.shape, part.source_strides) <= most for part in parts)


@settings(max_examples=examples(200))
@given(
    st.sampled_from(AXES),
    st.sampled_from(["rows", "columns"]),
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(1, 3),
)
def test_blocks_cover_the_target_once_whatever_their_size(
    text: str, how: str, ranks: int, limit: int, rows: int
) -> None:
    axes = parse_axes(text)
    shape = [extent(d, SIZES) for d in axes.dims]
    total = prod(shape)
    dim = 0 if how == "rows" else 1
    bounds = [shape[dim] * r // ranks for r in range(ranks + 1)]
    listed = []
    for rank, (low, high) in enumerate(pairwise(bounds)):
        if low == high:
            continue
        if how == "rows":
            listed.append(Copy(rank, 0, 0, low * shape[1], ((high - low) * shape[1],), (1,), (1,)))
        else:
            listed.append(Copy(rank, 0, 0, low, (shape[0], high - low), (high - low, 1), (shape[1], 1)))
    _covered_once(listed, total, limit, shape[1] * rows if shape[0] % rows == 0 else 1)


@pytest.mark.parametrize(
    ("listed", "quantum"),
    [
        ([(0, (3, 2), (4, 1)), (2, (2,), (1,)), (6, (2,), (1,)), (10, (2,), (1,))], 1),  # lie between one's rows
        ([(0, (6,), (1,)), (6, (6,), (1,))], 4),  # one begins within a row
    ],
)
def test_blocks_cover_copies_that_lie_between_others_or_begin_within_a_row(listed: list[Any], quantum: int) -> None:
    copies = [Copy(source, 0, 0, at, shape, shape, strides) for source, (at, shape, strides) in enumerate(listed)]
    _covered_once([one._replace(source_strides=dense_strides(one.shape)) for one in copies], 12, 4, quantum)


def _covered_once(listed: list[Copy], total: int, limit: int, quantum: int) -> None:
    wanted = {(c.source, *e) for c in listed for e in elements(c)}
    seen: set[tuple[int, int, int]] = set()
    end = 0
    for block in blocks(listed, total, limit, quantum):
        assert block.low == end
        assert block.low % quantum == 0
        end = block.high
        for copy, shift in zip(block.template, block.shifts, strict=True):
            for a, b in elements(copy):
                assert 0 <= b < block.high - block.low
                item = (copy.source, a + block.step * shift, b + block.low)
                assert item not in seen
                seen.add(item)
    assert end == total
    assert seen == wanted
