"""Copies between two sides, made once per class of tensors and shared.

Layers differ in the files that hold their tensors, not in geometry. Tensors whose shards have the
same shapes, strides and cuts on both sides form a class, and share one template of copies.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import NamedTuple

from engine.errors import EngineError, Lines, Place, shape_text
from engine.formats.headers import FLOATS
from engine.language.documents import grouped
from engine.planning.boxes import Copy, Holding, intersect
from engine.planning.groups import Group, GroupKey
from engine.planning.sides import Side
from engine.planning.stored import Stored


class Template(NamedTuple):
    """The copies that fill one shard; their sources are indices into `used`, which the caller defines."""

    copies: tuple[Copy, ...]
    used: tuple[int, ...]


_Filled = tuple[list[Template], "array[int]", str | None]  # templates of a group's shards, their sources, type


def template_of(copies: Sequence[Copy]) -> Template:
    """Copies whose sources are numbered in the order of use."""
    order = {source: number for number, source in enumerate(dict.fromkeys(c.source for c in copies))}
    return Template(tuple(c._replace(source=order[c.source], target=0) for c in copies), tuple(order))


@dataclass(frozen=True, slots=True)
class CopyTable:
    """`Plan.copies`: a class's template, filled in with the tensor numbers of one output.

    Attributes:
        outputs: for each output, its group on the target side and the position of its shard.
        target, source: the two sides; tensors of the source side are numbered as in the plan.
    """

    outputs: tuple[tuple[Group, int], ...]
    target: Side
    source: Side
    _templates: dict[tuple[object, ...], list[Template]] = field(default_factory=dict, compare=False, repr=False)
    # cached by group: in rank files the shards of a group are far apart
    _filled: dict[GroupKey, _Filled] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, output: int) -> list[Copy]:
        template, sources = self.filled(output)
        return [Copy(sources[one.source], output, *one[2:]) for one in template.copies]

    def subset(self, kept: Sequence[int]) -> CopyTable:
        """The copies of some outputs, renumbered; templates are shared."""
        return CopyTable(tuple(self.outputs[i] for i in kept), self.target, self.source, self._templates, self._filled)

    @property
    def classes(self) -> int:
        """The number of templates made so far."""
        return len(self._templates)

    def dtype(self, output: int, name: str, files: Sequence[str], place: Place | None) -> str:
        """The element type of everything that is copied into an output; E210 when there are several."""
        _, numbers, every = self._group(output)
        own = self.outputs[output][0].instance.rule.dtype
        allowed = FLOATS if own is None else (own,)
        if every is not None and every in allowed:
            return every
        held: dict[str, Stored] = {}
        for number in sorted(self.filled(output)[1]) or numbers[:1]:
            held.setdefault(self.source.stored[number].header.dtype, self.source.stored[number])
        if len(held) > 1:
            raise EngineError(
                "E210",
                f"element types differ inside `{name}`",
                place=place,
                got=Lines.of(f"{dtype} in {files[s.file]}:{s.header.name}" for dtype, s in held.items()),
                expected="one type",
                fix="The files are from different runs, or one was cast by hand.",
            )
        ((dtype, first),) = held.items()
        if dtype not in allowed:
            raise EngineError(
                "E209",
                f"`{name}` {'holds no floating-point weights' if own is None else 'holds whole numbers, not weights'}",
                place=place,
                got=f"{dtype} in {files[first.file]}",
                expected=", ".join(allowed),
                fix="Quantised weights are useless without their scales, which no rule reads. Save the model "
                "dequantised, with the library that quantised it."
                if own is None
                else "Save it in the type that the model class has, as before it was cast.",
            )
        return dtype

    def filled(self, output: int) -> tuple[Template, list[int]]:
        """The template of an output, and the tensor numbers of its sources."""
        templates, numbers, _ = self._group(output)
        template = templates[self.outputs[output][1]]
        return template, [numbers[one] for one in template.used]

    def _group(self, output: int) -> _Filled:
        """The cached templates of an output's group, which are those of its class."""
        group, _ = self.outputs[output]
        found = self._filled.get(group.key)
        if found is None:
            reaching = self.source.reaching(group, self.target)
            key = _class_of(group, reaching)
            templates = self._templates.get(key)
            if templates is None:
                templates = self._templates[key] = self._make(group, reaching)
            numbers = array("q", [n[0] for one in reaching for n in self.source.numbers(one)])
            dtypes = {self.source.stored[number].header.dtype for number in numbers}
            found = self._filled[group.key] = templates, numbers, dtypes.pop() if len(dtypes) == 1 else None
        return found

    def _make(self, group: Group, reaching: Sequence[Group]) -> list[Template]:
        """Intersect every region of the group with every region of the groups that overlap it."""
        shards = chain.from_iterable(map(self.source.place, reaching))
        sources = grouped((key, Holding(number, region)) for number, held in enumerate(shards) for key, region in held)
        made: list[Template] = []
        for (ranks, replicas), held in zip(group.shards.items(), self.target.place(group), strict=True):
            copies = [
                copy
                for key, region in held
                for one in sources.get(key, ())
                if (copy := intersect(one, Holding(0, region))) is not None
            ]
            copies.sort(key=lambda c: (c.target_offset, c.source, c.source_offset))
            prove_total(copies, replicas[0].header.shape, group, ranks)
            made.append(template_of(copies))
        return made


def prove_total(copies: Sequence[Copy], shape: tuple[int, ...], group: Group, ranks: tuple[int, ...] = ()) -> None:
    """E208 unless every element is written exactly once: source boxes are disjoint, so a full count proves it."""
    count = sum(copy.volume() for copy in copies)
    wanted = prod(shape)
    if count != wanted:
        where = "".join(f" {d}{r}" for d, r in zip(group.cut.rank_dims(), ranks, strict=False))
        raise EngineError(
            "E208",
            f"shards of `{group.name}`{where} overlap or leave a gap",
            place=group.instance.rule.place,
            got=f"{count} elements",
            expected=f"{wanted} elements, {shape_text(shape)}",
            fix="A file is missing or from another run; compare the sizes of the rank files.",
        )


def _class_of(group: Group, reaching: Sequence[Group]) -> tuple[object, ...]:
    """Everything that the copies of a group depend on; values that names fix on both sides cancel out."""
    shared = set(group.fixed)
    for one in reaching:
        shared &= set(one.fixed)
    return tuple(
        (
            one.instance.key,
            one.cut,
            tuple((r, h.shape, h.strides, h.dtype, h.recorded) for r, s in one.shards.items() for h in (s[0].header,)),
            tuple((a, v) for a, v in one.fixed.items() if a not in shared),
        )
        for one in (group, *reaching)
    )
