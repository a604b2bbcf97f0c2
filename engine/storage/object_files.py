"""Reads objects by position: both ends first, for headers; in ranges fetched ahead, for tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.storage.client import requests
from engine.storage.sources import split
from engine.storage.store import Fetched, Range, Ranges

ENDS = 128 << 10  # bytes at either end of a file, which hold the headers of most files
_LARGEST = 8 << 20  # bytes of a request
_FORWARD = 8 << 20  # bytes read at once of a file that is read from start to end
_LEAST_MORE, _MOST_MORE = 64 << 10, 1 << 20  # bytes that are read ahead if the next reads are not known
Get = Callable[[int, int], memoryview]  # gets some bytes of an object, if its state has not changed


class ObjectBytes:
    """An object whose headers are read: both ends at once, the rest on demand."""

    def __init__(self, get: Get, size: int) -> None:
        self._get, self._size = get, size
        self._end = 0  # where the last bytes that were fetched end
        self._ahead = ENDS
        tail = max(self._size - ENDS, 0)
        wanted = [(0, self._size)] if tail <= ENDS else [(0, ENDS), (tail, self._size)]
        asked = [requests().submit(get, start, end) for start, end in wanted if end > start]
        self._kept = [(start, one.result()) for (start, _), one in zip(wanted, asked, strict=False)]

    def at_hand(self, start: int, end: int) -> bool:
        return any(at <= start and end <= at + len(data) for at, data in self._kept)

    def read(self, at: int, target: memoryview) -> int:
        """As `Positioned` needs it."""
        found = next(((start, data) for start, data in self._kept if start <= at < start + len(data)), None)
        start, data = found or self._fetch(at, len(target))
        some = data[at - start : at - start + len(target)]
        target[: len(some)] = some
        return len(some)

    def _fetch(self, at: int, wanted: int) -> tuple[int, memoryview]:
        self._ahead = min(2 * self._ahead, _FORWARD) if at == self._end else ENDS
        self._end = min(at + max(wanted, self._ahead), self._size)
        found = at, self._get(at, self._end)
        self._kept = [*self._kept[:2], found]
        return found


class ObjectRanges(Ranges):
    """An object read by position; some of its bytes may have been fetched before. Belongs to one thread."""

    def __init__(self, get: Get, size: int) -> None:
        self._get, self._size = get, size
        self._held: list[tuple[int, memoryview]] = []
        self._more = 0  # bytes to read beyond those asked for, while reads are sequential

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        return [(start, requests().submit(self._get, start, end)) for start, end in split(ranges, _LARGEST)]

    def hold(self, fetched: Fetched) -> None:
        self._held = [(start, one.result()) for start, one in fetched]

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        for part in parts:
            self._fill(offset, part)
            offset += len(part)

    def _fill(self, offset: int, part: memoryview) -> None:
        done = 0
        for start, data in self._held:  # in order
            at = offset + done - start
            if 0 <= at < len(data):
                some = data[at : at + len(part) - done]
                part[done : done + len(some)] = some
                done += len(some)
                if done == len(part):
                    return
        if done < len(part):
            begin, end = offset + done, offset + len(part)
            in_order = bool(self._held) and begin == self._held[-1][0] + len(self._held[-1][1])
            self._more = min(max(4 * self._more, _LEAST_MORE), _MOST_MORE) if in_order else 0
            data = self._get(begin, max(end, min(end + self._more, self._size)))
            part[done:] = data[: end - begin]
            self._held = [(begin, data)]

    def close(self) -> None:
        self._held = []
