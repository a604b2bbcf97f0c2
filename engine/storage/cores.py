"""How many cores there are to use."""

from __future__ import annotations

import os


def cores() -> int:
    """The cores that this process may use: Slurm, `taskset` and containers may leave it a few of many."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on Linux, or forbidden
        return os.cpu_count() or 1
