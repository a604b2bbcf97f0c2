"""Progress of long work, reported to a listener; and the flag that stops its workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

_TOLD_EVERY = 8 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a piece of work.

    Attributes:
        done, total: in `unit`, over all phases.
        phase: what is being done now, in words.
        unit: `bytes`, or anything else that is counted, like `layers`.
        kept: the part of `done` that an interrupted run had done before.
    """

    done: int
    total: int
    phase: str = "writing"
    unit: str = "bytes"
    kept: int = 0


Listener = Callable[[Progress], None]


class Meter:
    """Adds up what workers did, and reports it to the listener now and then. Also the stop flag."""

    def __init__(self, total: int, listener: Listener | None, phase: str = "writing", unit: str = "bytes") -> None:
        self._total, self._listener, self._phase, self._unit = total, listener, phase, unit
        self._done = self._told = self.kept = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def begin(self, phase: str) -> None:
        """Begin a phase."""
        with self._lock:
            self._phase = phase
            self._tell()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            step = _TOLD_EVERY if self._unit == "bytes" else 1
            if self._done - self._told >= step or self._done == self._total:
                self._tell()

    def keep(self, amount: int) -> None:
        """Count work that an interrupted run had done."""
        with self._lock:
            self.kept += amount
        self.advance(amount)

    def finish(self) -> None:
        """Report that everything is done: what is left needed no reading."""
        if self._done < self._total:
            self.advance(self._total - self._done)

    def _tell(self) -> None:
        self._told = self._done
        if self._listener is not None:
            self._listener(Progress(self._done, self._total, self._phase, self._unit, self.kept))
