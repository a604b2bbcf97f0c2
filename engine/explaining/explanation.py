"""What an explanation holds, JSON-ready."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.planning.boxes import Interval


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor on either side, or the part of it that is explained."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    slice: str  # `[0:128, :]`
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements that lie in one box: their indices on either side, and the same by named axes.

    Attributes:
        source, target: indices as slices, one per dimension.
        axes: the range of every axis in the whole model.
        order: for dimensions that are rearranged, which positions come from which.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    axes: dict[str, Interval]
    order: tuple[str, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class Flow:
    """What goes from one stored source tensor to one output.

    Attributes:
        byte_ranges: the first absolute byte ranges in the source's file, the end not included.
        range_count: how many there are.
        replicas: other files that hold the same elements; a run compares them.
    """

    source: Tensor
    target: Tensor
    place: str  # where the shard lies: `tp1`
    stretches: tuple[Stretch, ...]
    stretch_count: int
    elements: int
    byte_ranges: tuple[Interval, ...]
    range_count: int
    replicas: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explained:
    """One tensor explained: the rule, its axes in words, and where its elements come from or go to."""

    asked: Tensor
    rule: str | None
    rule_place: str | None
    words: tuple[str, ...]
    flows: tuple[Flow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer to `engine explain`.

    Attributes:
        direction: `forward`, from an output back to its sources, or `backward`.
    """

    direction: str
    tensors: tuple[Explained, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
