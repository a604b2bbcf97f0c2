"""Conditions and ranges of requests, as RFC 9110 has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.serve.ranges import Reply, reply_to

WHOLE = Reply(200, 0, 10)
CASES = [
    ({}, WHOLE),
    ({"range": "bytes=0-0"}, Reply(206, 0, 1)),
    ({"range": "bytes=3-"}, Reply(206, 3, 10)),
    ({"range": "bytes=3-99999999999999999999"}, Reply(206, 3, 10)),
    ({"range": "BYTES = 3-4"}, Reply(206, 3, 5)),
    ({"range": "bytes=-4"}, Reply(206, 6, 10)),
    ({"range": "bytes=-40"}, Reply(206, 0, 10)),
    ({"range": "bytes=10-"}, Reply(416)),
    ({"range": "bytes=99999999999999999999-"}, Reply(416)),
    ({"range": "bytes=-0"}, Reply(416)),
    ({"range": "bytes=5-2"}, Reply(416)),
    ({"range": "bytes=-"}, Reply(416)),
    ({"range": "bytes="}, Reply(416)),
    ({"range": "bytes=1-2,4-5"}, Reply(416)),
    ({"range": "bytes=" + ",".join(["0-"] * 1000)}, Reply(416)),
    ({"range": "bytes=a-b"}, Reply(416)),
    ({"range": "bytes=١-٢"}, Reply(416)),
    ({"range": "bytes=--5"}, Reply(416)),
    ({"range": "lines=1-2"}, WHOLE),
    ({"range": "bytes=3-4", "if-range": '"tag"'}, Reply(206, 3, 5)),
    ({"range": "bytes=3-4", "if-range": '"other"'}, WHOLE),
    ({"range": "bytes=3-4", "if-range": 'W/"tag"'}, WHOLE),
    ({"range": "bytes=3-4", "if-range": "Sat, 28 Nov 2026 04:00:54 GMT"}, WHOLE),
    ({"if-none-match": '"tag"'}, Reply(304)),
    ({"if-none-match": 'W/"x", W/"tag"'}, Reply(304)),
    ({"if-none-match": "*"}, Reply(304)),
    ({"if-none-match": '"other"'}, WHOLE),
    ({"if-none-match": "tag"}, WHOLE),
    ({"if-none-match": '"tag"', "range": "bytes=0-1"}, Reply(304)),
    ({"if-match": '"tag"'}, WHOLE),
    ({"if-match": '"other"'}, Reply(412)),
    ({"if-match": '"other"', "if-none-match": '"tag"'}, Reply(412)),
]


@pytest.mark.parametrize(("headers", "reply"), CASES)
def test_a_request_gets_the_part_that_it_asks_for(headers: dict[str, str], reply: Reply) -> None:
    assert reply_to("GET", headers, 10, "tag") == reply


@pytest.mark.parametrize(("headers", "reply"), CASES)
def test_head_knows_conditions_but_no_ranges(headers: dict[str, str], reply: Reply) -> None:
    assert reply_to("HEAD", headers, 10, "tag") == (reply if reply.status in (304, 412) else WHOLE)


@given(st.integers(0, 50), st.text(alphabet="0123456789-,= bytes", max_size=20))
def test_no_range_leaves_the_file(size: int, text: str) -> None:
    reply = reply_to("GET", {"range": f"bytes={text}"}, size, "tag")
    assert reply.status in (206, 416) and 0 <= reply.start <= reply.stop <= size
    assert (reply.status == 206) == (reply.start < reply.stop)
