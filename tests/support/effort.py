"""What a conversion must read beside every byte once, counted from its plan."""

from __future__ import annotations

from typing import Any

_ENDS = 8192  # bytes of each rank's slice, at its two ends, which are compared with those of the other ranks


def beginnings(plan: Any) -> int:
    """Bytes that are read to see that no two ranks hold the same slice."""
    held = [plan.sources[number].header.nbytes for slices in plan.slices for number in slices.sources]
    return sum(min(nbytes, _ENDS) for nbytes in held)
