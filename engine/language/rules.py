"""One rule: from checked YAML data to a frozen `Rule`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import EngineError, Errors
from engine.language.axes import Axes, parse_axes
from engine.language.declared import undeclared
from engine.language.documents import Document
from engine.language.model import Rule, Target, Variant
from engine.language.names import Pattern, pattern

STORED = ("rows", "columns")  # storage dimensions that `split` may name in an axis' stead


def read_rule(name: str, rule: Document, variants: Mapping[str, Variant]) -> Rule:
    """A rule; E103, E104 and E108 for what it says wrongly."""
    body: dict[str, Any] = rule.data
    errors = Errors()
    axes = Axes(())
    patterns: list[Pattern] = []
    targets: tuple[Target, ...] = ()
    split = _texts(body.get("split", []))
    stage = body.get("stage")
    sources = _texts(body["source"])
    when: dict[str, tuple[str, ...]] = {}
    transform: tuple[str, str] | None = None
    with errors.caught():
        axes = parse_axes(body["axes"], rule.value_place("axes"))
        _check_split(rule, name, split, axes)
    with errors.caught():
        patterns = _sources(rule, sources)
        _check_stage(rule, name, (*patterns[0].placeholders, *axes.names()), stage)
    with errors.caught():
        targets = _targets(rule, body, axes)
        transform = _transform(rule, body.get("transform"), targets)
    with errors.caught():
        when = _when(rule, body.get("when") or {}, variants)
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
        keep_dtype=body.get("keep") == "dtype",
        drop=dict(body.get("drop") or {}),
        zeros=_texts(body.get("zeros", [])),
        tied_to=body.get("tied_to"),
    )


def _check_param(name: str, sources: Sequence[str], patterns: Sequence[Pattern], targets: Sequence[Target]) -> None:
    for target in targets if patterns else ():
        if pattern(target.name, target.place).has_param != patterns[0].has_param:
            raise EngineError(
                "E104",
                f"rule `{name}` has {{param}} on one side only",
                place=target.place,
                got=f"{sources[0]}\n{target.name}",
                expected="{param} on both sides, or on neither",
                fix="Write weight or bias out, or use {param} in every name of the rule.",
            )


def _check_split(rule: Document, name: str, split: Sequence[str], axes: Axes) -> None:
    for axis in split:
        if axis not in (*axes.names(), *STORED):
            at = rule.value_place("split")
            raise undeclared(f"rule `{name}` is split on `{axis}`, which is not among its axes", axis, axes.names(), at)


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


def _sources(rule: Document, sources: tuple[str, ...]) -> list[Pattern]:
    """Historical names stand for one tensor, so they have the same placeholders."""
    found = [pattern(text, rule.value_place("source", i)) for i, text in enumerate(sources)]
    for index, other in enumerate(found):
        if {*other.placeholders, other.has_param} != {*found[0].placeholders, found[0].has_param}:
            raise EngineError(
                "E104",
                "historical names of one tensor have different placeholders",
                place=rule.value_place("source", index),
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


def _when(rule: Document, when: dict[str, Any], variants: Mapping[str, Variant]) -> dict[str, tuple[str, ...]]:
    """Choices as tuples; each variant and choice is declared."""
    result = {variant: _texts(choices) for variant, choices in when.items()}
    for variant, choices in result.items():
        if variant not in variants:
            at = rule.place("when", variant)
            raise undeclared(f"there is no variant `{variant}`", variant, variants, at)
        known = variants[variant].choices
        for choice in choices:
            if choice not in known:
                at = rule.value_place("when", variant)
                raise undeclared(f"variant `{variant}` has no choice `{choice}`", choice, known, at)
    return result


def _transform(rule: Document, transform: dict[str, str] | None, targets: tuple[Target, ...]) -> tuple[str, str] | None:
    if not transform:
        return None
    ((operation, axis),) = transform.items()
    for target in targets:
        if axis not in target.axes.names():
            at = rule.value_place("transform", operation)
            raise undeclared(
                f"`{target.name}` has no axis `{axis}` to {operation} along", axis, target.axes.names(), at
            )
    return operation, axis
