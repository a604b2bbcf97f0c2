"""What workers have moved so far, told to a listener; and the flag that stops them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes moved so far and in all: replicas compared plus tensors written."""

    done_bytes: int
    total_bytes: int


class Meter:
    """Adds up what workers did; tells the listener at most once every 8 MiB. Also the stop flag."""

    def __init__(self, total: int, listener: Callable[[Progress], None] | None) -> None:
        self._total, self._listener = total, listener
        self._done = self._told = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._listener is not None and (self._done - self._told >= 8 << 20 or self._done == self._total):
                self._told = self._done
                self._listener(Progress(self._done, self._total))

    def finish(self) -> None:
        """Everything is done: what is left needed no reading."""
        if self._done < self._total:
            self.advance(self._total - self._done)
