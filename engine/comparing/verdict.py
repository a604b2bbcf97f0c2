"""What became of one tensor when two checkpoints were compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from engine.discover.levels import Kind as RelationKind

Kind = Literal[RelationKind, "equal", "cast", "swapped", "copied", "missing", "extra"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one tensor.

    Attributes:
        name: in the output, or in the reference when it is `missing`.
        out_dtype, out_shape, ref_dtype, ref_shape: None on the side that lacks it.
        other: the tensor it equals instead, where it equals one under another name.
        note: in what way, for people.
        rotary: for a permuted tensor, the choice of `rotary` that would have been right; `other`
            where head_dim 4 does not tell the two apart.
        count, largest, first: elements that differ, largest absolute deviation, first index.
    """

    name: str
    kind: Kind
    out_dtype: str | None = None
    out_shape: tuple[int, ...] | None = None
    ref_dtype: str | None = None
    ref_shape: tuple[int, ...] | None = None
    other: str | None = None
    note: str = ""
    rotary: str | None = None
    count: int | None = None
    largest: float | None = None
    first: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        largest = self.largest
        return {
            "name": self.name,
            "verdict": self.kind,
            "out": _side(self.out_dtype, self.out_shape),
            "ref": _side(self.ref_dtype, self.ref_shape),
            "other": self.other,
            "note": self.note,
            "rotary": self.rotary,
            "differing": self.count,
            "largest_deviation": largest if largest is None or math.isfinite(largest) else "infinite",
            "first_difference": None if self.first is None else list(self.first),
        }


def _side(dtype: str | None, shape: tuple[int, ...] | None) -> dict[str, Any] | None:
    return None if dtype is None or shape is None else {"dtype": dtype, "shape": list(shape)}
