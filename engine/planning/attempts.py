"""Attempts: one combination of variant choices, matched and solved; exactly one plan may fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from engine.checkpoint.identity import begins
from engine.checkpoint.joined import Joined
from engine.checkpoint.ranks import RankGrid, whole_grid
from engine.errors import EngineError, Lines, shape_text
from engine.formats.headers import FileHeader
from engine.language.expressions import OMIT, evaluate, names_in, valued_in
from engine.language.model import Layout, MappingFile, Variant
from engine.language.names import form
from engine.planning.groups import Group, GroupKey, group_shards, share_units
from engine.planning.matching import Matches, assign
from engine.planning.sizes import Contradiction, Fact, Sizes, solve
from engine.planning.stages import Stages
from engine.planning.stored import End, Instance, Stored
from engine.planning.variants import Decision, because

_MAX_COMBINATIONS = 16
_LARGEST = 1 << 63  # larger than any axis of a model


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training checkpoint before planning: grid, headers and configurations."""

    folder: str
    grid: RankGrid
    files: tuple[FileHeader, ...]  # parallel to grid.files
    config: Mapping[str, Any]
    training: Mapping[str, Any]
    config_name: str
    target_config: Mapping[str, Any] = field(default_factory=dict)  # the target's configuration, if it is given
    end: End = "training"
    renamed: tuple[str, ...] = ()  # names that another program exchanged in all layers, and in which file
    passed_over: tuple[str, ...] = ()  # keys of its own config.json that a given one says otherwise, and the file
    joined: Mapping[str, Joined] = field(default_factory=dict)  # what the places of tensors say of the layout's keys


def whole_checkpoint(
    folder: str, files: tuple[FileHeader, ...], config: Mapping[str, Any], unknown: tuple[str, ...] = ()
) -> Checkpoint:
    """A Hugging Face checkpoint before planning; `unknown` are weights files that are not part of it."""
    grid = replace(whole_grid([file.name for file in files]), unknown=unknown)
    return Checkpoint(folder, grid, files, config, {}, "the training configuration", config, "whole")


@dataclass(frozen=True, slots=True)
class Question:
    """What all attempts share: the files, the rules, and the names for expressions."""

    mapping: MappingFile
    layout: Layout
    checkpoint: Checkpoint
    stored: tuple[Stored, ...]
    matches: Matches
    instances: tuple[Instance, ...]  # the rules' tensors on the side that is read
    stages: Stages
    names: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One combination of variant choices, matched and solved."""

    decisions: Mapping[str, Decision]
    active: tuple[Instance, ...]
    groups: Mapping[GroupKey, Group]
    sizes: Sizes
    unread: Mapping[str, EngineError]


def decide_by_shapes(question: Question, decisions: Mapping[str, Decision]) -> Attempt:
    """Try all combinations of variants that only shapes decide; exactly one plan may fit.

    When none fits, the attempt with the fewest contradictions is returned for its report: of shapes, then of sizes.
    """
    mapping = question.mapping
    open_variants = [v for v in mapping.variants.values() if v.name not in decisions]
    combinations = list(product(*(v.choices for v in open_variants)))
    if len(combinations) > _MAX_COMBINATIONS:
        raise EngineError(
            "E202",
            f"{len(combinations)} combinations of variants are too many to try",
            place=mapping.place,
            fix="Set some of them with --set.",
        )
    told = "the only choice for which all sizes agree across all shards"
    attempts: list[Attempt] = []
    fitting: list[Attempt] = []
    for combination in combinations:
        chosen = zip((variant.name for variant in open_variants), combination, strict=True)
        tried = {**decisions, **{name: Decision(name, choice, "shapes", told) for name, choice in chosen}}
        if fitting and _attempt(_one_layer(question), tried).sizes.contradictions:
            continue  # so do all layers
        attempts.append(_attempt(question, tried))
        fitting += [attempts[-1]] if not attempts[-1].sizes.contradictions else []
    if not fitting:
        every = ((one, one.sizes.contradictions) for one in attempts)
        return min(every, key=lambda one: (sum(each.axis == "shape" for each in one[1]), len(one[1])))[0]
    distinct: dict[frozenset[tuple[object, ...]], Attempt] = {}
    for attempt in fitting if len(fitting) > 1 else ():
        distinct.setdefault(_reach(attempt), attempt)
    if len(distinct) > 1:
        raise _ambiguous(open_variants, list(distinct.values()), mapping)
    return fitting[0]


def _one_layer(question: Question) -> Question:
    """A question about only one of the tensors whose names differ by numbers, on all ranks that hold it."""
    names = {*{form(name): name for name in question.matches.candidates}.values()}
    return replace(question, stored=tuple([one for one in question.stored if one.name in names]))


def _reach(attempt: Attempt) -> frozenset[tuple[object, ...]]:
    """What an attempt would copy and to where: source names, cuts and targets, without rule names."""
    choices = {name: decision.choice for name, decision in attempt.decisions.items()}
    return frozenset(
        (
            group.name,
            group.instance.axes,
            group.cut if len(group.shards) > 1 else None,
            tuple((name.text, axes) for name, axes in group.instance.targets),
            group.instance.rule.under(choices).transform,
        )
        for group in attempt.groups.values()
    )


def _ambiguous(variants: Sequence[Variant], fitting: Sequence[Attempt], mapping: MappingFile) -> EngineError:
    differ = [v for v in variants if len({a.decisions[v.name].choice for a in fitting}) > 1]
    variant = differ[0]
    choices = {name: one.choice for name, one in fitting[0].decisions.items()}
    rules = [r for r in mapping.rules if variant.name in r.when and r.active(choices)]
    axes = {name for rule in rules for name in rule.axes.names()}
    seen: dict[str, str] = {}
    for group in fitting[0].groups.values():
        if group.instance.rule in rules:
            shapes = sorted({stored[0].header.whole for stored in group.shards.values()})
            seen[group.instance.sources[0].text] = ", ".join(shape_text(s) for s in shapes)
    sizes = ", ".join(f"{n} = {f.value}" for n, f in fitting[0].sizes.facts.items() if n in axes)
    return EngineError(
        "E202",
        f"variant `{variant.name}` cannot be decided: {len(fitting)} choices fit every shape",
        place=variant.place,
        got=Lines.of([*(f"{name} is {shape} in every rank" for name, shape in seen.items()), f"with {sizes}"]),
        expected=f"one of {', '.join(variant.choices)}",
        fix=f"{variant.help}. Say which: "
        + " or ".join(f"--set {variant.name}={c}" for c in variant.choices)
        + ". A wrong choice gives a model that loads and talks nonsense, so it is not guessed.",
        answers={variant.name: tuple(variant.choices)},
    )


def _attempt(question: Question, decisions: Mapping[str, Decision]) -> Attempt:
    """Match and solve under one combination of choices."""
    matches, stages, checkpoint = question.matches, question.stages, question.checkpoint
    choices = {n: d.choice for n, d in decisions.items()}
    active = tuple(i for i in question.instances if i.rule.active(choices))
    left = ((n, tuple(c for c in found if c[0].rule.active(choices))) for n, found in matches.candidates.items())
    usable = replace(matches, candidates={name: found for name, found in left if found})
    matched = assign(question.stored, usable, checkpoint.grid, question.layout, stages)
    groups = group_shards(matched, checkpoint.grid.files, question.layout)
    scope = {**question.names, **choices}
    facts, unread = claims(question.mapping, scope, checkpoint.config_name)
    stated = {axis: fact.value for axis, fact in facts.items()}

    def start(one: Stored) -> bytes:
        return begins(checkpoint.files[one.file], one.header)

    even, whole = question.mapping.even, question.layout.whole
    groups = {
        key: share_units(group, stated, even, start, whole=group.instance.stage_class in whole)
        for key, group in groups.items()
    }
    known = facts.get("layer")
    dropped = (axis for i in active for axis in i.rule.drop if axis not in i.rule.zeros)
    for axis in dropped if checkpoint.end == "whole" else ():
        facts.setdefault(axis, Fact(axis, 0, "dropped, and not restored"))
    if stages.layers:
        facts.setdefault("layer", Fact("layer", stages.layers, _counted(stages)))
    sizes = solve(list(groups.values()), facts, checkpoint.grid.files)
    if known is not None and stages.layers and known.value != stages.layers:
        sizes.contradictions.insert(0, _other_layers(stages, known))
    _count_numbers(sizes, active, groups)
    return Attempt(decisions, active, groups, sizes, unread)


def _counted(stages: Stages) -> str:
    over = f" over {len(stages.counts)} pipeline stages" if len(stages.counts) > 1 else ""
    return f"{stages.layers} layers counted{over}"


def _other_layers(stages: Stages, known: Fact) -> Contradiction:
    """Names show another number of layers than is known."""
    several = len(stages.counts) > 1
    per = ", ".join(f"{stages.name(stage)}: {n}" for stage, n in sorted(stages.counts.items()))
    got = f"{_counted(stages)} ({per})" if several else _counted(stages)
    odd, expected = "a stage" if several else "", f"{known.value} from {known.why}"
    return Contradiction("layer", got, expected, known.place, "Layers are counted in names", odd)


def _count_numbers(sizes: Sizes, active: Sequence[Instance], groups: Mapping[GroupKey, Group]) -> None:
    """Count the numbers in names, such as experts: sizes where none is known, else contradictions if there are more."""
    for axis in {p for i in active for p in i.axis_names} - {"layer"}:
        seen = [fixed for g in groups.values() if (fixed := g.fixed.get(axis)) is not None]
        count, why = max(seen, default=-1) + 1, f"{{{axis}}} in tensor names"
        fact = sizes.facts.setdefault(axis, Fact(axis, count, why)) if seen else None
        if fact is not None and fact.value < count:
            got, expected = f"{count} from {why}", f"{fact.value} from {fact.why}"
            told = f"`{axis}` is counted in names"
            sizes.contradictions.append(Contradiction(axis, got, expected, fact.place, told, "a file"))


def claims(
    mapping: MappingFile, scope: dict[str, Any], config_name: str
) -> tuple[dict[str, Fact], dict[str, EngineError]]:
    """Evaluate `dims` in order, adding each to `scope`; those that cannot be evaluated are returned separately."""
    facts: dict[str, Fact] = {}
    unread: dict[str, EngineError] = {}
    for axis, expression in mapping.dims.items():
        try:
            with valued_in(config_name):
                value = evaluate(expression, scope)
        except EngineError as error:
            # the config lacks a key: the tensors may still give the size
            later = [name for name in mapping.dims if name in names_in(expression) and name not in (axis, *scope)]
            if later:
                error.fix = f"Dims are computed in order: move `{later[0]}` up."
            unread[axis] = next((unread[name] for name in names_in(expression) if name in unread), error)
            continue
        if value is OMIT:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise EngineError(
                "E105",
                f"dim `{axis}` is not a whole number",
                place=expression.place,
                got=repr(value),
                expected="an integer",
                fix=f"`{expression.text}` reads {config_name}.",
            )
        empty = value == 0 and any(axis in rule.drop for rule in mapping.rules)  # such as padding
        if not (empty or 1 <= value < _LARGEST):
            known = [facts[name] for name in sorted(names_in(expression)) if name in facts]
            told = [f"{one.axis} = {one.value} from {one.why}" for one in known]
            told += [own] if (own := because([expression], scope, config_name, [*facts])) else []
            raise EngineError(
                "E218",
                f"dim `{axis}` is no size",
                place=expression.place,
                got=f"{str(value)[:40]}: {'; '.join(told)}",
                expected="1 or more",
                fix=f"Correct what `{expression.text}` reads, or the expression.",
            )
        scope[axis] = value
        written = expression.place.line is not None  # in a mapping; else it is of the class that a file tells
        defined = "its definition" if written else f"the model class of {expression.place}"
        why = defined if expression.text.isdigit() else f"`{expression.text}` on {config_name}"
        facts[axis] = Fact(axis, value, why, expression.place)
    return facts, unread
