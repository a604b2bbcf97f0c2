"""Sharing out: which worker moves which unit of which job, decided while they work."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence

from engine.run.schedule import Job, Unit


class Shares:
    """Units handed out to workers, each of which fills a job of its own in order while there is one.

    With none left a worker takes the largest unit of the job with most bytes left: several write to
    one file then, which costs them some waiting, but nobody is idle and all end together.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._left = [OrderedDict(enumerate(job.units)) for job in jobs]
        self._bytes = [job.nbytes for job in jobs]
        self._unfinished = [len(job.units) for job in jobs]
        self._new = deque(range(len(jobs)))
        self._lock = threading.Lock()

    def take(self, own: int | None) -> tuple[int, Unit] | None:
        """A job and one of its units; None when nothing is left.

        Args:
            own: the job that the worker took first, if any.
        """
        with self._lock:
            if own is not None and self._left[own]:
                return self._give(own, next(iter(self._left[own])))
            while self._new:
                job = self._new.popleft()
                if self._left[job]:
                    return self._give(job, next(iter(self._left[job])))
            job = max(range(len(self._jobs)), key=self._bytes.__getitem__, default=0)
            if not any(self._left):
                return None
            if not self._left[job]:  # only units without bytes are left
                job = next(i for i, left in enumerate(self._left) if left)
            return self._give(job, max(self._left[job], key=self._jobs[job].sizes.__getitem__))

    def _give(self, job: int, unit: int) -> tuple[int, Unit]:
        self._bytes[job] -= self._jobs[job].sizes[unit]
        return job, self._left[job].pop(unit)

    def files(self, job: int) -> tuple[int, ...]:
        """The files that a job fills."""
        return self._jobs[job].files

    def finish(self, job: int) -> bool:
        """Count a unit of a job as done; True for its last."""
        with self._lock:
            self._unfinished[job] -= 1
            return self._unfinished[job] == 0
