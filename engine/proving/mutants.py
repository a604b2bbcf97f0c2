"""Mutants: each rule of a mapping perturbed, and what would have caught it.

A mapping alone cannot tell gate from up: exchanged, the rules are as total, as invertible and of the
same shapes as before. Only facts that travel with the mapping can: those committed beside it, or, where
there are none, what its rules did before the change. A mutant that nothing else catches is reported so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from engine.errors import EngineError, EngineErrors
from engine.language.axes import Axes, Axis, Node, Product, Sum
from engine.language.model import Layout, Rule, Target
from engine.language.model import Mapping as MappingFile
from engine.language.names import pattern
from engine.proving.facts import committed
from engine.proving.facts import differences as facts_differ
from engine.proving.lint import lint
from engine.proving.meta_model import misfits
from engine.proving.proof import Mutant
from engine.proving.roundtrip import Trip, convert, differences, plan_back

LINT, PLANNING, MODEL = "lint", "planning", "the model's names and shapes"
FACTS, COMMITTED = "the committed facts", "the committed rules"

Change = tuple[Rule, str, dict[str, Rule]]  # the rule, what is done to it, and what takes whose place


def mutants_of(mapping: MappingFile) -> Iterator[Change]:
    """Every perturbation of every rule that changes anything: moving an axis of size 1 does not."""
    ones = frozenset(name for name, e in mapping.dims.items() if e.text.strip() == "1")
    for rule in mapping.rules:
        for what, changed in _changes(rule, ones):
            yield rule, what, {rule.name: changed}
    yield from _exchanges(mapping)


def _exchanges(mapping: MappingFile) -> Iterator[Change]:
    """Two targets of the same axes exchanged wherever they are written: gate and up, two norms."""
    written: dict[str, tuple[Rule, Target]] = {}
    for rule in mapping.rules:
        for target in rule.targets:
            written.setdefault(target.name, (rule, target))
    for (one, (rule, first)), (two, (other, second)) in combinations(written.items(), 2):
        alike = first.axes.dims == second.axes.dims and _placeholders(one) == _placeholders(two)
        if other is rule or not alike:
            continue
        renamed = {one: two, two: one}
        changed = {
            r.name: replace(r, targets=tuple(replace(t, name=renamed.get(t.name, t.name)) for t in r.targets))
            for r in mapping.rules
            if any(t.name in renamed for t in r.targets)
        }
        yield rule, f"`{_last(first)}` and `{_last(second)}` exchanged", changed


def _placeholders(name: str) -> frozenset[str]:
    return frozenset(pattern(name).placeholders)


def _changes(rule: Rule, ones: frozenset[str]) -> Iterator[tuple[str, Rule]]:
    for axis in rule.axes.names():
        if (axis,) != rule.split:
            yield f"split on `{axis}`", replace(rule, split=(axis,))
    if rule.split:
        yield "not split", replace(rule, split=())
    for axes in reordered(rule.axes, ones):
        yield f"source as `{axes}`", replace(rule, axes=axes)
    for number, target in enumerate(rule.targets):
        for axes in [*reordered(target.axes, ones), *turned(target.axes)]:
            changed = replace(target, axes=axes)
            yield f"`{_last(target)}` as `{axes}`", replace(rule, targets=_put(rule.targets, {number: changed}))
        for other in range(number + 1, len(rule.targets)):
            one, two = target, rule.targets[other]
            swapped = {number: replace(one, name=two.name), other: replace(two, name=one.name)}
            yield (
                f"`{_last(one)}` and `{_last(two)}` exchanged",
                replace(rule, targets=_put(rule.targets, swapped)),
            )


def _last(target: Target) -> str:
    """The part of a name that says most: `q_proj`."""
    parts = [part for part in target.name.split(".") if part not in ("weight", "{param}")]
    return parts[-1] if parts else target.name


def _put(targets: Sequence[Target], changed: Mapping[int, Target]) -> tuple[Target, ...]:
    return tuple(changed.get(i, target) for i, target in enumerate(targets))


def reordered(axes: Axes, ones: frozenset[str] = frozenset()) -> Iterator[Axes]:
    """Two neighbours of a sum or of a product exchanged: another order of q, k and v, a permutation lost.

    >>> from engine.language.axes import parse_axes
    >>> [str(axes) for axes in reordered(parse_axes("(heads (q + k)) | hidden"))]
    ['((q + k) heads) | hidden', '(heads (k + q)) | hidden']
    """
    for position, dim in enumerate(axes.dims):
        for node in _exchanged(dim, ones):
            yield Axes((*axes.dims[:position], node, *axes.dims[position + 1 :]), axes.bar)


def _exchanged(node: Node, ones: frozenset[str]) -> Iterator[Node]:
    if isinstance(node, Axis):
        return
    kind: type[Product] | type[Sum] = type(node)
    terms = node.terms
    for i in range(len(terms) - 1):
        if kind is Product and any(isinstance(t, Axis) and t.name in ones for t in terms[i : i + 2]):
            continue
        yield kind((*terms[:i], terms[i + 1], terms[i], *terms[i + 2 :]))
    for i, term in enumerate(terms):
        for changed in _exchanged(term, ones):
            yield kind((*terms[:i], changed, *terms[i + 1 :]))


def turned(axes: Axes) -> Iterator[Axes]:
    """The last two storage dimensions exchanged."""
    if len(axes.dims) >= 2:
        yield Axes((*axes.dims[:-2], axes.dims[-1], axes.dims[-2]), axes.bar)


def try_mutants(
    mapping: MappingFile,
    layout: Layout,
    trips: Sequence[Trip],
    model: Mapping[str, Any] | None,
    folder: Path,
) -> list[Mutant]:
    """Every mutant against rank files that the committed rules wrote.

    Args:
        trips: what the round trip left on disk.
        model: names and shapes of transformers' model for `trips`' sizes, by the trip's label; None: not known.
    """
    found: list[Mutant] = []
    known = committed(mapping)
    if known is not None and facts_differ(mapping, known[1]):
        known = None  # they are not of this mapping
    before = {(f.code, f.message) for f in lint(mapping)}
    for number, (rule, what, changed) in enumerate(mutants_of(mapping)):
        mutant = replace(mapping, rules=tuple(changed.get(one.name, one) for one in mapping.rules))
        caught, told = _caught(mutant, layout, _seeing(trips, changed), model, before, folder / str(number))
        if caught in (COMMITTED, None) and known is not None:
            failures = facts_differ(mutant, known[1])
            caught, told = (FACTS, failures[0].message) if failures else (caught, told)
        found.append(Mutant(rule.name, what, caught, told))
    return found


def _seeing(trips: Sequence[Trip], changed: Mapping[str, Rule]) -> list[Trip]:
    """Trips in which a changed rule is active, one per layout and choice that it names; others say nothing."""
    found: dict[object, Trip] = {}
    for trip in trips:
        choices = trip.world.choices
        active = [r for r in changed.values() if all(choices[n] in allowed for n, allowed in r.when.items())]
        if active:
            seen = (trip.case.label, tuple(choices[n] for r in active for n in r.when))
            found.setdefault(seen, trip)
    return sorted(found.values(), key=lambda trip: -len(trip.checkpoint.files))


def _caught(
    mutant: MappingFile,
    layout: Layout,
    trips: Sequence[Trip],
    model: Mapping[str, Any] | None,
    before: set[tuple[str, str]],
    folder: Path,
) -> tuple[str | None, str]:
    """The first thing that shows a mutant, weakest evidence first, and its words."""
    try:
        for finding in lint(mutant):
            if finding.severity == "error" and (finding.code, finding.message) not in before:
                return LINT, f"{finding.code} {finding.message}"
    except (EngineError, EngineErrors) as error:
        return LINT, str(error).splitlines()[0]
    differ: str | None = None
    for number, trip in enumerate(trips):
        try:
            plan, _ = plan_back(mutant, layout, trip)
        except EngineError as error:
            return PLANNING, f"{error.code} {error.message}"
        shapes = {output.name: output.shape for output in plan.outputs}
        wanted = (model or {}).get(trip.world.label)
        if wanted is not None:
            told = misfits(shapes, wanted, trip.world.pieces)
            if told:
                return MODEL, told[0].message
        if differ is None:
            try:
                got = convert(plan, folder / str(number))
            except EngineError as error:
                return PLANNING, f"{error.code} {error.message}"
            differ = next((one.message for one in differences(trip.world, plan, got, trip.where)), None)
    return (COMMITTED, differ) if differ is not None else (None, "")
