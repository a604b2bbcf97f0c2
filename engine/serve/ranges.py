"""Conditions and ranges of a request for a file, as in RFC 9110. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANGE = re.compile(r"([0-9]{1,20})-([0-9]{0,20})|-([0-9]{1,20})")
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent of a file: an HTTP status, and bytes `start` to `stop`."""

    status: int
    start: int = 0
    stop: int = 0


def reply_to(method: str, headers: Mapping[str, str], size: int, etag: str) -> Reply:
    """The status and the bytes that a request gets of a file of `size` bytes.

    Several ranges at once are refused, and so is an invalid one: a client that asks for a piece should not get the
    whole file.

    Args:
        headers: by lower-case names.
        etag: without quotes; a strong one.

    >>> reply_to("GET", {"range": "bytes=-3"}, 10, "a"), reply_to("GET", {"if-none-match": '"a"'}, 10, "a")
    (Reply(status=206, start=7, stop=10), Reply(status=304, start=0, stop=0))
    """
    match, none, asked = (headers.get(name) for name in ("if-match", "if-none-match", "range"))
    if match is not None and not _among(etag, match):
        return Reply(412)
    if none is not None and _among(etag, none):
        return Reply(304)
    whole = Reply(200, 0, size)
    if asked is None or method != "GET" or headers.get("if-range", f'"{etag}"') != f'"{etag}"':
        return whole
    unit, _, ranges = asked.partition("=")
    if unit.strip().lower() != "bytes":
        return whole
    found = _RANGE.fullmatch(ranges.strip())
    if found is None:
        return Reply(416)
    first, last, suffix = found.groups()
    start, stop = (max(size - int(suffix), 0), size) if suffix else (int(first), min(int(last or size - 1) + 1, size))
    return Reply(206, start, stop) if start < stop else Reply(416)


def _among(etag: str, header: str) -> bool:
    return header.strip() == "*" or etag in _TAG.findall(header)
