"""Rules, from YAML data to a frozen `Rule`; and the transforms, the only changes of values that a rule can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError, Errors, Lines
from engine.language.axes import Axes, Product, parse_axes
from engine.language.declared import undeclared
from engine.language.documents import Document
from engine.language.model import Rule, Target, Variant
from engine.language.names import Pattern, pattern


@dataclass(frozen=True, slots=True)
class Transform:
    """A kind of change of values.

    Attributes:
        loses: what cannot be restored; None if the same transform with the negative number undoes it.
        written: the element type that holds its results, if that of its sources does not.
    """

    loses: str | None = None
    written: str | None = None


TRANSFORMS = {
    "normalize": Transform(loses="the lengths of the rows"),  # as norm_head divides each row by its length
    "add": Transform(written="F32"),  # as norms add 1 to what is stored, in float32
}


def said(change: tuple[str, str]) -> str:
    """A change in words.

    >>> said(("normalize", "hidden")), said(("add", "-1"))
    ('normalize along hidden', 'add -1')
    """
    return f"{change[0]} {change[1]}" if TRANSFORMS[change[0]].loses is None else f"{change[0]} along {change[1]}"


def loses(change: tuple[str, str] | None) -> str | None:
    """What a change loses for good; None if it can be undone, or if there is no change."""
    return None if change is None else TRANSFORMS[change[0]].loses


def undone(change: tuple[str, str]) -> tuple[str, str] | None:
    """The change that undoes a change; None if there is none."""
    return (change[0], f"{-float(change[1]):g}") if TRANSFORMS[change[0]].loses is None else None


STORED = ("rows", "columns")  # storage dimensions that `split` may name instead of an axis


def read_rule(name: str, rule: Document, variants: Mapping[str, Variant]) -> Rule:
    """A rule; E102, E103, E104 or E108 for a mistake in it."""
    body: dict[str, Any] = rule.data
    errors = Errors()
    axes = Axes(())
    patterns: list[Pattern] = []
    targets: tuple[Target, ...] = ()
    split = _texts(body.get("split", []))
    stage = body.get("stage")
    sources, pieces = _texts(body["source"]), _texts(body.get("pieces", []))
    when: dict[str, tuple[str, ...]] = {}
    transform: tuple[str, str] | None = None
    changed: dict[str, tuple[str, ...]] = {}
    with errors.caught():
        axes = parse_axes(body["axes"], rule.value_place("axes"))
        for axis in (one for one in split if one not in (*axes.names(), *STORED)):
            told = f"rule `{name}` is split on `{axis}`, which is not among its axes"
            raise undeclared(told, axis, axes.names(), rule.value_place("split"))
    with errors.caught():
        patterns = _sources(rule, sources, pieces)
        _check_pieces(rule, pieces, split, axes)
        _check_stage(rule, name, (*patterns[0].placeholders, *axes.names()), stage)
    with errors.caught():
        targets = _targets(rule, body, axes)
        _check_numbers(targets)
        transform = _transform(rule, body.get("transform"), targets)
    with errors.caught():
        when = _when(rule, ("when",), variants)
        changed = _when(rule, ("transform", "when"), variants)
    with errors.caught():
        _check_param(name, sources, patterns, targets)
    errors.check()
    return Rule(
        name=name,
        sources=sources,
        axes=axes,
        targets=targets,
        place=rule.place(),
        split=split,
        stage=stage,
        when=when,
        optional=body.get("optional", False),
        transform=transform,
        transform_when=changed,
        keep_dtype=body.get("keep") == "dtype",
        drop=dict(body.get("drop") or {}),
        zeros=_texts(body.get("zeros", [])),
        tied_to=body.get("tied_to"),
        pieces=pieces,
        notice=body.get("notice"),
    )


def _check_param(name: str, sources: Sequence[str], patterns: Sequence[Pattern], targets: Sequence[Target]) -> None:
    for target in targets if patterns else ():
        if pattern(target.name, target.place).has_param != patterns[0].has_param:
            raise EngineError(
                "E104",
                f"rule `{name}` has {{param}} on one side only",
                place=target.place,
                got=Lines.of([sources[0], target.name]),
                expected="{param} on both sides, or on neither",
                fix="Write weight or bias out, or use {param} in every name of the rule.",
            )


def _check_pieces(rule: Document, pieces: Sequence[str], split: Sequence[str], axes: Axes) -> None:
    """E102 unless each piece has the rows of one term of a sum, and the ranks' rows follow each other."""
    rows = axes.dims[0] if axes.dims else None
    outer = str(rows.terms[0] if isinstance(rows, Product) else rows)  # no axis if it is a sum
    count = len(Axes(axes.dims[:1]).pieces())
    names = {*pieces} - {*_texts(rule.data["source"])}
    if pieces and rows and not (len(pieces) == len(names) == count and next(iter(split), None) in (outer, "rows")):
        raise EngineError(
            "E102",
            "`pieces` do not fit the rule's rows, which ranks cut one after the other, each in pieces of its own",
            place=rule.place("pieces"),
            got=f"{len(names)} names, split: {', '.join(split) or 'nothing'}",
            expected=f"{count} other than `source`, one for each term of `{rows}`, "
            f"split: {outer if outer in axes.names() else 'rows'}",
            fix="Correct `pieces`, `split` or `axes`.",
        )


def _check_stage(rule: Document, name: str, axes: Sequence[str], stage: Any) -> None:
    if ("layer" in axes) == (stage is not None):
        layered = stage is not None
        raise EngineError(
            "E102",
            f"rule `{name}` {'must not' if layered else 'must'} say its `stage`",
            place=rule.place("stage") if layered else rule.place(),
            got=", ".join(axes),
            expected="layers, by name or as an axis, or `stage`, not both"
            if layered
            else "stage: first, or stage: last",
            fix="`stage` is for a tensor outside the layers, and says which pipeline stage holds it.",
        )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def _sources(rule: Document, sources: tuple[str, ...], pieces: tuple[str, ...]) -> list[Pattern]:
    """Historical names stand for one tensor, as its pieces do, so they have the same placeholders."""
    places = [("source", i) for i, _ in enumerate(sources)] + [("pieces", i) for i, _ in enumerate(pieces)]
    texts = (*sources, *pieces)
    found = [pattern(text, rule.value_place(*at)) for text, at in zip(texts, places, strict=True)]
    for other, at in zip(found, places, strict=True):
        if {*other.placeholders, other.has_param} != {*found[0].placeholders, found[0].has_param}:
            raise EngineError(
                "E104",
                "historical names, or pieces, of one tensor have different placeholders",
                place=rule.value_place(*at),
                got=other.text,
                expected=f"the placeholders of {found[0].text}",
                fix="Write a rule of its own for it.",
            )
    return found


def _targets(rule: Document, body: dict[str, Any], axes: Axes) -> tuple[Target, ...]:
    """`target` is short for one target with the source's axes."""
    if "target" in body:
        return (Target(body["target"], axes, rule.value_place("target")),)
    targets: list[Target] = []
    for index, entry in enumerate(body["targets"]):
        read = parse_axes(entry["axes"], rule.value_place("targets", index, "axes"))
        targets.append(Target(entry["name"], read, rule.value_place("targets", index, "name")))
    return tuple(targets)


def _check_numbers(targets: Sequence[Target]) -> None:
    """E104 for a number in a target's name that is also one of its axes: a target is written whole."""
    for target in targets:
        for axis in pattern(target.name, target.place).placeholders:
            if axis in target.axes.names():
                raise EngineError(
                    "E104",
                    f"`{axis}` is in the name of a target and among its axes",
                    place=target.place,
                    got=f"{target.name}, with axes {target.axes}",
                    expected="one of both: only a source can be in slices whose numbers are in names",
                    fix=f"Leave `{axis}` out of the target's axes for a tensor of each, or out of its name for one.",
                )


def _when(rule: Document, at: tuple[str, ...], variants: Mapping[str, Variant]) -> dict[str, tuple[str, ...]]:
    """Choices as tuples; E108 for a variant or a choice that is not declared."""
    said: Any = rule.data
    for key in at:
        said = said.get(key) or {}
    result = {variant: _texts(choices) for variant, choices in said.items()}
    for variant, choices in result.items():
        if variant not in variants:
            place = rule.place(*at, variant)
            raise undeclared(f"there is no variant `{variant}`", variant, variants, place)
        known = variants[variant].choices
        for choice in choices:
            if choice not in known:
                place = rule.value_place(*at, variant)
                raise undeclared(f"variant `{variant}` has no choice `{choice}`", choice, known, place)
    return result


def _transform(rule: Document, said: Mapping[str, Any] | None, targets: tuple[Target, ...]) -> tuple[str, str] | None:
    """The change of values: an operation, and the axis or the number that it takes."""
    operation = next((one for one in TRANSFORMS if one in (said or {})), None)
    if said is None or operation is None:
        return None
    value = said[operation]
    if not isinstance(value, str):
        return operation, f"{value:g}"
    for target in targets:
        if value not in target.axes.names():
            at = rule.value_place("transform", operation)
            raise undeclared(
                f"`{target.name}` has no axis `{value}` to {operation} along", value, target.axes.names(), at
            )
    return operation, value
