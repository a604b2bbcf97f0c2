"""The value changes that a rule may name, and what undoes each. Everything else only moves elements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Transform:
    """A value change along one axis of an assembled target.

    Attributes:
        help: what it computes.
        inverse: the transform that undoes it, when there is one.
        lost: what cannot be restored, when there is none.
    """

    help: str
    inverse: str | None
    lost: str


TRANSFORMS: dict[str, Transform] = {
    "normalize": Transform(
        help="each row divided by its length (L2), in float32, as training's norm_head does at run time",
        inverse=None,
        lost="the lengths of the rows",
    ),
}
