"""Conditions and ranges of requests, as RFC 9110 has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.serve.ranges import Part, part_of

WHOLE = Part(200, 0, 10)
CASES = [
    ({}, WHOLE),
    ({"range": "bytes=0-0"}, Part(206, 0, 1)),
    ({"range": "bytes=3-"}, Part(206, 3, 10)),
    ({"range": "bytes=3-99999999999999999999"}, Part(206, 3, 10)),
    ({"range": "BYTES = 3-4"}, Part(206, 3, 5)),
    ({"range": "bytes=-4"}, Part(206, 6, 10)),
    ({"range": "bytes=-40"}, Part(206, 0, 10)),
    ({"range": "bytes=10-"}, Part(416)),
    ({"range": "bytes=99999999999999999999-"}, Part(416)),
    ({"range": "bytes=-0"}, Part(416)),
    ({"range": "bytes=5-2"}, Part(416)),
    ({"range": "bytes=-"}, Part(416)),
    ({"range": "bytes="}, Part(416)),
    ({"range": "bytes=1-2,4-5"}, Part(416)),
    ({"range": "bytes=" + ",".join(["0-"] * 1000)}, Part(416)),
    ({"range": "bytes=a-b"}, Part(416)),
    ({"range": "bytes=١-٢"}, Part(416)),
    ({"range": "bytes=--5"}, Part(416)),
    ({"range": "lines=1-2"}, WHOLE),
    ({"range": "bytes=3-4", "if-range": '"tag"'}, Part(206, 3, 5)),
    ({"range": "bytes=3-4", "if-range": '"other"'}, WHOLE),
    ({"range": "bytes=3-4", "if-range": 'W/"tag"'}, WHOLE),
    ({"range": "bytes=3-4", "if-range": "Sat, 28 Nov 2026 04:00:54 GMT"}, WHOLE),
    ({"if-none-match": '"tag"'}, Part(304)),
    ({"if-none-match": 'W/"x", W/"tag"'}, Part(304)),
    ({"if-none-match": "*"}, Part(304)),
    ({"if-none-match": '"other"'}, WHOLE),
    ({"if-none-match": "tag"}, WHOLE),
    ({"if-none-match": '"tag"', "range": "bytes=0-1"}, Part(304)),
    ({"if-match": '"tag"'}, WHOLE),
    ({"if-match": '"other"'}, Part(412)),
    ({"if-match": '"other"', "if-none-match": '"tag"'}, Part(412)),
]


@pytest.mark.parametrize(("headers", "part"), CASES)
def test_a_request_gets_the_part_that_it_asks_for(headers: dict[str, str], part: Part) -> None:
    assert part_of("GET", headers, 10, "tag") == part


@pytest.mark.parametrize(("headers", "part"), CASES)
def test_head_knows_conditions_but_no_ranges(headers: dict[str, str], part: Part) -> None:
    assert part_of("HEAD", headers, 10, "tag") == (part if part.status in (304, 412) else WHOLE)


@given(st.integers(0, 50), st.text(alphabet="0123456789-,= bytes", max_size=20))
def test_no_range_leaves_the_file(size: int, text: str) -> None:
    part = part_of("GET", {"range": f"bytes={text}"}, size, "tag")
    assert part.status in (206, 416) and 0 <= part.start <= part.stop <= size
    assert (part.status == 206) == (part.start < part.stop)
