"""The user's question, `NAME[0:128, :]` or `FILE:NAME[17, 3]`, and the explanation as JSON-ready data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from engine.errors import EngineError, Lines, counted
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
    """Elements of one box: their indices on either side, and their ranges along named axes.

    Attributes:
        source, target: indices as slices, one per dimension.
        axes: the range of every axis in the whole model.
        order: for rearranged dimensions, which positions come from which.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    axes: dict[str, Interval]
    order: tuple[str, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class Flow:
    """The elements that go from one stored source tensor to one output.

    Attributes:
        byte_ranges: the first absolute byte ranges in the source's file, the end not included.
        range_count: their total number.
        replicas: other files that hold the same elements; a run compares them.
    """

    source: Tensor
    target: Tensor
    place: str  # the shard's rank: `tp1`
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


_FIX = "Write one slice per dimension, like `[0:128, :]` or `[17, 3]`."


@dataclass(frozen=True, slots=True)
class Selection:
    """A tensor and the text of its slices; `file` is None when any file is meant."""

    name: str
    slices: tuple[str, ...] = ()
    file: str | None = None

    def window(self, shape: Sequence[int]) -> tuple[Interval, ...]:
        """The interval of positions along each dimension; E001 for an invalid slice."""
        if len(self.slices) > len(shape):
            raise _error(self.name, f"it has {counted(len(shape), 'dimension')}", ", ".join(self.slices))
        given = [_interval(self.name, text, size) for text, size in zip(self.slices, shape, strict=False)]
        return (*given, *((0, size) for size in shape[len(given) :]))


def parse_selection(text: str, *, file: bool = False) -> Selection:
    """Read what the user asks about; with `file`, a file name and a colon may precede the tensor.

    >>> parse_selection("model.norm.weight[0:4]")
    Selection(name='model.norm.weight', slices=('0:4',), file=None)
    >>> parse_selection("model_tp1_pp0.pt:norm.weight", file=True)
    Selection(name='norm.weight', slices=(), file='model_tp1_pp0.pt')
    """
    whole = re.fullmatch(r"([^\[\]]+?)\s*(?:\[([^\[\]]*)\])?", text.strip())
    if whole is None:
        raise EngineError("E001", "a tensor and its slices cannot be read", got=text, fix=_FIX)
    name, inside = whole.groups()
    before, colon, after = name.partition(":")
    holder = before if file and colon else None
    slices = tuple(part.strip() for part in inside.split(",")) if inside is not None and inside.strip() else ()
    if slices and not slices[-1]:  # numpy allows `[3,]`
        slices = slices[:-1]
    return Selection(after if holder is not None else name, slices, holder)


def _interval(name: str, text: str, size: int) -> Interval:
    found = re.fullmatch(r"(-?[0-9]{0,18})\s*(?:(:)\s*(-?[0-9]{0,18})\s*(?:(:)\s*(-?[0-9]{0,18}))?)?", text)
    if found is None or not text or text == "-":
        raise _error(name, "it is neither an index nor a slice", text)
    first, colon, last, second_colon, step = found.groups()
    if any(part and part.startswith("-") for part in (first, last, step)):
        raise _error(name, "negative positions and steps are not supported here", text)
    if second_colon and step not in ("", "1", None):
        raise _error(name, "a step is not supported here", text)
    low = int(first or 0)
    high = (int(last) if last else size) if colon else low + 1
    if high > size:
        raise _error(name, f"the dimension has {size} positions, 0…{size - 1}", text)
    if low >= high:
        raise _error(name, "nothing is selected", text)
    return low, high


def _error(name: str, why: str, text: str) -> EngineError:
    return EngineError("E001", f"a slice of `{name}` cannot be used: {why}", got=text, fix=_FIX)


def unknown_name(name: str, kind: str, known: Iterable[str], *, otherwise: str | None = None) -> EngineError:
    """E001 for an unknown name, with a similar name, else with the fix `otherwise`."""
    near = get_close_matches(name, list(dict.fromkeys(known)), 3)
    suggested = f"Did you mean `{near[0]}`?" if near else "`engine plan` lists the names."
    return EngineError(
        "E001", f"there is no {kind} `{name}`", expected=Lines.of(near) or None, fix=otherwise or suggested
    )
