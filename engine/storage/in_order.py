"""One object that is uploaded in parts, from begin to end, and is not visible before its upload is completed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.storage.client import library, refused
from engine.storage.objects import MARK, ObjectStore

_LEAST, _MOST = 5 << 20, 8 << 20  # bytes of a part of an upload, about; S3 takes none smaller
_MOST_PARTS = 9_000
_FOR_A_PART = 2 << 20  # bytes read ahead for each part on its way
_MOST_AT_ONCE = 4  # parts of a file on their way: one connection to a store is slow


def buffer_of(window: int) -> int:
    """Bytes that writing one file keeps in memory: parts on their way, one that is filled, and one of another."""
    return (at_once(window) + 2) * about(window)


def about(window: int) -> int:
    """Bytes of a part, about: half of what is read ahead at once, so that a small window takes little here too."""
    return min(max(window // 2, _LEAST), _MOST)


def at_once(window: int) -> int:
    """Parts of a file that are on their way at the same time: fewer with a small window, as memory is short then."""
    return min(max(window // _FOR_A_PART, 1), _MOST_AT_ONCE)


def part_size(size: int, least: int = _MOST) -> int:
    """Bytes of each part, such that next to nothing of a file is left over for the last one.

    What is left over stays in memory until the upload is completed.

    >>> part_size(20_000_003), part_size(1000), part_size(200 << 30) > 8 << 20
    (10000001, 1000, True)
    """
    return max(size // max(min(size // least, _MOST_PARTS), 1), 1)


class InOrder:
    """One object that is uploaded from begin to end. Bytes that come early are kept until it is their turn."""

    def __init__(self, store: ObjectStore, name: str, size: int, work: str, window: int, parts: int) -> None:
        """
        Args:
            work: what is kept with the object.
            window: bytes that are read ahead at once for it.
            parts: that may be on their way; with one, all have arrived when `flush` returns.
        """
        self._place, self._size, self._end = store.place(name), size, 0
        self._early: dict[int, bytes] = {}
        self._closed = False
        self._writer = library().open_writer(
            store.client, name, buffer_size=part_size(size, about(window)), max_concurrency=parts,
            attributes={MARK: work},
        )  # fmt: skip

    def write(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        if offset != self._end:
            self._early[offset] = b"".join(parts)
            return
        for part in parts:
            self._append(part)
        while (early := self._early.pop(self._end, None)) is not None:
            self._append(early)

    def _append(self, data: bytes | memoryview) -> None:
        if len(data):
            own = bytes(data)  # which the writer keeps, and the caller's buffer is used again
            self._said(lambda: self._writer.write(own))
            self._end += len(data)

    def flush(self) -> None:
        """Wait until fewer parts are on their way than may be: none, where it is one. The file is not visible yet."""
        self.check_whole()
        self._said(lambda: self._writer.write(b""))

    def check_whole(self) -> None:
        if self._end != self._size or self._early:
            raise OSError(f"{self._end} of {self._size} bytes were written in order")

    def close(self) -> None:
        self.check_whole()
        self._said(self._writer.close)
        self._closed = True

    def _said(self, ask: Callable[[], object]) -> None:
        """E403 for what the store says to a request to write."""
        try:
            ask()
        except Exception as error:  # obstore's own kinds, and OSError
            raise refused(self._place, str(error), writing=True) from error

    def abort(self) -> None:
        """End the upload, so that nothing of it stays."""
        if not self._closed:
            self._closed = True
            stop = InterruptedError("the upload is ended")
            try:
                self._writer.__exit__(InterruptedError, stop, None)
            except Exception:  # what cannot be ended now, `engine clean` ends
                return
